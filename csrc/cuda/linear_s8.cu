// linear_s8: out = acc * scale[n] + bias[n], quantized or as float. x s8 [M, K], w s8 [N, K], scale, bias f32 [N] -> out s8 or
// T [M, N]. Formula: swin/ops.h. Quantized: by what the tuner chose (gemm_channels.cu); as float: tile_gemm.cuh.
#include "gemm_tiles.h"
#include "kernels.h"
#include "linear_epilogues.cuh"

namespace swin::cuda {

template <class T>
void linear_s8(const LinearS8Args& args, const ExecContext& context) {
  const char* op = "linear_s8";
  const float *scale = args.scale.as<const float>(), *bias = args.bias.as<const float>();
  if (args.out.dtype == DType::kS8) {
    channels_gemm(op, args.x, *args.w, GemmOutput::kChannelsS8, scale, bias, args.out.data, context.stream);
  } else {
    run_linear(op, args.x, *args.w, StoreRows<T>(scale, bias, args.out.as<T>(), args.w->n), context.stream);
  }
}

SWIN_INSTANTIATE(linear_s8, LinearS8Args)

}  // namespace swin::cuda
