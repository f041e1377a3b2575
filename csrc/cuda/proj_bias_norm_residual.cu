// proj_bias_norm_residual: dequantize the projection, add its bias, LayerNorm, undo window partition and shift, add to
// the residual, quantize the residual as it is stored. proj s8 [P, C] in window order; residual T [M, C] and out s8
// [M, C] in image order. Formula: swin/ops.h.
//
// Layout: norm_residual.cuh. Floor: 6 bytes an element (3 read, 3 written). Not timed yet.
#include "kernels.h"
#include "norm_residual.cuh"

namespace swin::cuda {

template <class T>
void proj_bias_norm_residual(const ProjBiasNormResidualArgs& args, const ExecContext& context) {
  const std::int64_t c = args.residual.dim(1);
  const NormResidual<T, true> op{args.proj.as<const std::int8_t>(),
                                 args.bias.as<const T>(),
                                 args.gamma.as<const T>(),
                                 args.beta.as<const T>(),
                                 args.residual.as<T>(),
                                 args.out.as<std::int8_t>(),
                                 WindowRows(args.geometry),
                                 c,
                                 args.dequant,
                                 args.quant};
  launch_norm("proj_bias_norm_residual", op, args.geometry.tokens(), c, op.vectorised(), context.stream);
}

SWIN_INSTANTIATE(proj_bias_norm_residual, ProjBiasNormResidualArgs)

}  // namespace swin::cuda
