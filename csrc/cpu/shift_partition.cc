// shift_partition: cyclic shift, window partition and quantize in one pass; the two permutations are only the index a
// row is written to. residual f32 [M, C] -> out s8 [P, C] in window order. Swin-V2, where no norm comes first. Formula:
// swin/ops.h.
#include "kernels.h"
#include "window_rows.h"

namespace swin::cpu::SWIN_ISA {

void shift_partition(const ShiftPartitionArgs& args, const ExecContext& context) {
  const std::int64_t c = args.residual.dim(1);
  zero_padding(args.geometry, c, args.out.as<std::int8_t>(), context);
  parallel_rows(context, args.geometry.tokens(), 32, [&](std::int64_t first, std::int64_t last) {
    WindowRows target(args.geometry, first);
    for (std::int64_t row = first; row < last; ++row, target.next()) {
      const float* x = args.residual.as<const float>() + row * c;
      std::int8_t* out = args.out.as<std::int8_t>() + target.row() * c;
      for_lanes(c, [&](std::int64_t i, std::int64_t n) { store_s8(out + i, load(x + i, n) * args.quant, n); });
    }
  });
}

}  // namespace swin::cpu::SWIN_ISA
