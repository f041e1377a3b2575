// patch_embed_norm: x = LayerNorm(x + bias) in place, or only the bias where there is no gamma. x T [M, C]; bias,
// gamma, beta T [C], each of them or none. Formula: swin/ops.h.
//
// Layout: norm.cuh with the row, bias added, kept in float32: what is normalised is not rounded to T first. Without
// gamma: columns.cuh. Floor: 4 bytes an element.
#include "columns.cuh"
#include "kernels.h"
#include "norm.cuh"

namespace swin::cuda {
namespace {

template <class T>
struct PatchEmbedNorm {
  T* x;
  const T *bias, *gamma, *beta;
  std::int64_t c;

  static constexpr int kLongest = 6;
  struct Row {
    T* x;
  };
  using Raw = Words4;
  struct Kept {
    float x[8];
  };

  __device__ __forceinline__ Row row(unsigned r) const { return {x + r * c}; }
  __device__ __forceinline__ Raw load(const Row& row, int chunk) const { return load_words(row.x + 8 * chunk); }
  __device__ __forceinline__ Kept keep(const Row&, int chunk, const Raw& raw) const {
    Kept kept;
    float b[8] = {};
    unpack8<T>(raw, kept.x);
    if (bias != nullptr) load_floats(bias + 8 * chunk, b);
#pragma unroll
    for (int i = 0; i < 8; ++i) kept.x[i] += b[i];
    return kept;
  }
  __device__ __forceinline__ void unpack(const Kept& kept, float (&y)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i] = kept.x[i];
  }
  __device__ __forceinline__ void store(const Row& row, int chunk, const float (&y)[8]) const {
    store_floats<T, 8>(row.x + 8 * chunk, y);
  }

  __device__ __forceinline__ float first(const Row& row, int i) const {
    return to_float(row.x[i]) + (bias != nullptr ? to_float(bias[i]) : 0.0f);
  }
  __device__ __forceinline__ float again(const Row& row, int i) const { return first(row, i); }
  __device__ __forceinline__ void store_one(const Row& row, int i, float y) const { row.x[i] = from_float<T>(y); }
};

template <class T, int V, int kSteps>
__global__ void __launch_bounds__(kColumnThreads)
    add_bias_kernel(const ColumnGrid grid, T* __restrict__ x, const T* __restrict__ bias, const std::int64_t c) {
  unsigned row, chunk;
  if (!grid.locate(row, chunk)) return;
  const std::int64_t column = static_cast<std::int64_t>(chunk) * V;
  float b[V];
  load_floats(bias + column, b);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const unsigned r = row + step * grid.row_step;
    if (r >= grid.rows) break;
    float y[V];
    load_floats(x + r * c + column, y);
#pragma unroll
    for (int i = 0; i < V; ++i) y[i] += b[i];
    store_floats<T, V>(x + r * c + column, y);
  }
}

template <class T, int V>
void add_bias(const PatchEmbedNormArgs& args, const ExecContext& context) {
  const std::int64_t c = args.x.dim(1);
#define SWIN_KERNEL(steps) (add_bias_kernel<T, V, steps>)
  SWIN_LAUNCH_COLUMNS("patch_embed_norm", SWIN_KERNEL, args.x.dim(0), c / V, context.stream, args.x.as<T>(),
                      args.bias.as<const T>(), c);
#undef SWIN_KERNEL
}

}  // namespace

template <class T>
void patch_embed_norm(const PatchEmbedNormArgs& args, const ExecContext& context) {
  const std::int64_t c = args.x.dim(1);
  const PatchEmbedNorm<T> op{args.x.as<T>(), args.bias.as<const T>(), args.gamma.as<const T>(), args.beta.as<const T>(),
                             c};
  const bool vectorised = c % 8 == 0 && is_aligned(op.x, 16) && is_aligned(op.bias, 16) && is_aligned(op.gamma, 16) &&
                          is_aligned(op.beta, 16);
  if (op.gamma != nullptr) {
    launch_norm("patch_embed_norm", op, args.x.dim(0), c, vectorised, context.stream);
  } else if (op.bias == nullptr) {
    return;  // nothing to do
  } else if (vectorised) {
    add_bias<T, 8>(args, context);
  } else {
    add_bias<T, 1>(args, context);
  }
}

SWIN_INSTANTIATE(patch_embed_norm, PatchEmbedNormArgs)

}  // namespace swin::cuda
