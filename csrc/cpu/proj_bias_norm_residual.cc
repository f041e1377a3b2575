// proj_bias_norm_residual: dequantize the projection, add its bias, LayerNorm, undo window partition and shift, add to
// the residual, quantize: Swin-V2's norm behind the attention. proj s8 [P, C] in window order; residual f32 [M, C] and
// out s8 [M, C] in image order. Formula: swin/ops.h.
#include "kernels.h"
#include "norm_residual.h"
#include "window_rows.h"

namespace swin::cpu::SWIN_ISA {

void proj_bias_norm_residual(const ProjBiasNormResidualArgs& args, const ExecContext& context) {
  const std::int64_t c = args.residual.dim(1);
  const float* bias = args.bias.as<const float>();
  const float* gamma = args.gamma.as<const float>();
  const float* beta = args.beta.as<const float>();
  parallel_rows(context, args.geometry.tokens(), 16, [&](std::int64_t first, std::int64_t last) {
    float* scratch = static_cast<float*>(thread_scratch((c + kLanes) * sizeof(float)));
    WindowRows source(args.geometry, first);
    for (std::int64_t row = first; row < last; ++row, source.next()) {
      std::int8_t* out = args.out.as<std::int8_t>() + row * c;
      add_normed_row(args.proj.as<const std::int8_t>() + source.row() * c, args.dequant, bias, gamma, beta,
                     args.residual.as<float>() + row * c, c, scratch,
                     [&](std::int64_t i, Vf sum, std::int64_t n) { store_s8(out + i, sum * args.quant, n); });
    }
  });
}

}  // namespace swin::cpu::SWIN_ISA
