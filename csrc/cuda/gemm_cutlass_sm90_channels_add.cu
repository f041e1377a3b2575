// CUTLASS kernels for Hopper, the fused graph's FC2: out = T(float(out) + y), the residual stream updated in place.
// x s8 [M, K], w s8 [N, K], out T [M, N], T float16 or bfloat16; y as in gemm_cutlass_channels.cuh.
// Bytes: M*K + N*K + 4*M*N.
//
// out is both C and D: every subtile is loaded through TMA once, by the one block that stores it, and stored from what
// was loaded, so no load can see another's store. That rests on tiles that do not overlap and are not split along K.
#include "gemm_cutlass_channels.cuh"

namespace swin {
namespace cuda {
namespace {

template <class T, GemmOutput kOutput>
struct Add {
  using Out = T;
  using Source = T;
  template <class Y>
  using Tree = wgmma::fusion::Sm90EVT<wgmma::Node<cutlass::plus, T>, wgmma::fusion::Sm90SrcFetch<T>, Y>;

  template <class Arguments, class Y>
  static void fill(Arguments& tree, const Y& y, const GemmShape&, const GemmCall&) {
    tree = {{}, y, {}};
  }
  static bool serves(GemmOutput output) { return output == kOutput; }
};

using AddF16 = Add<cutlass::half_t, GemmOutput::kChannelsAddF16>;
using AddBF16 = Add<cutlass::bfloat16_t, GemmOutput::kChannelsAddBF16>;

}  // namespace

void add_sm90_channels_add_kernels(std::vector<CutlassKernel>& kernels) {
  using wgmma::CooperativeChannels;
  using wgmma::PingpongChannels;
  const auto add = [&](CutlassKernel kernel) { kernels.push_back(kernel); };
  add(CooperativeChannels<AddF16, 128, 192, 128, 2, 1>::kernel("sm90_channels_add_f16_coop_128x192x128_c2x1"));
  add(CooperativeChannels<AddF16, 128, 128, 128, 2, 1>::kernel("sm90_channels_add_f16_coop_128x128x128_c2x1"));
  add(PingpongChannels<AddF16, 64, 128, 128, 1, 1>::kernel("sm90_channels_add_f16_ping_64x128x128_c1x1"));
  add(PingpongChannels<AddF16, 64, 96, 128, 1, 1>::kernel("sm90_channels_add_f16_ping_64x96x128_c1x1"));
  add(CooperativeChannels<AddBF16, 128, 192, 128, 2, 1>::kernel("sm90_channels_add_bf16_coop_128x192x128_c2x1"));
  add(CooperativeChannels<AddBF16, 128, 128, 128, 2, 1>::kernel("sm90_channels_add_bf16_coop_128x128x128_c2x1"));
  add(PingpongChannels<AddBF16, 64, 128, 128, 1, 1>::kernel("sm90_channels_add_bf16_ping_64x128x128_c1x1"));
  add(PingpongChannels<AddBF16, 64, 96, 128, 1, 1>::kernel("sm90_channels_add_bf16_ping_64x96x128_c1x1"));
}

}  // namespace cuda
}  // namespace swin
