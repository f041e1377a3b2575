// Our own plain GEMM, which every other provider is measured against, and what a proof needs beside it (gemm_reference.cu).
// Everything launches on `stream` (a cudaStream_t) and neither allocates nor synchronizes.
#pragma once

#include <cstdint>

#include "gemm_provider.h"

namespace swin {
namespace cuda {

// Any shape and any alignment, exact.
void plain_gemm(const GemmShape& shape, const GemmCall& call, void* stream);

// What a proof multiplies. kFull: -128..127, all alike. kSmall: -8..8, whose sums are small, so that a factor of a power of
// two gives many exact ties. kExtremes: -128 and 127 alone: the largest sums, and outputs that saturate.
enum class GemmPattern { kFull, kSmall, kExtremes };
void fill_random(std::int8_t* data, std::int64_t count, std::uint64_t seed, GemmPattern pattern, void* stream);

// Floats for scales, biases and residuals: step * i, i one of first .. first + kinds - 1, all alike, and of either sign
// if `signs`. kinds: at most 2^16.
struct RandomFloats {
  float step = 0;
  int first = 0, kinds = 1;
  bool signs = false;
};
void fill_random(float* data, std::int64_t count, std::uint64_t seed, const RandomFloats& values, void* stream);
// What an output that adds finds in `out`, in its type.
void fill_residual(GemmOutput output, void* out, std::int64_t count, std::uint64_t seed, const RandomFloats& values,
                   void* stream);

// Added to `*found`: how many of `bytes` bytes differ, and the offset of one that does.
struct ByteDifferences {
  unsigned long long count;
  unsigned long long somewhere;
};
void count_differences(const void* a, const void* b, std::int64_t bytes, ByteDifferences* found, void* stream);

// Added to `*errors`, of an output that has channels: how many of its values are off by one step - the expected one's
// neighbours in int8, float16 or bfloat16, both zeros being one value - and how many are wrong, by more; and one of
// each. A float32 has no steps: it is wrong beyond tolerance * (|expected| + |bias[n]|).
struct GemmErrors {
  struct Kind {
    unsigned long long count, somewhere;
    float found, expected;
  } wrong, off_by_one;
};
void count_errors(const GemmShape& shape, const void* found, const void* expected, const float* bias, float tolerance,
                  GemmErrors* errors, void* stream);

}  // namespace cuda
}  // namespace swin
