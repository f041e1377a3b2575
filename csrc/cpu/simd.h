// Vectors of float lanes for one instruction set. Every file below csrc/cpu/ that includes this is compiled once per
// instruction set (CMakeLists.txt), each time in its own namespace SWIN_ISA, so that no symbol of one is ever linked
// into another. For the same reason these files call nothing of the C++ library but what is a compiler builtin.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "swin/ops.h"
#include "thread_pool.h"

namespace swin::cpu::SWIN_ISA {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
inline constexpr int kLanes = 16;
#define SWIN_MASKED_LANES  // a row's last, partial step loads and stores under a mask
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

// Of a lambda that is handed to a kernel template: a call for every row would cost more than what it does.
#define SWIN_INLINE __attribute__((always_inline))

typedef float Vf __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t Vi __attribute__((vector_size(4 * kLanes)));

// A number that a generic lambda takes as a constant.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

static inline std::int64_t min_of(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
static inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
static inline Vf splat(float x) {  // not Vf{} + x: adding to a zero is no copy, as -0 shows, and is computed
#if defined(SWIN_MASKED_LANES)
  return reinterpret_cast<Vf>(_mm512_set1_ps(x));
#elif defined(__AVX2__)
  return reinterpret_cast<Vf>(_mm256_set1_ps(x));
#else
  return Vf{x, x, x, x};
#endif
}
// a > b ? a : b and a < b ? a : b, so b where one is NaN: what maxps and minps do.
static inline Vf max_of(Vf a, Vf b) {
#if defined(SWIN_MASKED_LANES)
  return reinterpret_cast<Vf>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vf>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}
static inline Vf min_of(Vf a, Vf b) {
#if defined(SWIN_MASKED_LANES)
  return reinterpret_cast<Vf>(_mm512_min_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vf>(_mm256_min_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a < b ? a : b;
#endif
}
// The larger of |a| and |b|; a is not negative.
static inline Vf max_size_of(Vf a, Vf b) {
#if defined(SWIN_MASKED_LANES) && defined(__AVX512DQ__)
  return reinterpret_cast<Vf>(_mm512_range_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), 0b1011));
#else
  return max_of(max_of(b, -b), a);
#endif
}
static inline Vf sqrt_of(Vf x) {
#if defined(SWIN_MASKED_LANES)
  return reinterpret_cast<Vf>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vf>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x)));
#else
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}
static inline Vi bits_of(Vf x) { return reinterpret_cast<Vi>(x); }
static inline Vf float_of(Vi x) { return reinterpret_cast<Vf>(x); }

// Lanes 0 .. n-1 of x, `other` in the rest.
static inline Vf keep(Vf x, std::int64_t n, float other) {
  Vi lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return (lane < static_cast<std::int32_t>(n)) ? x : splat(other);
}

#if defined(SWIN_MASKED_LANES)
static inline __mmask16 first_lanes(std::int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
#elif defined(__AVX2__)
static inline __m256i first_lanes(std::int64_t n) {
  alignas(64) static constexpr std::int32_t kMask[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMask + 8 - n));
}
#endif

// n lanes of `source`, the rest zero. n is kLanes in all but the last step of a row.
static inline Vf load(const float* source, std::int64_t n = kLanes) {
  Vf v{};
  if (n == kLanes) {
    std::memcpy(&v, source, sizeof v);
  } else {
#if defined(SWIN_MASKED_LANES)
    v = reinterpret_cast<Vf>(_mm512_maskz_loadu_ps(first_lanes(n), source));
#elif defined(__AVX2__)
    v = reinterpret_cast<Vf>(_mm256_maskload_ps(source, first_lanes(n)));
#else
    std::memcpy(&v, source, n * sizeof(float));
#endif
  }
  return v;
}

static inline void store(float* target, Vf v, std::int64_t n = kLanes) {
  if (n == kLanes) {
    std::memcpy(target, &v, sizeof v);
  } else {
#if defined(SWIN_MASKED_LANES)
    _mm512_mask_storeu_ps(target, first_lanes(n), reinterpret_cast<__m512>(v));
#elif defined(__AVX2__)
    _mm256_maskstore_ps(target, first_lanes(n), reinterpret_cast<__m256>(v));
#else
    std::memcpy(target, &v, n * sizeof(float));
#endif
  }
}

static inline Vf load(const std::int32_t* source, std::int64_t n = kLanes) {
  Vi v{};
  if (n == kLanes) {
    std::memcpy(&v, source, sizeof v);
  } else {
    std::memcpy(&v, source, n * sizeof(std::int32_t));
  }
  return __builtin_convertvector(v, Vf);
}

static inline Vf load_full(const std::int8_t* source) {
#if defined(SWIN_MASKED_LANES)
  return reinterpret_cast<Vf>(
      _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)))));
#elif defined(__AVX2__)
  return reinterpret_cast<Vf>(
      _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source)))));
#elif defined(__aarch64__)
  std::uint32_t bytes;
  std::memcpy(&bytes, source, sizeof bytes);
  const int16x8_t words = vmovl_s8(vcreate_s8(bytes));
  return reinterpret_cast<Vf>(vcvtq_f32_s32(vmovl_s16(vget_low_s16(words))));
#else
  Vf v;
  for (int i = 0; i < kLanes; ++i) v[i] = source[i];
  return v;
#endif
}

static inline Vf load(const std::int8_t* source, std::int64_t n = kLanes) {
  if (n == kLanes) return load_full(source);
#if defined(SWIN_MASKED_LANES)
  return reinterpret_cast<Vf>(
      _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_lanes(n), source))));
#else
  std::int8_t lanes[kLanes] = {};
  std::memcpy(lanes, source, n);
  return load_full(lanes);
#endif
}

// Largest integer steps are exact here: after the clamp every value is below 2^22 in magnitude.
static inline Vf round_even(Vf x) {
  const Vf magic = splat(12582912.0f);  // 1.5 * 2^23
  return (x + magic) - magic;
}

// clamp(rne(x), -128, 127), NaN to 0 (docs/architecture.md). What is below -128 saturates in the conversions, of which
// the first turns everything beyond int32 into its least value: only the upper end needs a clamp.
#if defined(SWIN_MASKED_LANES)
static inline __m128i quantized(Vf x) {
  const __m512 v = reinterpret_cast<__m512>(x);
  const __mmask16 number = _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q);
  return _mm512_cvtsepi32_epi8(_mm512_maskz_cvtps_epi32(number, _mm512_min_ps(v, _mm512_set1_ps(127.0f))));
}
#elif defined(__AVX2__)
static inline __m128i quantized(Vf x) {  // the low 8 bytes
  const __m256 v = reinterpret_cast<__m256>(x), number = _mm256_and_ps(v, _mm256_cmp_ps(v, v, _CMP_ORD_Q));
  const __m256i q = _mm256_cvtps_epi32(_mm256_min_ps(number, _mm256_set1_ps(127.0f)));
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
  return _mm_packs_epi16(words, words);
}
#elif defined(__aarch64__)
static inline int16x4_t quantized_words(Vf x) {  // fcvtns rounds half to even, saturates, and turns NaN into 0
  return vqmovn_s32(vcvtnq_s32_f32(reinterpret_cast<float32x4_t>(x)));
}
#endif

static inline void store_s8_full(std::int8_t* target, Vf x) {
#if defined(SWIN_MASKED_LANES)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), quantized(x));
#elif defined(__AVX2__)
  _mm_storel_epi64(reinterpret_cast<__m128i*>(target), quantized(x));
#elif defined(__aarch64__)
  const int16x4_t words = quantized_words(x);
  const std::uint32_t bytes = vget_lane_u32(vreinterpret_u32_s8(vqmovn_s16(vcombine_s16(words, words))), 0);
  std::memcpy(target, &bytes, sizeof bytes);
#else
  x = (x == x) ? x : Vf{};
  const Vf q = round_even(min_of(max_of(x, splat(-128.0f)), splat(127.0f)));
  for (int i = 0; i < kLanes; ++i) target[i] = static_cast<std::int8_t>(q[i]);
#endif
}

static inline void store_s8(std::int8_t* target, Vf x, std::int64_t n = kLanes) {
  if (n == kLanes) {
    store_s8_full(target, x);
    return;
  }
#if defined(SWIN_MASKED_LANES)
  _mm_mask_storeu_epi8(target, first_lanes(n), quantized(x));
#else
  std::int8_t lanes[kLanes];
  store_s8_full(lanes, x);
  for (std::int64_t i = 0; i < n; ++i) target[i] = lanes[i];
#endif
}

// V (1 or 2) adjacent vectors as int8, clamp(rne(x), -128, 127), into the `left` columns that the row still has; x holds
// no NaN. What rounds below -128 saturates, up to -2^31 and beyond, in the conversions themselves; what is above 127 does where
// all x are below 2^31 (kBelow2To31), else it is cut off before. kRelu: max(0, x) instead, which is the same before rounding
// and after it; of bytes it is one instruction.
template <int V, bool kRelu = false, bool kBelow2To31 = false>
SWIN_INLINE static inline void store_s8_columns(std::int8_t* target, const Vf* x, std::int64_t left) {
  if (V * kLanes <= left) {
#if defined(SWIN_MASKED_LANES)
    __m512i q[V];
    for (int v = 0; v < V; ++v) {
      const __m512 y = reinterpret_cast<__m512>(x[v]);
      q[v] = _mm512_cvtps_epi32(kBelow2To31 ? y : _mm512_min_ps(y, _mm512_set1_ps(127.0f)));
    }
    if constexpr (V == 2) {  // a conversion that narrows is two instructions, packing one for both
      const __m512i words = _mm512_packs_epi32(q[0], q[1]), bytes = _mm512_packs_epi16(words, words);
      const __m512i order = _mm512_castsi256_si512(_mm256_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13));
      const __m256i columns = _mm512_castsi512_si256(_mm512_permutexvar_epi32(order, bytes));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(target),
                          kRelu ? _mm256_max_epi8(columns, _mm256_setzero_si256()) : columns);
    } else {
      const __m128i bytes = _mm512_cvtsepi32_epi8(q[0]);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(target), kRelu ? _mm_max_epi8(bytes, _mm_setzero_si128()) : bytes);
    }
    return;
#elif defined(__AVX2__)
    __m256i q[V];
    for (int v = 0; v < V; ++v) {
      q[v] = _mm256_cvtps_epi32(_mm256_min_ps(reinterpret_cast<__m256>(x[v]), _mm256_set1_ps(127.0f)));
    }
    if constexpr (V == 2) {
      const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(q[0], q[1]), 0xD8);
      const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(target), kRelu ? _mm_max_epi8(bytes, _mm_setzero_si128()) : bytes);
    } else {
      const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q[0]), _mm256_extracti128_si256(q[0], 1));
      const __m128i bytes = _mm_packs_epi16(words, words);
      _mm_storel_epi64(reinterpret_cast<__m128i*>(target), kRelu ? _mm_max_epi8(bytes, _mm_setzero_si128()) : bytes);
    }
    return;
#elif defined(__aarch64__)
    if constexpr (V == 2) {
      const int8x8_t bytes = vqmovn_s16(vcombine_s16(quantized_words(x[0]), quantized_words(x[1])));
      vst1_s8(target, kRelu ? vmax_s8(bytes, vdup_n_s8(0)) : bytes);
      return;
    }
#endif
  }
  for (int v = 0; v < V && left > v * kLanes; ++v) {
    store_s8(target + v * kLanes, kRelu ? max_of(x[v], Vf{}) : x[v], min_of(kLanes, left - v * kLanes));
  }
}

// Lane i of the result holds lane i + kLanes/2, kLanes/4, ... of v combined with it: lane 0 the whole.
template <class Combine>
static inline float reduce(Vf v, Combine&& combine) {
#if defined(__AVX2__)
#if defined(SWIN_MASKED_LANES)
  const __m512 wide = reinterpret_cast<__m512>(v);
  const __m256 half = combine(_mm512_castps512_ps256(wide), _mm512_extractf32x8_ps(wide, 1));
#else
  const __m256 half = reinterpret_cast<__m256>(v);
#endif
  __m128 x = combine(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  x = combine(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(combine(x, _mm_shuffle_ps(x, x, 1)));
#elif defined(__aarch64__)
  const float32x4_t whole = reinterpret_cast<float32x4_t>(v);
  const float32x2_t half = combine(vget_low_f32(whole), vget_high_f32(whole));
  return combine(half[0], half[1]);
#else
  float lanes[kLanes];
  std::memcpy(lanes, &v, sizeof v);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] = combine(lanes[i], lanes[i + width]);
  }
  return lanes[0];
#endif
}
static inline float sum_of(Vf v) {
  return reduce(v, [](auto a, auto b) { return a + b; });
}
static inline float max_lane(Vf v) {
#if defined(SWIN_MASKED_LANES)
  return _mm512_reduce_max_ps(reinterpret_cast<__m512>(v));
#else
  return reduce(v, [](auto a, auto b) { return a > b ? a : b; });
#endif
}

// Lane r of the result: the lanes of rows[r], combined; of kLanes rows at once, which takes half of what one row after the
// other does.
template <class Combine>
static inline Vf across(const Vf* rows, Combine&& combine) {
#if defined(SWIN_MASKED_LANES)
  __m512 fours[4];  // four rows each: lane 4 i + r what quarter i of row r gives
  for (int i = 0; i < 4; ++i) {
    __m512 twos[2];
    for (int j = 0; j < 2; ++j) {
      const __m512 a = reinterpret_cast<__m512>(rows[4 * i + 2 * j]), b = reinterpret_cast<__m512>(rows[4 * i + 2 * j + 1]);
      twos[j] = combine(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    const __m512d a = _mm512_castps_pd(twos[0]), b = _mm512_castps_pd(twos[1]);
    fours[i] = combine(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const auto halves = [&](__m512 a, __m512 b) SWIN_INLINE {
    return combine(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
  };
  return reinterpret_cast<Vf>(halves(halves(fours[0], fours[1]), halves(fours[2], fours[3])));
#elif defined(__AVX2__)
  __m256 fours[2];
  for (int i = 0; i < 2; ++i) {
    __m256 twos[2];
    for (int j = 0; j < 2; ++j) {
      const __m256 a = reinterpret_cast<__m256>(rows[4 * i + 2 * j]), b = reinterpret_cast<__m256>(rows[4 * i + 2 * j + 1]);
      twos[j] = combine(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    }
    const __m256d a = _mm256_castps_pd(twos[0]), b = _mm256_castps_pd(twos[1]);
    fours[i] = combine(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
  }
  return reinterpret_cast<Vf>(combine(_mm256_permute2f128_ps(fours[0], fours[1], 0x20),
                                      _mm256_permute2f128_ps(fours[0], fours[1], 0x31)));
#else
  Vf result{};
  for (int r = 0; r < kLanes; ++r) result[r] = reduce(rows[r], combine);
  return result;
#endif
}
#if defined(SWIN_MASKED_LANES)
static inline Vf sums_of(const Vf* rows) {
  return across(rows, [](__m512 a, __m512 b) SWIN_INLINE { return _mm512_add_ps(a, b); });
}
static inline Vf largest_of(const Vf* rows) {
  return across(rows, [](__m512 a, __m512 b) SWIN_INLINE { return _mm512_max_ps(a, b); });
}
#elif defined(__AVX2__)
static inline Vf sums_of(const Vf* rows) {
  return across(rows, [](__m256 a, __m256 b) SWIN_INLINE { return _mm256_add_ps(a, b); });
}
static inline Vf largest_of(const Vf* rows) {
  return across(rows, [](__m256 a, __m256 b) SWIN_INLINE { return _mm256_max_ps(a, b); });
}
#else
static inline Vf sums_of(const Vf* rows) {
  return across(rows, [](auto a, auto b) { return a + b; });
}
static inline Vf largest_of(const Vf* rows) {
  return across(rows, [](auto a, auto b) { return a > b ? a : b; });
}
#endif

// rne(x), |x| < 2^22.
static inline Vi rounded(Vf x) {
#if defined(SWIN_MASKED_LANES)
  return reinterpret_cast<Vi>(_mm512_cvtps_epi32(reinterpret_cast<__m512>(x)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vi>(_mm256_cvtps_epi32(reinterpret_cast<__m256>(x)));
#elif defined(__aarch64__)
  return reinterpret_cast<Vi>(vcvtnq_s32_f32(reinterpret_cast<float32x4_t>(x)));
#else
  return __builtin_convertvector(round_even(x), Vi);
#endif
}
// The lanes, each -128..127, as bytes.
static inline void store_bytes(std::int8_t* target, Vi x) {
#if defined(SWIN_MASKED_LANES)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(x)));
#elif defined(__AVX2__)
  const __m256i v = reinterpret_cast<__m256i>(x);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(target), _mm_packs_epi16(words, words));
#elif defined(__aarch64__)
  const int16x4_t words = vmovn_s32(reinterpret_cast<int32x4_t>(x));
  const std::uint32_t bytes = vget_lane_u32(vreinterpret_u32_s8(vmovn_s16(vcombine_s16(words, words))), 0);
  std::memcpy(target, &bytes, sizeof bytes);
#else
  for (int i = 0; i < kLanes; ++i) target[i] = static_cast<std::int8_t>(x[i]);
#endif
}

// x in the first lane, 0 in the rest.
static inline Vi first_lane(std::int32_t x) {
#if defined(SWIN_MASKED_LANES)
  return reinterpret_cast<Vi>(_mm512_zextsi128_si512(_mm_cvtsi32_si128(x)));
#else
  Vi v{};
  v[0] = x;
  return v;
#endif
}

// `count` vectors of such lanes, adjacent.
SWIN_INLINE static inline void store_bytes(std::int8_t* target, const Vi* x, std::int64_t count) {
  std::int64_t v = 0;
#if defined(SWIN_MASKED_LANES)
  const auto words_of = [x](std::int64_t i) SWIN_INLINE {  // of each quarter, i's and then i + 1's
    return _mm512_packs_epi32(reinterpret_cast<__m512i>(x[i]), reinterpret_cast<__m512i>(x[i + 1]));
  };
  for (; v + 4 <= count; v += 4) {
    const __m512i bytes = _mm512_packs_epi16(words_of(v), words_of(v + 2));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(target + v * kLanes, _mm512_permutexvar_epi32(order, bytes));
  }
#elif defined(__AVX2__)
  const auto words_of = [x](std::int64_t i) SWIN_INLINE {  // of each half, i's and then i + 1's
    return _mm256_packs_epi32(reinterpret_cast<__m256i>(x[i]), reinterpret_cast<__m256i>(x[i + 1]));
  };
  for (; v + 4 <= count; v += 4) {
    const __m256i bytes = _mm256_packs_epi16(words_of(v), words_of(v + 2));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + v * kLanes),
                        _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
  }
#endif
  for (; v < count; ++v) store_bytes(target + v * kLanes, x[v]);
}

// 2^t for t < 127, within 4e-7 of it, relatively; at most 2^-124 for t below -125, NaN for NaN. A polynomial of degree 5.
#if defined(SWIN_MASKED_LANES)
static inline Vf exp2_of(Vf t) {
  const __m512 x = reinterpret_cast<__m512>(t);
  const Vf r = reinterpret_cast<Vf>(_mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));  // t - floor(t)
  Vf p = splat(0.00187757669f);
  p = p * r + splat(0.00898933969f);
  p = p * r + splat(0.0558263175f);
  p = p * r + splat(0.240153611f);
  p = p * r + splat(0.693153083f);
  p = p * r + splat(0.99999994f);
  // p * 2^floor(t). A result below the least normal number would take the processor a hundred cycles.
  return reinterpret_cast<Vf>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), _mm512_max_ps(_mm512_set1_ps(-125.0f), x)));
}
#else
static inline Vf exp2_of(Vf t) {  // on [-1/2, 1/2], times 2^n by its exponent's bits
  // Adding 1.5 * 2^23 leaves an integer next to t in the lowest bits, here with the exponent's bias of 127.
  const Vf magic = splat(12582912.0f + 127.0f);
  const Vf clamped = max_of(splat(-126.0f), t);  // NaN stays NaN
  const Vf shifted = clamped + magic;
  const Vf r = clamped - (shifted - magic);
  Vf p = splat(0.00133908633f);
  p = p * r + splat(0.00967603177f);
  p = p * r + splat(0.0555035695f);
  p = p * r + splat(0.240221068f);
  p = p * r + splat(0.693147182f);
  p = p * r + splat(1.00000012f);
  return p * float_of(bits_of(shifted) << 23);
}
#endif

// Calls body(i, n) for i = 0, kLanes, 2 kLanes, ... below `count`, n being the lanes in use.
template <class Body>
static inline void for_lanes(std::int64_t count, Body&& body) {
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) body(i, static_cast<std::int64_t>(kLanes));
  if (i < count) body(i, count - i);
}

// Splits `rows` into chunks of at least about `grain` and calls body(first, last) on the pool's threads.
template <class Body>
static inline void parallel_rows(const ExecContext& context, std::int64_t rows, std::int64_t grain, Body&& body) {
  struct Closure {
    Body* body;
    std::int64_t rows, chunks;
  };
  // Four chunks a thread, so that an unlucky one holds up nobody for long. But of few blocks each is a chunk: the last is
  // what one thread works on while the others wait.
  const std::int64_t most = ceil_div(rows, grain), threads = context.threads > 0 ? context.threads : 1;
  Closure closure{&body, rows, most <= 8 * threads ? most : 4 * threads};
  run_tasks(
      context.threads, closure.chunks,
      [](void* opaque, std::int64_t task) {
        const Closure& c = *static_cast<Closure*>(opaque);
        (*c.body)(task * c.rows / c.chunks, (task + 1) * c.rows / c.chunks);
      },
      &closure);
}

}  // namespace swin::cpu::SWIN_ISA
