// dequantize: out = x * dequant. x s8 or s32 [M, C] -> out f32 [M, C].
#include "kernels.h"
#include "simd.h"

namespace swin::cpu::SWIN_ISA {
namespace {

template <class T>
void run(const DequantizeArgs& args, const ExecContext& context) {
  const std::int64_t c = args.x.dim(1);
  parallel_rows(context, args.x.dim(0), 32, [&](std::int64_t first, std::int64_t last) {
    const T* x = args.x.as<const T>();
    float* out = args.out.as<float>();
    for_lanes((last - first) * c, [&](std::int64_t i, std::int64_t n) {
      store(out + first * c + i, load(x + first * c + i, n) * args.dequant, n);
    });
  });
}

}  // namespace

void dequantize(const DequantizeArgs& args, const ExecContext& context) {
  if (args.x.dtype == DType::kS8) {
    run<std::int8_t>(args, context);
  } else {
    run<std::int32_t>(args, context);
  }
}

}  // namespace swin::cpu::SWIN_ISA
