// What the kernels share: vectors of s8 and float elements, conversions, reductions within a warp, the s8 tensor-core
// product, division by numbers known at launch, and the launch itself.
//
// The same sources compile for the host with -DSWIN_HOST_SHIM and tests/cuda_shim ahead in the include path, whose
// headers stand in for CUDA's; the few things that are PTX here have their meaning spelled out there.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "swin/error.h"
#include "swin/ops.h"

namespace swin::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

template <class To, class From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a bit pattern keeps its size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// x, as a number of which the compiler knows nothing: what follows from it is computed where it stands, also in a loop.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ---------------------------------------------------------------------------------------------------------------- PTX

#if defined(SWIN_HOST_SHIM)
using shim::commit_copies;
using shim::copy16_async;
using shim::exp2_approx;
using shim::mma_s8_16832;
using shim::pack_saturated_s8;
using shim::reciprocal_approx;
using shim::wait_copies;
#else
// 2^x within 2 ulp, subnormal results as 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1/x within 1 ulp.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// clamp(a), clamp(b), clamp(c), clamp(d) to -128..127, in this order from the lowest byte.
__device__ __forceinline__ std::uint32_t pack_saturated_s8(int a, int b, int c, int d) {
  std::uint32_t high, all;
  asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, 0;" : "=r"(high) : "r"(d), "r"(c));
  asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(all) : "r"(b), "r"(a), "r"(high));
  return all;
}

// acc += A B of one warp, A s8 [16, 32], B s8 [32, 8], exact in int32. With g = lane / 4 and t = lane % 4 a lane holds
//   a[0]: A[g, 4t..4t+3]   a[1]: A[g+8, 4t..]   a[2]: A[g, 16+4t..]   a[3]: A[g+8, 16+4t..]
//   b[0]: B[4t..4t+3, g]   b[1]: B[16+4t.., g]
//   acc[0], acc[1]: row g, columns 2t and 2t+1   acc[2], acc[3]: row g+8.
// Turing's m8n8k16 has the same layout for a quarter of it, so four of them are this product. volatile: all lanes of
// the warp must be there, so it may not be moved into a branch that some of them take.
__device__ __forceinline__ void mma_s8_16832(int (&acc)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(acc[0]), "+r"(acc[1]), "+r"(acc[2]), "+r"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                   : "+r"(acc[2 * half]), "+r"(acc[2 * half + 1])
                   : "r"(a[2 * k + half]), "r"(b[k]));
    }
  }
#endif
}

// 16 bytes from global to shared memory, zeros where they do not `exist`; there once wait_copies has said so to this thread,
// and after a barrier for the others. Turing has no such copies and does it at once.
__device__ __forceinline__ void copy16_async(void* shared, const void* global, bool exist) {
#if __CUDA_ARCH__ >= 800
  const std::uint32_t target = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global), "r"(exist ? 16 : 0) : "memory");
#else
  *static_cast<uint4*>(shared) = exist ? *static_cast<const uint4*>(global) : uint4{0, 0, 0, 0};
#endif
}
// Ends a group of copies.
__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits for this thread's groups but for the latest kPending.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}
#endif

// ---------------------------------------------------------------------------------------------------- s8 to float,
// back

// The four s8 of `word`. Each byte, 128 added, becomes the mantissa of a float of 2^23 and more: one PRMT and one FADD
// an element, at full rate, where I2F runs at a quarter of it or less.
__device__ __forceinline__ void float_of_s8x4(std::uint32_t word, float* x) {
  const std::uint32_t biased = word ^ 0x80808080u;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[i] = __uint_as_float(__byte_perm(biased, 0x4B000000u, 0x7440 + i)) - 8388736.0f;  // 2^23 + 128
  }
}

// clamp(rne(x), -128, 127), NaN to 0: the conversion to int32 rounds, saturates and turns NaN into 0, the packing
// clamps.
__device__ __forceinline__ std::uint32_t quantize_x4(const float* x) {
  return pack_saturated_s8(__float2int_rn(x[0]), __float2int_rn(x[1]), __float2int_rn(x[2]), __float2int_rn(x[3]));
}

// Integers of at most 2^22 in magnitude as floats, exactly: an accumulator that starts at kMagicBits in place of 0 is
// the bit pattern of 1.5 * 2^23 + sum.
inline constexpr int kMagicBits = 0x4B400000;
inline constexpr int kMagicRange = 1 << 22;
__device__ __forceinline__ float float_of_magic(int bits) { return __int_as_float(bits) - 12582912.0f; }

// V consecutive s8: V is 4, 8 or 16 (one access of V bytes), or 1.
template <int V>
struct alignas(V) S8 {
  std::uint32_t word[V / 4];
};
template <>
struct S8<1> {
  std::int8_t value;
};

template <int V>
__device__ __forceinline__ S8<V> load_s8(const std::int8_t* source) {
  return *reinterpret_cast<const S8<V>*>(source);
}

template <int V>
__device__ __forceinline__ void to_floats(const S8<V>& s8, float (&x)[V]) {
#pragma unroll
  for (int i = 0; i < V / 4; ++i) float_of_s8x4(s8.word[i], x + 4 * i);
}
__device__ __forceinline__ void to_floats(const S8<1>& s8, float (&x)[1]) { x[0] = static_cast<float>(s8.value); }

template <int V>
__device__ __forceinline__ void store_quantized(std::int8_t* target, const float (&x)[V]) {
  if constexpr (V == 1) {
    *target = static_cast<std::int8_t>(pack_saturated_s8(__float2int_rn(x[0]), 0, 0, 0) & 255u);
  } else {
    S8<V> out;
#pragma unroll
    for (int i = 0; i < V / 4; ++i) out.word[i] = quantize_x4(x + 4 * i);
    *reinterpret_cast<S8<V>*>(target) = out;
  }
}

// ------------------------------------------------------------------------------------------- float16 and bfloat16
// vectors

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Two values in one word.
template <class T>
__device__ __forceinline__ float2 unpack(std::uint32_t word);
template <>
__device__ __forceinline__ float2 unpack<__half>(std::uint32_t word) {
  return __half22float2(bits_as<__half2>(word));
}
template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(std::uint32_t word) {
  return float2{__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}

template <class T>
__device__ __forceinline__ std::uint32_t pack(float a, float b);
template <>
__device__ __forceinline__ std::uint32_t pack<__half>(float a, float b) {
  return bits_as<std::uint32_t>(__floats2half2_rn(a, b));
}
template <>
__device__ __forceinline__ std::uint32_t pack<__nv_bfloat16>(float a, float b) {
  return bits_as<std::uint32_t>(__floats2bfloat162_rn(a, b));
}

// 16 bytes: the unit of the vectorised paths.
struct alignas(16) Words4 {
  std::uint32_t word[4];
};
__device__ __forceinline__ Words4 load_words(const void* source) { return *static_cast<const Words4*>(source); }
__device__ __forceinline__ void store_words(void* target, const Words4& words) {
  *static_cast<Words4*>(target) = words;
}

// Eight values of T (T of two bytes) as the 16 bytes they are in memory.
template <class T>
__device__ __forceinline__ void unpack8(const Words4& words, float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack<T>(words.word[i]);
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}

template <class T>
__device__ __forceinline__ Words4 pack8(const float (&x)[8]) {
  Words4 words;
#pragma unroll
  for (int i = 0; i < 4; ++i) words.word[i] = pack<T>(x[2 * i], x[2 * i + 1]);
  return words;
}

// V consecutive values: V a multiple of 8 at a 16-byte boundary, or 1.
template <class T, int V>
__device__ __forceinline__ void load_floats(const T* source, float (&x)[V]) {
  if constexpr (V == 1) {
    x[0] = to_float(*source);
  } else if constexpr (sizeof(T) == sizeof(float)) {
#pragma unroll
    for (int i = 0; i < V / 4; ++i) {
      const Words4 words = load_words(source + 4 * i);
#pragma unroll
      for (int j = 0; j < 4; ++j) x[4 * i + j] = __uint_as_float(words.word[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < V / 8; ++i) {
      float part[8];
      unpack8<T>(load_words(source + 8 * i), part);
#pragma unroll
      for (int j = 0; j < 8; ++j) x[8 * i + j] = part[j];
    }
  }
}

template <class T, int V>
__device__ __forceinline__ void store_floats(T* target, const float (&x)[V]) {
  static_assert(V == 1 || V == 8, "one value or eight");
  if constexpr (V == 1) {
    *target = from_float<T>(x[0]);
  } else if constexpr (sizeof(T) == sizeof(float)) {
#pragma unroll
    for (int i = 0; i < V / 4; ++i) {
      Words4 words;
#pragma unroll
      for (int j = 0; j < 4; ++j) words.word[j] = __float_as_uint(x[4 * i + j]);
      store_words(target + 4 * i, words);
    }
  } else {
    store_words(target, pack8<T>(x));
  }
}

// V values of a two-byte T as they are in memory: loaded first, converted when it is their turn. A load behind a store
// waits for it, so that a loop of load, add and store goes to memory and back once for each round.
template <class T, int V>
struct Raw {
  Words4 words[V / 8];
  __device__ __forceinline__ void load(const T* source) {
#pragma unroll
    for (int i = 0; i < V / 8; ++i) words[i] = load_words(source + 8 * i);
  }
  __device__ __forceinline__ void floats(float (&x)[V]) const {
#pragma unroll
    for (int i = 0; i < V / 8; ++i) {
      float part[8];
      unpack8<T>(words[i], part);
#pragma unroll
      for (int j = 0; j < 8; ++j) x[8 * i + j] = part[j];
    }
  }
};
template <class T>
struct Raw<T, 1> {
  T value;
  __device__ __forceinline__ void load(const T* source) { value = *source; }
  __device__ __forceinline__ void floats(float (&x)[1]) const { x[0] = to_float(value); }
};

// V values of s8 or s32, likewise.
template <class X, int V>
struct Integers;
template <int V>
struct Integers<std::int8_t, V> {
  S8<V> s8;
  __device__ __forceinline__ void load(const std::int8_t* source) { s8 = load_s8<V>(source); }
  __device__ __forceinline__ void floats(float (&x)[V]) const { to_floats(s8, x); }
};
template <int V>
struct Integers<std::int32_t, V> {
  std::int32_t s32[V];
  __device__ __forceinline__ void load(const std::int32_t* source) {
    if constexpr (V == 1) {
      s32[0] = *source;
    } else {
#pragma unroll
      for (int i = 0; i < V / 4; ++i) {
        const Words4 words = load_words(source + 4 * i);
#pragma unroll
        for (int j = 0; j < 4; ++j) s32[4 * i + j] = static_cast<std::int32_t>(words.word[j]);
      }
    }
  }
  __device__ __forceinline__ void floats(float (&x)[V]) const {
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] = __int2float_rn(s32[i]);
  }
};

// ---------------------------------------------------------------------------------------------------------- reductions

// Over aligned groups of kLanes lanes (a power of two); every lane of the warp takes part, and every lane of a group
// gets the same result, bit by bit.
template <int kLanes>
__device__ __forceinline__ float sum_over(float x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

template <int kLanes>
__device__ __forceinline__ float max_over(float x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

// ------------------------------------------------------------------------------------------------------------ division

// n / divisor for 0 <= n < 2^31: multiply-high, add, shift.
class FastDiv {
 public:
  explicit FastDiv(std::int64_t divisor) : divisor_(static_cast<std::uint32_t>(divisor)) {
    while ((std::uint64_t{1} << shift_) < divisor_) ++shift_;
    multiplier_ = static_cast<std::uint32_t>((((std::uint64_t{1} << shift_) - divisor_) << 32) / divisor_ + 1);
  }
  __device__ __forceinline__ std::uint32_t divide(std::uint32_t n) const {
    return (__umulhi(n, multiplier_) + n) >> shift_;
  }
  // n / divisor; n becomes the remainder.
  __device__ __forceinline__ std::uint32_t split(std::uint32_t& n) const {
    const std::uint32_t quotient = divide(n);
    n -= quotient * divisor_;
    return quotient;
  }
  __device__ __forceinline__ std::uint32_t divisor() const { return divisor_; }

 private:
  std::uint32_t divisor_ = 1, multiplier_ = 0, shift_ = 0;
};

// ---------------------------------------------------------------------------------------------------------- host side

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
inline bool is_aligned(const void* p, std::uintptr_t bytes) { return reinterpret_cast<std::uintptr_t>(p) % bytes == 0; }

// Rows, blocks and threads are counted in 32 bits on the device.
inline unsigned count32(const char* op, const char* what, std::int64_t count) {
  SWIN_CHECK(ShapeError, op, count < (std::int64_t{1} << 31), count, " ", what,
             "; the CUDA backend counts to 2^31 - 1. Use a smaller batch");
  return static_cast<unsigned>(count);
}

[[noreturn]] inline void launch_failed(const char* op, const char* file, int line, dim3 grid, dim3 block,
                                       cudaError_t status) {
  const char* advice =
      status == cudaErrorNoKernelImageForDevice
          ? "This build has no kernels for this GPU: run `bash scripts/build_ft.sh --cuda-arch native` on this machine"
          : "If an earlier operation failed, this only reports it: run once with CUDA_LAUNCH_BLOCKING=1";
  throw Error(detail::concat(op, " (", file, ":", line, "): launching ", grid.x, "x", grid.y, " blocks of ", block.x,
                             " threads failed: ", cudaGetErrorString(status), ". ", advice,
                             "; see docs/troubleshooting.md"));
}

template <class... Parameters, class... Arguments>
void launch(const char* op, const char* file, int line, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            std::size_t shared, void* stream, const Arguments&... arguments) {
#if defined(SWIN_HOST_SHIM)
  shim::launch(grid, block, shared, stream, [&] { kernel(static_cast<Parameters>(arguments)...); });
#else
  // clang-format off
  kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(static_cast<Parameters>(arguments)...);
  // clang-format on
#endif
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) launch_failed(op, file, line, grid, block, status);
}

}  // namespace swin::cuda

// SWIN_LAUNCH("softmax", (softmax_kernel<T, 8>), grid, block, shared_bytes, context.stream, arguments...): launches,
// and throws where CUDA reports an error. Never synchronises.
#define SWIN_LAUNCH(op, kernel, grid, block, shared, stream, ...) \
  ::swin::cuda::launch(op, __FILE__, __LINE__, kernel, dim3(grid), dim3(block), shared, stream, __VA_ARGS__)

// The block's dynamic shared memory, as many bytes as the launch named.
#if defined(SWIN_HOST_SHIM)
#define SWIN_DYNAMIC_SHARED(name) std::int8_t* const name = shim::dynamic_shared()
#else
#define SWIN_DYNAMIC_SHARED(name) extern __shared__ __align__(16) std::int8_t name[]
#endif

// Defines one op's entry for both float types.
#define SWIN_INSTANTIATE(op, Args)                           \
  template void op<__half>(const Args&, const ExecContext&); \
  template void op<__nv_bfloat16>(const Args&, const ExecContext&);
