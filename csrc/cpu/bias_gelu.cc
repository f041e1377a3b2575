// bias_gelu: out = quantize(GELU(x * dequant + bias)), the operation the paper removes. x s8 [M, F] -> out s8 [M, F].
// Formula: swin/ops.h.
#include "gelu.h"
#include "kernels.h"
#include "simd.h"

namespace swin::cpu::SWIN_ISA {

constexpr int kAtOnce = 8;  // vectors

void bias_gelu(const BiasGeluArgs& args, const ExecContext& context) {
  const std::int64_t f = args.x.dim(1);
  const float* bias = args.bias.as<const float>();
  parallel_rows(context, args.x.dim(0), 8, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t row = first; row < last; ++row) {
      const std::int8_t* x = args.x.as<const std::int8_t>() + row * f;
      std::int8_t* out = args.out.as<std::int8_t>() + row * f;
      const auto vectors = [&]<int N>(std::int64_t i, std::int64_t lanes) SWIN_INLINE {
        Vf y[N];
        for (int v = 0; v < N; ++v) {
          y[v] = load(x + i + v * kLanes, lanes) * args.dequant + load(bias + i + v * kLanes, lanes);
        }
        gelu(y);
        for (int v = 0; v < N; ++v) store_s8(out + i + v * kLanes, y[v] * args.quant, lanes);
      };
      std::int64_t i = 0;
      for (; i + kAtOnce * kLanes <= f; i += kAtOnce * kLanes) vectors.template operator()<kAtOnce>(i, kLanes);
      for (; i < f; i += kLanes) vectors.template operator()<1>(i, min_of(kLanes, f - i));
    }
  });
}

}  // namespace swin::cpu::SWIN_ISA
