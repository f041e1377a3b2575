// Weights packed at load, and a block of rows multiplied by some of their columns: what gemm_s8 and the fused linear
// operations share. With AMX the block runs on tiles (gemm_amx.h), with ARM's matrix instructions on pairs of rows
// (gemm_mmla.h), elsewhere on the micro-kernels of gemm_core.h.
#pragma once

#include "gemm_core.h"
#include "gemm_grouped.h"
#include "gemm_mmla.h"
#include "memory.h"
#if defined(__AMX_INT8__)
#include "gemm_amx.h"
#endif

namespace swin::cpu::SWIN_ISA {

class CpuPackedWeight : public PackedWeight {
 public:
  CpuPackedWeight(std::int64_t n, std::int64_t k, InputRange input)
      : PackedWeight(n, k, input),
        starts(static_cast<std::int32_t*>(allocate_memory(start_count(n) * sizeof(std::int32_t)))) {}
  ~CpuPackedWeight() override {
    release_memory(units);
    release_memory(starts);
#if defined(SWIN_GROUPED)
    delete grouped;
#endif
  }

  static std::int64_t start_count(std::int64_t n) {
#if defined(SWIN_GROUPED)
    return grouped_starts(n);
#else
    return units_of(n) * kLanes;
#endif
  }

  void allocate_units() {
    units = static_cast<std::int8_t*>(allocate_memory(units_of(n) * bytes_per_unit(k, input)));
  }

  static std::int64_t bytes_per_unit(std::int64_t k, InputRange input) {
#if defined(__AMX_INT8__)
    static_cast<void>(input);
    return tile_padded(k) * kLanes;
#elif defined(SWIN_MMLA)
    static_cast<void>(input);
    return unit_bytes<MatrixDot>(k);
#else
    return input == InputRange::kNonNegative ? unit_bytes<NonNegativeDot>(k) : unit_bytes<SignedDot>(k);
#endif
  }

  std::int32_t* const starts;
  std::int8_t* units = nullptr;
#if defined(SWIN_GROUPED)
  const GroupedWeight* grouped = nullptr;  // in the place of `units`
#endif
};

// Scratch that multiply_block needs for `rows` rows, a multiple of 64.
static inline std::int64_t block_bytes(const CpuPackedWeight& w, std::int64_t rows) {
#if defined(__AMX_INT8__)
  return tile_scratch_bytes(rows, w.k);
#elif defined(SWIN_MMLA)
  return ceil_div(ceil_div(rows, 2) * pair_bytes(w.k), 64) * 64;
#else
#if defined(SWIN_GROUPED)
  if (w.grouped != nullptr) return ceil_div(w.grouped->layout(rows, w.k).bytes(), 64) * 64;
#endif
  const std::int64_t bytes =
      w.input == InputRange::kNonNegative ? rows_bytes<NonNegativeDot>(rows, w.k) : rows_bytes<SignedDot>(rows, w.k);
  return ceil_div(bytes, 64) * 64;
#endif
}

// A part of x times a part of the weights, for one thread.
struct BlockTask {
  std::int64_t first, rows;            // of x
  std::int64_t first_unit, last_unit;  // of the weights
  std::int64_t block, splits;          // the block of rows, and how many tasks share it
  bool same_rows;                      // as the task before on this thread, whose scratch this is
  bool new_weights;                    // to this thread, as far as is known: its second-level cache may not hold them
};

// Whether no sum of k products of int8, times a scale up to `scale`, plus a bias up to `bias`, comes to 2^31.
static inline bool results_below_2_to_31(std::int64_t k, float scale, float bias) {
  return static_cast<float>(k) * 16384.0f * scale + bias < 2.0e9f;
}

// What is known ahead of results and worth kernels of its own: that they are below 2^31, and that all columns are there
// of each two units, so that nothing has to ask how many are left.
template <bool kBelow2To31, bool kWhole>
struct Known {
  static constexpr bool below_2_to_31 = kBelow2To31, whole = kWhole;
};

// Calls body(Known) for results of n columns.
template <class Body>
static inline void with_known([[maybe_unused]] bool below_2_to_31, [[maybe_unused]] std::int64_t n, Body&& body) {
#if defined(__AMX_INT8__)
  if (below_2_to_31) return body(Known<true, false>{});
#elif defined(__aarch64__)  // where GCC keeps rows in memory for the sake of columns that are not there
  if (n % (2 * kLanes) == 0) return body(Known<false, true>{});
#endif
  body(Known<false, false>{});
}

// Of `count` columns those from `column` on, which V vectors take.
template <int V, class Known>
static inline std::int64_t columns_left(std::int64_t count, std::int64_t column, Known) {
  return Known::whole ? V * kLanes : count - column;
}

// The weights that an operation takes: kSigned none that were packed for inputs of 0..127, whose kernels are then not compiled.
enum class Inputs { kSigned, kAny };

// acc[r, n] of the task's rows, which begin at x (`stride` bytes apart), for its units of w. What becomes of them:
// emit_columns.operator()<V>(column) gives a function of (row, const Vi* acc), for V vectors of columns from `column` on,
// that holds what its rows share. `scratch` holds block_bytes(w, rows).
template <Inputs kInputs, class Emit>
static inline void multiply_block(const CpuPackedWeight& w, const std::int8_t* x, std::int64_t stride,
                                  const BlockTask& task, void* scratch, Emit emit_columns) {
#if defined(__AMX_INT8__)
  multiply_tiles(x, stride, task.rows, w.k, w.units, task.first_unit, task.last_unit, scratch, task.same_rows,
                 task.new_weights, emit_columns);
#elif defined(SWIN_MMLA)
  std::int8_t* pairs = static_cast<std::int8_t*>(scratch);
  if (!task.same_rows) pack_pairs(x, stride, task.rows, w.k, pairs);
  pairs_block(pairs, task.rows, w.k, w.units, task.first_unit, task.last_unit, emit_columns);
#else
#if defined(SWIN_GROUPED)
  if (w.grouped != nullptr) {
    if (!task.same_rows) pack_panels(x, stride, w.k, w.input, w.grouped->layout(task.rows, w.k), scratch);
    grouped_block(*w.grouped, static_cast<const char*>(scratch), task.rows, w.k, w.starts, task.first_unit,
                  task.last_unit, emit_columns);
    return;
  }
#endif
  const auto run = [&]<class Dot>(Dot) {
    const std::int64_t steps = steps_of<Dot>(w.k);
    const Rows packed = task.same_rows && !(Dot::kInPlace && w.k % Dot::kStepK == 0)
                            ? Rows{static_cast<const char*>(scratch), steps * 4}
                            : prepare_rows<Dot>(x, stride, task.rows, w.k, scratch);
    gemm_block<Dot>(packed, task.rows, steps, w.units, w.starts, task.first_unit, task.last_unit, emit_columns);
  };
  if constexpr (kInputs == Inputs::kAny) {
    if (w.input == InputRange::kNonNegative) return run(NonNegativeDot{});
  }
  run(SignedDot{});
#endif
}

// Rows of a task, at most. x K of packed rows: 336 KiB for Swin-L's K = 6144 and VNNI. Tiles read rows where they lie, and a
// larger block reads the weights less often.
#if defined(__AMX_INT8__)
inline constexpr std::int64_t kBlockRows = kTileBlockRows, kRowAlign = kPairRows;
#elif defined(SWIN_MMLA)
inline constexpr std::int64_t kBlockRows = 56, kRowAlign = 2;
#elif defined(SWIN_GROUPED)
inline constexpr std::int64_t kBlockRows = kMostPanelRows, kRowAlign = 1;
#else
inline constexpr std::int64_t kBlockRows = 56, kRowAlign = 1;
#endif
inline constexpr std::int64_t kFewestRows = 96;  // of a thread that goes through all of an operation's weights
inline constexpr std::int64_t kMinUnits = 8;  // fewer columns a task would prepare rows for too little work
inline constexpr std::int64_t kMaxSplitBlocks = 1024;   // blocks of rows that are still split by columns
inline constexpr std::int64_t kWeightsInCache = 1 << 19;  // bytes of weights that stay in a core's cache while rows pass
inline constexpr std::int64_t kWeightsOfOp = 3 << 19;  // that do so where rows pass through all of an operation's weights

// Blocks of m rows: as few as can be, or one more where the micro-kernels then have fewer groups of rows to go through.
static inline std::int64_t row_blocks_of(const CpuPackedWeight& w, std::int64_t m) {
  const std::int64_t least = ceil_div(m, kBlockRows);
#if defined(__AMX_INT8__)
  static_cast<void>(w);
  return least;
#else
#if defined(SWIN_GROUPED)
  if (w.grouped != nullptr && w.grouped->units == kWideUnits) return least;
  const std::int64_t at_once = w.grouped != nullptr ? kGroupRows : kMaxRows;
#else
  static_cast<void>(w);
  const std::int64_t at_once = kMaxRows;
#endif
  const auto groups = [&](std::int64_t blocks) { return blocks * ceil_div(ceil_div(m, blocks), at_once); };
  return groups(least + 1) < groups(least) ? least + 1 : least;
#endif
}

// At least `together` units, a multiple of it, at which tasks may begin.
static inline std::int64_t units_of_tasks(std::int64_t together) {
#if defined(SWIN_GROUPED)
  return together % kWideUnits == 0 ? together : together * kWideUnits;
#else
  return together;
#endif
}

// Whether the threads are so few that each has rows enough of its own to go through all `weights` bytes with them: once
// where it has one block, else from its cache. Split by columns, each would read its own weights alone, but rows and
// results would move from core to core in every operation.
static inline bool rows_for_each_thread(const ExecContext& context, std::int64_t m, std::int64_t weights) {
  return context.threads > 1 && m >= kFewestRows * context.threads &&
         weights <= (ceil_div(m, kBlockRows) <= context.threads ? 2 : 1) * kWeightsOfOp;
}

// Splits m rows times w's columns into tasks and calls body(task, scratch of `scratch_bytes`) on the pool's threads: by
// rows; where that gives too few tasks, by columns too; and where the weights are larger than a cache, by columns
// first, so that a part of them stays there while all rows pass (unless each thread has a block of its own). A task
// begins at a multiple of `least` units.
template <class Body>
static inline void parallel_blocks(const ExecContext& context, std::int64_t m, const CpuPackedWeight& w,
                                   std::int64_t scratch_bytes, Body&& body, std::int64_t least = 1) {
  const std::int64_t together = units_of_tasks(least);
  const std::int64_t units = units_of(w.n), row_blocks = row_blocks_of(w, m), groups = ceil_div(m, kRowAlign);
  const std::int64_t parts = ceil_div(units, together), part_units = together > kMinUnits ? together : kMinUnits;
  const std::int64_t for_threads = context.threads > 1 ? ceil_div(4 * context.threads, row_blocks) : 1;
  const bool own_rows = row_blocks <= context.threads && rows_for_each_thread(context, m, w.n * w.k);
  const bool by_columns = row_blocks > 1 && !own_rows;
  const std::int64_t for_cache = by_columns ? ceil_div(w.n * w.k, kWeightsInCache) : 1;
  const std::int64_t wanted = for_threads > for_cache ? for_threads : for_cache;
  const std::int64_t most = units / part_units > 1 && row_blocks <= kMaxSplitBlocks ? units / part_units : 1;
  const std::int64_t splits = wanted < most ? wanted : most;
  const bool columns_first = for_cache > 1;
  parallel_rows(context, row_blocks * splits, 1, [&](std::int64_t first_task, std::int64_t last_task) {
    void* scratch = thread_scratch(scratch_bytes);
    for (std::int64_t task = first_task; task < last_task; ++task) {
      const std::int64_t block = columns_first ? task % row_blocks : task / splits;
      const std::int64_t split = columns_first ? task / row_blocks : task % splits;
      const std::int64_t first = block * groups / row_blocks * kRowAlign;
      const std::int64_t last = min_of(m, (block + 1) * groups / row_blocks * kRowAlign);
      const bool same_rows = task != first_task && split != 0 && !columns_first;
      const bool new_weights = columns_first ? task == first_task || block == 0 : block == first_task / splits;
      body(BlockTask{first, last - first, split * parts / splits * together,
                     min_of(units, (split + 1) * parts / splits * together), block, splits, same_rows, new_weights},
           scratch);
    }
  });
}

// The same by rows alone: body(task, scratch), a task without columns, for operations that multiply by `weights` bytes.
template <class Body>
static inline void parallel_row_blocks(const ExecContext& context, std::int64_t m, const CpuPackedWeight& w,
                                       std::int64_t weights, std::int64_t scratch_bytes, Body&& body) {
  const std::int64_t groups = ceil_div(m, kRowAlign), threads = context.threads > 1 ? context.threads : 1;
  std::int64_t row_blocks = ceil_div(row_blocks_of(w, m), threads) * threads;  // so that all have the same to do
  if (row_blocks > groups) row_blocks = groups;
  parallel_rows(context, row_blocks, 1, [&](std::int64_t first_block, std::int64_t last_block) {
    void* scratch = thread_scratch(scratch_bytes);
    for (std::int64_t block = first_block; block < last_block; ++block) {
      const std::int64_t first = block * groups / row_blocks * kRowAlign;
      const std::int64_t last = min_of(m, (block + 1) * groups / row_blocks * kRowAlign);
      const bool new_weights = block == first_block || weights > kWeightsOfOp;
      body(BlockTask{first, last - first, 0, 0, block, 1, false, new_weights}, scratch);
    }
  });
}

}  // namespace swin::cpu::SWIN_ISA
