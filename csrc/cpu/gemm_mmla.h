// The integer GEMM on ARM's matrix instructions: smmla multiplies two rows of eight values of k by two columns, exactly in
// int32, twice as many products as sdot.
//
// Packed rows: pairs of rows; in a pair, step by step, eight values of each; behind an odd last row, zeros.
// Packed weights: units of four columns; in a unit, step by step, eight values of each column: two vectors of two columns.
#pragma once

#include "gemm_core.h"

#if defined(__ARM_FEATURE_MATMUL_INT8)
#define SWIN_MMLA

namespace swin::cpu::SWIN_ISA {

struct MatrixDot {
  static constexpr int kStepK = 8;
  static constexpr std::int32_t kOffset = 0;

  // Results of (row, column): (0, 0), (0, 1), (1, 0), (1, 1).
  static Vi dot(Vi acc, Vi a, Vi w) {
    return reinterpret_cast<Vi>(vmmlaq_s32(reinterpret_cast<int32x4_t>(acc), reinterpret_cast<int8x16_t>(a),
                                           reinterpret_cast<int8x16_t>(w)));
  }
};

inline constexpr int kMaxPairs = kMaxRows / 2;  // of rows: with two units of columns, 16 accumulators

static inline std::int64_t pair_bytes(std::int64_t k) { return 2 * MatrixDot::kStepK * steps_of<MatrixDot>(k); }

static inline void pack_pairs(const std::int8_t* x, std::int64_t stride, std::int64_t rows, std::int64_t k,
                              std::int8_t* packed) {
  constexpr std::int64_t kStep = MatrixDot::kStepK;
  for (std::int64_t r = 0; r < rows; r += 2, x += 2 * stride, packed += pair_bytes(k)) {
    std::int64_t i = 0;
    if (r + 1 < rows) {
      for (; i + 2 * kStep <= k; i += 2 * kStep) {
        const int64x2_t first = vreinterpretq_s64_s8(vld1q_s8(x + i)), second = vreinterpretq_s64_s8(vld1q_s8(x + stride + i));
        vst2q_s64(reinterpret_cast<std::int64_t*>(packed + 2 * i), {{first, second}});
      }
    }
    if (i == steps_of<MatrixDot>(k) * kStep) continue;
    std::memset(packed + 2 * i, 0, pair_bytes(k) - 2 * i);
    for (std::int64_t row = 0; row < min_of(2, rows - r); ++row) {
      for (std::int64_t j = i; j < k; j += kStep) {
        std::memcpy(packed + 2 * j + row * kStep, x + row * stride + j, min_of(kStep, k - j));
      }
    }
  }
}

// P pairs of rows, `stride` bytes apart, by V adjacent units; `rows` of them are emitted: 2 P, or one less. emit: as
// micro_kernel's (gemm_core.h).
template <int P, int V, class Emit>
SWIN_INLINE static inline void multiply_pairs(const std::int8_t* pairs, std::int64_t stride, std::int64_t steps,
                                              const std::int8_t* units, int rows, Emit emit) {
  Vi acc[P][2 * V] = {};
  const std::int64_t unit = steps * kStepBytes<MatrixDot>;
#pragma GCC unroll 2
  for (std::int64_t s = 0; s < steps; ++s) {
    Vi w[2 * V];
#pragma GCC unroll 4
    for (int c = 0; c < 2 * V; ++c) w[c] = load_vector(units + c / 2 * unit + s * kStepBytes<MatrixDot> + c % 2 * 16);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const Vi a = load_vector(pairs + p * stride + s * 2 * MatrixDot::kStepK);
#pragma GCC unroll 4
      for (int c = 0; c < 2 * V; ++c) acc[p][c] = MatrixDot::dot(acc[p][c], a, w[c]);
    }
  }
  const auto emit_row = emit.template operator()<V>();
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
    Vi first[V], second[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const int64x2_t left = reinterpret_cast<int64x2_t>(acc[p][2 * v]), right = reinterpret_cast<int64x2_t>(acc[p][2 * v + 1]);
      first[v] = reinterpret_cast<Vi>(vzip1q_s64(left, right));
      second[v] = reinterpret_cast<Vi>(vzip2q_s64(left, right));
    }
    emit_row(2 * p, first);
    if (p + 1 < P || rows == 2 * P) emit_row(2 * p + 1, second);
  }
}

template <int P, class Emit>
SWIN_INLINE static inline void dispatch_pairs(std::int64_t count, std::int64_t vectors, const std::int8_t* pairs,
                                              std::int64_t stride, std::int64_t steps, const std::int8_t* units, int rows,
                                              Emit emit) {
  if (count == P) {
    if (vectors == 2) {
      multiply_pairs<P, 2>(pairs, stride, steps, units, rows, emit);
    } else {
      multiply_pairs<P, 1>(pairs, stride, steps, units, rows, emit);
    }
  } else if constexpr (P > 1) {
    dispatch_pairs<P - 1>(count, vectors, pairs, stride, steps, units, rows, emit);
  }
}

// As gemm_block (gemm_core.h), of packed pairs.
template <class Emit>
static inline void pairs_block(const std::int8_t* pairs, std::int64_t rows, std::int64_t k, const std::int8_t* units,
                               std::int64_t first_unit, std::int64_t last_unit, Emit emit_columns) {
  const std::int64_t steps = steps_of<MatrixDot>(k), stride = pair_bytes(k);
  const RowGroups groups(ceil_div(rows, 2), kMaxPairs);
  for (std::int64_t u = first_unit; u < last_unit; u += 2) {
    for (std::int64_t g = 0; g < groups.all; ++g) {
      const std::int64_t first = groups.first(g), count = groups.rows(g);
      dispatch_pairs<kMaxPairs>(count, min_of(2, last_unit - u), pairs + first * stride, stride, steps,
                                units + u * steps * kStepBytes<MatrixDot>,
                                static_cast<int>(min_of(2 * count, rows - 2 * first)),
                                rows_from(2 * first, u * kLanes, emit_columns));
    }
  }
}

}  // namespace swin::cpu::SWIN_ISA
#endif
