// CUTLASS kernels for Hopper with the fused graph's outputs (swin/cuda_gemm.h): mainloop and shapes of
// gemm_cutlass_wgmma.cuh, and behind it a visitor tree on the accumulators in registers.
//
// All have y = float(acc) * scale[n] + bias[n] in common, acc int32, one fused multiply-add in float32; a Finish says
// what becomes of y. scale, bias: float32 [N], through shared memory once a tile; no bias: 0. x s8 [M, K], w s8 [N, K],
// out [M, N], row-major.
#pragma once

#include "cutlass/functional.h"
#include "gemm_cutlass_wgmma.cuh"

namespace swin {
namespace cuda {
namespace wgmma {

namespace fusion = cutlass::epilogue::fusion;

// A node of the tree: Function on float32, whatever its inputs were (accumulators become floats here); its result
// rounded to nearest even to Result.
template <template <class> class Function, class Result>
using Node = fusion::Sm90Compute<Function, Result, float, cutlass::FloatRoundStyle::round_to_nearest>;

// A value for each of N, the same for all rows; 0 where there are none.
template <class Tile>
using Row = fusion::Sm90RowBroadcast<0, Tile, float>;

// y: scale, acc and bias in this order.
template <class Tile>
using Channels =
    fusion::Sm90EVT<Node<cutlass::homogeneous_multiply_add, float>, Row<Tile>, fusion::Sm90AccFetch, Row<Tile>>;

// A Finish has
//   Out, Source             of the output and of what is read where it is written, void for nothing
//   Tree<Y>                 the tree over Y, the tree of y. Its root gives Out, so that nothing is left to convert: the
//                           collective does not know that a bare tree computes in float and would do it in int32
//   fill(tree, y, shape, call)   the tree's arguments, those of y given
//   serves(output)
template <class Finish, class Schedule, int TileM, int TileN, int TileK, int ClusterM, int ClusterN>
struct MakeChannels {
  using Y = Channels<Shape<Int<TileM>, Int<TileN>, Int<TileK>>>;
  using Base = Product<typename Finish::Source, typename Finish::Out, float, typename Finish::template Tree<Y>,
                       Schedule, TileM, TileN, TileK, ClusterM, ClusterN>;

  static const char* launch(const GemmShape& shape, const GemmCall& call, void* stream) {
    const typename Y::Arguments y{{call.scale}, {}, {call.bias}, {}};
    return Base::launch(shape, call, stream, [&](auto& tree) { Finish::fill(tree, y, shape, call); });
  }

  static CutlassKernel kernel(const char* name) { return {name, Finish::serves, 90, 90, Base::refuse, launch}; }
};

template <class Finish, int... Sizes>
using CooperativeChannels = MakeChannels<Finish, CooperativeSchedule, Sizes...>;
template <class Finish, int... Sizes>
using PingpongChannels = MakeChannels<Finish, PingpongSchedule, Sizes...>;

}  // namespace wgmma
}  // namespace cuda
}  // namespace swin
