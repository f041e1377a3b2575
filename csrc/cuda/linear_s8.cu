// linear_s8: out = acc * scale[n] + bias[n], quantized or as float. x s8 [M, K], w s8 [N, K], scale, bias f32 [N] -> out s8 or
// T [M, N]. Formula: swin/ops.h. Layout and floor: tile_gemm.cuh.
#include "kernels.h"
#include "linear_epilogues.cuh"

namespace swin::cuda {

template <class T>
void linear_s8(const LinearS8Args& args, const ExecContext& context) {
  const char* op = "linear_s8";
  const float *scale = args.scale.as<const float>(), *bias = args.bias.as<const float>();
  const std::int64_t n = args.w->n;
  if (args.out.dtype == DType::kS8) {
    run_linear(op, args.x, *args.w, QuantizeRows<Then::kQuantize>(scale, bias, args.out.as<std::int8_t>(), n),
               context.stream);
  } else {
    run_linear(op, args.x, *args.w, StoreRows<T>(scale, bias, args.out.as<T>(), n), context.stream);
  }
}

SWIN_INSTANTIATE(linear_s8, LinearS8Args)

}  // namespace swin::cuda
