// bias_norm_residual: residual += LayerNorm(x * dequant + bias). x s8 [M, C], residual T [M, C]. Formula: swin/ops.h.
//
// Layout: norm_residual.cuh. Floor: 5 bytes an element (3 read, 2 written). Not timed yet.
#include "kernels.h"
#include "norm_residual.cuh"

namespace swin::cuda {

template <class T>
void bias_norm_residual(const BiasNormResidualArgs& args, const ExecContext& context) {
  const std::int64_t m = args.residual.dim(0), c = args.residual.dim(1);
  const NormResidual<T, false> op{args.x.as<const std::int8_t>(),
                                  args.bias.as<const T>(),
                                  args.gamma.as<const T>(),
                                  args.beta.as<const T>(),
                                  args.residual.as<T>(),
                                  nullptr,
                                  WindowRows(WindowGeometry{1, 1, m, 1, 1, 0, 0}),
                                  c,
                                  args.dequant,
                                  0.0f};
  launch_norm("bias_norm_residual", op, m, c, op.vectorised(), context.stream);
}

SWIN_INSTANTIATE(bias_norm_residual, BiasNormResidualArgs)

}  // namespace swin::cuda
