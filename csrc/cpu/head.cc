// head: out = features @ weight^T + bias in float32. features f32 [B, C], weight f32 [K, C] -> out f32 [B, K].
#include "kernels.h"
#include "simd.h"

namespace swin::cpu::SWIN_ISA {

void head(const HeadArgs& args, const ExecContext& context) {
  const std::int64_t batch = args.features.dim(0), c = args.features.dim(1), classes = args.weight.dim(0);
  parallel_rows(context, classes, 16, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t k = first; k < last; ++k) {
      const float* w = args.weight.as<const float>() + k * c;
      for (std::int64_t b = 0; b < batch; ++b) {
        const float* x = args.features.as<const float>() + b * c;
        Vf sum{};
        for_lanes(c, [&](std::int64_t i, std::int64_t n) { sum += load(x + i, n) * load(w + i, n); });
        args.out.as<float>()[b * classes + k] = sum_of(sum) + args.bias.as<const float>()[k];
      }
    }
  });
}

}  // namespace swin::cpu::SWIN_ISA
