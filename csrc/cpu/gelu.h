// GELU in its erf form, x/2 * (1 + erf(x / sqrt 2)), within 4e-7 * max(1, |x|). No division, no exponential.
//
// It is max(x, 0) less a function that is even, smooth on either side, and below 2e-7 from |x| = kGeluLargest on, for
// which polynomials stand, interpolated at Chebyshev's points. What a vector waits for counts as much as how many
// instructions it takes, as few such chains fit a processor's queues at once.
//
// AVX-512: a shuffle finds each lane a coefficient of its own, so there are sixteen polynomials of degree 4, each for
// where |x| * kScale rounds to its number. The error is 2.5e-7.
//
// Elsewhere: one polynomial of degree 16, through which several vectors go together, step by step; the error is 1.5e-7.
// (AVX2 has shuffles as well, for eight polynomials of degree 6, but with them a vector took 1.3 times as long on Zen 3,
// however many went together.)
#pragma once

#include "simd.h"

namespace swin::cpu::SWIN_ISA {

inline constexpr float kGeluLargest = 5.4f;

#if defined(SWIN_MASKED_LANES)
// Highest power first.
inline constexpr int kGeluDegree = 4;
alignas(64) inline constexpr float kGeluTable[kGeluDegree + 1][kLanes] = {
    {0.000976463431f, 0.000727498846f, 0.000161225151f, -0.000345974142f, -0.000538122375f, -0.000430739194f,
     -0.000206746234f, -2.89031359e-05f, 4.97473156e-05f, 5.69674557e-05f, 3.7581467e-05f, 1.85483368e-05f,
     7.36890615e-06f, 2.43346244e-06f, 6.79726782e-07f, 1.62321868e-07f},
    {0.0f, 0.00355511927f, 0.00537478691f, 0.00493213814f, 0.00305283931f, 0.0010462841f, -0.0002342105f,
     -0.000676316035f, -0.000605281268f, -0.000377056072f, -0.000185209414f, -7.50715481e-05f, -2.56741332e-05f,
     -7.50343179e-06f, -1.8892141e-06f, -4.12051264e-07f},
    {-0.0484832376f, -0.0428525545f, -0.0287803859f, -0.0127145099f, -0.000509224017f, 0.00550953439f, 0.00645964313f,
     0.00488210469f, 0.00286672846f, 0.00138521427f, 0.000565147668f, 0.000197399437f, 5.95278761e-05f,
     1.55840771e-05f, 3.55543625e-06f, 7.08866651e-07f},
    {0.174306005f, 0.0811634287f, 0.00861227605f, -0.0326467678f, -0.0449087955f, -0.0388915502f, -0.0262810383f,
     -0.0147240367f, -0.00701654423f, -0.00288164755f, -0.0010277523f, -0.00031985229f, -8.71400916e-05f,
     -2.08291403e-05f, -4.37542531e-06f, -8.08718255e-07f},
    {0.0f, 0.126786798f, 0.169307813f, 0.154593781f, 0.113774657f, 0.0708755553f, 0.0381394103f, 0.0179064628f,
     0.00737496326f, 0.00267300988f, 0.000854240789f, 0.000241015368f, 6.00837484e-05f, 1.3242382e-05f,
     2.58135037e-06f, 4.45169377e-07f}};

// table[of_lane mod kLanes], lane by lane.
static inline Vf pick(const float* table, Vi of_lane) {
  return reinterpret_cast<Vf>(_mm512_permutexvar_ps(reinterpret_cast<__m512i>(of_lane), _mm512_load_ps(table)));
}

SWIN_INLINE static inline Vf gelu(Vf x) {
  constexpr float kScale = (kLanes - 0.51f) / kGeluLargest;
  const Vf scale = splat(kScale), magic = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves rne in the lowest bits
  const Vf a = min_of(splat(kGeluLargest), float_of(bits_of(x) & 0x7fffffff));  // NaN stays NaN
  const Vf shifted = a * scale + magic;
  const Vf r = a * scale - (shifted - magic);
  Vf p = pick(kGeluTable[0], bits_of(shifted));
  for (int i = 1; i <= kGeluDegree; ++i) p = p * r + pick(kGeluTable[i], bits_of(shifted));
  return max_of(x, Vf{}) - p;
}

// x[i] = GELU(x[i]).
template <int N>
SWIN_INLINE static inline void gelu(Vf (&x)[N]) {
  for (int i = 0; i < N; ++i) x[i] = gelu(x[i]);
}
#else
inline constexpr int kGeluDegree = 16;

// Of |x| * 2 / kGeluLargest - 1, highest power first; each in all lanes.
struct GeluCoefficients {
  alignas(32) float lanes[kGeluDegree + 1][kLanes] = {};

  constexpr GeluCoefficients() {
    constexpr float kOfPowers[kGeluDegree + 1] = {
        -0.0143383993f, 0.00259828242f, 0.0864494592f, -0.0476269759f, -0.212978825f, 0.232361197f,
        0.196728975f,   -0.498639882f,  0.204941079f,  0.378397048f,   -0.612220287f, 0.303107649f,
        0.141120985f,   -0.303587735f,  0.200936243f,  -0.0666095391f, 0.00936082937f};
    for (int i = 0; i <= kGeluDegree; ++i) {
      for (float& lane : lanes[i]) lane = kOfPowers[i];
    }
  }
};
inline constexpr GeluCoefficients kGelu;

// p * u + c. With AVX2 the multiplication reads c from memory: p and u of eight vectors take all registers, and GCC
// would load c into one, for which it moves others to memory.
SWIN_INLINE static inline Vf multiply_add(Vf p, Vf u, const float (&c)[kLanes]) {
#if defined(__AVX2__)
  asm("vfmadd213ps %2, %1, %0" : "+x"(p) : "x"(u), "m"(*reinterpret_cast<const __m256*>(c)));
  return p;
#else
  return p * u + splat(c[0]);
#endif
}

// x[i] = GELU(x[i]).
template <int N>
SWIN_INLINE static inline void gelu(Vf (&x)[N]) {
  Vf u[N], p[N];
  for (int i = 0; i < N; ++i) {
    const Vf a = min_of(splat(kGeluLargest), float_of(bits_of(x[i]) & 0x7fffffff));  // NaN stays NaN
    u[i] = a * splat(2 / kGeluLargest) - splat(1.0f);
    p[i] = splat(kGelu.lanes[0][0]);
  }
#pragma GCC unroll 16
  for (int power = 1; power <= kGeluDegree; ++power) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) p[i] = multiply_add(p[i], u[i], kGelu.lanes[power]);
  }
  for (int i = 0; i < N; ++i) x[i] = max_of(x[i], Vf{}) - p[i];
}
#endif

}  // namespace swin::cpu::SWIN_ISA
