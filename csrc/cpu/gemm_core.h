// The integer GEMM micro-kernels, exact in int32 on every instruction set.
//
// Computes acc[r, n] = sum_k a[r, k] * w[n, k] for a few rows and vectors of columns, in registers. One step
// handles kStepK values of k from one 32-bit word of `a`, broadcast. There are two ways to multiply, since what is
// exact and fast depends on the range of `a`:
//
//                SignedDot: a in -128..127                       NonNegativeDot: a in 0..127
//   VNNI         4 x u8 (a + 128) times 4 x s8, vpdpbusd: no     4 x u8 times 4 x s8, vpdpbusd, read from where it lies
//   (AVX-512,    saturation. The offset is taken back by
//   AVX)         starting from -128 * sum_k w[n, k]
//   AVX2         2 x s16 times 2 x s16, vpmaddwd: a pair's sum   4 x u8 times 4 x s8, vpmaddubsw, then vpmaddwd by 1: a
//                fits int32                                      pair's sum is at most 2 * 127 * 128 < 2^15, so int16
//                holds it
//   SSE2, other  the same, pmaddwd or plain integers             as SignedDot
//   NEON with    4 x s8 times 4 x s8, sdot, read from where it   as SignedDot
//   dotprod      lies
//   NEON         2 x s8 times 2 x s8, smull: a product fits      as SignedDot
//                int16; sadalp adds pairs of them to int32
//
// vpmaddubsw does a third more per instruction than vpmaddwd, and for inputs of 0..127 needs no more than that. For any
// other input it saturates unless the weights are small: with weights known ahead gemm_grouped.h makes use of that, and
// this file serves what would not gain by it, and products of two activations (docs/epilogues.md).
//
// Packed weights: units of kLanes columns; in a unit, step by step, kLanes columns x kStepK values.
#pragma once

#include "simd.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define SWIN_VNNI
#define SWIN_DPBUSD(acc, u, s)                                                                                     \
  reinterpret_cast<Vi>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(acc), reinterpret_cast<__m512i>(u), \
                                           reinterpret_cast<__m512i>(s)))
#elif defined(__AVXVNNI__)
#define SWIN_VNNI
#define SWIN_DPBUSD(acc, u, s)                                                                                         \
  reinterpret_cast<Vi>(_mm256_dpbusd_avx_epi32(reinterpret_cast<__m256i>(acc), reinterpret_cast<__m256i>(u), \
                                               reinterpret_cast<__m256i>(s)))
#elif defined(__ARM_FEATURE_DOTPROD)
#define SWIN_DOTPROD
#endif

namespace swin::cpu::SWIN_ISA {

// Rows x 2 vectors of accumulators, and what a step needs beside them, fill the registers. (With the sanitizers' checks in
// every instance that would take minutes to compile.)
#if defined(SWIN_SANITIZED)
inline constexpr int kMaxRows = 3;
#elif defined(SWIN_MASKED_LANES)
inline constexpr int kMaxRows = 14;
#elif defined(__AVX2__)
inline constexpr int kMaxRows = 6;
#elif defined(__aarch64__)
inline constexpr int kMaxRows = 8;
#else
inline constexpr int kMaxRows = 4;
#endif

// Vectors of results that an activation may have at once (gelu.h), those of one row at least.
#if defined(SWIN_MASKED_LANES)
inline constexpr int kEmitVectors = 1;
#elif defined(__AVX2__)
inline constexpr int kEmitVectors = 8;
#else
inline constexpr int kEmitVectors = 4;
#endif

static inline Vi broadcast(std::int32_t word) { return Vi{} + word; }
static inline Vi load_vector(const void* source) {
  Vi v;
  std::memcpy(&v, source, sizeof v);
  return v;
}

#if !defined(SWIN_VNNI) && !defined(SWIN_DOTPROD)
// 2 x s16 per word; with NEON 2 x s8, twice, against 8 bytes of weights in a vector's lower half.
struct PairDot {
  static constexpr int kStepK = 2;
  static constexpr bool kInPlace = false;  // rows are widened first
  static constexpr std::int32_t kOffset = 0;

  static Vi weights(const std::int8_t* w) {
#if defined(__AVX2__)
    return reinterpret_cast<Vi>(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w))));
#elif defined(__SSE2__)
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(w));
    return reinterpret_cast<Vi>(_mm_unpacklo_epi8(bytes, _mm_cmpgt_epi8(_mm_setzero_si128(), bytes)));
#elif defined(__aarch64__)
    return reinterpret_cast<Vi>(vcombine_s8(vld1_s8(w), vdup_n_s8(0)));
#else
    std::int16_t pairs[kLanes * 2];
    for (int i = 0; i < kLanes * 2; ++i) pairs[i] = w[i];
    return load_vector(pairs);
#endif
  }
  static Vi dot(Vi acc, Vi a, Vi w) {
#if defined(__AVX2__)
    return acc + reinterpret_cast<Vi>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(w)));
#elif defined(__SSE2__)
    return acc + reinterpret_cast<Vi>(_mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(w)));
#elif defined(__aarch64__)
    const int8x8_t x = vget_low_s8(reinterpret_cast<int8x16_t>(a)), y = vget_low_s8(reinterpret_cast<int8x16_t>(w));
    return reinterpret_cast<Vi>(vpadalq_s16(reinterpret_cast<int32x4_t>(acc), vmull_s8(x, y)));
#else
    std::int16_t x[kLanes * 2], y[kLanes * 2];
    std::memcpy(x, &a, sizeof a);
    std::memcpy(y, &w, sizeof w);
    for (int i = 0; i < kLanes; ++i) acc[i] += x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
    return acc;
#endif
  }
  static void pack_row(const std::int8_t* source, std::int64_t k, void* packed) {
    std::int16_t* target = static_cast<std::int16_t*>(packed);
#if defined(__aarch64__)
    for (std::int64_t i = 0; i < k; i += 2) {
      std::int8_t pair[2] = {source[i], 0};  // the second, where k ends with the first, meets a weight of zero
      if (i + 1 < k) pair[1] = source[i + 1];
      std::memcpy(target + i, pair, 2);
      std::memcpy(target + i + 1, pair, 2);
    }
#else
    for (std::int64_t i = 0; i < k; ++i) target[i] = source[i];
    if (k % 2 != 0) target[k] = 0;  // meets a weight of zero
#endif
  }
};

#endif

#if defined(SWIN_VNNI)
template <bool Signed>
struct QuadDot {
  static constexpr int kStepK = 4;
  static constexpr bool kInPlace = !Signed;
  static constexpr std::int32_t kOffset = Signed ? 128 : 0;

  static Vi weights(const std::int8_t* w) { return load_vector(w); }
  static Vi dot(Vi acc, Vi a, Vi w) { return SWIN_DPBUSD(acc, a, w); }
  static void pack_row(const std::int8_t* source, std::int64_t k, void* packed) {
    std::uint8_t* target = static_cast<std::uint8_t*>(packed);
    const std::uint8_t flip = Signed ? 0x80 : 0;
    std::int64_t i = 0;
    for (; i + 32 <= k; i += 32) {  // a head has 32 channels: less than the compiler's own loop takes
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + i),
                          _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i)),
                                           _mm256_set1_epi8(static_cast<char>(flip))));
    }
    for (; i < k; ++i) target[i] = static_cast<std::uint8_t>(source[i]) ^ flip;
    for (; i % 4 != 0; ++i) target[i] = 0;  // meets weights of zero
  }
};
using SignedDot = QuadDot<true>;
using NonNegativeDot = QuadDot<false>;
#elif defined(__AVX2__)
struct UnsignedQuadDot {
  static constexpr int kStepK = 4;
  static constexpr bool kInPlace = true;
  static constexpr std::int32_t kOffset = 0;

  static Vi weights(const std::int8_t* w) { return load_vector(w); }
  static Vi dot(Vi acc, Vi a, Vi w) {
    const __m256i pairs = _mm256_maddubs_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(w));
    return acc + reinterpret_cast<Vi>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static void pack_row(const std::int8_t* source, std::int64_t k, void* packed) {
    std::int8_t* target = static_cast<std::int8_t*>(packed);
    std::memcpy(target, source, k);
    for (std::int64_t i = k; i % 4 != 0; ++i) target[i] = 0;
  }
};
using SignedDot = PairDot;
using NonNegativeDot = UnsignedQuadDot;
#elif defined(SWIN_DOTPROD)
struct SignedQuadDot {
  static constexpr int kStepK = 4;
  static constexpr bool kInPlace = true;
  static constexpr std::int32_t kOffset = 0;

  static Vi weights(const std::int8_t* w) { return load_vector(w); }
  static Vi dot(Vi acc, Vi a, Vi w) {
    return reinterpret_cast<Vi>(
        vdotq_s32(reinterpret_cast<int32x4_t>(acc), reinterpret_cast<int8x16_t>(w), reinterpret_cast<int8x16_t>(a)));
  }
  // The same by word kWord of four that were loaded at once.
  template <int kWord>
  static Vi dot_word(Vi acc, Vi words, Vi w) {
    return reinterpret_cast<Vi>(vdotq_laneq_s32(reinterpret_cast<int32x4_t>(acc), reinterpret_cast<int8x16_t>(w),
                                                reinterpret_cast<int8x16_t>(words), kWord));
  }
  static void pack_row(const std::int8_t* source, std::int64_t k, void* packed) {
    std::int8_t* target = static_cast<std::int8_t*>(packed);
    std::memcpy(target, source, k);
    for (std::int64_t i = k; i % 4 != 0; ++i) target[i] = 0;  // meets weights of zero
  }
};
using SignedDot = SignedQuadDot;
using NonNegativeDot = SignedQuadDot;
#else
using SignedDot = PairDot;
using NonNegativeDot = PairDot;
#endif

template <class Dot>
inline constexpr std::int64_t kStepBytes = kLanes * Dot::kStepK;  // of packed weights, per unit

// 32-bit words of one row of k values.
template <class Dot>
static inline std::int64_t steps_of(std::int64_t k) {
  return ceil_div(k, Dot::kStepK);
}
static inline std::int64_t units_of(std::int64_t n) { return ceil_div(n, kLanes); }
template <class Dot>
static inline std::int64_t unit_bytes(std::int64_t k) {
  return steps_of<Dot>(k) * kStepBytes<Dot>;
}

// Rows as the micro-kernel reads them: row r's words begin at data + r * stride bytes.
struct Rows {
  const char* data;
  std::int64_t stride;
};

// Bytes of scratch that prepare_rows may need.
template <class Dot>
static inline std::int64_t rows_bytes(std::int64_t rows, std::int64_t k) {
  return rows * steps_of<Dot>(k) * 4;
}

// `rows` rows of k values, `stride` bytes apart, in the form of Dot: where they lie, or packed into `scratch`.
template <class Dot>
static inline Rows prepare_rows(const std::int8_t* x, std::int64_t stride, std::int64_t rows, std::int64_t k,
                                void* scratch) {
  if (Dot::kInPlace && k % Dot::kStepK == 0) return {reinterpret_cast<const char*>(x), stride};
  const std::int64_t packed = steps_of<Dot>(k) * 4;
  if (stride == k && k % Dot::kStepK == 0) {  // rows that lie and are packed one after the other: as one
    Dot::pack_row(x, rows * k, scratch);
    return {static_cast<const char*>(scratch), packed};
  }
  for (std::int64_t r = 0; r < rows; ++r) Dot::pack_row(x + r * stride, k, static_cast<char*>(scratch) + r * packed);
  return {static_cast<const char*>(scratch), packed};
}

#if defined(__AVX2__)
static inline __m128i load16(const std::int8_t* source) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
}

// kLanes rows of 16 bytes (`stride` apart) to 16 / kStep steps of kLanes words of kStep bytes: a transposition. With 16 lanes
// there may be fewer rows, followed by zeros.
template <int kStep>
static inline void transpose_words(const std::int8_t* rows, std::int64_t stride, std::int8_t* unit,
                                   [[maybe_unused]] std::int64_t count = kLanes) {
#if defined(SWIN_MASKED_LANES)
  const auto row = [=](std::int64_t i) SWIN_INLINE { return i < count ? load16(rows + i * stride) : _mm_setzero_si128(); };
  __m512i r[4];  // row i, i + 4, i + 8 and i + 12
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_inserti32x4(_mm512_castsi128_si512(row(i)), row(i + 4), 1);
    r[i] = _mm512_inserti32x4(_mm512_inserti32x4(r[i], row(i + 8), 2), row(i + 12), 3);
  }
  const __m512i a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpackhi_epi32(r[0], r[1]);
  const __m512i c = _mm512_unpacklo_epi32(r[2], r[3]), d = _mm512_unpackhi_epi32(r[2], r[3]);
  _mm512_storeu_si512(unit, _mm512_unpacklo_epi64(a, c));
  _mm512_storeu_si512(unit + 64, _mm512_unpackhi_epi64(a, c));
  _mm512_storeu_si512(unit + 128, _mm512_unpacklo_epi64(b, d));
  _mm512_storeu_si512(unit + 192, _mm512_unpackhi_epi64(b, d));
#else
  if constexpr (kStep == 4) {
    __m256i r[4];  // row i and i + 4
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(load16(rows + i * stride)), load16(rows + (i + 4) * stride), 1);
    }
    const __m256i a = _mm256_unpacklo_epi32(r[0], r[1]), b = _mm256_unpackhi_epi32(r[0], r[1]);
    const __m256i c = _mm256_unpacklo_epi32(r[2], r[3]), d = _mm256_unpackhi_epi32(r[2], r[3]);
    __m256i* target = reinterpret_cast<__m256i*>(unit);
    _mm256_storeu_si256(target, _mm256_unpacklo_epi64(a, c));
    _mm256_storeu_si256(target + 1, _mm256_unpackhi_epi64(a, c));
    _mm256_storeu_si256(target + 2, _mm256_unpacklo_epi64(b, d));
    _mm256_storeu_si256(target + 3, _mm256_unpackhi_epi64(b, d));
  } else {
    __m128i r[8], s[8];
    for (int i = 0; i < 8; ++i) r[i] = load16(rows + i * stride);
    for (int i = 0; i < 4; ++i) {  // pairs of rows, word by word
      s[i] = _mm_unpacklo_epi16(r[2 * i], r[2 * i + 1]);
      s[i + 4] = _mm_unpackhi_epi16(r[2 * i], r[2 * i + 1]);
    }
    __m128i* target = reinterpret_cast<__m128i*>(unit);
    for (int half = 0; half < 2; ++half) {
      const __m128i *q = s + 4 * half;
      const __m128i a = _mm_unpacklo_epi32(q[0], q[1]), b = _mm_unpackhi_epi32(q[0], q[1]);
      const __m128i c = _mm_unpacklo_epi32(q[2], q[3]), d = _mm_unpackhi_epi32(q[2], q[3]);
      _mm_storeu_si128(target + 4 * half, _mm_unpacklo_epi64(a, c));
      _mm_storeu_si128(target + 4 * half + 1, _mm_unpackhi_epi64(a, c));
      _mm_storeu_si128(target + 4 * half + 2, _mm_unpacklo_epi64(b, d));
      _mm_storeu_si128(target + 4 * half + 3, _mm_unpackhi_epi64(b, d));
    }
  }
#endif
}
#elif defined(__aarch64__)
// Four rows of 16 bytes (`stride` apart) to 16 / kStep steps of four words of kStep bytes: what st4 does.
template <int kStep>
static inline void transpose_words(const std::int8_t* rows, std::int64_t stride, std::int8_t* unit, std::int64_t = kLanes) {
  const int8x16_t r[4] = {vld1q_s8(rows), vld1q_s8(rows + stride), vld1q_s8(rows + 2 * stride),
                          vld1q_s8(rows + 3 * stride)};
  if constexpr (kStep == 8) {
    const auto word = [&](int i) { return vreinterpretq_s64_s8(r[i]); };
    vst4q_s64(reinterpret_cast<std::int64_t*>(unit), {{word(0), word(1), word(2), word(3)}});
  } else if constexpr (kStep == 4) {
    const auto word = [&](int i) { return vreinterpretq_s32_s8(r[i]); };
    vst4q_s32(reinterpret_cast<std::int32_t*>(unit), {{word(0), word(1), word(2), word(3)}});
  } else {
    const auto word = [&](int i) { return vreinterpretq_s16_s8(r[i]); };
    vst4q_s16(reinterpret_cast<std::int16_t*>(unit), {{word(0), word(1), word(2), word(3)}});
  }
}
#endif

// Packs columns [first, first + kLanes) of w[n, k] (row-major, `stride` apart) into one unit; missing ones are zero.
template <class Dot>
static inline void pack_unit_nk(const std::int8_t* w, std::int64_t stride, std::int64_t n, std::int64_t k,
                                std::int64_t first, std::int8_t* unit) {
  constexpr std::int64_t kStep = Dot::kStepK;
  const std::int64_t columns = min_of(n - first, kLanes), full = k / kStep;
#if defined(__AVX2__) || defined(__aarch64__)
#if defined(SWIN_MASKED_LANES)
  constexpr bool kAnyCount = true;
#else
  constexpr bool kAnyCount = false;
#endif
  if ((columns == kLanes || kAnyCount) && k % 16 == 0) {
    for (std::int64_t i = 0; i < k; i += 16) {
      transpose_words<kStep>(w + first * stride + i, stride, unit + i * kLanes, columns);
    }
    return;
  }
#endif
  if (columns < kLanes || full * kStep < k) std::memset(unit, 0, unit_bytes<Dot>(k));
  for (std::int64_t j = 0; j < columns; ++j) {
    const std::int8_t* source = w + (first + j) * stride;
    std::int8_t* target = unit + j * kStep;
    for (std::int64_t s = 0; s < full; ++s) std::memcpy(target + s * kStepBytes<Dot>, source + s * kStep, kStep);
    for (std::int64_t i = full * kStep; i < k; ++i) target[full * kStepBytes<Dot> + i - full * kStep] = source[i];
  }
}

// Packs columns [first, first + kLanes) of w given as [k, n] (row-major, `stride` apart) into one unit.
template <class Dot>
static inline void pack_unit_kn(const std::int8_t* w, std::int64_t stride, std::int64_t n, std::int64_t k,
                                std::int64_t first, std::int8_t* unit) {
  constexpr std::int64_t kStep = Dot::kStepK, kBytes = kStepBytes<Dot>;
  const std::int64_t columns = min_of(n - first, kLanes);
  [[maybe_unused]] const std::int64_t full = k / kStep;
  std::int64_t s = 0;
#if defined(SWIN_MASKED_LANES)
  if (columns == kLanes && kStep == 4) {
    const __m512i words = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    for (const std::int8_t* row = w + first; s < steps_of<Dot>(k); ++s, row += 4 * stride) {
      const auto at = [=, rows = k - s * 4](std::int64_t i) SWIN_INLINE {
        return i < rows ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + i * stride)) : _mm_setzero_si128();
      };
      // Four rows of 16 bytes to 16 words of four, in one store: a tile's load would wait for smaller ones.
      __m512i rows = _mm512_inserti32x4(_mm512_castsi128_si512(at(0)), at(1), 1);
      rows = _mm512_inserti32x4(_mm512_inserti32x4(rows, at(2), 2), at(3), 3);
      _mm512_storeu_si512(unit + s * kBytes, _mm512_shuffle_epi8(_mm512_permutexvar_epi32(words, rows), bytes));
    }
  }
#elif defined(__AVX2__)
  if (columns == kLanes && kStep == 4) {
    for (; s < full; ++s) {  // four rows of 8 bytes to 8 words of four
      const std::int8_t* row = w + s * 4 * stride + first;
      __m128i r[4];
      for (int i = 0; i < 4; ++i) r[i] = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + i * stride));
      const __m128i a = _mm_unpacklo_epi8(r[0], r[1]), c = _mm_unpacklo_epi8(r[2], r[3]);
      __m128i* target = reinterpret_cast<__m128i*>(unit + s * kBytes);
      _mm_storeu_si128(target, _mm_unpacklo_epi16(a, c));
      _mm_storeu_si128(target + 1, _mm_unpackhi_epi16(a, c));
    }
  } else if (columns == kLanes && kStep == 2) {
    for (; s < full; ++s) {  // two rows of 8 bytes to 8 pairs
      const std::int8_t* row = w + s * 2 * stride + first;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(unit + s * kBytes),
                       _mm_unpacklo_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(row)),
                                         _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + stride))));
    }
  }
#elif defined(__aarch64__)
  if (columns == kLanes && kStep == 4) {
    for (; s < full; ++s) {  // four rows of four bytes: byte i of row r to byte r of word i
      const std::int8_t* row = w + s * 4 * stride + first;
      std::uint32_t r[4];
      for (int i = 0; i < 4; ++i) std::memcpy(&r[i], row + i * stride, 4);
      const int8x8_t a = vzip1_s8(vcreate_s8(r[0]), vcreate_s8(r[1])), b = vzip1_s8(vcreate_s8(r[2]), vcreate_s8(r[3]));
      const int16x4x2_t words = vzip_s16(vreinterpret_s16_s8(a), vreinterpret_s16_s8(b));
      vst1q_s8(unit + s * kBytes, vreinterpretq_s8_s16(vcombine_s16(words.val[0], words.val[1])));
    }
  }
#endif
  for (; s < steps_of<Dot>(k); ++s) {
    std::memset(unit + s * kBytes, 0, kBytes);
    for (std::int64_t i = 0; i < min_of(kStep, k - s * kStep); ++i) {
      const std::int8_t* row = w + (s * kStep + i) * stride + first;
      for (std::int64_t j = 0; j < columns; ++j) unit[s * kBytes + j * kStep + i] = row[j];
    }
  }
}

// What the accumulators of a unit's kLanes columns start from; `starts` has room for them.
template <class Dot>
static inline void store_start(std::int32_t* starts, [[maybe_unused]] const std::int8_t* unit,
                               [[maybe_unused]] std::int64_t steps) {
  Vi sum{};
#if defined(SWIN_VNNI)
  if constexpr (Dot::kOffset != 0) {
    const Vi offset = broadcast(static_cast<std::int32_t>(0x80808080u));
    for (std::int64_t s = 0; s < steps; ++s) sum = Dot::dot(sum, offset, Dot::weights(unit + s * kStepBytes<Dot>));
  }
#endif
  sum = -sum;
  std::memcpy(starts, &sum, sizeof sum);
}

// Row pointers from few registers: base + {0, 1, 2} strides, a new base every third row.
template <int Rows>
struct RowPointers {
  const char* base[(Rows + 2) / 3];
  std::int64_t stride;

  RowPointers(const char* data, std::int64_t stride) : stride(stride) {
    for (int i = 0; i < (Rows + 2) / 3; ++i) base[i] = data + 3 * i * stride;
  }
  const char* at(int r, std::int64_t step) const { return base[r / 3] + (r % 3) * stride + step * 4; }
  std::int32_t word(int r, std::int64_t step) const {
    std::int32_t w;
    std::memcpy(&w, at(r, step), 4);
    return w;
  }
};

// `count` rows in groups of at most `most`, as equal as can be, so that none is left with one or two.
struct RowGroups {
  const std::int64_t all, least, more;  // rows of a group; the first `more` have one more

  RowGroups(std::int64_t count, std::int64_t most) : all(ceil_div(count, most)), least(count / all), more(count % all) {}
  std::int64_t first(std::int64_t group) const { return group * least + min_of(group, more); }
  std::int64_t rows(std::int64_t group) const { return least + (group < more ? 1 : 0); }
};

// R rows of V vectors each, `row` and those behind it, to `emit_row`: to emit_row.operator()<R>(row, acc) where there
// is one, which takes several rows at once, else to emit_row(row, acc), one by one.
template <int R, int V, class EmitRow>
SWIN_INLINE static inline void emit_rows(const EmitRow& emit_row, std::int64_t row, const Vi* acc) {
  if constexpr (R > 1 && requires { emit_row.template operator()<R>(row, acc); }) {
    emit_row.template operator()<R>(row, acc);
  } else {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) emit_row(row + r, acc + r * V);
  }
}

// The same, as many at once as have kEmitVectors.
template <int R, int V, class EmitRow>
SWIN_INLINE static inline void emit_all(const EmitRow& emit_row, std::int64_t row, const Vi* acc) {
  constexpr int kMost = V < kEmitVectors ? kEmitVectors / V : 1, kRows = R < kMost ? R : kMost;
  static_assert(kRows > 0);
  emit_rows<kRows, V>(emit_row, row, acc);
  if constexpr (R > kRows) emit_all<R - kRows, V>(emit_row, row + kRows, acc + kRows * V);
}

// R rows from `data`; `units`: V adjacent units; `start`: V * kLanes numbers.
// emit.operator()<V>() gives a function that each row's number and vectors of results go to; by value, as behind a reference
// what it holds would have to be read again after each byte that it stores.
// While it works on `units` it fetches `ahead` to the second-level cache, where that is not null.
template <class Dot, int R, int V, class Emit>
SWIN_INLINE static inline void micro_kernel(const char* data, std::int64_t stride, std::int64_t steps,
                                            const std::int8_t* units, const std::int8_t* ahead,
                                            const std::int32_t* start, Emit emit) {
  Vi acc[R][V];
  for (int v = 0; v < V; ++v) {
    const Vi first = load_vector(start + v * kLanes);
    for (int r = 0; r < R; ++r) acc[r][v] = first;
  }
  const std::int64_t unit = steps * kStepBytes<Dot>;
  const RowPointers<R> rows(data, stride);
  std::int64_t s = 0;
#if defined(SWIN_DOTPROD)
  for (; s + 4 <= steps; s += 4) {  // a load of a row for four steps
    Vi words[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) words[r] = load_vector(rows.at(r, s));
    const auto step = [&]<int kWord>() SWIN_INLINE {
      Vi w[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) w[v] = Dot::weights(units + v * unit + (s + kWord) * kStepBytes<Dot>);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[r][v] = Dot::template dot_word<kWord>(acc[r][v], words[r], w[v]);
      }
    };
    step.template operator()<0>();
    step.template operator()<1>();
    step.template operator()<2>();
    step.template operator()<3>();
  }
#endif
#pragma GCC unroll 4
  for (; s < steps; ++s) {
    if constexpr (kStepBytes<Dot> == 64) {
      if (ahead != nullptr) {
        for (int v = 0; v < V; ++v) __builtin_prefetch(ahead + v * unit + s * kStepBytes<Dot>, 0, 2);
      }
    }
    Vi w[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) w[v] = Dot::weights(units + v * unit + s * kStepBytes<Dot>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vi word = broadcast(rows.word(r, s));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = Dot::dot(acc[r][v], word, w[v]);
    }
  }
  emit_all<R, V>(emit.template operator()<V>(), 0, acc[0]);
}

// What a micro-kernel does with its results: rows from `first` on, columns from `column` on.
template <class Emit>
SWIN_INLINE static inline auto rows_from(std::int64_t first, std::int64_t column, Emit emit_columns) {
  return [=]<int V>() SWIN_INLINE {
    return [first, emit = emit_columns.template operator()<V>(column)]<int R = 1>(std::int64_t r, const Vi* acc)
               SWIN_INLINE { emit_rows<R, V>(emit, first + r, acc); };
  };
}

template <class Dot, int R, class Emit>
SWIN_INLINE static inline void dispatch_rows(int rows, int vectors, const char* data, std::int64_t stride,
                                             std::int64_t steps, const std::int8_t* units, const std::int8_t* ahead,
                                             const std::int32_t* start, Emit emit) {
  if (rows == R) {
    if (vectors == 2) {
      micro_kernel<Dot, R, 2>(data, stride, steps, units, ahead, start, emit);
    } else {
      micro_kernel<Dot, R, 1>(data, stride, steps, units, ahead, start, emit);
    }
  } else if constexpr (R > 1) {
    dispatch_rows<Dot, R - 1>(rows, vectors, data, stride, steps, units, ahead, start, emit);
  }
}

// All `count` rows against units [first_unit, last_unit). emit_columns.operator()<V>(column) gives a function of
// (row, const Vi* acc), for V vectors of columns from `column` on, that holds what its rows share.
//
// Where there is an emit_columns.fetch(row, column), it is called for each row and two vectors of columns, a group of
// rows ahead: what emitting reads is then on its way while the group before is multiplied. With AVX-512 alone: with
// AVX2, whose products take three times as long, nothing was gained.
template <class Dot, class Emit>
static inline void gemm_block(Rows rows, std::int64_t count, std::int64_t steps, const std::int8_t* units,
                              const std::int32_t* starts, std::int64_t first_unit, std::int64_t last_unit,
                              Emit emit_columns) {
  const RowGroups groups(count, kMaxRows);
  for (std::int64_t u = first_unit; u < last_unit; u += 2) {
    const int vectors = static_cast<int>(min_of(2, last_unit - u));
    for (std::int64_t g = 0; g < groups.all; ++g) {
      const std::int64_t first = groups.first(g);
      const std::int8_t* own = units + u * steps * kStepBytes<Dot>;
      const std::int8_t* ahead = g == 0 && u + 4 <= last_unit ? own + 2 * steps * kStepBytes<Dot> : nullptr;
      if constexpr (kLanes == 16 && requires { emit_columns.fetch(0, 0); }) {
        const bool same_units = g + 1 < groups.all;
        const std::int64_t next = same_units ? g + 1 : 0, column = (same_units ? u : u + 2) * kLanes;
        for (std::int64_t r = 0; column < last_unit * kLanes && r < groups.rows(next); ++r) {
          emit_columns.fetch(groups.first(next) + r, column);
        }
      }
      dispatch_rows<Dot, kMaxRows>(
          static_cast<int>(groups.rows(g)), vectors, rows.data + first * rows.stride, rows.stride, steps, own, ahead,
          starts + u * kLanes,
          rows_from(first, u * kLanes, emit_columns));
    }
  }
}

}  // namespace swin::cpu::SWIN_ISA
