// LayerNorm of one row in float32, two passes over the row: mean, then variance of what is left.
#pragma once

#include "simd.h"

namespace swin::cpu::SWIN_ISA {

struct RowStats {
  float mean, rstd;
};

// `at(i, n)` gives lanes i .. i+n-1 of the row.
template <class At>
static inline RowStats row_stats(std::int64_t c, At&& at) {
  Vf sum{};
  for_lanes(c, [&](std::int64_t i, std::int64_t n) { sum += at(i, n); });
  const float mean = sum_of(sum) / static_cast<float>(c);
  Vf squares{};
  for_lanes(c, [&](std::int64_t i, std::int64_t n) {
    const Vf d = keep(at(i, n) - mean, n, 0.0f);  // unused lanes would add mean^2
    squares += d * d;
  });
  const float variance = sum_of(squares) / static_cast<float>(c);
  return {mean, 1.0f / __builtin_sqrtf(variance + kLayerNormEps)};
}

static inline Vf normalize(Vf x, RowStats s, const float* gamma, const float* beta, std::int64_t i, std::int64_t n) {
  return (x - s.mean) * s.rstd * load(gamma + i, n) + load(beta + i, n);
}

}  // namespace swin::cpu::SWIN_ISA
