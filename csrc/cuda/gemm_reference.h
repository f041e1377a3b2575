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

// Added to `*found`: how many of `bytes` bytes differ, and the offset of one that does.
struct ByteDifferences {
  unsigned long long count;
  unsigned long long somewhere;
};
void count_differences(const void* a, const void* b, std::int64_t bytes, ByteDifferences* found, void* stream);

}  // namespace cuda
}  // namespace swin
