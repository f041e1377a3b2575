// Sums of int8 products, of the shim's tensor cores and of the tests' references: most of the time of these tests. Compiled
// with optimization and without sanitizers in every build; they read no memory of a kernel.
#pragma once

#include <cstdint>

namespace shim {

// sum_i x[i] * w[i], exactly.
std::int64_t dot_s8(const std::int8_t* x, const std::int8_t* w, std::int64_t n);

// acc[i][j] += sum_k a[i][k] * b[j][k], modulo 2^32.
void multiply_s8_2x2x32(std::uint32_t (&acc)[2][2], const std::uint32_t (&a)[2][8], const std::uint32_t (&b)[2][8]);

}  // namespace shim
