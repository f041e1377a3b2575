// qkv_bias_normalize: dequantize, add the bias, scale every head's q and k to length 1, quantize, and split into heads:
// Swin-V2's cosine attention. qkv s8 [BW*N, 3*h*d] -> out s8 [3, BW, h, N, d]. Formula: swin/ops.h.
// One head of one token at a time, kept in the thread's scratch between the sum of squares and the division.
#include "kernels.h"
#include "simd.h"

namespace swin::cpu::SWIN_ISA {

void qkv_bias_normalize(const QkvBiasNormalizeArgs& args, const ExecContext& context) {
  const std::int64_t bw = args.out.dim(1), heads = args.out.dim(2), n = args.out.dim(3), d = args.out.dim(4);
  const std::int64_t c = heads * d;
  const float quant[3] = {args.quant_q, args.quant_k, args.quant_v};
  parallel_rows(context, bw * n, 16, [&](std::int64_t first, std::int64_t last) {
    float* head_row = static_cast<float*>(thread_scratch((d + kLanes) * sizeof(float)));
    for (std::int64_t row = first; row < last; ++row) {
      const std::int64_t window = row / n, token = row % n;
      const std::int8_t* qkv = args.qkv.as<const std::int8_t>() + row * 3 * c;
      for (std::int64_t t = 0; t < 3; ++t) {
        for (std::int64_t head = 0; head < heads; ++head) {
          const std::int64_t column = t * c + head * d;
          const float* bias = args.bias.as<const float>() + column;
          std::int8_t* out = args.out.as<std::int8_t>() + (((t * bw + window) * heads + head) * n + token) * d;
          Vf squares{};
          for_lanes(d, [&](std::int64_t e, std::int64_t lanes) {  // unused lanes hold 0
            const Vf x = load(qkv + column + e, lanes) * args.dequant + load(bias + e, lanes);
            store(head_row + e, x);
            squares += x * x;
          });
          float factor = quant[t];
          if (t < 2) {
            const float length = __builtin_sqrtf(sum_of(squares));
            factor /= length < kNormalizeEps ? kNormalizeEps : length;  // NaN stays NaN
          }
          for_lanes(d,
                    [&](std::int64_t e, std::int64_t lanes) { store_s8(out + e, load(head_row + e) * factor, lanes); });
        }
      }
    }
  });
}

}  // namespace swin::cpu::SWIN_ISA
