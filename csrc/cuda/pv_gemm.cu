// pv_gemm: out[window*N + i, head*d + e] = requantize(sum_j p[i, j] * v[j, e]), j < N. p s8 [BW, h, N, pitch],
// v s8 [BW, h, N, d] -> out s8 [BW*N, h*d]. Formula: swin/ops.h.
//
// Layout: a warp computes 32 rows of one window and head, 32 columns at a time, with m16n8k32; for N = 49 two warps a
// window and head, whose V they share in L1.
// - k order: as in qk_gemm.cu, lane t of four owns P's bytes 8t..8t+7 of each 32 of a row: one 8-byte load.
// - V transposed: the product wants four tokens j of one column in a word, memory has four columns of one token. Lane
//   group g owns columns 4g..4g+3 and loads their word of its 8 tokens; two 4x4 byte transpositions (8 PRMT each) make
//   of them the words of four tiles. No shared memory, no barrier; two row tiles share the work.
// - column order: column c of tile i is column 4c + i of the 32, so a lane ends up with 8 adjacent bytes of a row.
// - tokens past N are zeros in V's words, so whatever P's padding holds does not count.
// Floor: N*pitch + 2*N*d bytes a window and head. Not timed yet.
#include "attention.cuh"
#include "kernels.h"
#include "transpose_bytes.cuh"

namespace swin::cuda {
namespace {

constexpr int kRowTiles = 2;

struct PvShape {
  FastDiv strips, heads;  // strips of 16 * kRowTiles rows
  unsigned items;         // warps of work: windows * heads * strips
  int n, d, pitch;
  float factor;
};

// 4 bytes at column `column` of a row of d; zeros past d and where the row does not exist.
template <bool kAligned>
__device__ __forceinline__ std::uint32_t load_word(const std::int8_t* row, int column, int d, bool exists) {
  std::uint32_t word = 0;
  if constexpr (kAligned) {
    if (exists && column < d) word = load_s8<4>(row + column).word[0];
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (exists && column + i < d)
        word |= static_cast<std::uint32_t>(static_cast<std::uint8_t>(row[column + i])) << (8 * i);
    }
  }
  return word;
}

template <bool kAligned, bool kMagic>
__global__ void __launch_bounds__(kAttentionThreads, kAligned ? 4 : 1)
    pv_kernel(const PvShape shape, const std::int8_t* __restrict__ p, const std::int8_t* __restrict__ v,
              std::int8_t* __restrict__ out) {
  unsigned strip = blockIdx.x * (kAttentionThreads / kWarp) + threadIdx.x / kWarp;
  if (strip >= shape.items) return;  // a whole warp
  const unsigned index = shape.strips.split(strip);
  unsigned head = index;
  const std::int64_t window = shape.heads.split(head);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
  const int n = shape.n, d = shape.d, pitch = shape.pitch, row = static_cast<int>(strip) * 16 * kRowTiles + g;
  const std::int64_t c = static_cast<std::int64_t>(shape.heads.divisor()) * d;
  p += static_cast<std::int64_t>(index) * n * pitch;
  v += static_cast<std::int64_t>(index) * n * d;
  out += window * n * c + static_cast<std::int64_t>(head) * d;

  for (int column = 0; column < d; column += 32) {
    int acc[kRowTiles][4][4];
#pragma unroll
    for (int s = 0; s < kRowTiles; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[s][i][j] = kMagic ? kMagicBits : 0;
      }
    }
    for (int step = 0; step < n; step += 32) {
      const int token = step + 8 * t;
      std::uint32_t words[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        words[i] = load_word<kAligned>(v + (token + i) * d, column + 4 * g, d, token + i < n);
      }
      S8<8> low[kRowTiles], high[kRowTiles];
#pragma unroll
      for (int s = 0; s < kRowTiles; ++s) {
        const int r = row + 16 * s;
        low[s] = load_fragment<kAligned>(p + r * pitch, token, n, r < n);
        high[s] = load_fragment<kAligned>(p + (r + 8) * pitch, token, n, r + 8 < n);
      }
      std::uint32_t first[4], second[4];
      transpose_bytes(words, first);
      transpose_bytes(words + 4, second);
#pragma unroll
      for (int s = 0; s < kRowTiles; ++s) {
        const std::uint32_t a[4] = {low[s].word[0], high[s].word[0], low[s].word[1], high[s].word[1]};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const std::uint32_t b[2] = {first[i], second[i]};
          mma_s8_16832(acc[s][i], a, b);
        }
      }
    }
#pragma unroll
    for (int s = 0; s < kRowTiles; ++s) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = row + 16 * s + 8 * half;
        std::uint32_t result[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          result[j] = requantize_x4<kMagic>(acc[s][0][2 * half + j], acc[s][1][2 * half + j], acc[s][2][2 * half + j],
                                            acc[s][3][2 * half + j], shape.factor);
        }
        if (r < n) store_fragment<kAligned>(out + r * c, column + 8 * t, d, result);
      }
    }
  }
}

template <bool kAligned, bool kMagic>
void run(const PvGemmArgs& args, const PvShape& shape, const ExecContext& context) {
  SWIN_LAUNCH("pv_gemm", (pv_kernel<kAligned, kMagic>),
              static_cast<unsigned>(ceil_div(shape.items, kAttentionThreads / kWarp)), kAttentionThreads, 0,
              context.stream, shape, args.p.as<const std::int8_t>(), args.v.as<const std::int8_t>(),
              args.out.as<std::int8_t>());
}

}  // namespace

template <class T>
void pv_gemm(const PvGemmArgs& args, const ExecContext& context) {
  const std::int64_t bw = args.v.dim(0), heads = args.v.dim(1), n = args.v.dim(2), d = args.v.dim(3),
                     pitch = args.p.dim(3);
  const std::int64_t strips = ceil_div(n, 16 * kRowTiles);
  count32("pv_gemm", "bytes of a window and head", (n + 64) * (pitch > d ? pitch : d));  // offsets are 32 bits wide
  const PvShape shape{FastDiv(strips),     FastDiv(heads),      count32("pv_gemm", "warps", bw * heads * strips),
                      static_cast<int>(n), static_cast<int>(d), static_cast<int>(pitch),
                      args.factor};
  const bool aligned = d % 8 == 0 && pitch % 8 == 0 && is_aligned(args.p.data, 8) && is_aligned(args.v.data, 8) &&
                       is_aligned(args.out.data, 8);
  const bool magic = n * 128 * 128 <= kMagicRange;
  if (aligned) {
    magic ? run<true, true>(args, shape, context) : run<true, false>(args, shape, context);
  } else {
    magic ? run<false, true>(args, shape, context) : run<false, false>(args, shape, context);
  }
}

SWIN_INSTANTIATE(pv_gemm, PvGemmArgs)

}  // namespace swin::cuda
