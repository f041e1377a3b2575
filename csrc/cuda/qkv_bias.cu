// qkv_bias: dequantize, add the bias, quantize for Q, K or V, and split into heads. qkv s8 [BW*N, 3*h*d], bias T
// [3*h*d]
// -> out s8 [3, BW, h, N, d]. Formula: swin/ops.h.
//
// Layout: a thread owns 16 columns of one head (8 where d is only a multiple of 8) and 4 rows (columns.cuh). Reads are
// contiguous; writes are runs of d bytes, full 32-byte sectors for d = 32, whose neighbours the next rows write. Bias
// and scales are per column, so both are folded into one multiply-add: (x*dequant + bias) * quant. Floor: 2 bytes an
// element; about 6 instructions, so bound by memory.
#include "columns.cuh"
#include "kernels.h"

namespace swin::cuda {
namespace {

struct QkvShape {
  FastDiv n, d, heads;
  unsigned bw;
  float dequant, quant[3];
};

template <class T, int V, int kSteps>
__global__ void __launch_bounds__(kColumnThreads)
    qkv_bias_kernel(const ColumnGrid grid, const std::int8_t* __restrict__ qkv, const T* __restrict__ bias,
                    std::int8_t* __restrict__ out, const QkvShape shape) {
  unsigned row, chunk;
  if (!grid.locate(row, chunk)) return;
  const unsigned column = chunk * V;
  const std::int64_t width = static_cast<std::int64_t>(grid.chunks.divisor()) * V;
  S8<V> in[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const unsigned r = row + step * grid.row_step;
    if (r < grid.rows) in[step] = load_s8<V>(qkv + r * width + column);
  }
  unsigned e = column;  // column = (t*h + head)*d + e
  unsigned head = shape.d.split(e);
  const unsigned t = shape.heads.split(head);
  const float quant = t == 0 ? shape.quant[0] : t == 1 ? shape.quant[1] : shape.quant[2];
  const float scale = shape.dequant * quant;
  float b[V];
  load_floats(bias + column, b);
#pragma unroll
  for (int i = 0; i < V; ++i) b[i] *= quant;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const unsigned r = row + step * grid.row_step;
    if (r >= grid.rows) break;
    unsigned token = r;
    const unsigned window = shape.n.split(token);
    float y[V];
    to_floats(in[step], y);
#pragma unroll
    for (int i = 0; i < V; ++i) y[i] = y[i] * scale + b[i];
    const std::int64_t target =
        (((static_cast<std::int64_t>(t) * shape.bw + window) * shape.heads.divisor() + head) * shape.n.divisor() +
         token) *
            shape.d.divisor() +
        e;
    store_quantized<V>(out + target, y);
  }
}

template <class T, int V>
void run(const QkvBiasArgs& args, const ExecContext& context) {
  const std::int64_t bw = args.out.dim(1), heads = args.out.dim(2), n = args.out.dim(3), d = args.out.dim(4);
  const QkvShape shape{FastDiv(n),     FastDiv(d),
                       FastDiv(heads), count32("qkv_bias", "windows", bw),
                       args.dequant,   {args.quant_q, args.quant_k, args.quant_v}};
#define SWIN_KERNEL(steps) (qkv_bias_kernel<T, V, steps>)
  SWIN_LAUNCH_COLUMNS("qkv_bias", SWIN_KERNEL, bw * n, 3 * heads * d / V, context.stream,
                      args.qkv.as<const std::int8_t>(), args.bias.as<const T>(), args.out.as<std::int8_t>(), shape);
#undef SWIN_KERNEL
}

}  // namespace

template <class T>
void qkv_bias(const QkvBiasArgs& args, const ExecContext& context) {
  const std::int64_t d = args.out.dim(4);
  const auto fits = [&](int v) {
    return d % v == 0 && is_aligned(args.qkv.data, v) && is_aligned(args.out.data, v) && is_aligned(args.bias.data, 16);
  };
  if (fits(16)) {
    run<T, 16>(args, context);
  } else if (fits(8)) {
    run<T, 8>(args, context);
  } else {
    run<T, 1>(args, context);
  }
}

SWIN_INSTANTIATE(qkv_bias, QkvBiasArgs)

}  // namespace swin::cuda
