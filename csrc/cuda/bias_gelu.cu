// bias_gelu: out = quantize(GELU(x * dequant + bias)), the operation the paper removes. x s8 [M, F], bias T [F] -> out
// s8 [M, F]. Formula: swin/ops.h.
//
// Layout: a thread owns 16 columns and 4 rows (columns.cuh): 16 bytes read and written a row, bias in registers.
// Floor: 2 bytes an element; for F = 384 at batch 128 (56 x 56 tokens) 308 MB. By count it is not bound by memory on
// the largest GPUs: about 20 instructions an element (3 of them in the special-function unit: reciprocal, exponential,
// float to int), where an H200's bandwidth leaves time for about 12. So the instructions are what is saved here: s8 to
// float through the mantissa, erf by a formula with one reciprocal and one exponential instead of erff's two branches.
// Not timed yet: erff; a polynomial in x^2 without special functions, which has more multiply-adds.
#include "columns.cuh"
#include "gelu.cuh"
#include "kernels.h"

namespace swin::cuda {
namespace {

template <class T, int V, int kSteps>
__global__ void __launch_bounds__(kColumnThreads)
    bias_gelu_kernel(const ColumnGrid grid, const std::int8_t* __restrict__ x, const T* __restrict__ bias,
                     std::int8_t* __restrict__ out, const std::int64_t f, const float dequant, const float quant) {
  unsigned row, chunk;
  if (!grid.locate(row, chunk)) return;
  const std::int64_t column = static_cast<std::int64_t>(chunk) * V;
  S8<V> in[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const unsigned r = row + step * grid.row_step;
    if (r < grid.rows) in[step] = load_s8<V>(x + r * f + column);
  }
  float b[V];
  load_floats(bias + column, b);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const unsigned r = row + step * grid.row_step;
    if (r >= grid.rows) break;
    float y[V];
    to_floats(in[step], y);
#pragma unroll
    for (int i = 0; i < V; ++i) y[i] = gelu(y[i] * dequant + b[i]) * quant;
    store_quantized<V>(out + r * f + column, y);
  }
}

template <class T, int V>
void run(const BiasGeluArgs& args, const ExecContext& context) {
  const std::int64_t f = args.x.dim(1);
#define SWIN_KERNEL(steps) (bias_gelu_kernel<T, V, steps>)
  SWIN_LAUNCH_COLUMNS("bias_gelu", SWIN_KERNEL, args.x.dim(0), f / V, context.stream, args.x.as<const std::int8_t>(),
                      args.bias.as<const T>(), args.out.as<std::int8_t>(), f, args.dequant, args.quant);
#undef SWIN_KERNEL
}

}  // namespace

template <class T>
void bias_gelu(const BiasGeluArgs& args, const ExecContext& context) {
  if (args.x.dim(1) % 16 == 0 && is_aligned(args.x.data, 16) && is_aligned(args.bias.data, 16) &&
      is_aligned(args.out.data, 16)) {
    run<T, 16>(args, context);
  } else {
    run<T, 1>(args, context);
  }
}

SWIN_INSTANTIATE(bias_gelu, BiasGeluArgs)

}  // namespace swin::cuda
