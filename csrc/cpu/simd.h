// Vectors of float lanes for one instruction set. Every file below csrc/cpu/ that includes this is compiled once per
// instruction set (CMakeLists.txt), each time in its own namespace SWIN_ISA, so that no symbol of one is ever linked
// into another. For the same reason these files call nothing of the C++ library but what is a compiler builtin.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
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

typedef float Vf __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t Vi __attribute__((vector_size(4 * kLanes)));

static inline std::int64_t min_of(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
static inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
static inline Vf splat(float x) { return Vf{} + x; }
static inline Vf max_of(Vf a, Vf b) { return a > b ? a : b; }
static inline Vf min_of(Vf a, Vf b) { return a < b ? a : b; }
static inline Vi bits_of(Vf x) { return reinterpret_cast<Vi>(x); }
static inline Vf float_of(Vi x) { return reinterpret_cast<Vf>(x); }

// Lanes 0 .. n-1 of x, `other` in the rest.
static inline Vf keep(Vf x, std::int64_t n, float other) {
  Vi lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return (lane < static_cast<std::int32_t>(n)) ? x : splat(other);
}

// n lanes of `source`, the rest zero. n is kLanes in all but the last step of a row.
static inline Vf load(const float* source, std::int64_t n = kLanes) {
  Vf v{};
  if (n == kLanes) {
    std::memcpy(&v, source, sizeof v);
  } else {
#if defined(SWIN_MASKED_LANES)
    v = reinterpret_cast<Vf>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), source));
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
    _mm512_mask_storeu_ps(target, static_cast<__mmask16>((1u << n) - 1), reinterpret_cast<__m512>(v));
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
      _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << n) - 1), source))));
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

// clamp(rne(x), -128, 127), NaN to 0 (docs/architecture.md).
static inline void store_s8_full(std::int8_t* target, Vf x) {
  x = (x == x) ? x : Vf{};
  x = min_of(max_of(x, splat(-128.0f)), splat(127.0f));
#if defined(SWIN_MASKED_LANES)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target),
                   _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(reinterpret_cast<__m512>(x))));
#elif defined(__AVX2__)
  const __m256i q = _mm256_cvtps_epi32(reinterpret_cast<__m256>(x));
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(target), _mm_packs_epi16(words, words));
#else
  const Vf q = round_even(x);
  for (int i = 0; i < kLanes; ++i) target[i] = static_cast<std::int8_t>(q[i]);
#endif
}

static inline void store_s8(std::int8_t* target, Vf x, std::int64_t n = kLanes) {
  if (n == kLanes) {
    store_s8_full(target, x);
    return;
  }
  std::int8_t lanes[kLanes];
  store_s8_full(lanes, x);
  std::memcpy(target, lanes, n);
}

static inline float sum_of(Vf v) {
  float lanes[kLanes];
  std::memcpy(lanes, &v, sizeof v);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

static inline float max_lane(Vf v) {
  float lanes[kLanes];
  std::memcpy(lanes, &v, sizeof v);
  float m = lanes[0];
  for (int i = 1; i < kLanes; ++i) m = lanes[i] > m ? lanes[i] : m;
  return m;
}

// e^x for x <= 0; 0 below -87, NaN for NaN. Cephes' degree-5 polynomial on [-ln2/2, ln2/2], scaled by 2^n.
static inline Vf exp_nonpositive(Vf x) {
  const Vf clamped = (x < splat(-87.0f)) ? splat(-87.0f) : x;  // NaN stays NaN
  const Vf n = round_even(clamped * splat(1.44269504f));
  const Vf r = (clamped - n * splat(0.693359375f)) - n * splat(-2.12194440e-4f);
  Vf p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * (r * r) + r + splat(1.0f);
  const Vi exponent = (__builtin_convertvector(n, Vi) + 127) << 23;
  return (x < splat(-87.0f)) ? Vf{} : p * float_of(exponent);
}

// GELU in its erf form, x/2 * (1 + erf(x / sqrt 2)), within 4e-7 * max(1, |x|). erf after Abramowitz and Stegun 7.1.26
// (error under 1.5e-7).
static inline Vf gelu(Vf x) {
  const Vf z = x * splat(0.70710678f);
  const Vf a = float_of(bits_of(z) & 0x7fffffff);
  const Vf t = splat(1.0f) / (splat(1.0f) + splat(0.3275911f) * a);
  Vf p = splat(1.061405429f);
  p = p * t + splat(-1.453152027f);
  p = p * t + splat(1.421413741f);
  p = p * t + splat(-0.284496736f);
  p = p * t + splat(0.254829592f);
  const Vf tail = p * t * exp_nonpositive(-(a * a));  // 1 - erf(a)
  const Vf phi = (z > Vf{}) ? splat(2.0f) - tail : tail;
  return splat(0.5f) * x * phi;
}

// Calls body(i, n) for i = 0, kLanes, 2 kLanes, ... below `count`, n being the lanes in use.
template <class Body>
static inline void for_lanes(std::int64_t count, Body&& body) {
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) body(i, static_cast<std::int64_t>(kLanes));
  if (i < count) body(i, count - i);
}

// Splits `rows` into chunks of about `grain` and calls body(first, last) on the pool's threads.
template <class Body>
static inline void parallel_rows(const ExecContext& context, std::int64_t rows, std::int64_t grain, Body&& body) {
  struct Closure {
    Body* body;
    std::int64_t rows, chunk;
  };
  // At least four chunks a thread where there is enough work, so that an unlucky thread holds up nobody for long.
  const std::int64_t wanted = ceil_div(rows, 4 * (context.threads > 0 ? context.threads : 1));
  Closure closure{&body, rows, wanted > grain ? wanted : grain};
  run_tasks(
      context.threads, ceil_div(rows, closure.chunk),
      [](void* opaque, std::int64_t task) {
        const Closure& c = *static_cast<Closure*>(opaque);
        const std::int64_t first = task * c.chunk;
        (*c.body)(first, min_of(first + c.chunk, c.rows));
      },
      &closure);
}

}  // namespace swin::cpu::SWIN_ISA
