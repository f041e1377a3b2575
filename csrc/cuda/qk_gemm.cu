// qk_gemm: scores of one window and head, out[i, j] = requantize(sum_e q[i, e] * k[j, e]); columns N..pitch-1 are 0.
// q, k s8 [BW, h, N, d] -> out s8 [BW, h, N, pitch]. Formula: swin/ops.h.
//
// Layout: a warp computes 16 rows of one window and head, in strips of 64 columns (32 or 16 at the end), with m16n8k32.
// The four warps of a block are neighbours, for N = 49 exactly one window and head, whose K they share in L1.
// - k order: lane t of four owns bytes 8t..8t+7 of each 32 of a row of Q and K, as the low half and the high half of
// its
//   share of k: one 8-byte load where the fragment's own order would take two of 4.
// - column order: in a strip of 8 tiles, column c of tile i is column (c/2)*16 + 2i + c%2 of the strip, so a lane ends
// up
//   with 16 adjacent bytes of a row, and stores them at once.
// - d not a multiple of 32 is filled up with zeros in registers; d not a multiple of 8, or misaligned tensors, take
// byte
//   accesses and the same product, so no other path is needed.
// Floor: 2*N*d + N*pitch bytes a window and head. Not timed yet.
#include "attention.cuh"
#include "kernels.h"

namespace swin::cuda {
namespace {

struct QkShape {
  FastDiv strips;  // of 16 rows
  unsigned items;  // warps of work: windows * heads * strips
  int n, d, pitch;
  float factor;
};

// Columns column .. column + 8*kTiles - 1 of 16 rows.
template <bool kAligned, bool kMagic, int kTiles>
__device__ __forceinline__ void qk_strip(const QkShape& shape, const std::int8_t* q, const std::int8_t* k,
                                         std::int8_t* out, int first_row, int column) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
  const int n = shape.n, d = shape.d, row = first_row + g;
  int acc[kTiles][4];
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) acc[i][j] = kMagic ? kMagicBits : 0;
  }
  for (int step = 0; step < d; step += 32) {
    const int e = step + 8 * t;
    const S8<8> low = load_fragment<kAligned>(q + row * d, e, d, row < n);
    const S8<8> high = load_fragment<kAligned>(q + (row + 8) * d, e, d, row + 8 < n);
    const std::uint32_t a[4] = {low.word[0], high.word[0], low.word[1], high.word[1]};
    S8<8> keys[kTiles];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int key = column + (g / 2) * (2 * kTiles) + 2 * i + g % 2;
      keys[i] = load_fragment<kAligned>(k + key * d, e, d, key < n);
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) mma_s8_16832(acc[i], a, keys[i].word);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    std::uint32_t words[kTiles / 2];
#pragma unroll
    for (int i = 0; i < kTiles / 2; ++i) {
      words[i] = requantize_x4<kMagic>(acc[2 * i][2 * half], acc[2 * i][2 * half + 1], acc[2 * i + 1][2 * half],
                                       acc[2 * i + 1][2 * half + 1], shape.factor);
    }
    if (row + 8 * half < n) {
      store_fragment<kAligned>(out + (row + 8 * half) * shape.pitch, column + 2 * kTiles * t, shape.pitch, words);
    }
  }
}

template <bool kAligned, bool kMagic>
__global__ void __launch_bounds__(kAttentionThreads, kAligned ? 5 : 1)
    qk_kernel(const QkShape shape, const std::int8_t* __restrict__ q, const std::int8_t* __restrict__ k,
              std::int8_t* __restrict__ out) {
  unsigned strip = blockIdx.x * (kAttentionThreads / kWarp) + threadIdx.x / kWarp;
  if (strip >= shape.items) return;  // a whole warp
  const std::int64_t head = shape.strips.split(strip);
  q += head * shape.n * shape.d;
  k += head * shape.n * shape.d;
  out += head * shape.n * shape.pitch;
  const int row = static_cast<int>(strip) * 16;
  for (int column = 0; column < shape.pitch;) {
    const int left = shape.pitch - column;
    if (left > 32) {
      qk_strip<kAligned, kMagic, 8>(shape, q, k, out, row, column);
      column += 64;
    } else if (left > 16) {
      qk_strip<kAligned, kMagic, 4>(shape, q, k, out, row, column);
      column += 32;
    } else {
      qk_strip<kAligned, kMagic, 2>(shape, q, k, out, row, column);
      column += 16;
    }
  }
}

template <bool kAligned, bool kMagic>
void run(const QkGemmArgs& args, const QkShape& shape, const ExecContext& context) {
  SWIN_LAUNCH("qk_gemm", (qk_kernel<kAligned, kMagic>),
              static_cast<unsigned>(ceil_div(shape.items, kAttentionThreads / kWarp)), kAttentionThreads, 0,
              context.stream, shape, args.q.as<const std::int8_t>(), args.k.as<const std::int8_t>(),
              args.out.as<std::int8_t>());
}

}  // namespace

template <class T>
void qk_gemm(const QkGemmArgs& args, const ExecContext& context) {
  const std::int64_t n = args.q.dim(2), d = args.q.dim(3), pitch = args.out.dim(3), strips = ceil_div(n, 16);
  count32("qk_gemm", "bytes of a window and head", (n + 64) * (pitch > d ? pitch : d));  // offsets are 32 bits wide
  const QkShape shape{FastDiv(strips),         count32("qk_gemm", "warps", args.q.dim(0) * args.q.dim(1) * strips),
                      static_cast<int>(n),     static_cast<int>(d),
                      static_cast<int>(pitch), args.factor};
  const bool aligned = d % 8 == 0 && pitch % 16 == 0 && is_aligned(args.q.data, 8) && is_aligned(args.k.data, 8) &&
                       is_aligned(args.out.data, 16);
  const bool magic = d * 128 * 128 <= kMagicRange;
  if (aligned) {
    magic ? run<true, true>(args, shape, context) : run<true, false>(args, shape, context);
  } else {
    magic ? run<false, true>(args, shape, context) : run<false, false>(args, shape, context);
  }
}

SWIN_INSTANTIATE(qk_gemm, QkGemmArgs)

}  // namespace swin::cuda
