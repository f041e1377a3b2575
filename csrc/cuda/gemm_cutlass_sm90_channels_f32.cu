// CUTLASS kernels for Hopper, what a LayerNorm follows in the fused graph of a Swin-V2: out = y. x s8 [M, K], w s8
// [N, K], out f32 [M, N]; y as in gemm_cutlass_channels.cuh. Bytes: M*K + N*K + 4*M*N.
#include "gemm_cutlass_channels.cuh"

namespace swin {
namespace cuda {
namespace {

struct Float {
  using Out = float;
  using Source = void;
  template <class Y>
  using Tree = Y;

  template <class Arguments, class Y>
  static void fill(Arguments& tree, const Y& y, const GemmShape&, const GemmCall&) {
    tree = y;
  }
  static bool serves(GemmOutput output) { return output == GemmOutput::kChannelsF32; }
};

}  // namespace

void add_sm90_channels_f32_kernels(std::vector<CutlassKernel>& kernels) {
  using wgmma::CooperativeChannels;
  using wgmma::PingpongChannels;
  const auto add = [&](CutlassKernel kernel) { kernels.push_back(kernel); };
  add(CooperativeChannels<Float, 128, 192, 128, 2, 1>::kernel("sm90_channels_f32_coop_128x192x128_c2x1"));
  add(CooperativeChannels<Float, 128, 128, 128, 2, 1>::kernel("sm90_channels_f32_coop_128x128x128_c2x1"));
  add(PingpongChannels<Float, 64, 128, 128, 1, 1>::kernel("sm90_channels_f32_ping_64x128x128_c1x1"));
  add(PingpongChannels<Float, 64, 96, 128, 1, 1>::kernel("sm90_channels_f32_ping_64x96x128_c1x1"));
}

}  // namespace cuda
}  // namespace swin
