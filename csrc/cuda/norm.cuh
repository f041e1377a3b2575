// LayerNorm of rows, the part the norm operations share: which lanes own what, mean, variance, gamma and beta.
//
// Vectorised path: a row of C values is C/8 chunks of 8 (16 bytes of a two-byte type), spread over kLanes lanes of a
// warp, at most kChunks a lane: lane l owns chunks l, l + kLanes, ... The row stays in registers, so memory is read
// once, and mean and variance are two passes over registers (the two-pass variance does not cancel). Short rows share a
// warp: with one warp a row, C = 96 would leave 20 of 32 lanes idle.
//
//   C   96: 4 lanes, 3 chunks each     C  768: 32 lanes, 3 chunks      C 3072 (merge of Swin-L): 32 lanes, 12 chunks
//   C  192: 8 lanes, 3 chunks          C 1536: 32 lanes, 6 chunks
//
// Scalar path, for C not a multiple of 8, longer rows and misaligned tensors: a warp a row, three passes over memory.
//
// An operation is a struct with
//   Row row(r)                     addresses of row r
//   Raw load(row, chunk)           what memory holds of a chunk: all of a lane's loads are issued before the first use
//   Kept keep(row, chunk, raw)     the chunk to be normalised, as it stays in registers; may store on the way
//   void unpack(kept, x)           its 8 values
//   void store(row, chunk, y)      8 normalised values
//   float first(row, i), again(row, i); void store_one(row, i, y)     the same by element
//   const T *gamma, *beta
//   kLongest                       6 or 12: the chunks a lane it may own
#pragma once

#include "device.cuh"

namespace swin::cuda {

inline constexpr int kNormThreads = 128;

template <class Op, int kLanes, int kChunks>
__global__ void __launch_bounds__(kNormThreads, 1)
    norm_rows(const Op op, const unsigned rows, const int chunks, const float share) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const unsigned slot = blockIdx.x * (kNormThreads / kLanes) + threadIdx.x / kLanes;
  const bool live = slot < rows;
  const int owned = live ? chunks : 0;  // lanes past the last row go along for the shuffles
  const typename Op::Row row = op.row(live ? slot : rows - 1);

  typename Op::Raw raw[kChunks];
#pragma unroll
  for (int k = 0; k < kChunks; ++k) {
    if (k * kLanes + lane < owned) raw[k] = op.load(row, k * kLanes + lane);
  }
  typename Op::Kept kept[kChunks];
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < kChunks; ++k) {
    if (k * kLanes + lane < owned) {
      kept[k] = op.keep(row, k * kLanes + lane, raw[k]);
      float x[8];
      op.unpack(kept[k], x);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += x[i];
    }
  }
  const float mean = sum_over<kLanes>(sum) * share;
  float squares = 0.0f;
#pragma unroll
  for (int k = 0; k < kChunks; ++k) {
    if (k * kLanes + lane < owned) {
      float x[8];
      op.unpack(kept[k], x);
#pragma unroll
      for (int i = 0; i < 8; ++i) squares += (x[i] - mean) * (x[i] - mean);
    }
  }
  const float rstd = rsqrtf(sum_over<kLanes>(squares) * share + kLayerNormEps);
#pragma unroll
  for (int k = 0; k < kChunks; ++k) {
    const int chunk = k * kLanes + lane;
    if (chunk < owned) {
      float x[8], gamma[8], beta[8];
      op.unpack(kept[k], x);
      load_floats(op.gamma + 8 * chunk, gamma);
      load_floats(op.beta + 8 * chunk, beta);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = (x[i] - mean) * rstd * gamma[i] + beta[i];
      op.store(row, chunk, x);
    }
  }
}

template <class Op>
__global__ void __launch_bounds__(kNormThreads) norm_rows_scalar(const Op op, const unsigned rows, const int c) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const unsigned slot = blockIdx.x * (kNormThreads / kWarp) + threadIdx.x / kWarp;
  if (slot >= rows) return;  // a whole warp
  const typename Op::Row row = op.row(slot);
  float sum = 0.0f;
  for (int i = lane; i < c; i += kWarp) sum += op.first(row, i);
  const float mean = sum_over<kWarp>(sum) / static_cast<float>(c);
  float squares = 0.0f;
  for (int i = lane; i < c; i += kWarp) {
    const float centred = op.again(row, i) - mean;
    squares += centred * centred;
  }
  const float rstd = rsqrtf(sum_over<kWarp>(squares) / static_cast<float>(c) + kLayerNormEps);
  for (int i = lane; i < c; i += kWarp) {
    op.store_one(row, i, (op.again(row, i) - mean) * rstd * to_float(op.gamma[i]) + to_float(op.beta[i]));
  }
}

// Rows of c values; `vectorised`: every address of a chunk is a 16-byte boundary (8 bytes for s8), and c % 8 == 0.
template <class Op>
void launch_norm(const char* name, const Op& op, std::int64_t rows64, std::int64_t c64, bool vectorised, void* stream) {
  const unsigned rows = count32(name, "rows", rows64);
  const int c = static_cast<int>(count32(name, "channels", c64)), chunks = c / 8;
  const float share = 1.0f / static_cast<float>(c);
  const auto blocks = [&](int lanes) { return static_cast<unsigned>(ceil_div(rows64, kNormThreads / lanes)); };
  if (!vectorised || chunks > Op::kLongest * kWarp) {
    SWIN_LAUNCH(name, norm_rows_scalar<Op>, blocks(kWarp), kNormThreads, 0, stream, op, rows, c);
  } else if (chunks <= 4 * 4) {
    SWIN_LAUNCH(name, (norm_rows<Op, 4, 4>), blocks(4), kNormThreads, 0, stream, op, rows, chunks, share);
  } else if (chunks <= 8 * 4) {
    SWIN_LAUNCH(name, (norm_rows<Op, 8, 4>), blocks(8), kNormThreads, 0, stream, op, rows, chunks, share);
  } else if (chunks <= 16 * 4) {
    SWIN_LAUNCH(name, (norm_rows<Op, 16, 4>), blocks(16), kNormThreads, 0, stream, op, rows, chunks, share);
  } else if (chunks <= kWarp * 4) {
    SWIN_LAUNCH(name, (norm_rows<Op, kWarp, 4>), blocks(kWarp), kNormThreads, 0, stream, op, rows, chunks, share);
  } else if (chunks <= kWarp * 6) {
    SWIN_LAUNCH(name, (norm_rows<Op, kWarp, 6>), blocks(kWarp), kNormThreads, 0, stream, op, rows, chunks, share);
  } else if constexpr (Op::kLongest == 12) {
    SWIN_LAUNCH(name, (norm_rows<Op, kWarp, 12>), blocks(kWarp), kNormThreads, 0, stream, op, rows, chunks, share);
  }
}

}  // namespace swin::cuda
