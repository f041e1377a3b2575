// final_norm_pool: mean over an image's tokens of LayerNorm(residual). residual f32 [B*L, C] -> out f32 [B, C].
// Formula: swin/ops.h. A task is one image.
#include "kernels.h"
#include "norm.h"

namespace swin::cpu::SWIN_ISA {

void final_norm_pool(const FinalNormPoolArgs& args, const ExecContext& context) {
  const std::int64_t batch = args.out.dim(0), c = args.out.dim(1), tokens = args.residual.dim(0) / batch;
  const float* gamma = args.gamma.as<const float>();
  const float* beta = args.beta.as<const float>();
  parallel_rows(context, batch, 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t b = first; b < last; ++b) {
      float* out = args.out.as<float>() + b * c;
      std::memset(out, 0, c * sizeof(float));
      for (std::int64_t t = 0; t < tokens; ++t) {
        const float* x = args.residual.as<const float>() + (b * tokens + t) * c;
        const RowStats stats = row_stats(x, c);
        for_lanes(c, [&](std::int64_t i, std::int64_t n) {
          store(out + i, load(out + i, n) + normalize(load(x + i, n), stats, gamma, beta, i, n), n);
        });
      }
      const float share = 1.0f / static_cast<float>(tokens);
      for_lanes(c, [&](std::int64_t i, std::int64_t n) { store(out + i, load(out + i, n) * share, n); });
    }
  });
}

}  // namespace swin::cpu::SWIN_ISA
