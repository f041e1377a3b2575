// The integer GEMM on AMX tiles: int8 times int8 exactly in int32, sixteen rows by sixteen columns at a time.
//
// Two tiles of rows times two of columns use all eight tile registers, so that each tile loaded meets two others.
// Rows are read where they lie; a step of k is the largest divisor of K up to 64 (48 for K = 96), so that none reads
// past its row. What does not fit (the last rows, a K without such a divisor) is copied to scratch first.
// Packed weights: units of 16 columns; in a unit, four values of k by four: the layout of VNNI without an offset, which
// is also that of a tile.
#pragma once

#include "gemm_core.h"

namespace swin::cpu::SWIN_ISA {

inline constexpr std::int64_t kTile = 16;                                      // rows, or columns, of a tile
inline constexpr std::int64_t kEmitRows = 4;                                    // emitted without a branch between them
inline constexpr std::int64_t kGroupResults = 4 * kTile * kTile;                        // of two tiles by two
inline constexpr std::int64_t kResults = 2 * kGroupResults * sizeof(std::int32_t);      // bytes of two groups' results

// Values of k that one tile holds: at most 64.
static inline std::int64_t tile_step(std::int64_t k) {
  for (std::int64_t step = 64; step >= 32; step -= 4) {
    if (k % step == 0) return step;
  }
  return k < 64 && k % 4 == 0 ? k : 64;
}
static inline std::int64_t tile_padded(std::int64_t k) { return ceil_div(k, tile_step(k)) * tile_step(k); }

// The results of two groups, then copies of rows: all of them where K is padded, else the last few.
static inline std::int64_t tile_scratch_bytes(std::int64_t rows, std::int64_t k) {
  const std::int64_t copied = tile_padded(k) == k ? 1 : ceil_div(rows, kTile);
  return ceil_div(kResults + copied * kTile * tile_padded(k), 64) * 64;
}

// `shape(tile)` gives the rows and bytes per row of each of the eight tiles.
struct TileShape {
  std::int64_t rows, row_bytes;
};
template <class Shape>
static inline void configure_tiles_as(Shape&& shape) {
  struct alignas(64) {
    std::uint8_t palette, start_row, reserved[14];
    std::uint16_t row_bytes[16];
    std::uint8_t rows[16];
  } config = {};
  config.palette = 1;
  for (int tile = 0; tile < 8; ++tile) {
    const TileShape s = shape(tile);
    config.row_bytes[tile] = static_cast<std::uint16_t>(s.row_bytes);
    config.rows[tile] = static_cast<std::uint8_t>(s.rows);
  }
  // GCC's intrinsics say nothing of the memory that the tile instructions read: it has to be written by then.
  asm volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}
static inline void configure_tiles(std::int64_t step) {
  configure_tiles_as([=](int tile) {  // 0..3 results, 4 and 5 rows, 6 and 7 weights
    return TileShape{tile >= 6 ? step / 4 : kTile, tile == 4 || tile == 5 ? step : 64};
  });
}

// A group of up to two tiles of rows by up to two units: what its kernel reads, and where its results go.
struct TileGroup {
  const std::int8_t* rows[2];
  std::int64_t strides[2];
  const std::int8_t *units, *ahead;  // ahead: what to fetch to the second-level cache meanwhile, `fetched` bytes a step
  std::int32_t* results;             // [row_count][units * kTile]
  std::int64_t row, row_count, fetched;
};

// What all groups of a block share.
struct TileSteps {
  std::int64_t steps, step, unit_size;
  std::int64_t rows_at_once;  // that are emitted after each step, so that a group's are out with the next one's last step
};

// Multiplies a group of R (1 or 2) tiles of rows by V (1 or 2) units, and emits the group before it, if it has rows.
//
// Its rows are emitted between the steps of the tiles: the vector units work on one group while the tiles work on the
// other. Behind all steps they would find no room among the instructions that the processor looks ahead to. What they share
// is in registers, as tiles need all that the load ports give; results are read where they lie, as GCC would store a copy of
// every row.
template <int R, int V, class EmitRow>
SWIN_INLINE static inline void multiply_group(const TileGroup& group, const TileSteps& shared, const TileGroup& before,
                                              const EmitRow& emit_before) {
  const EmitRow emit = emit_before;
  const std::int8_t *row0 = group.rows[0], *row1 = group.rows[1], *unit = group.units, *ahead = group.ahead;
  const std::int64_t stride0 = group.strides[0], stride1 = group.strides[1], unit_size = shared.unit_size;
  const std::int64_t step = shared.step, step_bytes = step * kTile, at_once = shared.rows_at_once;
  const std::int64_t fetched = group.fetched;
  const std::int32_t* results = before.results;
  std::int64_t row = before.row;
  const std::int64_t end = row + before.row_count;
  _tile_zero(0);
  if constexpr (V == 2) _tile_zero(1);
  if constexpr (R == 2) _tile_zero(2);
  if constexpr (R == 2 && V == 2) _tile_zero(3);
  for (std::int64_t s = shared.steps; s > 0; --s) {
#pragma GCC unroll 1
    for (const std::int8_t* until = ahead + fetched; ahead < until; ahead += 64) __builtin_prefetch(ahead, 0, 2);
    _tile_loadd(4, row0, stride0);
    _tile_loadd(6, unit, 64);
    if constexpr (V == 2) _tile_loadd(7, unit + unit_size, 64);
    if constexpr (R == 2) _tile_loadd(5, row1, stride1);
    _tile_dpbssd(0, 4, 6);
    if constexpr (V == 2) _tile_dpbssd(1, 4, 7);
    if constexpr (R == 2) _tile_dpbssd(2, 5, 6);
    if constexpr (R == 2 && V == 2) _tile_dpbssd(3, 5, 7);
    row0 += step;
    row1 += step;
    unit += step_bytes;
    for (const std::int64_t until = min_of(row + at_once, end); row < until;) {
      if (row + kEmitRows <= end) {
#pragma GCC unroll 8
        for (std::int64_t r = 0; r < kEmitRows; ++r) emit(row + r, reinterpret_cast<const Vi*>(results + r * V * kTile));
        row += kEmitRows;
        results += kEmitRows * V * kTile;
      } else {
        emit(row++, reinterpret_cast<const Vi*>(results));
        results += V * kTile;
      }
    }
  }
  std::int32_t* out = group.results;
  constexpr std::int64_t kPitch = V * kTile * sizeof(std::int32_t);
  _tile_stored(0, out, kPitch);
  if constexpr (V == 2) _tile_stored(1, out + kTile, kPitch);
  if constexpr (R == 2) _tile_stored(2, out + kTile * V * kTile, kPitch);
  if constexpr (R == 2 && V == 2) _tile_stored(3, out + kTile * V * kTile + kTile, kPitch);
}

// All rows by units [first_unit, last_unit), V at a time. A function of its own, as GCC has no register left for its loops
// where they are part of another.
template <int V, class Emit, class SetGroup>
[[gnu::noinline]] static void multiply_units(std::int64_t rows, const TileSteps& shared, std::int64_t first_unit,
                                             std::int64_t last_unit, SetGroup&& set_group, const Emit& emit) {
  TileGroup groups[2] = {};  // by turns: a copy would wait for what was just written to its original
  int next = 0;
  auto emit_before = emit.template operator()<V>(first_unit * kTile);
  for (std::int64_t u = first_unit; u + V <= last_unit; u += V) {
    for (std::int64_t r = 0; r < rows; r += 2 * kTile) {
      TileGroup& group = groups[next];
      next = 1 - next;
      set_group(group, r, u, V);
      if (group.row_count > kTile) {
        multiply_group<2, V>(group, shared, groups[next], emit_before);
      } else {
        multiply_group<1, V>(group, shared, groups[next], emit_before);
      }
      if (r == 0) {
        const auto own = emit.template operator()<V>(u * kTile);
        static_assert(__is_trivially_copyable(decltype(own)));  // a lambda has no assignment
        std::memcpy(static_cast<void*>(&emit_before), &own, sizeof own);
      }
    }
  }
  const TileGroup& last = groups[1 - next];
  for (std::int64_t r = 0; r < last.row_count; ++r) {
    emit_before(last.row + r, reinterpret_cast<const Vi*>(last.results + r * V * kTile));
  }
}

// See multiply_block (packed_gemm.h). `fetch`: the weights are not in the second-level cache yet.
template <class Emit>
static inline void multiply_tiles(const std::int8_t* x, std::int64_t stride, std::int64_t rows, std::int64_t k,
                                  const std::int8_t* units, std::int64_t first_unit, std::int64_t last_unit,
                                  void* scratch, bool prepared, bool fetch, Emit emit) {
  const std::int64_t step = tile_step(k), padded = tile_padded(k), unit_size = padded * kTile, steps = padded / step;
  std::int32_t* results = static_cast<std::int32_t*>(scratch);
  std::int8_t* copies = static_cast<std::int8_t*>(scratch) + kResults;
  const std::int64_t in_place = padded == k ? rows / kTile * kTile : 0;  // rows that are read where they lie
  if (!prepared && in_place < rows) {
    for (std::int64_t r = in_place; r < rows; ++r) {
      std::int8_t* copy = copies + (r - in_place) * padded;
      std::memcpy(copy, x + r * stride, k);
      std::memset(copy + k, 0, padded - k);
    }
    const std::int64_t missing = ceil_div(rows, kTile) * kTile - rows;
    std::memset(copies + (rows - in_place) * padded, 0, missing * padded);
  }
  configure_tiles(step);
  // Each group fetches its share of the next units, so much of each a step: all at once they would hold up the tiles' own
  // loads.
  const std::int64_t share = ceil_div(ceil_div(unit_size, ceil_div(rows, 2 * kTile) * steps), 64) * 64;
  const auto set_group = [&](TileGroup& group, std::int64_t r, std::int64_t u, std::int64_t count) SWIN_INLINE {
    for (std::int64_t i = 0; i < 2; ++i) {
      const std::int64_t row = r + i * kTile;
      group.rows[i] = row < in_place ? x + row * stride : copies + (row - in_place) * padded;
      group.strides[i] = row < in_place ? stride : padded;
    }
    group.units = units + u * unit_size;
    group.fetched = fetch && u + 2 * count <= last_unit ? count * share : 0;
    group.ahead = group.units + count * unit_size + r / (2 * kTile) * steps * group.fetched;
    group.results = results;
    results = static_cast<std::int32_t*>(scratch) + (results == scratch ? kGroupResults : 0);
    group.row = r;
    group.row_count = min_of(2 * kTile, rows - r);
  };
  const TileSteps shared{steps, step, unit_size, ceil_div(2 * kTile / kEmitRows, steps) * kEmitRows};
  const std::int64_t pairs_end = last_unit - (last_unit - first_unit) % 2;
  multiply_units<2>(rows, shared, first_unit, pairs_end, set_group, emit);
  if (pairs_end < last_unit) multiply_units<1>(rows, shared, pairs_end, last_unit, set_group, emit);
  _tile_release();
}

// Packs columns [first, first + 16) of w[n, k] into one unit; missing values are zero.
static inline void pack_tile_unit(const std::int8_t* w, std::int64_t n, std::int64_t k, std::int64_t first,
                                  std::int8_t* unit) {
  std::memset(unit, 0, tile_padded(k) * kTile);
  for (std::int64_t j = 0; j < min_of(n - first, kTile); ++j) {
    for (std::int64_t i = 0; i < k; ++i) unit[i / 4 * 64 + j * 4 + i % 4] = w[(first + j) * k + i];
  }
}

}  // namespace swin::cpu::SWIN_ISA
