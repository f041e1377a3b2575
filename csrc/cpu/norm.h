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

static inline RowStats row_stats(const float* x, std::int64_t c) {
  RowStats stats;
  row_stats_of<1>(&x, c, &stats);
  return stats;
}

static inline Vf normalize(Vf x, RowStats s, const float* gamma, const float* beta, std::int64_t i, std::int64_t n) {
  return (x - s.mean) * s.rstd * load(gamma + i, n) + load(beta + i, n);
}

// LayerNorm of rows of the residual stream, quantized: out = quantize(norm(x) * quant). Rows are taken together, so they are
// written when enough of them were added, or at flush().
class NormQuantize {
 public:
  NormQuantize(const float* gamma, const float* beta, std::int64_t c, float quant)
      : gamma_(gamma), beta_(beta), c_(c), quant_(quant) {}

  void add(const float* x, std::int8_t* out) {
    x_[count_] = x;
    out_[count_] = out;
    if (++count_ == kRows) {
      write<kRows>(x_, out_);
      count_ = 0;
    }
  }

  void flush() {
    for (int r = 0; r < count_; ++r) write<1>(x_ + r, out_ + r);
    count_ = 0;
  }

 private:
  static constexpr int kRows = 4;

  template <int R>
  void write(const float* const* x, std::int8_t* const* out) const {
    RowStats stats[R];
    row_stats_of<R>(x, c_, stats);
    for_lanes(c_, [&](std::int64_t i, std::int64_t n) SWIN_INLINE {
      const Vf gamma = load(gamma_ + i, n), beta = load(beta_ + i, n);
      for (int r = 0; r < R; ++r) {
        store_s8(out[r] + i, ((load(x[r] + i, n) - stats[r].mean) * stats[r].rstd * gamma + beta) * quant_, n);
      }
    });
  }

  const float *gamma_, *beta_;
  const std::int64_t c_;
  const float quant_;
  const float* x_[kRows];
  std::int8_t* out_[kRows];
  int count_ = 0;
};

}  // namespace swin::cpu::SWIN_ISA
