#include "arithmetic.h"

#include <algorithm>
#include <cstring>

namespace shim {
namespace {

// Products of n int8, at most 2^16 of them, so that 32 bits hold their sum.
std::int32_t dot_block(const std::int8_t* x, const std::int8_t* w, std::int64_t n) {
  std::int32_t sum = 0;
  for (std::int64_t i = 0; i < n; ++i) sum += x[i] * w[i];
  return sum;
}

}  // namespace

std::int64_t dot_s8(const std::int8_t* x, const std::int8_t* w, std::int64_t n) {
  constexpr std::int64_t kBlock = 1 << 16;
  std::int64_t sum = 0;
  for (std::int64_t i = 0; i < n; i += kBlock) sum += dot_block(x + i, w + i, std::min(kBlock, n - i));
  return sum;
}

void multiply_s8_2x2x32(std::uint32_t (&acc)[2][2], const std::uint32_t (&a)[2][8], const std::uint32_t (&b)[2][8]) {
  std::int8_t left[2][32], right[2][32];
  std::memcpy(left, a, sizeof left);
  std::memcpy(right, b, sizeof right);
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) acc[i][j] += static_cast<std::uint32_t>(dot_block(left[i], right[j], 32));
  }
}

}  // namespace shim
