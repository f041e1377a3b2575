// What qk_gemm and pv_gemm share: guarded loads of fragments, and requantization of accumulators.
//
// Both are products of small matrices, one for each window and head, with few operations a byte (QK^T of 49 x 32: 25
// for each byte moved), so tensor cores do them in passing and memory sets the pace. Two freedoms of a product are used
// to make every access wide, without shared memory: a sum over k may run in any order, as long as A and B agree on it,
// and the columns of the output may be dealt to lanes in any order, as long as B's columns are dealt alike.
#pragma once

#include "device.cuh"

namespace swin::cuda {

inline constexpr int kAttentionThreads = 128;

// 8 bytes at column `column` of a row of which `bound` columns count; zeros where the row does not exist. kAligned:
// rows start at multiples of 8 bytes and are a multiple of 8 long, so that what begins inside the bound stays in the
// row.
template <bool kAligned>
__device__ __forceinline__ S8<8> load_fragment(const std::int8_t* row, int column, int bound, bool exists) {
  S8<8> bytes{};
  if constexpr (kAligned) {
    if (exists && column < bound) bytes = load_s8<8>(row + column);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (exists && column + i < bound) {
        bytes.word[i / 4] |= static_cast<std::uint32_t>(static_cast<std::uint8_t>(row[column + i])) << (8 * (i % 4));
      }
    }
  }
  return bytes;
}

// Accumulators of sums of at most kMagicRange / 2^14 products start from magic bits and become floats by one
// subtraction.
template <bool kMagic>
__device__ __forceinline__ float scaled(int acc, float factor) {
  return (kMagic ? float_of_magic(acc) : __int2float_rn(acc)) * factor;
}

template <bool kMagic>
__device__ __forceinline__ std::uint32_t requantize_x4(int a, int b, int c, int d, float factor) {
  const float x[4] = {scaled<kMagic>(a, factor), scaled<kMagic>(b, factor), scaled<kMagic>(c, factor),
                      scaled<kMagic>(d, factor)};
  return quantize_x4(x);
}

// Bytes of `words` that lie below `bound`, where `column` is the first one's; kAligned: all or none of them.
template <bool kAligned, int kWords>
__device__ __forceinline__ void store_fragment(std::int8_t* row, int column, int bound,
                                               const std::uint32_t (&words)[kWords]) {
  if constexpr (kAligned) {
    if (column < bound) {
      S8<4 * kWords> out;
#pragma unroll
      for (int i = 0; i < kWords; ++i) out.word[i] = words[i];
      *reinterpret_cast<S8<4 * kWords>*>(row + column) = out;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4 * kWords; ++i) {
      if (column + i < bound) row[column + i] = static_cast<std::int8_t>(words[i / 4] >> (8 * (i % 4)));
    }
  }
}

}  // namespace swin::cuda
