// bias_gelu: out = quantize(GELU(x * dequant + bias)), the operation the paper removes. x s8 [M, F] -> out s8 [M, F].
// Formula: swin/ops.h.
#include "gelu.h"
#include "kernels.h"
#include "simd.h"

namespace swin::cpu::SWIN_ISA {

void bias_gelu(const BiasGeluArgs& args, const ExecContext& context) {
  const std::int64_t f = args.x.dim(1);
  const float* bias = args.bias.as<const float>();
  parallel_rows(context, args.x.dim(0), 8, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t row = first; row < last; ++row) {
      const std::int8_t* x = args.x.as<const std::int8_t>() + row * f;
      std::int8_t* out = args.out.as<std::int8_t>() + row * f;
      for_lanes(f, [&](std::int64_t i, std::int64_t n) {
        store_s8(out + i, gelu(load(x + i, n) * args.dequant + load(bias + i, n)) * args.quant, n);
      });
    }
  });
}

}  // namespace swin::cpu::SWIN_ISA
