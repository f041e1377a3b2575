// GELU on the device.
#pragma once

#include "device.cuh"

namespace swin::cuda {

// GELU in its erf form, x/2 * (1 + erf(x / sqrt 2)), within 4e-7 * max(1, |x|). erf after Abramowitz and Stegun 7.1.26
// (error under 1.5e-7), as on the CPU.
__device__ __forceinline__ float gelu(float x) {
  const float z = fabsf(x) * 0.70710678f;
  const float t = reciprocal_approx(0.3275911f * z + 1.0f);
  float p = 1.061405429f * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float tail = p * t * exp2_approx(z * z * -1.44269504f);  // 1 - erf(z)
  return 0.5f * x * (x > 0.0f ? 2.0f - tail : tail);
}

}  // namespace swin::cuda
