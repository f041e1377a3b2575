// From the scores of one window and head to its probabilities: what all ways to attend have in common
// (window_attention.cc, pass_heads.h).
#pragma once

#include "gemm_core.h"
#include "kernels.h"
#include "softmax_row.h"
#include "swin/position_bias.h"

#if defined(SWIN_MASKED_LANES) && defined(SWIN_VNNI)
#define SWIN_PASS_HEADS  // pass_heads.h in place of the scores in memory
#endif

namespace swin::cpu::SWIN_ISA {

inline constexpr const char* kAttentionOp = "window_attention";
inline constexpr float kLog2Of127 = 6.98868469f;

// What the rows of one head and window add; `starts`: those of `bias`, null where it is not compact.
static inline LogitRows logit_rows(const WindowAttentionArgs& args, const BiasRows& bias, const std::int32_t* starts,
                                   std::int64_t head, std::int64_t window) {
  const float* mask = nullptr;
  if (args.mask) {
    std::int64_t which = window % (args.mask_of ? args.mask_of : args.mask).dim(0);
    if (args.mask_of) which = args.mask_of.as<const std::int32_t>()[which];
    if (which >= 0) mask = args.mask.as<const float>() + which * bias.tokens * bias.tokens;
  }
  return {args.bias.as<const float>() + head * bias.head_stride, mask, bias.tokens, starts};
}

// To `starts`, [tokens], where a row of the bias begins; null where they lie one after the other.
static inline const std::int32_t* bias_starts(const BiasRows& bias, std::int32_t* starts) {
  if (!bias.compact()) return nullptr;
  for (std::int64_t row = 0; row < bias.tokens; ++row) starts[row] = static_cast<std::int32_t>(bias.start(row));
  return starts;
}

// out[r] = factor / max(1, length of row r), 0 from row `rows` to `padded`; rows s8 [rows, d], `stride` apart. The sums
// of squares, at most 2^14 d, are whole numbers that float32 holds.
static inline void inverse_lengths(const std::int8_t* x, std::int64_t stride, std::int64_t rows, std::int64_t d,
                                   float factor, float* out, std::int64_t padded) {
  for (std::int64_t first = 0; first < padded; first += kSoftmaxRows) {
    const std::int64_t count = min_of(kSoftmaxRows, rows - first);
    RowVectors squares;
    RowNumbers sums;
    for (std::int64_t r = 0; r < count; ++r) {
      Vf sum{};
      for_lanes(d, [&](std::int64_t e, std::int64_t lanes) SWIN_INLINE {
        const Vf y = load(x + (first + r) * stride + e, lanes);
        sum += y * y;
      });
      squares.of[r] = sum;
    }
    squares.reduce_to(sums, count < 0 ? 0 : count, sums_of);
    for (std::int64_t v = 0; v < kRowVectors && first + v * kLanes < padded; ++v) {
      const Vf inverse = splat(factor) / sqrt_of(max_of(sums.vector(v), splat(1.0f)));
      store(out + first + v * kLanes, keep(inverse, count - v * kLanes, 0.0f),
            min_of(kLanes, padded - first - v * kLanes));
    }
  }
}

// What scores are multiplied with: all of them with the same, or each with a number of its row and one of its column.
struct Scale {
  float factor;
  const float *rows, *columns;  // null where there is one factor; columns [pitch], finite beyond n

  Scale from(std::int64_t row) const { return {factor, rows == nullptr ? rows : rows + row, columns}; }
};

// The logits of a pass's rows, one after the other in whole vectors, with the largest of each; in `lone` the lone
// column.
struct PassLogits {
  Vf* x;
  RowNumbers largest, lone;
};

// Where the probabilities of some rows go.
struct Probabilities {
  std::int8_t* p;  // [rows, pitch], 0 from column n on; pitch: n rounded up to whole vectors
  float* factor;   // [rows]: pv_factor over the row's sum of p
  std::int64_t pitch;
  float pv_factor;

  Probabilities from(std::int64_t row) const { return {p + row * pitch, factor + row, pitch, pv_factor}; }
};

// rounded(127 * exp(logit - the row's largest)); `largest`: a number, or one for each lane.
template <class Largest>
static inline Vi probability_of(Vf logit, Largest largest) {
  return rounded(exp2_of((logit - largest) * kLog2E + kLog2Of127));
}

// The `rows` rows of a pass, of kVectors vectors each, or where that is 0 of `vectors`.
template <int kVectors, bool kLone>
SWIN_INLINE static inline void probabilities_pass(const PassLogits& logits, std::int64_t rows, std::int64_t vectors,
                                                  const Probabilities& to) {
  const std::int64_t count = kVectors > 0 ? kVectors : vectors;
  alignas(64) std::int32_t lone_p[kSoftmaxRows];
  if constexpr (kLone) {
    for (std::int64_t v = 0; v < kRowVectors; ++v) {
      const Vi q = probability_of(logits.lone.vector(v), logits.largest.vector(v));
      std::memcpy(lone_p + v * kLanes, &q, sizeof q);
    }
  }
  RowVectors parts;
  for (std::int64_t r = 0; r < rows; ++r) {
    std::int8_t* p = to.p + r * to.pitch;
    const auto probability = [&](std::int64_t v)
                                 SWIN_INLINE { return probability_of(logits.x[r * count + v], logits.largest.of[r]); };
    Vi sum{};
    if constexpr (kVectors > 0) {
      Vi q[kVectors + kLone];
#pragma GCC unroll 9
      for (int v = 0; v < kVectors; ++v) sum += q[v] = probability(v);
      if constexpr (kLone) q[kVectors] = first_lane(lone_p[r]);
      store_bytes(p, q, kVectors + kLone);
    } else {
      for (std::int64_t v = 0; v < count; ++v) {
        const Vi q = probability(v);
        store_bytes(p + v * kLanes, q);
        sum += q;
      }
      if constexpr (kLone) store_lone(p + count * kLanes, lone_p[r]);
    }
    parts.of[r] = __builtin_convertvector(sum, Vf);
  }
  RowNumbers sums;
  parts.reduce_to(sums, rows, sums_of);
  for (std::int64_t v = 0; v < kRowVectors && v * kLanes < rows; ++v) {
    Vf sum = sums.vector(v);
    if constexpr (kLone) sum += load(lone_p + v * kLanes);
    store(to.factor + v * kLanes, splat(to.pv_factor) / sum, min_of(kLanes, rows - v * kLanes));
  }
}

// Rows of one window and head on their way from scores to probabilities.
struct SoftmaxRows {
  std::int32_t* scores;  // [rows, pitch], columns from n on anything; logits in their place afterwards
  LogitRows logits;
  Scale scale;
  Probabilities to;
};

template <int kVectors, bool kLone, bool kCosine>
[[gnu::noinline]] static void softmax_pass(const SoftmaxRows& s, std::int64_t first, std::int64_t rows,
                                           std::int64_t vectors) {
  const std::int64_t n = s.logits.n, pitch = s.to.pitch, count = kVectors > 0 ? kVectors : vectors;
  std::int32_t* scores = s.scores + first * pitch;
  const float* row_scale = kCosine ? s.scale.rows + first : nullptr;
  // Rows of logits are as long as those of scores, or shorter by the lone column: each row is read before it is
  // written.
  PassLogits logits{reinterpret_cast<Vf*>(scores), {}, {}};
  if constexpr (kLone) {
    for (std::int64_t r = 0; r < rows; ++r) {
      const float score = static_cast<float>(scores[r * pitch + n - 1]);
      logits.lone.of[r] = score * (kCosine ? row_scale[r] * s.scale.columns[n - 1] : s.scale.factor);
    }
  }
  logits_of<kVectors, kLone>(
      s.logits.from(first), rows, count,
      [scores, pitch, row_scale, scale = s.scale](std::int64_t r, std::int64_t j) SWIN_INLINE {
        const Vf score = load(scores + r * pitch + j);
        return kCosine ? score * row_scale[r] * load(scale.columns + j) : score * scale.factor;
      },
      [&lone = logits.lone](std::int64_t r) SWIN_INLINE { return lone.of[r]; }, logits.x, logits.largest, logits.lone);
  probabilities_pass<kVectors, kLone>(logits, rows, vectors, s.to.from(first));
}

// Rows [first, first + rows), at most kSoftmaxRows.
static inline void softmax_some(const SoftmaxRows& s, std::int64_t first, std::int64_t rows) {
  with_row_shape(s.logits.n, [&](auto count, auto lone, std::int64_t vectors) SWIN_INLINE {
    if (s.scale.rows != nullptr) {
      softmax_pass<count.value, lone.value, true>(s, first, rows, vectors);
    } else {
      softmax_pass<count.value, lone.value, false>(s, first, rows, vectors);
    }
  });
}

}  // namespace swin::cpu::SWIN_ISA
