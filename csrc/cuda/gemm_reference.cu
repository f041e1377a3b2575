// The plain GEMM: acc[m, n] = sum_k x[m, k] * w[n, k] in int32 through dp4a, then the output's epilogue
// (swin/cuda_gemm.h). x s8 [M, K], w s8 [N, K], of any shape and alignment, scale, bias f32 [N], out [M, N]; row-major.
//
// It is what every provider is held to (gemm_lab.cc), and the last resort where none can run a shape: K not a multiple
// of 16, an odd N. So it is simple before it is fast.
//
// Block: 256 threads, a tile of 64 x 64 outputs, K in steps of 64 bytes through shared memory; thread (ty, tx) holds the
// outputs of rows ty + 16 i and columns tx + 16 j, i, j < 4, so a warp's reads of shared memory are 2 words broadcast and
// 16 words in 16 banks (the pitch is odd). Rows of K a multiple of 4 are read a word at a time, others byte by byte.
// Bytes moved: (M*K*N/64 + N*K*M/64) at worst, what the L2 does not hold; the floor is M*K + N*K + M*N.
// Versions tried: this one.
#include "gemm_reference.h"

#include <type_traits>

#include "device.cuh"
#include "gelu.cuh"

namespace swin::cuda {
namespace {

constexpr const char* kOp = "gemm_s8 (swin_plain)";
constexpr int kTile = 64;
constexpr int kWords = 16;  // of K in one step
constexpr int kThreads = 256;
constexpr int kPer = 4;  // outputs of a thread in each direction

// Adds, and gives what was there before.
__device__ __forceinline__ unsigned long long fetch_add(unsigned long long* counter, unsigned long long value) {
#if defined(SWIN_HOST_SHIM)  // one thread at a time
  const unsigned long long before = *counter;
  *counter += value;
  return before;
#else
  return atomicAdd(counter, value);
#endif
}

// Bytes first .. first + 3 of one row of K values; those behind its end are 0.
template <bool kAlignedWords>
__device__ __forceinline__ int load_word(const std::int8_t* row, int first, int k) {
  if (kAlignedWords) return first < k ? *reinterpret_cast<const int*>(row + first) : 0;
  std::uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (first + i < k) word |= static_cast<std::uint32_t>(static_cast<std::uint8_t>(row[first + i])) << (8 * i);
  }
  return static_cast<int>(word);
}

template <bool kAlignedWords>
__device__ __forceinline__ void load_tile(const std::int8_t* source, std::int64_t first_row, std::int64_t rows, int first,
                                          int k, int (&tile)[kTile][kWords + 1]) {
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kWords; i += kThreads) {
    const int row = i / kWords, word = i % kWords;
    const bool there = first_row + row < rows;
    tile[row][word] =
        there ? load_word<kAlignedWords>(source + (first_row + row) * k, first + 4 * word, k) : 0;
  }
}

struct Epilogue {
  float factor, floor;
  const float *scale, *bias;
  bool gelu;
};

// One accumulator of `column` to where its value belongs.
template <class Out, bool kChannels>
__device__ __forceinline__ void finish(Out* out, int acc, std::int64_t column, const Epilogue& e) {
  if constexpr (std::is_same_v<Out, std::int32_t>) {
    *out = acc;
  } else if constexpr (!kChannels) {
    store_quantized<1>(out, {fmaxf(static_cast<float>(acc) * e.factor, e.floor)});
  } else {
    const float y = fmaf(static_cast<float>(acc), e.scale[column], e.bias != nullptr ? e.bias[column] : 0.0f);
    if constexpr (std::is_same_v<Out, std::int8_t>) {
      store_quantized<1>(out, {e.gelu ? gelu(y) * e.factor : fmaxf(y, e.floor)});
    } else if constexpr (std::is_same_v<Out, float>) {
      *out = y;
    } else {
      *out = from_float<Out>(to_float(*out) + y);
    }
  }
}

template <class Out, bool kChannels, bool kAlignedWords>
__global__ void __launch_bounds__(kThreads)
    plain_gemm_kernel(const std::int8_t* x, const std::int8_t* w, Out* out, std::int64_t m, std::int64_t n, int k,
                      unsigned column_tiles, Epilogue epilogue) {
  __shared__ int xs[kTile][kWords + 1];
  __shared__ int ws[kTile][kWords + 1];
  const std::int64_t first_row = static_cast<std::int64_t>(blockIdx.x / column_tiles) * kTile;
  const std::int64_t first_column = static_cast<std::int64_t>(blockIdx.x % column_tiles) * kTile;
  const int ty = static_cast<int>(threadIdx.x) / 16, tx = static_cast<int>(threadIdx.x) % 16;

  int acc[kPer][kPer] = {};
  for (int first = 0; first < k; first += 4 * kWords) {
    load_tile<kAlignedWords>(x, first_row, m, first, k, xs);
    load_tile<kAlignedWords>(w, first_column, n, first, k, ws);
    __syncthreads();
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      int a[kPer], b[kPer];
#pragma unroll
      for (int i = 0; i < kPer; ++i) a[i] = xs[ty + 16 * i][word];
#pragma unroll
      for (int j = 0; j < kPer; ++j) b[j] = ws[tx + 16 * j][word];
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
#pragma unroll
        for (int j = 0; j < kPer; ++j) acc[i][j] = __dp4a(a[i], b[j], acc[i][j]);
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const std::int64_t row = first_row + ty + 16 * i;
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      const std::int64_t column = first_column + tx + 16 * j;
      if (row < m && column < n) finish<Out, kChannels>(out + row * n + column, acc[i][j], column, epilogue);
    }
  }
}

// A good hash of 64 bits: every byte of the result depends on every bit of the index.
__device__ __forceinline__ std::uint64_t scramble(std::uint64_t x) {
  x = (x ^ (x >> 31)) * 0x7FB5D329728EA185ull;
  x = (x ^ (x >> 27)) * 0x81DADEF4BC2DD44Dull;
  return x ^ (x >> 33);
}

__global__ void __launch_bounds__(kThreads)
    fill_random_kernel(std::int8_t* data, std::int64_t count, std::uint64_t seed, int pattern) {
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    const std::uint64_t bits = scramble(scramble(seed) + static_cast<std::uint64_t>(i)) >> 32;
    int value = static_cast<int>(bits & 255u) - 128;
    if (pattern == static_cast<int>(GemmPattern::kSmall)) value = static_cast<int>(bits % 17u) - 8;
    if (pattern == static_cast<int>(GemmPattern::kExtremes)) value = (bits & 1u) != 0 ? 127 : -128;
    data[i] = static_cast<std::int8_t>(value);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    fill_random_floats_kernel(T* data, std::int64_t count, std::uint64_t seed, RandomFloats values) {
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    const std::uint64_t bits = scramble(scramble(seed) + static_cast<std::uint64_t>(i)) >> 32;
    const int steps = values.first + static_cast<int>((bits >> 1) % static_cast<unsigned>(values.kinds));
    data[i] = from_float<T>(static_cast<float>(values.signs && (bits & 1u) != 0 ? -steps : steps) * values.step);
  }
}

__global__ void __launch_bounds__(kThreads) count_differences_kernel(const std::uint8_t* a, const std::uint8_t* b,
                                                                     std::int64_t bytes, ByteDifferences* found) {
  unsigned long long count = 0, somewhere = 0;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < bytes; i += stride) {
    if (a[i] != b[i]) {
      if (count == 0) somewhere = static_cast<unsigned long long>(i);
      ++count;
    }
  }
  if (count != 0) {
    // Whoever is first says where; the others only add.
    if (fetch_add(&found->count, count) == 0) found->somewhere = somewhere;
  }
}

// How many values of T lie from a to b; both zeros are one.
__device__ __forceinline__ int steps_between(std::int8_t a, std::int8_t b) { return abs(a - b); }
template <class T>
__device__ __forceinline__ int steps_between(T a, T b) {
  const int x = bits_as<std::uint16_t>(a), y = bits_as<std::uint16_t>(b);
  return abs((x < 0x8000 ? x : 0x8000 - x) - (y < 0x8000 ? y : 0x8000 - y));
}

template <class T>
__device__ __forceinline__ float shown(T x) {
  if constexpr (std::is_same_v<T, std::int8_t>) {
    return static_cast<float>(x);
  } else {
    return to_float(x);
  }
}

__device__ __forceinline__ void add_errors(GemmErrors::Kind* all, const GemmErrors::Kind& mine) {
  if (mine.count == 0 || fetch_add(&all->count, mine.count) != 0) return;
  // Whoever is first says where; the others only add.
  all->somewhere = mine.somewhere;
  all->found = mine.found;
  all->expected = mine.expected;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    count_errors_kernel(const T* found, const T* expected, const float* bias, std::int64_t count, std::int64_t n,
                        float tolerance, GemmErrors* errors) {
  GemmErrors mine{};
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    const T a = found[i], b = expected[i];
    int steps;
    if constexpr (std::is_same_v<T, float>) {
      const float size = fabsf(b) + (bias != nullptr ? fabsf(bias[i % n]) : 0.0f);
      steps = fabsf(a - b) <= tolerance * size ? 0 : 2;  // NaN is not
    } else {
      steps = steps_between(a, b);
    }
    if (steps == 0) continue;
    GemmErrors::Kind& kind = steps == 1 ? mine.off_by_one : mine.wrong;
    if (kind.count++ == 0) {
      kind.somewhere = static_cast<unsigned long long>(i);
      kind.found = shown(a);
      kind.expected = shown(b);
    }
  }
  add_errors(&errors->wrong, mine.wrong);
  add_errors(&errors->off_by_one, mine.off_by_one);
}

// Enough blocks to fill any GPU; the kernels walk on from there.
unsigned walking_blocks(std::int64_t count) {
  const std::int64_t blocks = ceil_div(count, kThreads);
  return static_cast<unsigned>(blocks < 4096 ? blocks : 4096);
}

template <class Out, bool kChannels>
void run(const GemmShape& shape, const GemmCall& call, void* stream) {
  const std::int64_t column_tiles = ceil_div(shape.n, kTile);
  const unsigned blocks = count32(kOp, "tiles", ceil_div(shape.m, kTile) * column_tiles);
  const bool words = shape.k % 4 == 0 && is_aligned(call.x, 4) && is_aligned(call.w, 4);
  const auto kernel = words ? plain_gemm_kernel<Out, kChannels, true> : plain_gemm_kernel<Out, kChannels, false>;
  const Epilogue epilogue{call.factor, floor_of(shape.output), call.scale, call.bias,
                          shape.output == GemmOutput::kChannelsGelu};
  SWIN_LAUNCH(kOp, kernel, blocks, kThreads, 0, stream, call.x, call.w, static_cast<Out*>(call.out), shape.m, shape.n,
              static_cast<int>(shape.k), static_cast<unsigned>(column_tiles), epilogue);
}

template <class T>
void fill(T* data, std::int64_t count, std::uint64_t seed, const RandomFloats& values, void* stream) {
  SWIN_LAUNCH("fill_random", fill_random_floats_kernel<T>, walking_blocks(count), kThreads, 0, stream, data, count,
              seed, values);
}

template <class T>
void count(const GemmShape& shape, const void* found, const void* expected, const float* bias, float tolerance,
           GemmErrors* errors, void* stream) {
  const std::int64_t values = shape.m * shape.n;
  SWIN_LAUNCH("count_errors", count_errors_kernel<T>, walking_blocks(values), kThreads, 0, stream,
              static_cast<const T*>(found), static_cast<const T*>(expected), bias, values, shape.n, tolerance, errors);
}

}  // namespace

void plain_gemm(const GemmShape& shape, const GemmCall& call, void* stream) {
  count32(kOp, "values of K", shape.k);
  switch (shape.output) {
    case GemmOutput::kS8:
    case GemmOutput::kS8Relu: return run<std::int8_t, false>(shape, call, stream);
    case GemmOutput::kS32: return run<std::int32_t, false>(shape, call, stream);
    case GemmOutput::kChannelsS8:
    case GemmOutput::kChannelsRelu:
    case GemmOutput::kChannelsGelu: return run<std::int8_t, true>(shape, call, stream);
    case GemmOutput::kChannelsF32: return run<float, true>(shape, call, stream);
    case GemmOutput::kChannelsAddF16: return run<__half, true>(shape, call, stream);
    case GemmOutput::kChannelsAddBF16: return run<__nv_bfloat16, true>(shape, call, stream);
  }
}

void fill_random(std::int8_t* data, std::int64_t count, std::uint64_t seed, GemmPattern pattern, void* stream) {
  SWIN_LAUNCH("fill_random", fill_random_kernel, walking_blocks(count), kThreads, 0, stream, data, count, seed,
              static_cast<int>(pattern));
}

void fill_random(float* data, std::int64_t count, std::uint64_t seed, const RandomFloats& values, void* stream) {
  fill(data, count, seed, values, stream);
}

void fill_residual(GemmOutput output, void* out, std::int64_t count, std::uint64_t seed, const RandomFloats& values,
                   void* stream) {
  if (output == GemmOutput::kChannelsAddF16) return fill(static_cast<__half*>(out), count, seed, values, stream);
  fill(static_cast<__nv_bfloat16*>(out), count, seed, values, stream);
}

void count_differences(const void* a, const void* b, std::int64_t bytes, ByteDifferences* found, void* stream) {
  SWIN_LAUNCH("count_differences", count_differences_kernel, walking_blocks(bytes), kThreads, 0, stream,
              static_cast<const std::uint8_t*>(a), static_cast<const std::uint8_t*>(b), bytes, found);
}

void count_errors(const GemmShape& shape, const void* found, const void* expected, const float* bias, float tolerance,
                  GemmErrors* errors, void* stream) {
  const auto of_type = shape.output == GemmOutput::kChannelsF32       ? count<float>
                       : shape.output == GemmOutput::kChannelsAddF16  ? count<__half>
                       : shape.output == GemmOutput::kChannelsAddBF16 ? count<__nv_bfloat16>
                                                                      : count<std::int8_t>;
  of_type(shape, found, expected, bias, tolerance, errors, stream);
}

namespace {

class PlainKernel : public GemmKernel {
 public:
  explicit PlainKernel(const GemmShape& shape) : shape_(shape) {}
  void run(const GemmCall& call, void* stream) const override { plain_gemm(shape_, call, stream); }

 private:
  const GemmShape shape_;
};

class PlainProvider : public GemmProvider {
 public:
  const char* name() const override { return kPlain; }
  std::string version() const override { return "1"; }
  std::vector<GemmCandidate> candidates(const GemmShape&, int, std::string*) const override {
    return {{"dp4a_64x64x64", ""}};
  }
  std::unique_ptr<GemmKernel> prepare(const GemmShape& shape, const GemmCandidate&) const override {
    return std::make_unique<PlainKernel>(shape);
  }
};

}  // namespace

const GemmProvider& plain_provider() {
  static const PlainProvider provider;
  return provider;
}

}  // namespace swin::cuda
