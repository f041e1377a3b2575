// LayerNorm of rows in float32, two passes over a row: mean, then variance of what is left.
#pragma once

#include "simd.h"

namespace swin::cpu::SWIN_ISA {

struct RowStats {
  float mean, rstd;
};

// Of R rows of c values at once: what one row waits for, a sum that grows and then the way from a vector's lanes to a
// number, fills the others' time.
template <int R>
static inline void row_stats_of(const float* const* x, std::int64_t c, RowStats* stats) {
  Vf sum[R] = {}, squares[R] = {};
  for_lanes(c, [&](std::int64_t i, std::int64_t n) SWIN_INLINE {
    for (int r = 0; r < R; ++r) sum[r] += load(x[r] + i, n);
  });
  for (int r = 0; r < R; ++r) stats[r].mean = sum_of(sum[r]) / static_cast<float>(c);
  for_lanes(c, [&](std::int64_t i, std::int64_t n) SWIN_INLINE {
    for (int r = 0; r < R; ++r) {
      const Vf d = keep(load(x[r] + i, n) - stats[r].mean, n, 0.0f);  // unused lanes would add mean^2
      squares[r] += d * d;
    }
  });
  for (int r = 0; r < R; ++r) {
    const float variance = sum_of(squares[r]) / static_cast<float>(c);
    stats[r].rstd = 1.0f / __builtin_sqrtf(variance + kLayerNormEps);
  }
}

// The same of rows that have an x.
template <int R, class Row>
static inline void stats_of_rows(const Row* rows, std::int64_t c, RowStats* stats) {
  const float* x[R];
  for (int r = 0; r < R; ++r) x[r] = rows[r].x;
  row_stats_of<R>(x, c, stats);
}

static inline RowStats row_stats(const float* x, std::int64_t c) {
  RowStats stats;
  row_stats_of<1>(&x, c, &stats);
  return stats;
}

static inline Vf normalize(Vf x, RowStats s, const float* gamma, const float* beta, std::int64_t i, std::int64_t n) {
  return (x - s.mean) * s.rstd * load(gamma + i, n) + load(beta + i, n);
}

// Rows that are taken together, kTogether at a time, and written when enough of them were added, or at flush(). `Rows` has
// what Row says of one of them and template <int R> void write(const Row*) const.
template <class Rows>
class Together {
 public:
  template <class... Of>
  explicit Together(Of... of) : rows_{of...} {}

  template <class... Of>
  void add(Of... of) {
    row_[count_] = {of...};
    if (++count_ == kTogether) {
      rows_.template write<kTogether>(row_);
      count_ = 0;
    }
  }

  void flush() {
    for (int r = 0; r < count_; ++r) rows_.template write<1>(row_ + r);
    count_ = 0;
  }

  static constexpr int kTogether = 4;

 private:
  const Rows rows_;
  typename Rows::Row row_[kTogether];
  int count_ = 0;
};

// LayerNorm of rows of the residual stream, quantized: out = quantize(norm(x) * quant).
struct NormedRows {
  const float *gamma, *beta;
  std::int64_t c;
  float quant;

  struct Row {
    const float* x;
    std::int8_t* out;
  };
  template <int R>
  void write(const Row* rows) const {
    RowStats stats[R];
    stats_of_rows<R>(rows, c, stats);
    for_lanes(c, [&](std::int64_t i, std::int64_t n) SWIN_INLINE {
      const Vf scale = load(gamma + i, n), offset = load(beta + i, n);
      for (int r = 0; r < R; ++r) {
        store_s8(rows[r].out + i, ((load(rows[r].x + i, n) - stats[r].mean) * stats[r].rstd * scale + offset) * quant,
                 n);
      }
    });
  }
};
using NormQuantize = Together<NormedRows>;

// Swin-V2's norm behind a branch: residual += norm(x); out = quantize(residual * quant), where there is an out.
struct AddedRows {
  const float *gamma, *beta;
  std::int64_t c;
  float quant;

  struct Row {
    const float* x;
    float* residual;
    std::int8_t* out;
  };
  template <int R>
  void write(const Row* rows) const {
    RowStats stats[R];
    stats_of_rows<R>(rows, c, stats);
    for_lanes(c, [&](std::int64_t i, std::int64_t n) SWIN_INLINE {
      const Vf scale = load(gamma + i, n), offset = load(beta + i, n);
      for (int r = 0; r < R; ++r) {
        float* residual = rows[r].residual + i;
        const Vf sum = load(residual, n) + ((load(rows[r].x + i, n) - stats[r].mean) * stats[r].rstd * scale + offset);
        store(residual, sum, n);
        if (rows[r].out != nullptr) store_s8(rows[r].out + i, sum * quant, n);
      }
    });
  }
};
using AddQuantize = Together<AddedRows>;

}  // namespace swin::cpu::SWIN_ISA
