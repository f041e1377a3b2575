// head: out = features @ weight^T + bias in float32. features f32 [B, C], weight f32 [K, C] -> out f32 [B, K].
#include "kernels.h"
#include "simd.h"

namespace swin::cpu::SWIN_ISA {
namespace {

// R classes from `first` on of all images.
template <int R>
void classes_of(const HeadArgs& args, std::int64_t first) {
  const std::int64_t batch = args.features.dim(0), c = args.features.dim(1), classes = args.weight.dim(0);
  const float *w = args.weight.as<const float>() + first * c, *bias = args.bias.as<const float>() + first;
  for (std::int64_t b = 0; b < batch; ++b) {
    const float* features = args.features.as<const float>() + b * c;
    Vf sum[R];
    for (int r = 0; r < R; ++r) sum[r] = Vf{};
    for_lanes(c, [&](std::int64_t i, std::int64_t n) SWIN_INLINE {
      const Vf x = load(features + i, n);
      for (int r = 0; r < R; ++r) sum[r] += x * load(w + r * c + i, n);
    });
    float* out = args.out.as<float>() + b * classes + first;
    for (int r = 0; r < R; ++r) out[r] = sum_of(sum[r]) + bias[r];
  }
}

}  // namespace

void head(const HeadArgs& args, const ExecContext& context) {
  // One class alone waits for its sum. But of one image it is the weights' way from memory that takes the time, and one
  // stream of them is fetched ahead better than four.
  constexpr int kTogether = 4;
  const bool together = args.features.dim(0) > 1;
  parallel_rows(context, args.weight.dim(0), 16, [&](std::int64_t first, std::int64_t last) {
    std::int64_t k = first;
    for (; together && k + kTogether <= last; k += kTogether) classes_of<kTogether>(args, k);
    for (; k < last; ++k) classes_of<1>(args, k);
  });
}

}  // namespace swin::cpu::SWIN_ISA
