// patch_embed_norm: x = LayerNorm(x + bias) in place, or only one of the two. x f32 [M, C]. Formula: swin/ops.h.
#include "kernels.h"
#include "norm.h"

namespace swin::cpu::SWIN_ISA {

void patch_embed_norm(const PatchEmbedNormArgs& args, const ExecContext& context) {
  const std::int64_t c = args.x.dim(1);
  const float* bias = args.bias.as<const float>();
  const float* gamma = args.gamma.as<const float>();
  const float* beta = args.beta.as<const float>();
  parallel_rows(context, args.x.dim(0), 16, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t row = first; row < last; ++row) {
      float* x = args.x.as<float>() + row * c;
      if (bias != nullptr) {
        for_lanes(c, [&](std::int64_t i, std::int64_t n) { store(x + i, load(x + i, n) + load(bias + i, n), n); });
      }
      if (gamma == nullptr) continue;
      const RowStats stats = row_stats(x, c);
      for_lanes(c, [&](std::int64_t i, std::int64_t n) {
        store(x + i, normalize(load(x + i, n), stats, gamma, beta, i, n), n);
      });
    }
  });
}

}  // namespace swin::cpu::SWIN_ISA
