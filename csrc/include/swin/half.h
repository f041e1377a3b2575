// float16 and bfloat16 as bits, converted in host code without a compiler's or a GPU's help.
#pragma once

#include <cstdint>

namespace swin {

float float_of_half(std::uint16_t bits);
// Rounded to nearest, ties to even; beyond the type's range infinity; NaN stays NaN.
std::uint16_t half_of_float(float x);
std::uint16_t bfloat16_of_float(float x);

}  // namespace swin
