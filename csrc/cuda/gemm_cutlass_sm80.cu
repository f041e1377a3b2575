// CUTLASS kernels for Ampere and later: mma.sync m16n8k32 on s8, operands through cp.async in a multi-stage pipeline.
// They also run on Hopper, beside wgmma (gemm_cutlass_sm90.cu), and on Blackwell.
#include "gemm_cutlass_mma.cuh"

namespace swin {
namespace cuda {
namespace {

constexpr int kAnyLater = 999;

template <class Out, int... Sizes>
using Tile = mma::Make<Out, cutlass::arch::Sm80, cutlass::gemm::GemmShape<16, 8, 32>, Sizes...>;

}  // namespace

void add_sm80_kernels(std::vector<CutlassKernel>& kernels) {
  using S8 = std::int8_t;
  using S32 = std::int32_t;
  const auto add = [&](CutlassKernel kernel) { kernels.push_back(kernel); };
  // Many rows: the widest tiles that leave room for three stages in 100 KiB of shared memory (sm_86, sm_89).
  add(Tile<S8, 256, 128, 64, 64, 64, 64, 3>::kernel("sm80_256x128x64_s3", 80, kAnyLater));
  add(Tile<S8, 128, 256, 64, 64, 64, 64, 3>::kernel("sm80_128x256x64_s3", 80, kAnyLater));
  add(Tile<S8, 128, 128, 64, 64, 64, 64, 4>::kernel("sm80_128x128x64_s4", 80, kAnyLater));
  // K of 768 and more: half the barriers.
  add(Tile<S8, 128, 128, 128, 64, 64, 128, 3>::kernel("sm80_128x128x128_s3", 80, kAnyLater));
  // Narrow outputs, and K of 96 to 192, where the pipeline is over before it is full.
  add(Tile<S8, 128, 64, 64, 64, 32, 64, 3>::kernel("sm80_128x64x64_s3", 80, kAnyLater));
  // Few rows.
  add(Tile<S8, 64, 128, 64, 32, 64, 64, 4>::kernel("sm80_64x128x64_s4", 80, kAnyLater));
  add(Tile<S8, 64, 64, 128, 32, 32, 128, 4>::kernel("sm80_64x64x128_s4", 80, kAnyLater));
  // int8_mode 2: FC2 and the reduction.
  add(Tile<S32, 128, 128, 64, 64, 64, 64, 4>::kernel("sm80_128x128x64_s4_s32", 80, kAnyLater));
  add(Tile<S32, 64, 64, 128, 32, 32, 128, 4>::kernel("sm80_64x64x128_s4_s32", 80, kAnyLater));
}

}  // namespace cuda
}  // namespace swin
