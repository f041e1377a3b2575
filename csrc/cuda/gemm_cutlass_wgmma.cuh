// CUTLASS 3.x kernels for Hopper: wgmma on s8, operands through TMA into shared memory, warp-specialized, persistent.
//
// x s8 [M, K] and w s8 [N, K] row-major, so both operands have K innermost, as wgmma wants s8; out s8 or s32 [M, N].
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

template <class Out, class MainloopSchedule, class EpilogueSchedule, int TileM, int TileN, int TileK, int ClusterM,
          int ClusterN>
struct Make {
  static constexpr bool kS32 = std::is_same<Out, std::int32_t>::value;
  static constexpr int kAlignOut = 16 / static_cast<int>(sizeof(Out));
  using Tile = Shape<Int<TileM>, Int<TileN>, Int<TileK>>;
  using Cluster = Shape<Int<ClusterM>, Int<ClusterN>, Int<1>>;
  using RowMajor = cutlass::layout::RowMajor;
  // s8: clamp(acc * factor, floor, 127) in float, then rounded to nearest even; the ReLU is a floor of 0.
  // s32: acc times an integer 1.
  using Compute = std::conditional_t<kS32, std::int32_t, float>;
  using Fusion = std::conditional_t<
      kS32, cutlass::epilogue::fusion::ScaledAcc<Out, Compute, Compute>,
      cutlass::epilogue::fusion::LinCombEltAct<cutlass::epilogue::thread::Clamp, Out, Compute, void, Compute,
                                               cutlass::FloatRoundStyle::round_to_nearest>>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, std::int32_t, Compute, void, RowMajor, kAlignOut, Out, RowMajor,
      kAlignOut, EpilogueSchedule, Fusion>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, std::int8_t, RowMajor, 16, std::int8_t,
      cutlass::layout::ColumnMajor, 16, std::int32_t, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      MainloopSchedule>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static const char* refuse(const GemmShape& shape) {
    if (shape.k % 16 != 0 || shape.n % 16 != 0) return "K and N must be multiples of 16";
    if (shape.m > INT32_MAX) return "M does not fit 32 bits";
    return nullptr;
  }

  static const char* launch(const GemmShape& shape, const GemmCall& call, void* stream) {
    const int m = static_cast<int>(shape.m), n = static_cast<int>(shape.n), k = static_cast<int>(shape.k);
    typename Gemm::Arguments args;
    args.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    args.problem_shape = cute::make_shape(m, n, k, 1);
    args.mainloop.ptr_A = call.x;
    args.mainloop.dA = rows_of<typename Kernel::StrideA>(k);
    args.mainloop.ptr_B = call.w;
    args.mainloop.dB = rows_of<typename Kernel::StrideB>(k);
    args.epilogue.dC = rows_of<typename Kernel::StrideC>(n);
    args.epilogue.ptr_D = static_cast<Out*>(call.out);
    args.epilogue.dD = rows_of<typename Kernel::StrideD>(n);
    args.hw_info = hardware();
    if constexpr (kS32) {
      args.epilogue.thread.alpha = 1;
    } else {
      args.epilogue.thread.alpha = call.factor;
      args.epilogue.thread.activation = {floor_of(shape.output), 127.0f};
    }
    if (Gemm::get_workspace_size(args) != 0) return "the kernel asks for a workspace";
    Gemm gemm;
    cutlass::Status status = Gemm::can_implement(args);
    if (status == cutlass::Status::kSuccess) status = gemm.initialize(args, nullptr, static_cast<cudaStream_t>(stream));
    if (status == cutlass::Status::kSuccess) status = gemm.run(static_cast<cudaStream_t>(stream));
    return status == cutlass::Status::kSuccess ? nullptr : cutlass::cutlassGetStatusString(status);
  }

  static CutlassKernel kernel(const char* name) { return {name, kS32, 90, 90, refuse, launch}; }
};

// Cooperative: two warpgroups share a tile of 128 or 256 rows. Ping-pong: each has a tile of its own, and one's epilogue
// runs under the other's products, which pays where K is short, as everywhere in Swin's first stages.
template <class Out, int... Sizes>
using Cooperative = Make<Out, cutlass::gemm::KernelTmaWarpSpecializedCooperative,
                         cutlass::epilogue::TmaWarpSpecializedCooperative, Sizes...>;
template <class Out, int... Sizes>
using Pingpong = Make<Out, cutlass::gemm::KernelTmaWarpSpecializedPingpong, cutlass::epilogue::TmaWarpSpecialized, Sizes...>;

}  // namespace wgmma
}  // namespace cuda
}  // namespace swin
