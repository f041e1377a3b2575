// Elementwise operations with a bias per column: a thread owns V adjacent columns, keeps their bias in registers, and
// takes kSteps rows that lie `row_step` apart. Neighbouring threads own neighbouring columns, then the next row's, so
// every access of a warp is contiguous, and all of a thread's loads are issued before the first use.
#pragma once

#include "device.cuh"

namespace swin::cuda {

inline constexpr int kColumnThreads = 256;

struct ColumnGrid {
  FastDiv chunks;  // of V columns, in a row
  unsigned rows, row_step;

  // This thread's columns and first row; false where it has none.
  __device__ __forceinline__ bool locate(unsigned& row, unsigned& chunk) const {
    chunk = blockIdx.x * kColumnThreads + threadIdx.x;
    row = chunks.split(chunk);
    return row < row_step;
  }
};

// Four rows a thread hide latency and share the bias, where there are enough threads left to fill a large GPU.
inline int column_steps(std::int64_t rows, std::int64_t chunks) { return rows * chunks >= (1 << 19) ? 4 : 1; }

inline ColumnGrid column_grid(const char* op, std::int64_t rows, std::int64_t chunks, int steps) {
  const std::int64_t row_step = ceil_div(rows, steps);
  count32(op, "threads", row_step * chunks + kColumnThreads);
  return {FastDiv(chunks), count32(op, "rows", rows), static_cast<unsigned>(row_step)};
}

inline unsigned column_blocks(const ColumnGrid& grid, std::int64_t chunks) {
  return static_cast<unsigned>(ceil_div(static_cast<std::int64_t>(grid.row_step) * chunks, kColumnThreads));
}

// Launches `kernel<V, 4>` or `kernel<V, 1>` of a functor-like template; see bias_gelu.cu.
#define SWIN_LAUNCH_COLUMNS(op, kernel_of_steps, rows, chunks, stream, ...)                                  \
  do {                                                                                                       \
    const std::int64_t rows_ = (rows), chunks_ = (chunks);                                                   \
    const int steps_ = ::swin::cuda::column_steps(rows_, chunks_);                                           \
    const ::swin::cuda::ColumnGrid grid_ = ::swin::cuda::column_grid(op, rows_, chunks_, steps_);            \
    SWIN_LAUNCH(op, steps_ == 4 ? kernel_of_steps(4) : kernel_of_steps(1),                                   \
                ::swin::cuda::column_blocks(grid_, chunks_), ::swin::cuda::kColumnThreads, 0, stream, grid_, \
                __VA_ARGS__);                                                                                \
  } while (0)

}  // namespace swin::cuda
