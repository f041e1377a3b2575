// GELU in its erf form, x/2 * (1 + erf(x / sqrt 2)), within 4e-7 * max(1, |x|).
//
// It is max(x, 0) less a function that is even, smooth on either side, and below 2e-7 from |x| = 5.4 on, for which
// polynomials stand, interpolated at Chebyshev's points: no division, no exponential. Behind a GEMM, what a vector waits for
// counts more than how many multiplications it takes, as few chains of them fit the processor's queues at once. So where
// a shuffle can find each lane a coefficient of its own, there are as many polynomials as a vector has lanes, of a low
// degree, each for where |x| * kScale rounds to its number.
#pragma once

#include "simd.h"

namespace swin::cpu::SWIN_ISA {

#if defined(__AVX2__)
// Highest power first; the error is 2.5e-7 (16 lanes) and 5.5e-8 (8).
#if defined(SWIN_MASKED_LANES)
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
#else
inline constexpr int kGeluDegree = 6;
alignas(64) inline constexpr float kGeluTable[kGeluDegree + 1][kLanes] = {
    {-0.00136329851f, 0.000244148861f, 0.00075360277f, -0.000192632506f, -0.000152752778f, 1.4646962e-05f,
     1.27553376e-05f, 1.7733114e-06f},
    {0.0f, -0.00439242506f, 0.000123375488f, 0.00153453916f, 0.000143151687f, -0.000151682645f, -4.04405146e-05f,
     -3.99056535e-06f},
    {0.0179595035f, 0.00218955148f, -0.00989384018f, -0.00297293253f, 0.0010496988f, 0.000554643513f, 8.66181072e-05f,
     6.26985775e-06f},
    {0.0f, 0.0481948443f, 0.0244106483f, -0.00351989525f, -0.00485150516f, -0.00121826294f, -0.000136921008f,
     -7.92246192e-06f},
    {-0.207364142f, -0.118347481f, 0.00290145935f, 0.0267729852f, 0.0102392007f, 0.00171844335f, 0.000149769417f,
     7.17130615e-06f},
    {0.360480636f, 0.00985711068f, -0.0928224772f, -0.0489700809f, -0.0115518468f, -0.00145036925f, -0.00010206463f,
     -4.11669771e-06f},
    {0.0f, 0.169762358f, 0.107656978f, 0.0330381766f, 0.00566462055f, 0.000563044974f, 3.28761707e-05f,
     1.13409646e-06f}};
#endif

// table[of_lane mod kLanes], lane by lane.
static inline Vf pick(const float* table, Vi of_lane) {
#if defined(SWIN_MASKED_LANES)
  return reinterpret_cast<Vf>(_mm512_permutexvar_ps(reinterpret_cast<__m512i>(of_lane), _mm512_load_ps(table)));
#else
  return reinterpret_cast<Vf>(_mm256_permutevar8x32_ps(_mm256_load_ps(table), reinterpret_cast<__m256i>(of_lane)));
#endif
}

static inline Vf gelu(Vf x) {
  constexpr float kLargest = 5.4f, kScale = (kLanes - 0.51f) / kLargest;
  const Vf scale = splat(kScale), magic = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves rne in the lowest bits
  const Vf a = min_of(splat(kLargest), float_of(bits_of(x) & 0x7fffffff));  // NaN stays NaN
  const Vf shifted = a * scale + magic;
  const Vf r = a * scale - (shifted - magic);
  Vf p = pick(kGeluTable[0], bits_of(shifted));
  for (int i = 1; i <= kGeluDegree; ++i) p = p * r + pick(kGeluTable[i], bits_of(shifted));
  return max_of(x, Vf{}) - p;
}
#else
static inline Vf gelu(Vf x) {
  const Vf a = min_of(splat(5.4f), float_of(bits_of(x) & 0x7fffffff));  // NaN stays NaN
  const Vf u = a * splat(0.370370358f) - splat(1.0f);
  Vf p = splat(-0.0143383993f);
  p = p * u + splat(0.00259828242f);
  p = p * u + splat(0.0864494592f);
  p = p * u + splat(-0.0476269759f);
  p = p * u + splat(-0.212978825f);
  p = p * u + splat(0.232361197f);
  p = p * u + splat(0.196728975f);
  p = p * u + splat(-0.498639882f);
  p = p * u + splat(0.204941079f);
  p = p * u + splat(0.378397048f);
  p = p * u + splat(-0.612220287f);
  p = p * u + splat(0.303107649f);
  p = p * u + splat(0.141120985f);
  p = p * u + splat(-0.303587735f);
  p = p * u + splat(0.200936243f);
  p = p * u + splat(-0.0666095391f);
  p = p * u + splat(0.00936082937f);
  return max_of(x, Vf{}) - p;
}
#endif

}  // namespace swin::cpu::SWIN_ISA
