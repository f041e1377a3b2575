// The plain GEMM: acc[m, n] = sum_k x[m, k] * w[n, k] in int32 through dp4a, then the epilogue of swin/ops.h. x s8 [M, K],
// w s8 [N, K], out s8 or s32 [M, N], all row-major, of any shape and alignment.
//
// It is what every provider must reproduce bit by bit (gemm_lab.cc), and the last resort where none can run a shape: K not
// a multiple of 16, an odd N. So it is simple before it is fast.
//
// Block: 256 threads, a tile of 64 x 64 outputs, K in steps of 64 bytes through shared memory; thread (ty, tx) holds the
// outputs of rows ty + 16 i and columns tx + 16 j, i, j < 4, so a warp's reads of shared memory are 2 words broadcast and
// 16 words in 16 banks (the pitch is odd). Rows of K a multiple of 4 are read a word at a time, others byte by byte.
// Bytes moved: (M*K*N/64 + N*K*M/64) at worst, what the L2 does not hold; the floor is M*K + N*K + M*N.
// Versions tried: this one.
#include "gemm_reference.h"

#include "device.cuh"

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

template <class Out, bool kAlignedWords>
__global__ void __launch_bounds__(kThreads)
    plain_gemm_kernel(const std::int8_t* x, const std::int8_t* w, Out* out, std::int64_t m, std::int64_t n, int k,
                      unsigned column_tiles, float factor, float floor) {
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
      if (row >= m || column >= n) continue;
      if constexpr (sizeof(Out) == 4) {
        out[row * n + column] = acc[i][j];
      } else {
        const float y = fmaxf(static_cast<float>(acc[i][j]) * factor, floor);
        store_quantized<1>(out + row * n + column, {y});
      }
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

// Enough blocks to fill any GPU; the kernels walk on from there.
unsigned walking_blocks(std::int64_t count) {
  const std::int64_t blocks = ceil_div(count, kThreads);
  return static_cast<unsigned>(blocks < 4096 ? blocks : 4096);
}

template <class Out>
void run(const GemmShape& shape, const GemmCall& call, void* stream) {
  const std::int64_t column_tiles = ceil_div(shape.n, kTile);
  const unsigned blocks = count32(kOp, "tiles", ceil_div(shape.m, kTile) * column_tiles);
  const bool words = shape.k % 4 == 0 && is_aligned(call.x, 4) && is_aligned(call.w, 4);
  const auto kernel = words ? plain_gemm_kernel<Out, true> : plain_gemm_kernel<Out, false>;
  SWIN_LAUNCH(kOp, kernel, blocks, kThreads, 0, stream, call.x, call.w, static_cast<Out*>(call.out), shape.m, shape.n,
              static_cast<int>(shape.k), static_cast<unsigned>(column_tiles), call.factor, floor_of(shape.output));
}

}  // namespace

void plain_gemm(const GemmShape& shape, const GemmCall& call, void* stream) {
  count32(kOp, "values of K", shape.k);
  if (shape.output == GemmOutput::kS32) {
    run<std::int32_t>(shape, call, stream);
  } else {
    run<std::int8_t>(shape, call, stream);
  }
}

void fill_random(std::int8_t* data, std::int64_t count, std::uint64_t seed, GemmPattern pattern, void* stream) {
  SWIN_LAUNCH("fill_random", fill_random_kernel, walking_blocks(count), kThreads, 0, stream, data, count, seed,
              static_cast<int>(pattern));
}

void count_differences(const void* a, const void* b, std::int64_t bytes, ByteDifferences* found, void* stream) {
  SWIN_LAUNCH("count_differences", count_differences_kernel, walking_blocks(bytes), kThreads, 0, stream,
              static_cast<const std::uint8_t*>(a), static_cast<const std::uint8_t*>(b), bytes, found);
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
