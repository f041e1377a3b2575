// CUTLASS 2.x GEMMs on mma.sync with our own epilogue: what the files of Turing and of Ampere and later share.
//
// x s8 [M, K] row-major, w s8 [N, K] row-major (to CUTLASS: a column-major [K, N]), out s8 or s32 [M, N] row-major.
// K and N multiples of 16, for 16-byte accesses on either side. No workspace.
// Bytes: (M*K + N*K + M*N * size of out), x once more for each tile of columns as far as the L2 does not hold it.
#pragma once

#include <cuda_runtime.h>

#include "cutlass/cutlass.h"
#include "cutlass/epilogue/thread/linear_combination.h"
#include "cutlass/gemm/device/gemm.h"
#include "cutlass/numeric_conversion.h"
#include "gemm_cutlass.h"

namespace swin {
namespace cuda {
namespace mma {

// CUTLASS's epilogue functor: clamp(rne(float(acc) * factor), floor, 127), `floor` being 0 for the ReLU and -128
// otherwise, so that one kernel serves both.
template <int Count>
class Requantize {
 public:
  using ElementOutput = std::int8_t;
  using ElementAccumulator = std::int32_t;
  using ElementCompute = float;
  using ElementScalar = float;
  using ElementC = ElementOutput;
  using ElementD = ElementOutput;
  static int const kCount = Count;
  static cutlass::FloatRoundStyle const kRound = cutlass::FloatRoundStyle::round_to_nearest;
  static bool const kIsHeavy = false;
  using FragmentOutput = cutlass::Array<ElementOutput, kCount>;
  using FragmentSource = FragmentOutput;
  using FragmentAccumulator = cutlass::Array<ElementAccumulator, kCount>;

  struct Params {
    float factor = 0, floor = 0;
  };

  CUTLASS_HOST_DEVICE explicit Requantize(const Params& params) : params_(params) {}
  CUTLASS_HOST_DEVICE bool is_source_needed() const { return false; }
  CUTLASS_HOST_DEVICE void set_k_partition(int, int) {}

  CUTLASS_DEVICE FragmentOutput operator()(const FragmentAccumulator& acc, const FragmentOutput&) const {
    return (*this)(acc);
  }
  CUTLASS_DEVICE FragmentOutput operator()(const FragmentAccumulator& acc) const {
    FragmentAccumulator rounded;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kCount; ++i) {
      rounded[i] = __float2int_rn(fmaxf(__fmul_rn(__int2float_rn(acc[i]), params_.factor), params_.floor));
    }
    // Saturates: cvt.pack.sat on every architecture built here.
    return cutlass::NumericArrayConverter<ElementOutput, std::int32_t, kCount>{}(rounded);
  }

 private:
  Params params_;
};

template <class Gemm>
struct Launcher {
  static constexpr bool kS32 = std::is_same<typename Gemm::ElementC, std::int32_t>::value;

  static typename Gemm::Arguments arguments(const GemmShape& shape, const GemmCall& call) {
    const int m = static_cast<int>(shape.m), n = static_cast<int>(shape.n), k = static_cast<int>(shape.k);
    typename Gemm::EpilogueOutputOp::Params epilogue;
    if constexpr (kS32) {
      epilogue = {1, 0};
    } else {
      epilogue = {call.factor, floor_of(shape.output)};
    }
    auto* out = static_cast<typename Gemm::ElementC*>(call.out);
    return {{m, n, k}, {call.x, k}, {call.w, k}, {out, n}, {out, n}, epilogue};
  }

  static const char* refuse(const GemmShape& shape) {
    if (shape.k % 16 != 0 || shape.n % 16 != 0) return "K and N must be multiples of 16";
    if (shape.m > INT32_MAX) return "M does not fit 32 bits";
    return nullptr;
  }

  static const char* launch(const GemmShape& shape, const GemmCall& call, void* stream) {
    Gemm gemm;
    const typename Gemm::Arguments args = arguments(shape, call);
    cutlass::Status status = Gemm::can_implement(args);
    if (status == cutlass::Status::kSuccess) status = gemm.initialize(args, nullptr);
    if (status == cutlass::Status::kSuccess) status = gemm.run(static_cast<cudaStream_t>(stream));
    return status == cutlass::Status::kSuccess ? nullptr : cutlass::cutlassGetStatusString(status);
  }
};

// Tb*: the tile of a thread block; W*: of a warp.
template <class Out, class Arch, class Instruction, int TbM, int TbN, int TbK, int WM, int WN, int WK, int Stages>
struct Make {
  static constexpr bool kS32 = std::is_same<Out, std::int32_t>::value;
  // Values one thread stores at once: 16 bytes, 8 where a tile's row of s8 is too short for that.
  static constexpr int kAccess = kS32 ? 4 : TbN < 128 ? 8 : 16;
  using Epilogue = std::conditional_t<
      kS32,
      cutlass::epilogue::thread::LinearCombination<std::int32_t, kAccess, std::int32_t, std::int32_t,
                                                   cutlass::epilogue::thread::ScaleType::Nothing>,
      Requantize<kAccess>>;
  using Gemm = cutlass::gemm::device::Gemm<
      std::int8_t, cutlass::layout::RowMajor, std::int8_t, cutlass::layout::ColumnMajor, Out, cutlass::layout::RowMajor,
      std::int32_t, cutlass::arch::OpClassTensorOp, Arch, cutlass::gemm::GemmShape<TbM, TbN, TbK>,
      cutlass::gemm::GemmShape<WM, WN, WK>, Instruction, Epilogue,
      cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<4>, Stages, 16, 16, false,
      cutlass::arch::OpMultiplyAddSaturate>;

  static CutlassKernel kernel(const char* name, int min_sm, int max_sm) {
    return {name, kS32 ? serves_s32 : serves_s8, min_sm, max_sm, Launcher<Gemm>::refuse, Launcher<Gemm>::launch};
  }
};

}  // namespace mma
}  // namespace cuda
}  // namespace swin
