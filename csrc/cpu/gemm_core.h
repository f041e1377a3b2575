// The integer GEMM micro-kernel, exact in int32 on every instruction set.
//
// Computes acc[r, n] = sum_k a[r, k] * w[n, k] for a few rows and one or two vectors of columns, in registers.
// Both operands are packed so that one step handles kStepK values of k from one 32-bit word of `a`, broadcast:
//   avx512_vnni  4 x u8 (a + 128) times 4 x s8, vpdpbusd: accumulates in int32 without saturating. The offset is taken
//                back by starting from -128 * sum_k w[n, k].
//   avx2, sse2   2 x s16 times 2 x s16, (v)pmaddwd: |a*w| <= 2^14, so a pair's sum fits int32.
//   elsewhere    the same with plain integers.
// Not used: vpmaddubsw on machines without VNNI, since u8 x s8 pair sums saturate in int16 (docs/epilogues.md).
//
// Packed weights: units of kLanes columns; in a unit, step by step, kLanes columns x kStepK values.
#pragma once

#include "simd.h"

namespace swin::cpu::SWIN_ISA {

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
inline constexpr int kStepK = 4;
inline constexpr int kMaxRows = 12;  // x 2 vectors of columns = 24 accumulators of 32 registers
using PackedA = std::uint8_t;
#else
inline constexpr int kStepK = 2;
#if defined(__AVX2__)
inline constexpr int kMaxRows = 6;  // x 2 = 12 accumulators of 16 registers
#else
inline constexpr int kMaxRows = 4;
#endif
using PackedA = std::int16_t;
#endif
inline constexpr std::int64_t kStepBytes = kLanes * kStepK;  // of packed weights, per unit

static inline Vi load_weights(const std::int8_t* w) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  return reinterpret_cast<Vi>(_mm512_loadu_si512(w));
#elif defined(__AVX2__)
  return reinterpret_cast<Vi>(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w))));
#elif defined(__SSE2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(w));
  return reinterpret_cast<Vi>(_mm_unpacklo_epi8(bytes, _mm_cmpgt_epi8(_mm_setzero_si128(), bytes)));
#else
  Vi v;
  std::int16_t pairs[kLanes * 2];
  for (int i = 0; i < kLanes * 2; ++i) pairs[i] = w[i];
  std::memcpy(&v, pairs, sizeof v);
  return v;
#endif
}

static inline Vi broadcast(std::int32_t word) { return Vi{} + word; }

static inline Vi dot(Vi acc, Vi a, Vi w) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  return reinterpret_cast<Vi>(
      _mm512_dpbusd_epi32(reinterpret_cast<__m512i>(acc), reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(w)));
#elif defined(__AVX2__)
  return acc + reinterpret_cast<Vi>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(w)));
#elif defined(__SSE2__)
  return acc + reinterpret_cast<Vi>(_mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(w)));
#else
  std::int16_t x[kLanes * 2], y[kLanes * 2];
  std::memcpy(x, &a, sizeof a);
  std::memcpy(y, &w, sizeof w);
  for (int i = 0; i < kLanes; ++i) acc[i] += x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
  return acc;
#endif
}

// 32-bit words of one packed row of k values.
static inline std::int64_t steps_of(std::int64_t k) { return ceil_div(k, kStepK); }
static inline std::int64_t units_of(std::int64_t n) { return ceil_div(n, kLanes); }
static inline std::int64_t unit_bytes(std::int64_t k) { return steps_of(k) * kStepBytes; }

// Packs `rows` rows of k values, `stride` apart, each to steps_of(k) words.
static inline void pack_rows(const std::int8_t* x, std::int64_t stride, std::int64_t rows, std::int64_t k,
                             std::int32_t* packed) {
  const std::int64_t steps = steps_of(k);
  for (std::int64_t r = 0; r < rows; ++r) {
    PackedA* target = reinterpret_cast<PackedA*>(packed + r * steps);
    const std::int8_t* source = x + r * stride;
    for (std::int64_t i = 0; i < k; ++i) {
      if constexpr (kStepK == 4) {
        target[i] = static_cast<PackedA>(static_cast<std::uint8_t>(source[i]) ^ 0x80u);
      } else {
        target[i] = static_cast<PackedA>(source[i]);
      }
    }
    for (std::int64_t i = k; i < steps * kStepK; ++i) target[i] = 0;  // meets weights of zero
  }
}

// Packs columns [first, first + kLanes) of w[n, k] (row-major, `stride` apart) into one unit; missing ones are zero.
static inline void pack_unit_nk(const std::int8_t* w, std::int64_t stride, std::int64_t n, std::int64_t k,
                                std::int64_t first, std::int8_t* unit) {
  const std::int64_t columns = min_of(n - first, kLanes), full = k / kStepK;
  if (columns < kLanes || full * kStepK < k) std::memset(unit, 0, unit_bytes(k));
  for (std::int64_t j = 0; j < columns; ++j) {
    const std::int8_t* source = w + (first + j) * stride;
    std::int8_t* target = unit + j * kStepK;
    for (std::int64_t s = 0; s < full; ++s) std::memcpy(target + s * kStepBytes, source + s * kStepK, kStepK);
    for (std::int64_t i = full * kStepK; i < k; ++i) target[full * kStepBytes + i - full * kStepK] = source[i];
  }
}

// Packs columns [first, first + kLanes) of w given as [k, n] (row-major, `stride` apart) into one unit.
static inline void pack_unit_kn(const std::int8_t* w, std::int64_t stride, std::int64_t n, std::int64_t k,
                                std::int64_t first, std::int8_t* unit) {
  const std::int64_t columns = min_of(n - first, kLanes);
  [[maybe_unused]] const std::int64_t full = k / kStepK;
  std::int64_t s = 0;
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  if (columns == kLanes) {
    for (; s < full; ++s) {  // four rows of 16 bytes to 16 words of four
      const std::int8_t* row = w + s * 4 * stride + first;
      const __m128i r0 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row));
      const __m128i r1 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + stride));
      const __m128i r2 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 2 * stride));
      const __m128i r3 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 3 * stride));
      const __m128i a = _mm_unpacklo_epi8(r0, r1), b = _mm_unpackhi_epi8(r0, r1);
      const __m128i c = _mm_unpacklo_epi8(r2, r3), d = _mm_unpackhi_epi8(r2, r3);
      __m128i* target = reinterpret_cast<__m128i*>(unit + s * kStepBytes);
      _mm_storeu_si128(target, _mm_unpacklo_epi16(a, c));
      _mm_storeu_si128(target + 1, _mm_unpackhi_epi16(a, c));
      _mm_storeu_si128(target + 2, _mm_unpacklo_epi16(b, d));
      _mm_storeu_si128(target + 3, _mm_unpackhi_epi16(b, d));
    }
  }
#elif defined(__AVX2__)
  if (columns == kLanes) {
    for (; s < full; ++s) {  // two rows of 8 bytes to 8 pairs
      const std::int8_t* row = w + s * 2 * stride + first;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(unit + s * kStepBytes),
                       _mm_unpacklo_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(row)),
                                         _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + stride))));
    }
  }
#endif
  for (; s < steps_of(k); ++s) {
    std::memset(unit + s * kStepBytes, 0, kStepBytes);
    for (std::int64_t i = 0; i < min_of(kStepK, k - s * kStepK); ++i) {
      const std::int8_t* row = w + (s * kStepK + i) * stride + first;
      for (std::int64_t j = 0; j < columns; ++j) unit[s * kStepBytes + j * kStepK + i] = row[j];
    }
  }
}

// What a unit's accumulators start from.
static inline Vi start_of([[maybe_unused]] const std::int8_t* unit, [[maybe_unused]] std::int64_t steps) {
  Vi sum{};
  if constexpr (kStepK == 4) {
    const Vi offset = broadcast(static_cast<std::int32_t>(0x80808080u));
    for (std::int64_t s = 0; s < steps; ++s) sum = dot(sum, offset, load_weights(unit + s * kStepBytes));
  }
  return -sum;
}

// `a`: Rows packed rows; `units`: Vectors adjacent units; `start`: Vectors * kLanes numbers.
// Gives each result to emit(row, vector, Vi).
template <int Rows, int Vectors, class Emit>
static inline void micro_kernel(const std::int32_t* a, std::int64_t steps, const std::int8_t* units,
                                const std::int32_t* start, Emit&& emit) {
  Vi acc[Rows][Vectors];
  for (int v = 0; v < Vectors; ++v) {
    Vi first;
    std::memcpy(&first, start + v * kLanes, sizeof first);
    for (int r = 0; r < Rows; ++r) acc[r][v] = first;
  }
  const std::int64_t unit = steps * kStepBytes;
  for (std::int64_t s = 0; s < steps; ++s) {
    Vi w[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) w[v] = load_weights(units + v * unit + s * kStepBytes);
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      const Vi word = broadcast(a[r * steps + s]);
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) acc[r][v] = dot(acc[r][v], word, w[v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) emit(r, v, acc[r][v]);
  }
}

template <int Rows, class Emit>
static inline void dispatch_rows(int rows, int vectors, const std::int32_t* a, std::int64_t steps,
                                 const std::int8_t* units, const std::int32_t* start, Emit&& emit) {
  if (rows == Rows) {
    if (vectors == 2) {
      micro_kernel<Rows, 2>(a, steps, units, start, emit);
    } else {
      micro_kernel<Rows, 1>(a, steps, units, start, emit);
    }
  } else if constexpr (Rows > 1) {
    dispatch_rows<Rows - 1>(rows, vectors, a, steps, units, start, emit);
  }
}

// All `rows` packed rows of `a` against units [first_unit, last_unit); emit(row, column, Vi) gets each vector of
// results, `column` being its first.
template <class Emit>
static inline void gemm_block(const std::int32_t* a, std::int64_t rows, std::int64_t steps, const std::int8_t* units,
                              const std::int32_t* starts, std::int64_t first_unit, std::int64_t last_unit,
                              Emit&& emit) {
  // Rows in equal groups, so that none is left with one or two.
  const std::int64_t groups = ceil_div(rows, kMaxRows);
  for (std::int64_t u = first_unit; u < last_unit; u += 2) {
    const int vectors = static_cast<int>(min_of(2, last_unit - u));
    for (std::int64_t g = 0; g < groups; ++g) {
      const std::int64_t first = g * rows / groups, last = (g + 1) * rows / groups;
      dispatch_rows<kMaxRows>(static_cast<int>(last - first), vectors, a + first * steps, steps,
                              units + u * steps * kStepBytes, starts + u * kLanes,
                              [&](int r, int v, Vi acc) { emit(first + r, (u + v) * kLanes, acc); });
    }
  }
}

static inline void store_start(std::int32_t* starts, std::int64_t unit, Vi start) {
  std::memcpy(starts + unit * kLanes, &start, sizeof start);
}

}  // namespace swin::cpu::SWIN_ISA
