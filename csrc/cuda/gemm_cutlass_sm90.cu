// CUTLASS kernels for Hopper whose two warpgroups share a tile: the many rows and long K of the later stages.
#include "gemm_cutlass_wgmma.cuh"

namespace swin {
namespace cuda {

void add_sm90_kernels(std::vector<CutlassKernel>& kernels) {
  using S8 = std::int8_t;
  using S32 = std::int32_t;
  const auto add = [&](CutlassKernel kernel) { kernels.push_back(kernel); };
  add(wgmma::Cooperative<S8, 128, 256, 128, 2, 1>::kernel("sm90_coop_128x256x128_c2x1"));
  add(wgmma::Cooperative<S8, 256, 128, 128, 2, 1>::kernel("sm90_coop_256x128x128_c2x1"));
  add(wgmma::Cooperative<S8, 128, 192, 128, 2, 1>::kernel("sm90_coop_128x192x128_c2x1"));
  add(wgmma::Cooperative<S8, 128, 128, 128, 1, 1>::kernel("sm90_coop_128x128x128_c1x1"));
  // int8_mode 2: FC2 and the reduction.
  add(wgmma::Cooperative<S32, 128, 128, 128, 2, 1>::kernel("sm90_coop_128x128x128_c2x1_s32"));
  add_sm90_pingpong_kernels(kernels);
  add_sm90_channels_s8_kernels(kernels);
  add_sm90_channels_gelu_kernels(kernels);
  add_sm90_channels_f32_kernels(kernels);
  add_sm90_channels_add_kernels(kernels);
}

}  // namespace cuda
}  // namespace swin
