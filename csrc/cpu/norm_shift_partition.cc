// norm_shift_partition: LayerNorm, cyclic shift, window partition and quantize in one pass; the two permutations are
// only the index a row is written to. residual f32 [M, C] -> out s8 [P, C] in window order. Formula: swin/ops.h.
#include "kernels.h"
#include "norm.h"
#include "window_rows.h"

namespace swin::cpu::SWIN_ISA {

void norm_shift_partition(const NormShiftPartitionArgs& args, const ExecContext& context) {
  const std::int64_t c = args.residual.dim(1);
  std::int8_t* out = args.out.as<std::int8_t>();
  zero_padding(args.geometry, c, out, context);
  parallel_rows(context, args.geometry.tokens(), 16, [&](std::int64_t first, std::int64_t last) {
    NormQuantize norm(args.gamma.as<const float>(), args.beta.as<const float>(), c, args.quant);
    WindowRows target(args.geometry, first);
    for (std::int64_t row = first; row < last; ++row, target.next()) {
      norm.add(args.residual.as<const float>() + row * c, out + target.row() * c);
    }
    norm.flush();
  });
}

}  // namespace swin::cpu::SWIN_ISA
