// What Swin-V2's two residual ops share: one row of LayerNorm(x * dequant + bias), added to the residual stream.
#pragma once

#include "norm.h"

namespace swin::cpu::SWIN_ISA {

// residual += LayerNorm(x * dequant + bias), c channels; `scratch` holds c + kLanes floats. emit(i, value, n) gets the
// new residual's lanes i .. i+n-1.
template <class Emit>
static inline void add_normed_row(const std::int8_t* x, float dequant, const float* bias, const float* gamma,
                                  const float* beta, float* residual, std::int64_t c, float* scratch, Emit&& emit) {
  for_lanes(
      c, [&](std::int64_t i, std::int64_t n) { store(scratch + i, load(x + i, n) * dequant + load(bias + i, n), n); });
  const RowStats stats = row_stats(scratch, c);
  for_lanes(c, [&](std::int64_t i, std::int64_t n) {
    const Vf sum = load(residual + i, n) + normalize(load(scratch + i, n), stats, gamma, beta, i, n);
    store(residual + i, sum, n);
    emit(i, sum, n);
  });
}

}  // namespace swin::cpu::SWIN_ISA
