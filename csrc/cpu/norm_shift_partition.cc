// norm_shift_partition: LayerNorm, cyclic shift, window partition and quantize in one pass; the two permutations are
// only the index a row is read from. residual f32 [M, C] -> out s8 [M, C] in window order. Formula: swin/ops.h.
#include "kernels.h"
#include "norm.h"
#include "window_rows.h"

namespace swin::cpu::SWIN_ISA {

void norm_shift_partition(const NormShiftPartitionArgs& args, const ExecContext& context) {
  const std::int64_t c = args.residual.dim(1);
  const float* gamma = args.gamma.as<const float>();
  const float* beta = args.beta.as<const float>();
  parallel_rows(context, args.geometry.tokens(), 16, [&](std::int64_t first, std::int64_t last) {
    ImageRows source(args.geometry, first);
    for (std::int64_t row = first; row < last; ++row, source.next()) {
      const float* x = args.residual.as<const float>() + source.row() * c;
      std::int8_t* out = args.out.as<std::int8_t>() + row * c;
      const RowStats stats = row_stats(c, [&](std::int64_t i, std::int64_t n) { return load(x + i, n); });
      for_lanes(c, [&](std::int64_t i, std::int64_t n) {
        store_s8(out + i, normalize(load(x + i, n), stats, gamma, beta, i, n) * args.quant, n);
      });
    }
  });
}

}  // namespace swin::cpu::SWIN_ISA
