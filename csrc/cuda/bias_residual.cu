// bias_residual: residual += x * dequant + bias. x s8 or s32 [M, C], bias T [C], residual T [M, C]. Formula:
// swin/ops.h.
//
// Layout: a thread owns 8 columns (16 bytes of residual, 8 or 32 of x) and 4 rows (columns.cuh), bias in registers.
// Floor: 5 bytes an element from s8, 8 from s32; about 4 instructions, so bound by memory.
#include "columns.cuh"
#include "kernels.h"

namespace swin::cuda {
namespace {

// V values of the residual as they are in memory.
template <class T, int V>
struct Stream {
  Words4 words;
  __device__ __forceinline__ void load(const T* p) { words = load_words(p); }
  __device__ __forceinline__ void floats(float (&y)[V]) const { unpack8<T>(words, y); }
};
template <class T>
struct Stream<T, 1> {
  T value;
  __device__ __forceinline__ void load(const T* p) { value = *p; }
  __device__ __forceinline__ void floats(float (&y)[1]) const { y[0] = to_float(value); }
};

template <class T, class X, int V, int kSteps>
__global__ void __launch_bounds__(kColumnThreads)
    bias_residual_kernel(const ColumnGrid grid, const X* __restrict__ x, const T* __restrict__ bias,
                         T* __restrict__ residual, const std::int64_t c, const float dequant) {
  unsigned row, chunk;
  if (!grid.locate(row, chunk)) return;
  const std::int64_t column = static_cast<std::int64_t>(chunk) * V;
  Integers<X, V> in[kSteps];
  Stream<T, V> stream[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const unsigned r = row + step * grid.row_step;
    if (r < grid.rows) {
      in[step].load(x + r * c + column);
      stream[step].load(residual + r * c + column);
    }
  }
  float b[V];
  load_floats(bias + column, b);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const unsigned r = row + step * grid.row_step;
    if (r >= grid.rows) break;
    float y[V], old[V];
    in[step].floats(y);
    stream[step].floats(old);
#pragma unroll
    for (int i = 0; i < V; ++i) y[i] = old[i] + (y[i] * dequant + b[i]);
    store_floats<T, V>(residual + r * c + column, y);
  }
}

template <class T, class X, int V>
void run(const BiasResidualArgs& args, const ExecContext& context) {
  const std::int64_t c = args.residual.dim(1);
#define SWIN_KERNEL(steps) (bias_residual_kernel<T, X, V, steps>)
  SWIN_LAUNCH_COLUMNS("bias_residual", SWIN_KERNEL, args.residual.dim(0), c / V, context.stream, args.x.as<const X>(),
                      args.bias.as<const T>(), args.residual.as<T>(), c, args.dequant);
#undef SWIN_KERNEL
}

template <class T, class X>
void run(const BiasResidualArgs& args, const ExecContext& context) {
  if (args.residual.dim(1) % 8 == 0 && is_aligned(args.x.data, sizeof(X) == 1 ? 8 : 16) &&
      is_aligned(args.bias.data, 16) && is_aligned(args.residual.data, 16)) {
    run<T, X, 8>(args, context);
  } else {
    run<T, X, 1>(args, context);
  }
}

}  // namespace

template <class T>
void bias_residual(const BiasResidualArgs& args, const ExecContext& context) {
  if (args.x.dtype == DType::kS8) {
    run<T, std::int8_t>(args, context);
  } else {
    run<T, std::int32_t>(args, context);
  }
}

SWIN_INSTANTIATE(bias_residual, BiasResidualArgs)

}  // namespace swin::cuda
