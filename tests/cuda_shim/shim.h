// CUDA for the host, as much of it as the kernels use: blocks run one after another, the threads of a block are fibers,
// and a warp's collectives (shuffles, tensor-core products) and __syncthreads are where fibers wait for each other.
//
// What this finds: wrong results, out-of-bounds and misaligned accesses (under AddressSanitizer and UBSan), a
// collective not reached by all lanes it names, asynchronous copies read before they were waited for, a block whose threads wait for different things (both are errors, not
// hangs). The order in which fibers run can be reversed or shuffled (shim::set_order), so that a missing barrier
// changes results. What it cannot find: what only real concurrency shows (races between accesses of the same barrier
// interval that happen to agree in every order tried), resource limits, and anything about speed.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "arithmetic.h"

// -------------------------------------------------------------------------------------------------------------
// language

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// Blocks run one after another on one thread, so a function's static is a block's shared memory.
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

// The running fiber's.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

// --------------------------------------------------------------------------------------------------------------
// runtime

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorNoKernelImageForDevice = 209 };
cudaError_t cudaGetLastError();
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
// As on sm_86 and sm_89, whose blocks have the least of Ampere and later. What needs more than Turing's 64 KiB is not offered
// there, or asserts that it does not.
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int bytes) {
  return bytes <= 99 << 10 ? cudaSuccess : cudaErrorInvalidValue;
}
const char* cudaGetErrorString(cudaError_t);

namespace shim {

enum class Order { kForward, kReverse, kShuffled };
void set_order(Order order);
// The next launch reports this error and runs nothing.
void fail_next_launch(cudaError_t status);
// Threads run, and times a fiber gave way, since the program started.
struct Counters {
  std::int64_t launches, threads, switches;
};
Counters counters();

void launch_threads(dim3 grid, dim3 block, std::size_t shared, void* stream, void (*body)(void*), void* closure);

template <class Body>
void launch(dim3 grid, dim3 block, std::size_t shared, void* stream, const Body& body) {
  launch_threads(
      grid, block, shared, stream, [](void* b) { (*static_cast<const Body*>(b))(); }, const_cast<Body*>(&body));
}

// Waits for the lanes of `mask`; then the deposits of the warp's 32 lanes, valid until the caller's next collective.
// `what` names the collective: lanes that meet at different ones are an error.
const Deposit* meet(unsigned mask, const char* what, const Deposit& mine);
int lane_index();

template <class T>
T exchange(unsigned mask, const char* what, T value, int source) {
  static_assert(sizeof(T) == 4, "four-byte shuffles");
  Deposit mine{};
  std::memcpy(mine.word, &value, 4);
  const Deposit* all = meet(mask, what, mine);
  T result;
  std::memcpy(&result, all[source].word, 4);
  return result;
}

void mma_s8_16832(int (&acc)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);

// The running block's dynamic shared memory: as many bytes as its launch named, aligned to 16.
std::int8_t* dynamic_shared();

// Asynchronous copies arrive as late as they may: when this thread waits for their group.
void copy16_async(void* shared, const void* global, bool exist);
void commit_copies();
void wait_for_copies(int pending);
template <int kPending>
void wait_copies() {
  wait_for_copies(kPending);
}

}  // namespace shim

void __syncthreads();
inline void __syncwarp(unsigned mask = 0xffffffffu) { shim::meet(mask, "__syncwarp", {}); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const int lane = shim::lane_index(), source = lane ^ lane_mask;
  return shim::exchange(mask, "__shfl_xor_sync", value, source / width == lane / width ? source : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = shim::lane_index(), source = lane + static_cast<int>(delta);
  return shim::exchange(mask, "__shfl_down_sync", value, source / width == lane / width ? source : lane);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = shim::lane_index();
  return shim::exchange(mask, "__shfl_sync", value, lane / width * width + source % width);
}
// Bit i: lane i of `mask` came with `predicate`.
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  shim::Deposit mine{};
  mine.word[0] = predicate != 0;
  const shim::Deposit* all = shim::meet(mask, "__ballot_sync", mine);
  unsigned result = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1 && all[lane].word[0] != 0) result |= 1u << lane;
  }
  return result;
}

// -----------------------------------------------------------------------------------------------------------
// intrinsics

template <class To, class From>
To shim_bits(From from) {
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(unsigned x) { return shim_bits<float>(x); }
inline float __int_as_float(int x) { return shim_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return shim_bits<unsigned>(x); }
inline int __float_as_int(float x) { return shim_bits<int>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
// cvt.rni.s32.f32: saturates, NaN to 0.
inline int __float2int_rn(float x) {
  if (x != x) return 0;
  if (x >= 2147483648.0f) return 2147483647;
  if (x <= -2147483648.0f) return -2147483647 - 1;
  return static_cast<int>(std::nearbyintf(x));
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<std::uint64_t>(a) * b) >> 32);
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const std::uint64_t bytes = (static_cast<std::uint64_t>(y) << 32) | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = (selector >> (4 * i)) & 15u;
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (pick & 7u))) & 255u;
    if (pick & 8u) byte = (byte & 128u) ? 255u : 0u;  // the byte's sign, replicated
    result |= byte << (8 * i);
  }
  return result;
}
inline int __dp4a(int a, int b, int c) {
  const auto product = [](int x, int y) {
    return static_cast<unsigned>(static_cast<std::int8_t>(x)) * static_cast<unsigned>(static_cast<std::int8_t>(y));
  };
  return static_cast<int>(static_cast<unsigned>(c) + product(a, b) + product(a >> 8, b >> 8) +
                          product(a >> 16, b >> 16) + product(a >> 24, b >> 24));  // modulo 2^32
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int min(int a, int b) { return a < b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
template <class T>
T __ldg(const T* p) {
  return *p;
}

// -------------------------------------------------------------------------------------------------- float16 and
// bfloat16

struct __half {
  std::uint16_t bits;
};
struct __nv_bfloat16 {
  std::uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

float __half2float(__half x);
__half __float2half_rn(float x);  // to nearest, ties to even; overflows to infinity
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__nv_bfloat16 __float2bfloat16_rn(float x);
inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }
inline __half2 __floats2half2_rn(float a, float b) { return {__float2half_rn(a), __float2half_rn(b)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 x) { return {__bfloat162float(x.x), __bfloat162float(x.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {__float2bfloat16_rn(a), __float2bfloat16_rn(b)};
}
