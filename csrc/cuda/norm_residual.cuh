// What Swin-V2's residual operations share, a row at a time (norm.cuh): in FT's graphs residual += LayerNorm(x * dequant +
// bias), x s8, in the fused one residual += LayerNorm(branch), branch f32. What is normalised stays in registers as
// float32; the residual is read where the sum is made.
#pragma once

#include "norm.cuh"
#include "window_rows.cuh"

namespace swin::cuda {

// With kWindows x lies in window order, residual and out in image order, and out gets the residual as it is stored,
// quantized; without, rows are the same on both sides and there is no out. Rows are taken in the residual's order.
template <class T, bool kWindows>
struct NormResidual {
  const std::int8_t* x;
  const T *bias, *gamma, *beta;
  T* residual;
  std::int8_t* out;
  WindowRows windows;
  std::int64_t c;
  float dequant, quant;

  static constexpr int kLongest = 6;
  struct Row {
    const std::int8_t* x;
    T* residual;
    std::int8_t* out;
  };
  using Raw = S8<8>;
  struct Kept {
    float x[8];
  };

  __device__ __forceinline__ Row row(unsigned r) const {
    const std::int64_t target = r * c;
    return {x + (kWindows ? windows.window_row(r) : r) * c, residual + target, kWindows ? out + target : nullptr};
  }
  __device__ __forceinline__ Raw load(const Row& row, int chunk) const { return load_s8<8>(row.x + 8 * chunk); }
  __device__ __forceinline__ Kept keep(const Row&, int chunk, const Raw& raw) const {
    Kept kept;
    float b[8];
    to_floats(raw, kept.x);
    load_floats(bias + 8 * chunk, b);
#pragma unroll
    for (int i = 0; i < 8; ++i) kept.x[i] = kept.x[i] * dequant + b[i];
    return kept;
  }
  __device__ __forceinline__ void unpack(const Kept& kept, float (&y)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i] = kept.x[i];
  }
  __device__ __forceinline__ void store(const Row& row, int chunk, float (&y)[8]) const {
    float sum[8];
    load_floats(row.residual + 8 * chunk, sum);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] += y[i];
    const Words4 rounded = pack8<T>(sum);
    store_words(row.residual + 8 * chunk, rounded);
    if constexpr (kWindows) {
      unpack8<T>(rounded, sum);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i] *= quant;
      store_quantized<8>(row.out + 8 * chunk, sum);
    }
  }

  __device__ __forceinline__ float first(const Row& row, int i) const {
    return static_cast<float>(row.x[i]) * dequant + to_float(bias[i]);
  }
  __device__ __forceinline__ float again(const Row& row, int i) const { return first(row, i); }
  __device__ __forceinline__ void store_one(const Row& row, int i, float y) const {
    const T rounded = from_float<T>(to_float(row.residual[i]) + y);
    row.residual[i] = rounded;
    if constexpr (kWindows) {
      const float scaled[1] = {to_float(rounded) * quant};
      store_quantized<1>(row.out + i, scaled);
    }
  }

  bool vectorised() const {
    return c % 8 == 0 && is_aligned(x, 8) && is_aligned(bias, 16) && is_aligned(gamma, 16) && is_aligned(beta, 16) &&
           is_aligned(residual, 16) && (!kWindows || is_aligned(out, 8));
  }
};

// End says where rows come from and go to (RowEnd, row_tiles.cuh). `out`, if there is one, gets the residual as it is
// stored, quantized. Rows are taken in the residual's order, which leaves out the branch's padding.
template <class T, class End>
struct NormBranch : End {
  const float* branch;
  std::int64_t c;

  NormBranch(const End& end, const float* branch, std::int64_t c) : End(end), branch(branch), c(c) {}

  static constexpr int kLongest = 6;
  struct Row {
    const float* branch;
    T* residual;
    std::int8_t* out;
  };
  struct Raw {
    float x[8];
  };
  using Kept = Raw;

  __device__ __forceinline__ Row row(unsigned r) const {
    std::int8_t* const quantized = this->out == nullptr ? nullptr : this->out + this->out_row(r) * c;
    return {branch + this->branch_row(r) * c, this->residual + r * c, quantized};
  }
  __device__ __forceinline__ Raw load(const Row& row, int chunk) const {
    Raw raw;
    load_floats(row.branch + 8 * chunk, raw.x);
    return raw;
  }
  __device__ __forceinline__ Kept keep(const Row&, int, const Raw& raw) const { return raw; }
  __device__ __forceinline__ void unpack(const Kept& kept, float (&y)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i] = kept.x[i];
  }
  __device__ __forceinline__ void store(const Row& row, int chunk, float (&y)[8]) const {
    float sum[8];
    load_floats(row.residual + 8 * chunk, sum);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] += y[i];
    const Words4 rounded = pack8<T>(sum);
    store_words(row.residual + 8 * chunk, rounded);
    if (row.out == nullptr) return;
    unpack8<T>(rounded, sum);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] *= this->quant;
    store_quantized<8>(row.out + 8 * chunk, sum);
  }

  __device__ __forceinline__ float first(const Row& row, int i) const { return row.branch[i]; }
  __device__ __forceinline__ float again(const Row& row, int i) const { return row.branch[i]; }
  __device__ __forceinline__ void store_one(const Row& row, int i, float y) const {
    const T rounded = from_float<T>(to_float(row.residual[i]) + y);
    row.residual[i] = rounded;
    if (row.out == nullptr) return;
    const float scaled[1] = {to_float(rounded) * this->quant};
    store_quantized<1>(row.out + i, scaled);
  }

  bool vectorised() const {
    return c % 8 == 0 && is_aligned(branch, 16) && is_aligned(this->gamma, 16) && is_aligned(this->beta, 16) &&
           is_aligned(this->residual, 16) && is_aligned(this->out, 8);
  }
};

}  // namespace swin::cuda
