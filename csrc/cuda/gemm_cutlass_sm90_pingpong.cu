// CUTLASS kernels for Hopper whose two warpgroups take turns: the short K of the first stages, and few rows.
#include "gemm_cutlass_wgmma.cuh"

namespace swin {
namespace cuda {

void add_sm90_pingpong_kernels(std::vector<CutlassKernel>& kernels) {
  using S8 = std::int8_t;
  using S32 = std::int32_t;
  const auto add = [&](CutlassKernel kernel) { kernels.push_back(kernel); };
  add(wgmma::Pingpong<S8, 64, 256, 128, 1, 1>::kernel("sm90_ping_64x256x128_c1x1"));
  add(wgmma::Pingpong<S8, 64, 128, 128, 1, 1>::kernel("sm90_ping_64x128x128_c1x1"));
  // N and K of 96, 192 and 288: Swin's own sizes, without a tile that is half empty.
  add(wgmma::Pingpong<S8, 64, 96, 128, 1, 1>::kernel("sm90_ping_64x96x128_c1x1"));
  add(wgmma::Pingpong<S8, 64, 192, 96, 1, 1>::kernel("sm90_ping_64x192x96_c1x1"));
  add(wgmma::Pingpong<S8, 64, 64, 128, 1, 1>::kernel("sm90_ping_64x64x128_c1x1"));
  add(wgmma::Pingpong<S32, 64, 128, 128, 1, 1>::kernel("sm90_ping_64x128x128_c1x1_s32"));
}

}  // namespace cuda
}  // namespace swin
