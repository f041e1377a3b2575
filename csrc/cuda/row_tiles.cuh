// Whole rows in one block: 128 rows and all their C channels in the block's registers, so that what follows a GEMM's sum, the
// residual, its LayerNorm and the quantization, needs no second pass over memory.
//
// Layout: eight warps, 4 along the rows and 2 along the channels; a warp has 32 rows and C/2 channels, a lane 4 rows and C/8
// adjacent channels of each (the column order of tile_gemm.cuh, with C/16 tiles of 8). A row's sums go over four lanes by
// shuffles and over two warps through shared memory. C = 96, 128 and 192: the first two stages of every Swin, where the
// rows are many and the memory they move sets the pace. Not timed yet.
#pragma once

#include "linear_epilogues.cuh"
#include "row_blocks.h"

namespace swin::cuda {

template <int kChannels_>
struct RowTile : Tile<static_cast<int>(kRowBlock), kChannels_, 4, 2> {
  static constexpr int kChannels = kChannels_, kLaneColumns = kChannels / 8;
  static constexpr int kSumBytes = static_cast<int>(kRowBlock) * 2 * static_cast<int>(sizeof(float));
  static_assert(kChannels % 32 == 0);
};

// Calls body with the RowTile of c channels; false where there is none.
template <class Body>
bool with_row_tile(std::int64_t c, Body&& body) {
  switch (c) {
    case 96:
      body(RowTile<96>{});
      return true;
    case 128:
      body(RowTile<128>{});
      return true;
    case 192:
      body(RowTile<192>{});
      return true;
    default:
      return false;
  }
}

// Where a block's rows go on: row r of the block's GEMM is row residual_row(r) of the residual, kNoRow where it is
// padding or behind the last one; row r of the residual is row branch_row(r) of the GEMM, and row out_row(r) of `out`.
// Without `out` the residual alone is updated.
template <class T>
struct RowEnd {
  const float *scale, *bias;
  T* residual;
  const T *gamma, *beta;
  std::int8_t* out;
  WindowRows windows;
  bool from_windows;  // rows come in window order and leave in image order; else the other way round
  unsigned rows;
  float quant;

  __device__ __forceinline__ unsigned residual_row(unsigned r) const {
    if (r >= rows) return kNoRow;
    return from_windows ? windows.image_row(r) : r;
  }
  __device__ __forceinline__ unsigned branch_row(unsigned r) const { return from_windows ? windows.window_row(r) : r; }
  __device__ __forceinline__ unsigned out_row(unsigned r) const { return from_windows ? r : windows.window_row(r); }
  bool aligned() const {
    return is_aligned(residual, 8) && is_aligned(out, 4) && is_aligned(gamma, 8) && is_aligned(beta, 8);
  }
};

// Four adjacent values of a two-byte type.
template <class T>
__device__ __forceinline__ void unpack_four(const uint2& words, float (&x)[4]) {
  const float2 low = unpack<T>(words.x), high = unpack<T>(words.y);
  x[0] = low.x;
  x[1] = low.y;
  x[2] = high.x;
  x[3] = high.y;
}
template <class T>
__device__ __forceinline__ void load_four(const T* source, float (&x)[4]) {
  unpack_four<T>(*reinterpret_cast<const uint2*>(source), x);
}
template <class T>
__device__ __forceinline__ uint2 four_words(const float* x) {
  return make_uint2(pack<T>(x[0], x[1]), pack<T>(x[2], x[3]));
}

// Sums of each of a lane's rows over all channels. `shared` holds Tile::kSumBytes; barriers on both sides.
template <class Tile>
__device__ __forceinline__ void sum_rows(float* shared, float (&sums)[Tile::kRowTiles][2]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int first = warp / Tile::kWarpsN * 16 * Tile::kRowTiles + lane / 4;
#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = sum_over<4>(sums[i][half]);
      if (lane % 4 == 0) shared[(first + 16 * i + 8 * half) * Tile::kWarpsN + warp % Tile::kWarpsN] = sum;
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* row = shared + (first + 16 * i + 8 * half) * Tile::kWarpsN;
      sums[i][half] = row[0] + row[1];
    }
  }
  __syncthreads();
}

// A lane's rows: of the residual, kNoRow where there is none, and of `out`.
template <class Tile>
using LaneRows = unsigned[Tile::kRowTiles][2];

template <class Tile, class T>
__device__ __forceinline__ void rows_of_lane(const RowEnd<T>& end, unsigned row, LaneRows<Tile>& residual,
                                             LaneRows<Tile>& out) {
#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned r = end.residual_row(row + 16 * i + 8 * half);
      residual[i][half] = r;
      out[i][half] = r == kNoRow ? kNoRow : end.out_row(r);
    }
  }
}

// What the residual holds of four columns of all of a lane's rows: loaded before any of them is stored.
template <class Tile, class T>
__device__ __forceinline__ void load_columns(const T* residual, const LaneRows<Tile>& rows, int column,
                                             uint2 (&words)[Tile::kRowTiles][2]) {
#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned r = rows[i][half];
      if (r == kNoRow) continue;
      words[i][half] =
          *reinterpret_cast<const uint2*>(residual + static_cast<std::int64_t>(r) * Tile::kChannels + column);
    }
  }
}

// residual += acc * scale + bias; out = quantize(LayerNorm(residual as it is stored)). All threads of the block.
template <class Tile, class T>
__device__ __forceinline__ void end_pre_norm(const RowEnd<T>& end, unsigned first_row, Accumulators<Tile>& acc,
                                             float* shared) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const unsigned row = first_row + warp / Tile::kWarpsN * 16 * Tile::kRowTiles + lane / 4;
  const int column = warp % Tile::kWarpsN * (Tile::kChannels / Tile::kWarpsN) + lane % 4 * Tile::kLaneColumns;
  float sums[Tile::kRowTiles][2] = {};
  LaneRows<Tile> rows, out_rows;
  rows_of_lane<Tile>(end, row, rows, out_rows);
  // Four columns at a time: two tiles of accumulators become the stored values' bits.
#pragma unroll
  for (int j = 0; j < Tile::kColumnTiles; j += 2) {
    float scale[4], bias[4];
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      scale[v] = end.scale[column + 2 * j + v];
      bias[v] = end.bias != nullptr ? end.bias[column + 2 * j + v] : 0.0f;
    }
    uint2 before[Tile::kRowTiles][2];
    load_columns<Tile>(end.residual, rows, column + 2 * j, before);
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const unsigned r = rows[i][half];
        if (r == kNoRow) continue;
        T* target = end.residual + static_cast<std::int64_t>(r) * Tile::kChannels + column + 2 * j;
        float x[4];
        unpack_four<T>(before[i][half], x);
#pragma unroll
        for (int v = 0; v < 4; ++v) x[v] += __int2float_rn(acc[i][j + v / 2][2 * half + v % 2]) * scale[v] + bias[v];
        const uint2 words = four_words<T>(x);
        *reinterpret_cast<uint2*>(target) = words;
        const float2 low = unpack<T>(words.x), high = unpack<T>(words.y);
        sums[i][half] += (low.x + low.y) + (high.x + high.y);
        acc[i][j][2 * half] = static_cast<int>(words.x);
        acc[i][j + 1][2 * half] = static_cast<int>(words.y);
      }
    }
  }
  if (end.out == nullptr) return;  // of the whole block
  constexpr float kShare = 1.0f / Tile::kChannels;
  sum_rows<Tile>(shared, sums);
  float mean[Tile::kRowTiles][2], squares[Tile::kRowTiles][2] = {};
#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      mean[i][half] = sums[i][half] * kShare;
#pragma unroll
      for (int j = 0; j < Tile::kColumnTiles; ++j) {
        const float2 x = unpack<T>(static_cast<std::uint32_t>(acc[i][j][2 * half]));
        const float a = x.x - mean[i][half], b = x.y - mean[i][half];
        squares[i][half] += a * a + b * b;
      }
    }
  }
  sum_rows<Tile>(shared, squares);
#pragma unroll
  for (int j = 0; j < Tile::kColumnTiles; j += 2) {
    float gamma[4], beta[4];
    load_four<T>(end.gamma + column + 2 * j, gamma);
    load_four<T>(end.beta + column + 2 * j, beta);
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (rows[i][half] == kNoRow) continue;
        const float rstd = rsqrtf(squares[i][half] * kShare + kLayerNormEps);
        const float2 low = unpack<T>(static_cast<std::uint32_t>(acc[i][j][2 * half]));
        const float2 high = unpack<T>(static_cast<std::uint32_t>(acc[i][j + 1][2 * half]));
        float x[4] = {low.x, low.y, high.x, high.y};
#pragma unroll
        for (int v = 0; v < 4; ++v) x[v] = ((x[v] - mean[i][half]) * rstd * gamma[v] + beta[v]) * end.quant;
        store_quantized<4>(end.out + static_cast<std::int64_t>(out_rows[i][half]) * Tile::kChannels + column + 2 * j, x);
      }
    }
  }
}

// residual += LayerNorm(acc * scale + bias); out = quantize(residual as it is stored). All threads of the block.
template <class Tile, class T>
__device__ __forceinline__ void end_res_post_norm(const RowEnd<T>& end, unsigned first_row, Accumulators<Tile>& acc,
                                                  float* shared) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const unsigned row = first_row + warp / Tile::kWarpsN * 16 * Tile::kRowTiles + lane / 4;
  const int column = warp % Tile::kWarpsN * (Tile::kChannels / Tile::kWarpsN) + lane % 4 * Tile::kLaneColumns;
  constexpr float kShare = 1.0f / Tile::kChannels;
  // The accumulators become y's bits, then, less their mean, those of what the LayerNorm scales.
  float sums[Tile::kRowTiles][2] = {}, squares[Tile::kRowTiles][2] = {};
#pragma unroll
  for (int j = 0; j < Tile::kColumnTiles; ++j) {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const int at = column + 2 * j + v;
      const float scale = end.scale[at], bias = end.bias != nullptr ? end.bias[at] : 0.0f;
#pragma unroll
      for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float y = __int2float_rn(acc[i][j][2 * half + v]) * scale + bias;
          acc[i][j][2 * half + v] = __float_as_int(y);
          sums[i][half] += y;
        }
      }
    }
  }
  sum_rows<Tile>(shared, sums);
#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float mean = sums[i][half] * kShare;
#pragma unroll
      for (int j = 0; j < Tile::kColumnTiles; ++j) {
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          int& bits = acc[i][j][2 * half + v];
          const float centred = __int_as_float(bits) - mean;
          bits = __float_as_int(centred);
          squares[i][half] += centred * centred;
        }
      }
    }
  }
  sum_rows<Tile>(shared, squares);
  LaneRows<Tile> rows, out_rows;
  rows_of_lane<Tile>(end, row, rows, out_rows);
#pragma unroll
  for (int j = 0; j < Tile::kColumnTiles; j += 2) {
    float gamma[4], beta[4];
    load_four<T>(end.gamma + column + 2 * j, gamma);
    load_four<T>(end.beta + column + 2 * j, beta);
    uint2 before[Tile::kRowTiles][2];
    load_columns<Tile>(end.residual, rows, column + 2 * j, before);
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const unsigned r = rows[i][half];
        if (r == kNoRow) continue;
        T* target = end.residual + static_cast<std::int64_t>(r) * Tile::kChannels + column + 2 * j;
        const float rstd = rsqrtf(squares[i][half] * kShare + kLayerNormEps);
        float x[4];
        unpack_four<T>(before[i][half], x);
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          x[v] += __int_as_float(acc[i][j + v / 2][2 * half + v % 2]) * rstd * gamma[v] + beta[v];
        }
        const uint2 words = four_words<T>(x);
        *reinterpret_cast<uint2*>(target) = words;
        if (end.out == nullptr) continue;
        const float2 low = unpack<T>(words.x), high = unpack<T>(words.y);
        const float scaled[4] = {low.x * end.quant, low.y * end.quant, high.x * end.quant, high.y * end.quant};
        store_quantized<4>(end.out + static_cast<std::int64_t>(out_rows[i][half]) * Tile::kChannels + column + 2 * j,
                           scaled);
      }
    }
  }
}

template <class Tile, NormPlace kNorm, class T>
__device__ __forceinline__ void end_rows(const RowEnd<T>& end, unsigned first_row, Accumulators<Tile>& acc,
                                         float* shared) {
  if constexpr (kNorm == NormPlace::kPreNorm) {
    end_pre_norm<Tile>(end, first_row, acc, shared);
  } else {
    end_res_post_norm<Tile>(end, first_row, acc, shared);
  }
}

// A GEMM and the end of its rows with kResPostNorm where no block has whole ones: branch f32 = y, in the order of x's
// rows, then its LayerNorm added to the residual of `tokens` rows; compiled once, in linear_residual_norm.cu.
template <class T>
void end_linear(const char* op, const TensorView& x, const PackedWeight& w, const TensorView& branch,
                const RowEnd<T>& end, std::int64_t tokens, void* stream);

// Launches blocks of whole rows, with `bytes` of dynamic shared memory.
template <class Tile, class... Parameters, class... Arguments>
void launch_row_blocks(const char* op, void (*kernel)(Parameters...), unsigned rows, std::size_t bytes, void* stream,
                       const Arguments&... arguments) {
  allow_shared(op, kernel, bytes);
  SWIN_LAUNCH(op, kernel, static_cast<unsigned>(ceil_div(rows, Tile::kM)), Tile::kThreads, bytes, stream, arguments...);
}

}  // namespace swin::cuda
