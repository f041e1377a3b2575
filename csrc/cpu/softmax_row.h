// One row of attention scores through softmax, for the operations that differ only in where its scale comes from. In
// registers where the row has few enough vectors.
#pragma once

#include "simd.h"

namespace swin::cpu::SWIN_ISA {

struct SoftmaxRow {
  const std::int8_t* scores;
  const float *bias, *mask;  // mask: null where there is none
  std::int8_t* out;
  std::int64_t n, pitch;
  float scale, quant;
};

// `vectors` is ceil(n / kLanes); as a constant (kVectors > 0) the row stays in registers.
template <int kVectors>
static inline void softmax_row(const SoftmaxRow& row, std::int64_t vectors, Vf* x) {
  const std::int64_t count = kVectors > 0 ? kVectors : vectors;
  const auto lanes_of = [&](std::int64_t v) { return v + 1 < count ? kLanes : row.n - v * kLanes; };
  const auto room_of = [&](std::int64_t v) { return v + 1 < count ? kLanes : min_of(kLanes, row.pitch - v * kLanes); };
  Vf largest = splat(-3.0e38f);
  for (std::int64_t v = 0; v < count; ++v) {
    const std::int64_t j = v * kLanes, lanes = lanes_of(v);
    Vf y = load(row.scores + j, room_of(v)) * row.scale + load(row.bias + j, lanes);
    if (row.mask != nullptr) y += load(row.mask + j, lanes);
    x[v] = lanes == kLanes ? y : keep(y, lanes, -3.0e38f);
    largest = max_of(largest, x[v]);
  }
  const float top = max_lane(largest);
  Vf sum{};
  for (std::int64_t v = 0; v < count; ++v) {
    x[v] = exp2_of((x[v] - top) * splat(1.44269504f));
    sum += x[v];
  }
  const float factor = row.quant / sum_of(sum);
  // Lanes past N hold exponentials of -3e38, which are 0.
  for (std::int64_t v = 0; v < count; ++v) store_s8(row.out + v * kLanes, x[v] * factor, room_of(v));
}

template <int kVectors = 9>
static inline void dispatch_row(const SoftmaxRow& row, std::int64_t vectors, Vf* x) {
  if (vectors == kVectors) {
    Vf registers[kVectors];
    softmax_row<kVectors>(row, vectors, registers);
  } else if constexpr (kVectors > 1) {
    dispatch_row<kVectors - 1>(row, vectors, x);
  } else {
    softmax_row<0>(row, vectors, x);
  }
}

}  // namespace swin::cpu::SWIN_ISA
