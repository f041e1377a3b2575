// What the fused linear operations do with a GEMM's accumulators before they leave the registers, and with the rows of
// the residual stream that they complete.
#pragma once

#include "norm.h"
#include "packed_gemm.h"
#include "window_rows.h"

namespace swin::cpu::SWIN_ISA {

// float(acc) * scale[n] + bias[n]; n up to `count`, beyond it 0.
struct Channels {
  const float *scale, *bias;  // bias: null where there is none
  std::int64_t count;

  Channels(const TensorView& scale, const TensorView& bias, std::int64_t count)
      : scale(scale.as<const float>()), bias(bias.as<const float>()), count(count) {}

  // Calls body(v, channel, lanes) for the vectors that begin below `count`.
  template <int V, class Body>
  SWIN_INLINE void each(std::int64_t column, Body&& body) const {
    for (int v = 0; v < V; ++v) {
      const std::int64_t i = column + v * kLanes;
      if (i + kLanes <= count) {
        body(v, i, static_cast<std::int64_t>(kLanes));
      } else if (i < count) {
        body(v, i, count - i);
      }
    }
  }

  template <int V>
  SWIN_INLINE void apply(const Vi* acc, std::int64_t column, Vf* y) const {
    for (int v = 0; v < V; ++v) y[v] = Vf{};
    each<V>(column, [&](int v, std::int64_t i, std::int64_t lanes) SWIN_INLINE {
      y[v] = __builtin_convertvector(acc[v], Vf) * load(scale + i, lanes);
      if (bias != nullptr) y[v] += load(bias + i, lanes);
    });
  }
};

// Adds a GEMM's results to rows of the residual stream, row r of the block to residual row target[r].
struct ResidualAdd {
  const Channels channels;
  float* residual;
  const std::int64_t* target;

  template <int V>
  SWIN_INLINE void operator()(std::int64_t row, std::int64_t column, const Vi* acc) const {
    Vf y[V];
    channels.apply<V>(acc, column, y);
    float* x = residual + target[row] * channels.count;
    channels.each<V>(column, [&](int v, std::int64_t i, std::int64_t lanes) SWIN_INLINE {
      store(x + i, load(x + i, lanes) + y[v], lanes);
    });
  }
};

// Counts the tasks of each block of rows that are done; the last of a block may go on with its whole rows.
class BlockCounts {
 public:
  BlockCounts(const CpuPackedWeight& w, std::int64_t m) {
    const std::int64_t blocks = row_blocks_of(w, m);
    for (std::int64_t i = 0; i < min_of(blocks, kMaxSplitBlocks); ++i) done_[i] = 0;
  }
  bool completes(const BlockTask& task) {
    return task.splits == 1 || __atomic_add_fetch(&done_[task.block], 1, __ATOMIC_ACQ_REL) == task.splits;
  }

 private:
  int done_[kMaxSplitBlocks];
};

}  // namespace swin::cpu::SWIN_ISA
