// 4 x 4 bytes transposed in registers.
#pragma once

#include "device.cuh"

namespace swin::cuda {

// out[i] = byte i of in[0], in[1], in[2], in[3].
__device__ __forceinline__ void transpose_bytes(const std::uint32_t* in, std::uint32_t (&out)[4]) {
  const std::uint32_t low01 = __byte_perm(in[0], in[1], 0x5140), high01 = __byte_perm(in[0], in[1], 0x7362);
  const std::uint32_t low23 = __byte_perm(in[2], in[3], 0x5140), high23 = __byte_perm(in[2], in[3], 0x7362);
  out[0] = __byte_perm(low01, low23, 0x5410);
  out[1] = __byte_perm(low01, low23, 0x7632);
  out[2] = __byte_perm(high01, high23, 0x5410);
  out[3] = __byte_perm(high01, high23, 0x7632);
}

}  // namespace swin::cuda
