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

  // Calls body(v, channel, lanes) for the vectors that begin below `count`; kWhole: for all V, whole ones.
  template <int V, bool kWhole = false, class Body>
  SWIN_INLINE void each(std::int64_t column, Body&& body) const {
    for (int v = 0; v < V; ++v) {
      const std::int64_t i = column + v * kLanes;
      if (kWhole || i + kLanes <= count) {
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

// Rows of floats: row r of the block begins at `rows` + target[r].
struct FloatRows {
  float* rows = nullptr;
  const std::int64_t* target = nullptr;
};

// multiply_block whose results are added to FloatRows, or stored there: once for all operations that do so
// (linear_residual_norm.cc), as its kernels take long to compile. `next`, where there is any: what is read after the
// call.
void multiply_and_add(const CpuPackedWeight& w, const std::int8_t* x, const BlockTask& task, void* scratch,
                      const Channels& channels, const FloatRows& to);
void multiply_and_store(const CpuPackedWeight& w, const std::int8_t* x, const BlockTask& task, void* scratch,
                        const Channels& channels, const FloatRows& to, const FloatRows& next);

// Bytes of the rows of a block that are to be normalized before they reach the residual stream.
static inline std::int64_t branch_bytes(NormPlace norm, std::int64_t c) {
  return norm == NormPlace::kResPostNorm ? kBlockRows * c * static_cast<std::int64_t>(sizeof(float)) : 0;
}

// Where a task puts such rows: into the thread's scratch, unless other tasks give the rest of their columns.
static inline float* branch_rows(const TensorView& branch, const BlockTask& task, std::int64_t c, void* own) {
  return task.splits == 1 ? static_cast<float*>(own) : branch.as<float>() + task.first * c;
}

// multiply_and_store of the task's rows one after the other.
static inline void multiply_to_rows(const CpuPackedWeight& w, const std::int8_t* x, const BlockTask& task,
                                    void* scratch, const Channels& channels, float* rows, const FloatRows& next = {}) {
  std::int64_t target[kBlockRows];
  for (std::int64_t r = 0; r < task.rows; ++r) target[r] = r * channels.count;
  multiply_and_store(w, x, task, scratch, channels, FloatRows{rows, target}, next);
}

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
