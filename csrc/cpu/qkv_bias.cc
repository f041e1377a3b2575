// qkv_bias: dequantize, add the bias, quantize for Q, K or V, and split into heads.
// qkv s8 [BW*N, 3*h*d] -> out s8 [3, BW, h, N, d]. Formula: swin/ops.h.
#include "kernels.h"
#include "simd.h"

namespace swin::cpu::SWIN_ISA {

void qkv_bias(const QkvBiasArgs& args, const ExecContext& context) {
  const std::int64_t bw = args.out.dim(1), heads = args.out.dim(2), n = args.out.dim(3), d = args.out.dim(4);
  const std::int64_t c = heads * d;
  const float quant[3] = {args.quant_q, args.quant_k, args.quant_v};
  parallel_rows(context, bw * n, 16, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t row = first; row < last; ++row) {
      const std::int64_t window = row / n, token = row % n;
      const std::int8_t* x = args.qkv.as<const std::int8_t>() + row * 3 * c;
      for (std::int64_t t = 0; t < 3; ++t) {
        for (std::int64_t head = 0; head < heads; ++head) {
          const std::int64_t column = t * c + head * d;
          const float* bias = args.bias.as<const float>() + column;
          std::int8_t* out = args.out.as<std::int8_t>() + (((t * bw + window) * heads + head) * n + token) * d;
          for_lanes(d, [&](std::int64_t e, std::int64_t lanes) {
            store_s8(out + e, (load(x + column + e, lanes) * args.dequant + load(bias + e, lanes)) * quant[t], lanes);
          });
        }
      }
    }
  });
}

}  // namespace swin::cpu::SWIN_ISA
