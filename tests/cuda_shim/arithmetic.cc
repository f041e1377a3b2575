#include "arithmetic.h"

#include <algorithm>
#include <cmath>
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

void multiply_lane(int (&acc)[4], const Deposit* lanes, int lane) {
  // Its rows g and g + 8 of the left matrix and columns 2t and 2t + 1 of the right one, four of k to a word.
  const int g = lane / 4, t = lane % 4;
  std::uint32_t rows[2][8], columns[2][8];
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 8; ++j) {
      const int owner = j % 4, upper = j / 4;
      rows[i][j] = lanes[4 * g + owner].word[2 * upper + i];
      columns[i][j] = lanes[4 * (2 * t + i) + owner].word[4 + upper];
    }
  }
  std::int8_t left[2][32], right[2][32];
  std::memcpy(left, rows, sizeof left);
  std::memcpy(right, columns, sizeof right);
  for (int i = 0; i < 4; ++i) {  // modulo 2^32
    const auto sum = static_cast<std::uint32_t>(dot_block(left[i / 2], right[i % 2], 32));
    acc[i] = static_cast<int>(static_cast<std::uint32_t>(acc[i]) + sum);
  }
}

float exp2_approx(float x) {
  if (x < -126) return 0;  // ftz
  return std::exp2(x);
}
float reciprocal_approx(float x) { return 1.0f / x; }

std::uint32_t pack_saturated_s8(int a, int b, int c, int d) {
  std::uint32_t all = 0;
  const int values[4] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) {
    const int clamped = values[i] < -128 ? -128 : values[i] > 127 ? 127 : values[i];
    all |= (static_cast<std::uint32_t>(clamped) & 255u) << (8 * i);
  }
  return all;
}

}  // namespace shim
