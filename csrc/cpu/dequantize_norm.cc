// dequantize_norm: out = LayerNorm(x * dequant), Swin-V2's norm behind the reduction. x s8 [M, C] -> out f32 [M, C].
// Formula: swin/ops.h.
#include "kernels.h"
#include "norm.h"

namespace swin::cpu::SWIN_ISA {

void dequantize_norm(const DequantizeNormArgs& args, const ExecContext& context) {
  const std::int64_t c = args.x.dim(1);
  const float* gamma = args.gamma.as<const float>();
  const float* beta = args.beta.as<const float>();
  parallel_rows(context, args.x.dim(0), 16, [&](std::int64_t first, std::int64_t last) {
    // The row as floats in memory: recomputed, a fused multiply-add would give other values than those of the mean.
    float* scratch = static_cast<float*>(thread_scratch((c + kLanes) * sizeof(float)));
    for (std::int64_t row = first; row < last; ++row) {
      const std::int8_t* x = args.x.as<const std::int8_t>() + row * c;
      float* out = args.out.as<float>() + row * c;
      for_lanes(c, [&](std::int64_t i, std::int64_t n) { store(scratch + i, load(x + i, n) * args.dequant, n); });
      const RowStats stats = row_stats(scratch, c);
      for_lanes(c, [&](std::int64_t i, std::int64_t n) {
        store(out + i, normalize(load(scratch + i, n), stats, gamma, beta, i, n), n);
      });
    }
  });
}

}  // namespace swin::cpu::SWIN_ISA
