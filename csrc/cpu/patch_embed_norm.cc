// patch_embed_norm: x = LayerNorm(x + bias) in place, or only one of the two. x f32 [M, C]. Formula: swin/ops.h.
#include "kernels.h"
#include "norm.h"

namespace swin::cpu::SWIN_ISA {
namespace {

struct EmbeddedRows {
  const float *bias, *gamma, *beta;  // null: not added; not normalized
  std::int64_t c;

  struct Row {
    float* x;
  };
  template <int R>
  void write(const Row* rows) const {
    if (bias != nullptr) {
      for_lanes(c, [&](std::int64_t i, std::int64_t n) SWIN_INLINE {
        const Vf b = load(bias + i, n);
        for (int r = 0; r < R; ++r) store(rows[r].x + i, load(rows[r].x + i, n) + b, n);
      });
    }
    if (gamma == nullptr) return;
    RowStats stats[R];
    stats_of_rows<R>(rows, c, stats);
    for_lanes(c, [&](std::int64_t i, std::int64_t n) SWIN_INLINE {
      const Vf scale = load(gamma + i, n), offset = load(beta + i, n);
      for (int r = 0; r < R; ++r) {
        store(rows[r].x + i, (load(rows[r].x + i, n) - stats[r].mean) * stats[r].rstd * scale + offset, n);
      }
    });
  }
};

}  // namespace

void patch_embed_norm(const PatchEmbedNormArgs& args, const ExecContext& context) {
  const std::int64_t c = args.x.dim(1);
  parallel_rows(context, args.x.dim(0), 16, [&](std::int64_t first, std::int64_t last) {
    Together<EmbeddedRows> norm(args.bias.as<const float>(), args.gamma.as<const float>(), args.beta.as<const float>(),
                                c);
    for (std::int64_t row = first; row < last; ++row) norm.add(args.x.as<float>() + row * c);
    norm.flush();
  });
}

}  // namespace swin::cpu::SWIN_ISA
