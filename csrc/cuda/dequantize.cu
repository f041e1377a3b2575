// dequantize: out = x * dequant. x s8 or s32 [M, C] -> out T [M, C].
//
// Layout: a thread converts 8 elements at a time (8 or 32 bytes read, 16 written), four of them a grid apart, loads
// first. The shape does not matter, so the tensor is one row. Floor: 3 bytes an element from s8, 6 from s32.
#include "device.cuh"
#include "kernels.h"

namespace swin::cuda {
namespace {

constexpr int kDequantizeThreads = 256;
constexpr int kSteps = 4;

template <class T, class X, int V>
__global__ void __launch_bounds__(kDequantizeThreads)
    dequantize_kernel(const X* __restrict__ x, T* __restrict__ out, const std::int64_t vectors, const float dequant) {
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * (kDequantizeThreads * kSteps) + threadIdx.x;
  Integers<X, V> in[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const std::int64_t i = first + step * kDequantizeThreads;
    if (i < vectors) in[step].load(x + i * V);
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const std::int64_t i = first + step * kDequantizeThreads;
    if (i < vectors) {
      float y[V];
      in[step].floats(y);
#pragma unroll
      for (int j = 0; j < V; ++j) y[j] *= dequant;
      store_floats<T, V>(out + i * V, y);
    }
  }
}

template <class T, class X>
void run(const DequantizeArgs& args, const ExecContext& context) {
  const X* x = args.x.as<const X>();
  T* out = args.out.as<T>();
  const std::int64_t elements = args.x.numel();
  const bool vectorised = elements % 8 == 0 && is_aligned(x, sizeof(X) == 1 ? 8 : 16) && is_aligned(out, 16);
  const std::int64_t vectors = vectorised ? elements / 8 : elements;
  const unsigned blocks = count32("dequantize", "blocks", ceil_div(vectors, kDequantizeThreads * kSteps));
  if (vectorised) {
    SWIN_LAUNCH("dequantize", (dequantize_kernel<T, X, 8>), blocks, kDequantizeThreads, 0, context.stream, x, out,
                vectors, args.dequant);
  } else {
    SWIN_LAUNCH("dequantize", (dequantize_kernel<T, X, 1>), blocks, kDequantizeThreads, 0, context.stream, x, out,
                vectors, args.dequant);
  }
}

}  // namespace

template <class T>
void dequantize(const DequantizeArgs& args, const ExecContext& context) {
  if (args.x.dtype == DType::kS8) {
    run<T, std::int8_t>(args, context);
  } else {
    run<T, std::int32_t>(args, context);
  }
}

SWIN_INSTANTIATE(dequantize, DequantizeArgs)

}  // namespace swin::cuda
