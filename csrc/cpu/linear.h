// What the fused linear operations do with a GEMM's accumulators before they leave the registers, and with the rows of
// the residual stream that they complete.
#pragma once

#include "norm.h"
#include "packed_gemm.h"
#include "window_rows.h"

namespace swin::cpu::SWIN_ISA {

// float(acc) * scale + bias of V vectors of channels.
template <int V>
struct ChannelVectors {
  Vf scale[V], bias[V];

  SWIN_INLINE Vf value(const Vi* acc, int v) const { return __builtin_convertvector(acc[v], Vf) * scale[v] + bias[v]; }
};

// The scales and biases of all channels; beyond `count` 0.
//
// On AMX, where vector instructions are what a GEMM of int8 waits for, the kernels are compiled once more for results that
// no sum of k products can take to 2^31, as is so with all scales but absurd ones.
struct Channels {
  const float *scale, *bias;  // bias: null where there is none
  std::int64_t count;

  Channels(const TensorView& scale, const TensorView& bias, std::int64_t count)
      : scale(scale.as<const float>()), bias(bias.as<const float>()), count(count) {}

  bool below_2_to_31(std::int64_t k) const {
    Vf most_scale{}, most_bias{};
    for_lanes(count, [&](std::int64_t i, std::int64_t lanes) {
      const Vf s = load(scale + i, lanes);
      most_scale = max_of(max_of(s, -s), most_scale);
      if (bias != nullptr) most_bias = max_of(load(bias + i, lanes), most_bias);
    });
    return results_below_2_to_31(k, max_lane(most_scale), max_lane(most_bias));
  }

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
  SWIN_INLINE ChannelVectors<V> at(std::int64_t column) const {
    ChannelVectors<V> vectors{};
    each<V>(column, [&](int v, std::int64_t i, std::int64_t lanes) SWIN_INLINE {
      vectors.scale[v] = load(scale + i, lanes);
      if (bias != nullptr) vectors.bias[v] = load(bias + i, lanes);
    });
    return vectors;
  }
};

// Adds a GEMM's results to rows of the residual stream, row r of the block to residual row target[r].
struct ResidualAdd {
  const Channels channels;
  float* residual;
  const std::int64_t* target;

  template <int V>
  SWIN_INLINE auto operator()(std::int64_t column) const {
    return [columns = channels.at<V>(column), add = *this, column](std::int64_t row, const Vi* acc) SWIN_INLINE {
      float* x = add.residual + add.target[row] * add.channels.count;
      add.channels.each<V>(column, [&](int v, std::int64_t i, std::int64_t lanes) SWIN_INLINE {
        store(x + i, load(x + i, lanes) + columns.value(acc, v), lanes);
      });
    };
  }
};

// multiply_block whose results are added to the residual stream: once for all operations that do so (linear_residual_norm.cc),
// as its kernels take long to compile.
void multiply_and_add(const CpuPackedWeight& w, const std::int8_t* x, const BlockTask& task, void* scratch,
                      const ResidualAdd& add);

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
