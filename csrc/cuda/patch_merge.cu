// patch_merge: gather 2x2 neighbours to 4C channels and quantize, zeros beyond an odd H or W. residual T [B*H*W, C] ->
// out s8 [B*ceil(H/2)*ceil(W/2), 4C]. Formula: swin/ops.h.
//
// Layout: a thread owns 8 columns (16 bytes read, 8 written) of one row of 4C (columns.cuh) and finds its neighbour by
// one division. Floor: 3 bytes an element. Not timed yet.
#include "columns.cuh"
#include "kernels.h"

namespace swin::cuda {
namespace {

struct MergeShape {
  FastDiv half_h, half_w, per_neighbour;  // halves rounded up; per_neighbour: chunks of V columns of one neighbour
  std::int64_t c;
  unsigned height, width;
  float quant;
};

template <class T, int V, int kSteps>
__global__ void __launch_bounds__(kColumnThreads)
    patch_merge_kernel(const ColumnGrid grid, const T* __restrict__ residual, std::int8_t* __restrict__ out,
                       const MergeShape shape) {
  unsigned row, chunk;
  if (!grid.locate(row, chunk)) return;
  unsigned within = chunk;
  // Neighbours 0..3 in the order (0,0) (1,0) (0,1) (1,1) of (row parity, column parity).
  const unsigned which = shape.per_neighbour.split(within);
  Raw<T, V> in[kSteps];  // zeros beyond the image, whose bits are zeros too
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const unsigned r = row + step * grid.row_step;
    in[step] = {};
    if (r >= grid.rows) continue;
    unsigned x = r;
    unsigned y = shape.half_w.split(x);
    const unsigned b = shape.half_h.split(y);
    y = 2 * y + (which & 1);
    x = 2 * x + (which >> 1);
    if (y < shape.height && x < shape.width) {
      in[step].load(residual + ((b * shape.height + y) * shape.width + x) * shape.c + within * V);
    }
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const unsigned r = row + step * grid.row_step;
    if (r >= grid.rows) break;
    float values[V];
    in[step].floats(values);
#pragma unroll
    for (int i = 0; i < V; ++i) values[i] *= shape.quant;
    store_quantized<V>(out + r * 4 * shape.c + static_cast<std::int64_t>(chunk) * V, values);
  }
}

template <class T, int V>
void run(const PatchMergeArgs& args, const ExecContext& context) {
  const std::int64_t c = args.residual.dim(1);
  const MergeShape shape{FastDiv(ceil_div(args.height, 2)),
                         FastDiv(ceil_div(args.width, 2)),
                         FastDiv(c / V),
                         c,
                         static_cast<unsigned>(args.height),
                         static_cast<unsigned>(args.width),
                         args.quant};
#define SWIN_KERNEL(steps) (patch_merge_kernel<T, V, steps>)
  SWIN_LAUNCH_COLUMNS("patch_merge", SWIN_KERNEL, args.out.dim(0), 4 * c / V, context.stream,
                      args.residual.as<const T>(), args.out.as<std::int8_t>(), shape);
#undef SWIN_KERNEL
}

}  // namespace

template <class T>
void patch_merge(const PatchMergeArgs& args, const ExecContext& context) {
  if (args.residual.dim(1) % 8 == 0 && is_aligned(args.residual.data, 16) && is_aligned(args.out.data, 8)) {
    run<T, 8>(args, context);
  } else {
    run<T, 1>(args, context);
  }
}

SWIN_INSTANTIATE(patch_merge, PatchMergeArgs)

}  // namespace swin::cuda
