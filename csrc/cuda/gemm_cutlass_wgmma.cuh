// CUTLASS 3.x kernels for Hopper: wgmma on s8, operands through TMA into shared memory, warp-specialized, persistent.
//
// x s8 [M, K] and w s8 [N, K] row-major, so both operands have K innermost, as wgmma wants s8; out [M, N], s8 or s32
// here and more in gemm_cutlass_channels.cuh.
// K and N multiples of 16 (TMA strides). No workspace. Compiled for sm_90a alone: wgmma exists nowhere else.
// Bytes: (M*K + N*K + M*N * size of out); a cluster of two blocks reads its common operand once.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/thread/activation.h"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "gemm_cutlass.h"

namespace swin {
namespace cuda {
namespace wgmma {

using cute::Int;
using cute::Shape;

// Multiprocessors of the current device: how many blocks a persistent kernel starts at most.
inline cutlass::KernelHardwareInfo hardware() {
  cutlass::KernelHardwareInfo info;
  if (cudaGetDevice(&info.device_id) == cudaSuccess) {
    cudaDeviceGetAttribute(&info.sm_count, cudaDevAttrMultiProcessorCount, info.device_id);
  }
  return info;
}

// The strides of a row-major matrix whose rows hold `columns` values; one matrix, so none between matrices.
template <class Stride>
Stride rows_of(int columns) {
  return cute::make_stride(std::int64_t{columns}, Int<1>{}, std::int64_t{0});
}

// Cooperative: two warpgroups share a tile of 128 or 256 rows. Ping-pong: each has a tile of its own, and one's
// epilogue runs under the other's products, which pays where K is short, as everywhere in Swin's first stages.
struct CooperativeSchedule {
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using Epilogue = cutlass::epilogue::TmaWarpSpecializedCooperative;
};
struct PingpongSchedule {
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  using Epilogue = cutlass::epilogue::TmaWarpSpecialized;
};

// The product, whatever becomes of it. Source: what the epilogue reads where it writes, void for nothing. Fusion: a
// fusion operation or a visitor tree, computing in Compute.
template <class Source, class Out, class Compute, class Fusion, class Schedule, int TileM, int TileN, int TileK,
          int ClusterM, int ClusterN>
struct Product {
  static constexpr int kAlignOut = 16 / static_cast<int>(sizeof(Out));
  using Tile = Shape<Int<TileM>, Int<TileN>, Int<TileK>>;
  using Cluster = Shape<Int<ClusterM>, Int<ClusterN>, Int<1>>;
  using RowMajor = cutlass::layout::RowMajor;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, std::int32_t, Compute, Source, RowMajor, kAlignOut, Out,
      RowMajor, kAlignOut, typename Schedule::Epilogue, Fusion>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, std::int8_t, RowMajor, 16, std::int8_t,
      cutlass::layout::ColumnMajor, 16, std::int32_t, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      typename Schedule::Mainloop>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static const char* refuse(const GemmShape& shape) {
    if (shape.k % 16 != 0 || shape.n % 16 != 0) return "K and N must be multiples of 16";
    if (shape.m > INT32_MAX) return "M does not fit 32 bits";
    return nullptr;
  }

  // set_fusion: called with the fusion's own arguments to fill in.
  template <class SetFusion>
  static const char* launch(const GemmShape& shape, const GemmCall& call, void* stream, SetFusion set_fusion) {
    const int m = static_cast<int>(shape.m), n = static_cast<int>(shape.n), k = static_cast<int>(shape.k);
    typename Gemm::Arguments args;
    args.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    args.problem_shape = cute::make_shape(m, n, k, 1);
    args.mainloop.ptr_A = call.x;
    args.mainloop.dA = rows_of<typename Kernel::StrideA>(k);
    args.mainloop.ptr_B = call.w;
    args.mainloop.dB = rows_of<typename Kernel::StrideB>(k);
    if constexpr (!std::is_void<Source>::value) args.epilogue.ptr_C = static_cast<const Source*>(call.out);
    args.epilogue.dC = rows_of<typename Kernel::StrideC>(n);
    args.epilogue.ptr_D = static_cast<Out*>(call.out);
    args.epilogue.dD = rows_of<typename Kernel::StrideD>(n);
    args.hw_info = hardware();
    set_fusion(args.epilogue.thread);
    if (Gemm::get_workspace_size(args) != 0) return "the kernel asks for a workspace";
    Gemm gemm;
    cutlass::Status status = Gemm::can_implement(args);
    if (status == cutlass::Status::kSuccess) status = gemm.initialize(args, nullptr, static_cast<cudaStream_t>(stream));
    if (status == cutlass::Status::kSuccess) status = gemm.run(static_cast<cudaStream_t>(stream));
    return status == cutlass::Status::kSuccess ? nullptr : cutlass::cutlassGetStatusString(status);
  }
};

// FT's outputs. s8: clamp(acc * factor, floor, 127) in float, then rounded to nearest even; the ReLU is a floor of 0.
// s32: acc times an integer 1.
template <class Out, class Schedule, int... Sizes>
struct Make {
  static constexpr bool kS32 = std::is_same<Out, std::int32_t>::value;
  using Compute = std::conditional_t<kS32, std::int32_t, float>;
  using Fusion = std::conditional_t<
      kS32, cutlass::epilogue::fusion::ScaledAcc<Out, Compute, Compute>,
      cutlass::epilogue::fusion::LinCombEltAct<cutlass::epilogue::thread::Clamp, Out, Compute, void, Compute,
                                               cutlass::FloatRoundStyle::round_to_nearest>>;
  using Base = Product<void, Out, Compute, Fusion, Schedule, Sizes...>;

  static const char* launch(const GemmShape& shape, const GemmCall& call, void* stream) {
    return Base::launch(shape, call, stream, [&](auto& fusion) {
      if constexpr (kS32) {
        fusion.alpha = 1;
      } else {
        fusion.alpha = call.factor;
        fusion.activation = {floor_of(shape.output), 127.0f};
      }
    });
  }

  static CutlassKernel kernel(const char* name) {
    return {name, kS32 ? serves_s32 : serves_s8, 90, 90, Base::refuse, launch};
  }
};

template <class Out, int... Sizes>
using Cooperative = Make<Out, CooperativeSchedule, Sizes...>;
template <class Out, int... Sizes>
using Pingpong = Make<Out, PingpongSchedule, Sizes...>;

}  // namespace wgmma
}  // namespace cuda
}  // namespace swin
