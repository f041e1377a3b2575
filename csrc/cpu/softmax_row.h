// Rows of attention scores through softmax, for the operations that differ in where their scores come from and in when
// they quantize.
//
// In passes over a few rows each, not row by row: a row's largest logit and its sum take some forty cycles to come
// together from a vector's lanes, and its exponentials wait for them. The other rows' work fills that time.
#pragma once

#include "simd.h"

namespace swin::cpu::SWIN_ISA {

inline constexpr std::int64_t kSoftmaxRows = 8;  // a pass: their logits stay in the first-level cache
inline constexpr float kLog2E = 1.44269504f;

// Logits of some rows of one window and head: scores times `scale`, plus position bias and shift mask.
struct LogitRows {
  const float *bias, *mask;  // [rows, n] each; mask: null where there is none
  std::int64_t n;
  float scale;
};

// x[r, v] = score(r, v * kLanes) * scale + bias + mask, -3e38 beyond column n, and the largest of each row. `vectors` is
// ceil(n / kLanes), as a constant where kVectors > 0.
template <int kVectors, class Score>
SWIN_INLINE static inline void logits_of(const LogitRows& of, std::int64_t rows, std::int64_t vectors, Score score, Vf* x,
                                         float* largest) {
  const std::int64_t count = kVectors > 0 ? kVectors : vectors, last = of.n - (count - 1) * kLanes;
  const auto each_row = [&](auto add_mask) SWIN_INLINE {
    for (std::int64_t r = 0; r < rows; ++r) {
      Vf most = splat(-3.0e38f);
#pragma GCC unroll 9
      for (std::int64_t v = 0; v < count; ++v) {
        const std::int64_t j = v * kLanes, lanes = v + 1 < count ? kLanes : last;
        Vf y = add_mask(score(r, j) * of.scale + load(of.bias + r * of.n + j, lanes), r * of.n + j, lanes);
        if (v + 1 == count) y = keep(y, lanes, -3.0e38f);
        x[r * count + v] = y;
        most = max_of(most, y);
      }
      largest[r] = max_lane(most);
    }
  };
  if (of.mask != nullptr) {
    each_row([&](Vf y, std::int64_t i, std::int64_t lanes) SWIN_INLINE { return y + load(of.mask + i, lanes); });
  } else {
    each_row([](Vf y, std::int64_t, std::int64_t) SWIN_INLINE { return y; });
  }
}

// Calls body(std::integral_constant<int, kVectors>): the number of vectors where it is at most nine, else 0.
template <int kVectors = 9, class Body>
SWIN_INLINE static inline void with_vectors(std::int64_t vectors, Body&& body) {
  if (vectors == kVectors) {
    body(Constant<kVectors>{});
  } else if constexpr (kVectors > 1) {
    with_vectors<kVectors - 1>(vectors, body);
  } else {
    body(Constant<0>{});
  }
}

// What softmax and head_scale_softmax have in common: scores s8 [n, pitch] of one window and head to out s8 [n, pitch].
struct SoftmaxS8 {
  const std::int8_t* scores;
  LogitRows logits;
  std::int8_t* out;
  std::int64_t pitch;
  float quant;
};

static inline std::int64_t softmax_scratch_bytes(std::int64_t n) {
  return kSoftmaxRows * ceil_div(n, kLanes) * static_cast<std::int64_t>(sizeof(Vf));
}

// `x`: softmax_scratch_bytes(n).
template <int kVectors>
static inline void softmax_s8(const SoftmaxS8& s, std::int64_t vectors, Vf* x) {
  const std::int64_t n = s.logits.n, count = kVectors > 0 ? kVectors : vectors;
  const auto room_of = [&](std::int64_t v) { return v + 1 < count ? kLanes : min_of(kLanes, s.pitch - v * kLanes); };
  for (std::int64_t first = 0; first < n; first += kSoftmaxRows) {
    const std::int64_t rows = min_of(kSoftmaxRows, n - first);
    float largest[kSoftmaxRows];
    Vf sums[kSoftmaxRows];
    LogitRows logits = s.logits;
    logits.bias += first * n;
    if (logits.mask != nullptr) logits.mask += first * n;
    logits_of<kVectors>(
        logits, rows, count,
        [scores = s.scores + first * s.pitch, pitch = s.pitch, room_of](std::int64_t r, std::int64_t j)
            SWIN_INLINE { return load(scores + r * pitch + j, room_of(j / kLanes)); },
        x, largest);
    for (std::int64_t r = 0; r < rows; ++r) {
      Vf sum{};
#pragma GCC unroll 9
      for (std::int64_t v = 0; v < count; ++v) {
        Vf& e = x[r * count + v];
        e = exp2_of((e - largest[r]) * splat(kLog2E));
        sum += e;
      }
      sums[r] = sum;
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      const float factor = s.quant / sum_of(sums[r]);
      std::int8_t* out = s.out + (first + r) * s.pitch;
      // Lanes past N hold exponentials of -3e38, which are 0.
#pragma GCC unroll 9
      for (std::int64_t v = 0; v < count; ++v) store_s8(out + v * kLanes, x[r * count + v] * factor, room_of(v));
      if (s.pitch > count * kLanes) std::memset(out + n, 0, s.pitch - n);
    }
  }
}

}  // namespace swin::cpu::SWIN_ISA
