#include "swin/half.h"

#include <cmath>
#include <cstring>
#include <limits>

namespace swin {
namespace {

std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

}  // namespace

float float_of_half(std::uint16_t h) {
  const int exponent = (h >> 10) & 31, mantissa = h & 1023;
  float value;
  if (exponent == 31) {
    value = mantissa ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
  } else if (exponent == 0) {
    value = std::ldexp(static_cast<float>(mantissa), -24);
  } else {
    value = std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  }
  return (h & 0x8000) ? -value : value;
}

std::uint16_t half_of_float(float x) {
  const std::uint16_t sign = static_cast<std::uint16_t>((bits_of(x) >> 16) & 0x8000);
  if (std::isnan(x)) return sign | 0x7e00;
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.0f) return sign | 0x7c00;  // halfway from the largest half to the next power of two
  // Below 2^-14 halves are multiples of 2^-24; above, multiples of 2^(exponent - 10).
  int exponent = magnitude > 0 ? std::ilogb(magnitude) : -14;
  if (exponent < -14) exponent = -14;
  // nearbyint rounds to even in the default rounding mode; a carry into the next exponent adds up by itself.
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return static_cast<std::uint16_t>(sign + ((exponent + 14) << 10) + steps);
}

std::uint16_t bfloat16_of_float(float x) {
  const std::uint32_t bits = bits_of(x);
  if (std::isnan(x)) return static_cast<std::uint16_t>((bits >> 16) | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace swin
