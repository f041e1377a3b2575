// proj_bias_residual_norm: dequantize the projection, add its bias, undo window partition and shift, add to the
// residual, LayerNorm, quantize. proj s8 [P, C] in window order; residual f32 [M, C] and out s8 [M, C] in image order.
// Formula: swin/ops.h.
#include "kernels.h"
#include "norm.h"
#include "window_rows.h"

namespace swin::cpu::SWIN_ISA {

void proj_bias_residual_norm(const ProjBiasResidualNormArgs& args, const ExecContext& context) {
  const std::int64_t c = args.residual.dim(1);
  const float* bias = args.bias.as<const float>();
  parallel_rows(context, args.geometry.tokens(), 16, [&](std::int64_t first, std::int64_t last) {
    NormQuantize norm(args.gamma.as<const float>(), args.beta.as<const float>(), c, args.quant);
    WindowRows source(args.geometry, first);
    for (std::int64_t row = first; row < last; ++row, source.next()) {
      const std::int8_t* proj = args.proj.as<const std::int8_t>() + source.row() * c;
      float* x = args.residual.as<float>() + row * c;
      for_lanes(c, [&](std::int64_t i, std::int64_t n) {
        store(x + i, load(x + i, n) + (load(proj + i, n) * args.dequant + load(bias + i, n)), n);
      });
      norm.add(x, args.out.as<std::int8_t>() + row * c);
    }
    norm.flush();
  });
}

}  // namespace swin::cpu::SWIN_ISA
