// bias_residual: residual += x * dequant + bias. x s8 or s32 [M, C], residual f32 [M, C]. Formula: swin/ops.h.
#include "kernels.h"
#include "simd.h"

namespace swin::cpu::SWIN_ISA {
namespace {

template <class T>
void run(const BiasResidualArgs& args, const ExecContext& context) {
  const std::int64_t c = args.residual.dim(1);
  const float* bias = args.bias.as<const float>();
  parallel_rows(context, args.residual.dim(0), 32, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t row = first; row < last; ++row) {
      const T* x = args.x.as<const T>() + row * c;
      float* residual = args.residual.as<float>() + row * c;
      for_lanes(c, [&](std::int64_t i, std::int64_t n) {
        store(residual + i, load(residual + i, n) + (load(x + i, n) * args.dequant + load(bias + i, n)), n);
      });
    }
  });
}

}  // namespace

void bias_residual(const BiasResidualArgs& args, const ExecContext& context) {
  if (args.x.dtype == DType::kS8) {
    run<std::int8_t>(args, context);
  } else {
    run<std::int32_t>(args, context);
  }
}

}  // namespace swin::cpu::SWIN_ISA
