// The shim's tensor cores and intrinsics, and sums of products for the tests' references: most of these tests' time.
// Compiled with optimization and without sanitizers in every build; they read no memory of a kernel.
#pragma once

#include <cstdint>

namespace shim {

// sum_i x[i] * w[i], exactly.
std::int64_t dot_s8(const std::int8_t* x, const std::int8_t* w, std::int64_t n);

// What one lane lays down for the others at a collective.
struct Deposit {
  std::uint32_t word[6];
};

// One lane's part of mma_s8_16832 (device.cuh), from the a and b that the 32 lanes have laid down.
void multiply_lane(int (&acc)[4], const Deposit* lanes, int lane);

float exp2_approx(float x);
float reciprocal_approx(float x);
std::uint32_t pack_saturated_s8(int a, int b, int c, int d);

}  // namespace shim
