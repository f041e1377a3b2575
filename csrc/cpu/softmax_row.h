// Rows of attention scores through softmax, for the operations that differ in where their scores come from and in when
// they quantize.
//
// In passes over a few rows each, not row by row: a row's largest logit and its sum take some forty cycles to come
// together from a vector's lanes, and its exponentials wait for them. The other rows' work fills that time, and vectors of as
// many rows as they have lanes are reduced together in half the instructions.
//
// A window of 7 x 7 has 49 columns, one more than whole vectors. This lone column would cost each row a vector that holds
// one number; the rows of a pass share vectors for it instead, a lane each.
#pragma once

#include "simd.h"

namespace swin::cpu::SWIN_ISA {

inline constexpr std::int64_t kSoftmaxRows = kLanes > 8 ? kLanes : 8;  // a pass: their logits stay in the first-level cache
inline constexpr std::int64_t kRowVectors = kSoftmaxRows / kLanes;     // vectors with a lane for each row of a pass
inline constexpr float kLog2E = 1.44269504f;

// What some rows of one window and head add to their scores: position bias and shift mask.
struct LogitRows {
  const float *bias, *mask;  // n columns a row, one row after the other; mask: null where there is none
  std::int64_t n;
  const std::int32_t* starts = nullptr;  // of the rows' biases, counted from `bias`, where they do not lie so

  const float* bias_row(std::int64_t row) const { return bias + (starts == nullptr ? row * n : starts[row]); }
  LogitRows from(std::int64_t row) const {
    LogitRows rest = *this;
    if (mask != nullptr) rest.mask += row * n;
    if (starts != nullptr) {
      rest.starts += row;
    } else {
      rest.bias += row * n;
    }
    return rest;
  }
};

// n rows in passes of at most kSoftmaxRows, as equal as can be: calls body(first, rows).
template <class Body>
SWIN_INLINE static inline void each_pass(std::int64_t n, Body&& body) {
  const std::int64_t passes = ceil_div(n, kSoftmaxRows);
  for (std::int64_t pass = 0; pass < passes; ++pass) {
    const std::int64_t first = pass * n / passes;
    body(first, (pass + 1) * n / passes - first);
  }
}

// A number for each row of a pass, 0 beyond them.
struct RowNumbers {
  alignas(64) float of[kSoftmaxRows] = {};

  Vf vector(std::int64_t v) const { return load(of + v * kLanes); }
};

// A vector for each row of a pass, whose lanes `combine` (sums_of, largest_of) brings together to a number.
struct RowVectors {
  Vf of[kSoftmaxRows];

  template <class Combine>
  SWIN_INLINE void reduce_to(RowNumbers& numbers, std::int64_t rows, Combine&& combine) {
    for (std::int64_t r = rows; r < kSoftmaxRows; ++r) of[r] = Vf{};
    for (std::int64_t v = 0; v < kRowVectors; ++v) store(numbers.of + v * kLanes, combine(of + v * kLanes));
  }
};

// x[r, v] = score(r, v * kLanes) + bias + mask for `vectors` vectors, -3e38 beyond column n, and the largest of each
// lane. kLone: they are n / kLanes whole vectors, and column n - 1 is left out.
template <int kVectors, bool kLone, class Score>
SWIN_INLINE static inline void whole_logits_of(const LogitRows& of, std::int64_t rows, std::int64_t vectors,
                                               Score score, Vf* x, RowVectors& most_of) {
  const std::int64_t count = kVectors > 0 ? kVectors : vectors, last = kLone ? kLanes : of.n - (count - 1) * kLanes;
  const auto each_row = [&](auto add_mask) SWIN_INLINE {
    for (std::int64_t r = 0; r < rows; ++r) {
      Vf most = splat(-3.0e38f);
      const float* bias = of.bias_row(r);
#pragma GCC unroll 9
      for (std::int64_t v = 0; v < count; ++v) {
        const std::int64_t j = v * kLanes, lanes = v + 1 < count ? kLanes : last;
        Vf y = add_mask(score(r, j) + load(bias + j, lanes), r * of.n + j, lanes);
        if (!kLone && v + 1 == count) y = keep(y, lanes, -3.0e38f);
        x[r * count + v] = y;
        most = max_of(most, y);
      }
      most_of.of[r] = most;
    }
  };
  if (of.mask != nullptr) {
    each_row([&](Vf y, std::int64_t i, std::int64_t lanes) SWIN_INLINE { return y + load(of.mask + i, lanes); });
  } else {
    each_row([](Vf y, std::int64_t, std::int64_t) SWIN_INLINE { return y; });
  }
}

// The same, and the largest of each row; kLone: the logits of column n - 1, whose score is lone_score(r), go to `lone`.
template <int kVectors, bool kLone, class Score, class LoneScore>
SWIN_INLINE static inline void logits_of(const LogitRows& of, std::int64_t rows, std::int64_t vectors, Score score,
                                         LoneScore lone_score, Vf* x, RowNumbers& largest, RowNumbers& lone) {
  RowVectors most_of;
  whole_logits_of<kVectors, kLone>(of, rows, vectors, score, x, most_of);
  most_of.reduce_to(largest, rows, largest_of);
  if constexpr (kLone) {
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t last_column = of.n - 1;
      const float y = lone_score(r) + of.bias_row(r)[last_column];
      lone.of[r] = of.mask != nullptr ? y + of.mask[r * of.n + last_column] : y;
    }
    for (std::int64_t v = 0; v < kRowVectors; ++v) {
      store(largest.of + v * kLanes, max_of(largest.vector(v), lone.vector(v)));
    }
  }
}

// The most vectors of a row that has an instance of its own. With the sanitizers' checks in each, which take long to
// compile, those of windows up to 7 x 7.
#if defined(SWIN_SANITIZED)
inline constexpr int kMostVectors = 6;
#else
inline constexpr int kMostVectors = 9;
#endif

// Whether a row of n columns has a lone one beside its whole vectors.
constexpr bool has_lone_column(std::int64_t n) { return n > kLanes && n % kLanes == 1; }

// Whether the rows of any square window have so many vectors beside a lone column, or without one. (Others there are
// where an image has fewer tokens than a window one way.)
constexpr bool window_has(int vectors, bool lone) {
  for (std::int64_t side = 1; side * side <= vectors * kLanes + 1; ++side) {
    const std::int64_t n = side * side;
    if (lone == has_lone_column(n) && vectors == (lone ? n / kLanes : (n + kLanes - 1) / kLanes)) return true;
  }
  return false;
}

// Calls body(Constant<vectors>{}) where there is an instance for as many, of at most kVectors, else
// body(Constant<0>{}).
template <bool kLone, int kVectors = kMostVectors, class Body>
SWIN_INLINE static inline void with_vectors(std::int64_t vectors, Body&& body) {
  if constexpr (kVectors == 0) {
    body(Constant<0>{});
  } else {
    if constexpr (window_has(kVectors, kLone)) {
      if (vectors == kVectors) return body(Constant<kVectors>{});
    }
    with_vectors<kLone, kVectors - 1>(vectors, body);
  }
}

// Calls body(Constant<kVectors>{}, Constant<kLone>{}, vectors): how logits_of goes through rows of n columns. Instances
// of at most kMost vectors.
template <int kMost = kMostVectors, class Body>
SWIN_INLINE static inline void with_row_shape(std::int64_t n, Body&& body) {
  if (has_lone_column(n)) {
    const std::int64_t whole = n / kLanes;
    with_vectors<true, kMost>(whole, [&](auto count) SWIN_INLINE { body(count, Constant<1>{}, whole); });
  } else {
    const std::int64_t vectors = ceil_div(n, kLanes);
    with_vectors<false, kMost>(vectors, [&](auto count) SWIN_INLINE { body(count, Constant<0>{}, vectors); });
  }
}

// `value`, 0..127, and zeros in the rest of kLanes bytes.
static inline void store_lone(std::int8_t* target, std::int32_t value) {
#if defined(SWIN_MASKED_LANES)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm_cvtsi32_si128(value));
#else
  std::int8_t bytes[kLanes] = {static_cast<std::int8_t>(value)};
  std::memcpy(target, bytes, kLanes);
#endif
}

// What softmax and head_scale_softmax have in common: scores s8 [n, pitch] of one window and head, times `scale`, to out s8
// [n, pitch].
struct SoftmaxS8 {
  const std::int8_t* scores;
  LogitRows logits;
  std::int8_t* out;
  std::int64_t pitch;
  float scale, quant;
};

static inline std::int64_t softmax_scratch_bytes(std::int64_t n) {
  return kSoftmaxRows * ceil_div(n, kLanes) * static_cast<std::int64_t>(sizeof(Vf));
}

// In softmax.cc, whose many instances are compiled once for both. `x`: softmax_scratch_bytes(n).
void softmax_s8(const SoftmaxS8& s, Vf* x);

}  // namespace swin::cpu::SWIN_ISA
