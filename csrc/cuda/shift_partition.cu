// shift_partition: cyclic shift, window partition and quantize. residual T [M, C] -> out s8 [P, C] in window order.
// Formula: swin/ops.h.
//
// Layout: a thread owns 8 columns (16 bytes read, 8 written) of one row (columns.cuh); rows are taken in image order,
// so that none is padding. Floor: 3 bytes an element, and a byte for each of the padding (zero_padding.h). Not timed
// yet.
#include "columns.cuh"
#include "kernels.h"
#include "window_rows.cuh"
#include "zero_padding.h"

namespace swin::cuda {
namespace {

template <class T, int V, int kSteps>
__global__ void __launch_bounds__(kColumnThreads)
    shift_partition_kernel(const ColumnGrid grid, const T* __restrict__ residual, std::int8_t* __restrict__ out,
                           const WindowRows windows, const std::int64_t c, const float quant) {
  unsigned row, chunk;
  if (!grid.locate(row, chunk)) return;
  const std::int64_t column = static_cast<std::int64_t>(chunk) * V;
  Raw<T, V> in[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const unsigned r = row + step * grid.row_step;
    if (r < grid.rows) in[step].load(residual + r * c + column);
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const unsigned r = row + step * grid.row_step;
    if (r >= grid.rows) break;
    float x[V];
    in[step].floats(x);
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] *= quant;
    store_quantized<V>(out + windows.window_row(r) * c + column, x);
  }
}

template <class T, int V>
void run(const ShiftPartitionArgs& args, const ExecContext& context) {
  const std::int64_t c = args.residual.dim(1);
#define SWIN_KERNEL(steps) (shift_partition_kernel<T, V, steps>)
  SWIN_LAUNCH_COLUMNS("shift_partition", SWIN_KERNEL, args.geometry.tokens(), c / V, context.stream,
                      args.residual.as<const T>(), args.out.as<std::int8_t>(), WindowRows(args.geometry), c,
                      args.quant);
#undef SWIN_KERNEL
}

}  // namespace

template <class T>
void shift_partition(const ShiftPartitionArgs& args, const ExecContext& context) {
  if (args.residual.dim(1) % 8 == 0 && is_aligned(args.residual.data, 16) && is_aligned(args.out.data, 8)) {
    run<T, 8>(args, context);
  } else {
    run<T, 1>(args, context);
  }
  zero_padding("shift_partition", args.out, args.geometry, context.stream);
}

SWIN_INSTANTIATE(shift_partition, ShiftPartitionArgs)

}  // namespace swin::cuda
