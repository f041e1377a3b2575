// What the fused operations do with a GEMM's accumulators (tile_gemm.cuh): scale and bias of each output channel, then
// quantized, an activation, stored as float or added to the residual stream.
#pragma once

#include <type_traits>

#include "gelu.cuh"
#include "packed_weight.h"
#include "tile_gemm.cuh"
#include "window_rows.cuh"

namespace swin::cuda {

// y = acc * scale[n] + bias[n]; no bias: 0.
struct ChannelScale {
  static constexpr bool kCombines = false, kAdds = false;
  template <int V>
  struct Before {};
  const float *scale, *bias;

  template <int V>
  struct Column {
    float scale[V], bias[V];
    __device__ __forceinline__ void apply(float (&x)[V]) const {
#pragma unroll
      for (int i = 0; i < V; ++i) x[i] = x[i] * scale[i] + bias[i];
    }
  };
  template <int V>
  __device__ __forceinline__ Column<V> column(unsigned n) const {
    Column<V> c;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      c.scale[i] = scale[n + i];
      c.bias[i] = bias != nullptr ? bias[n + i] : 0.0f;
    }
    return c;
  }
};

enum class Then { kQuantize, kRelu, kGelu };

// out s8 [M, N]: quantized as it is, behind ReLU, or behind GELU with `quant`.
template <Then kThen>
struct QuantizeRows : ChannelScale {
  std::int8_t* out;
  std::int64_t n;
  float quant;

  QuantizeRows(const float* scale, const float* bias, std::int8_t* out, std::int64_t n, float quant = 1)
      : ChannelScale{scale, bias}, out(out), n(n), quant(quant) {}

  bool aligned() const { return is_aligned(out, kOwned); }
  template <int V>
  __device__ __forceinline__ void store(unsigned row, unsigned at, const Column<V>& c, float (&x)[V]) const {
    c.apply(x);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if constexpr (kThen == Then::kRelu) x[i] = fmaxf(x[i], 0.0f);
      if constexpr (kThen == Then::kGelu) x[i] = gelu(x[i]) * quant;
    }
    store_quantized<V>(out + row * n + at, x);
  }
};

// out T [M, N].
template <class T>
struct StoreRows : ChannelScale {
  T* out;
  std::int64_t n;

  StoreRows(const float* scale, const float* bias, T* out, std::int64_t n) : ChannelScale{scale, bias}, out(out), n(n) {}

  bool aligned() const { return is_aligned(out, 16); }
  template <int V>
  __device__ __forceinline__ void store(unsigned row, unsigned at, const Column<V>& c, float (&x)[V]) const {
    c.apply(x);
    store_floats<T, V>(out + row * n + at, x);
  }
};

// Row r of the GEMM is row r of what it is added to.
struct SameRows {
  __device__ __forceinline__ unsigned image_row(unsigned row) const { return row; }
};

// out T [M, N] += y, row r of the GEMM being row rows.image_row(r) of it (SameRows or WindowRows), or left out.
template <class T, class Rows>
struct AddRows : ChannelScale {
  static constexpr bool kAdds = true;
  template <int V>
  struct Before {
    unsigned row;
    Raw<T, V> values;
  };
  T* out;
  std::int64_t n;
  Rows rows;

  AddRows(const float* scale, const float* bias, T* out, std::int64_t n, const Rows& rows = {})
      : ChannelScale{scale, bias}, out(out), n(n), rows(rows) {}

  bool aligned() const { return is_aligned(out, 16); }
  __device__ __forceinline__ bool is_left_out(unsigned to) const {
    return !std::is_same_v<Rows, SameRows> && to == kNoRow;
  }
  template <int V>
  __device__ __forceinline__ Before<V> load(unsigned row, unsigned at) const {
    Before<V> before;
    before.row = rows.image_row(row);
    if (!is_left_out(before.row)) before.values.load(out + before.row * n + at);
    return before;
  }
  template <int V>
  __device__ __forceinline__ void store(unsigned, unsigned at, const Column<V>& c, float (&x)[V],
                                        const Before<V>& before) const {
    if (is_left_out(before.row)) return;
    c.apply(x);
    float old[V];
    before.values.floats(old);
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] += old[i];
    store_floats<T, V>(out + before.row * n + at, x);
  }
};

// Rows in image order: one window a whole "image" of m x 1 tokens.
inline WindowGeometry image_order(std::int64_t m) {
  WindowGeometry g;
  g.batch = 1;
  g.height = g.window_h = m;
  g.width = g.window_w = 1;
  return g;
}

inline GemmOperands operands(const char* op, const TensorView& x, const PackedWeight& w) {
  return {x.as<const std::int8_t>(), static_cast<const CudaPackedWeight&>(w).data, count32(op, "rows", x.dim(0)),
          count32(op, "columns", w.n), static_cast<int>(count32(op, "values of K", w.k))};
}

template <class Epilogue>
void run_linear(const char* op, const TensorView& x, const PackedWeight& w, const Epilogue& epilogue, void* stream) {
  launch_tile_gemm(op, operands(op, x, w), epilogue.aligned(), epilogue, stream);
}

}  // namespace swin::cuda
