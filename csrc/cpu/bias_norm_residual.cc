// bias_norm_residual: residual += LayerNorm(x * dequant + bias), Swin-V2's norm behind the MLP. x s8 [M, C], residual
// f32 [M, C]. Formula: swin/ops.h.
#include "kernels.h"
#include "norm_residual.h"

namespace swin::cpu::SWIN_ISA {

void bias_norm_residual(const BiasNormResidualArgs& args, const ExecContext& context) {
  const std::int64_t c = args.residual.dim(1);
  const float* bias = args.bias.as<const float>();
  const float* gamma = args.gamma.as<const float>();
  const float* beta = args.beta.as<const float>();
  parallel_rows(context, args.residual.dim(0), 16, [&](std::int64_t first, std::int64_t last) {
    float* scratch = static_cast<float*>(thread_scratch((c + kLanes) * sizeof(float)));
    for (std::int64_t row = first; row < last; ++row) {
      add_normed_row(args.x.as<const std::int8_t>() + row * c, args.dequant, bias, gamma, beta,
                     args.residual.as<float>() + row * c, c, scratch, [](std::int64_t, Vf, std::int64_t) {});
    }
  });
}

}  // namespace swin::cpu::SWIN_ISA
