// CUTLASS kernels for Turing: mma.sync m8n8k16 on s8, operands double-buffered through registers (there is no cp.async).
#include "gemm_cutlass_mma.cuh"

namespace swin {
namespace cuda {
namespace {

template <class Out, int... Sizes>
using Tile = mma::Make<Out, cutlass::arch::Sm75, cutlass::gemm::GemmShape<8, 8, 16>, Sizes..., 2>;

}  // namespace

void add_sm75_kernels(std::vector<CutlassKernel>& kernels) {
  using S8 = std::int8_t;
  using S32 = std::int32_t;
  const auto add = [&](CutlassKernel kernel) { kernels.push_back(kernel); };
  add(Tile<S8, 256, 128, 64, 64, 64, 64>::kernel("sm75_256x128x64", 75, 79));
  add(Tile<S8, 128, 256, 64, 64, 64, 64>::kernel("sm75_128x256x64", 75, 79));
  add(Tile<S8, 128, 128, 64, 64, 64, 64>::kernel("sm75_128x128x64", 75, 79));
  add(Tile<S8, 128, 64, 64, 64, 32, 64>::kernel("sm75_128x64x64", 75, 79));
  add(Tile<S8, 64, 64, 64, 32, 32, 64>::kernel("sm75_64x64x64", 75, 79));
  add(Tile<S32, 128, 128, 64, 64, 64, 64>::kernel("sm75_128x128x64_s32", 75, 79));
  add(Tile<S32, 64, 64, 64, 32, 32, 64>::kernel("sm75_64x64x64_s32", 75, 79));
}

}  // namespace cuda
}  // namespace swin
