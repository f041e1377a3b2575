// CUTLASS kernels for Hopper, the fused graph's FC1 with GELU: clamp(rne(GELU(y) * factor), -128, 127). x s8 [M, K], w
// s8 [N, K], out s8 [M, N]; y as in gemm_cutlass_channels.cuh. Bytes: M*K + N*K + M*N.
#include "gelu.cuh"
#include "gemm_cutlass_channels.cuh"

namespace swin {
namespace cuda {
namespace {

struct GeluArguments {
  float factor = 0;
};

// Values: an Array of floats. Only the Arguments are asked of the float's own.
template <class Values>
struct ScaledGelu {
  using Arguments = GeluArguments;

  CUTLASS_DEVICE Values operator()(const Values& y, const Arguments& arguments) const {
    Values scaled;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < Values::kElements; ++i) scaled[i] = gelu(y[i]) * arguments.factor;
    return cutlass::epilogue::thread::Clamp<Values>{}(scaled, -128.0f, 127.0f);
  }
};

struct Gelu {
  using Out = std::int8_t;
  using Source = void;
  template <class Y>
  using Tree = wgmma::fusion::Sm90EVT<wgmma::Node<ScaledGelu, Out>, Y>;

  template <class Arguments, class Y>
  static void fill(Arguments& tree, const Y& y, const GemmShape&, const GemmCall& call) {
    tree = {y, {call.factor}};
  }
  static bool serves(GemmOutput output) { return output == GemmOutput::kChannelsGelu; }
};

}  // namespace

void add_sm90_channels_gelu_kernels(std::vector<CutlassKernel>& kernels) {
  using wgmma::CooperativeChannels;
  using wgmma::PingpongChannels;
  const auto add = [&](CutlassKernel kernel) { kernels.push_back(kernel); };
  add(CooperativeChannels<Gelu, 128, 256, 128, 2, 1>::kernel("sm90_channels_gelu_coop_128x256x128_c2x1"));
  add(CooperativeChannels<Gelu, 128, 192, 128, 2, 1>::kernel("sm90_channels_gelu_coop_128x192x128_c2x1"));
  add(PingpongChannels<Gelu, 64, 192, 128, 1, 1>::kernel("sm90_channels_gelu_ping_64x192x128_c1x1"));
  add(PingpongChannels<Gelu, 64, 128, 128, 1, 1>::kernel("sm90_channels_gelu_ping_64x128x128_c1x1"));
}

}  // namespace cuda
}  // namespace swin
