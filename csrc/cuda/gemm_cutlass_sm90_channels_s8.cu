// CUTLASS kernels for Hopper, the fused graph's QKV and its FC1 with ReLU: clamp(rne(y), floor, 127), the ReLU a floor
// of 0. x s8 [M, K], w s8 [N, K], out s8 [M, N]; y as in gemm_cutlass_channels.cuh. Bytes: M*K + N*K + M*N.
#include "gemm_cutlass_channels.cuh"

namespace swin {
namespace cuda {
namespace {

struct Quantize {
  using Out = std::int8_t;
  using Source = void;
  // Clamped, then rounded: the same as the other way round, the bounds being integers.
  template <class Y>
  using Tree = wgmma::fusion::Sm90EVT<wgmma::Node<cutlass::epilogue::thread::Clamp, Out>, Y>;

  template <class Arguments, class Y>
  static void fill(Arguments& tree, const Y& y, const GemmShape& shape, const GemmCall&) {
    tree = {y, {floor_of(shape.output), 127.0f}};
  }
  static bool serves(GemmOutput output) {
    return output == GemmOutput::kChannelsS8 || output == GemmOutput::kChannelsRelu;
  }
};

}  // namespace

void add_sm90_channels_s8_kernels(std::vector<CutlassKernel>& kernels) {
  using wgmma::CooperativeChannels;
  using wgmma::PingpongChannels;
  const auto add = [&](CutlassKernel kernel) { kernels.push_back(kernel); };
  add(CooperativeChannels<Quantize, 128, 256, 128, 2, 1>::kernel("sm90_channels_s8_coop_128x256x128_c2x1"));
  add(CooperativeChannels<Quantize, 128, 192, 128, 2, 1>::kernel("sm90_channels_s8_coop_128x192x128_c2x1"));
  add(PingpongChannels<Quantize, 64, 192, 128, 1, 1>::kernel("sm90_channels_s8_ping_64x192x128_c1x1"));
  add(PingpongChannels<Quantize, 64, 128, 128, 1, 1>::kernel("sm90_channels_s8_ping_64x128x128_c1x1"));
}

}  // namespace cuda
}  // namespace swin
