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

inline constexpr std::int64_t kTile = 16;              // rows, or columns, of a tile
inline constexpr std::int64_t kPairRows = 2 * kTile;   // that go through the weights together
inline constexpr std::int64_t kTileBlockRows = 128;    // of a block, at most
inline constexpr std::int64_t kEmitRows = 4;           // emitted without a branch between them
inline constexpr std::int64_t kResults = 4 * kTile * kTile * sizeof(std::int32_t);  // bytes of the results of two tiles by two
// Rows that stay in the first-level cache beside weights and results while columns pass, and the largest K for which that
// is worth reading the weights more often.
inline constexpr std::int64_t kRowsInCache = 24 << 10, kMaxKOfRowsInCache = 512;
// The weights which those rows go through before the next ones do, so that they come from the second-level cache.
inline constexpr std::int64_t kUnitsInCache = 256 << 10;

// Values of k that one tile holds: at most 64.
static inline std::int64_t tile_step(std::int64_t k) {
  for (std::int64_t step = 64; step >= 32; step -= 4) {
    if (k % step == 0) return step;
  }
  return k < 64 && k % 4 == 0 ? k : 64;
}
static inline std::int64_t tile_padded(std::int64_t k) { return ceil_div(k, tile_step(k)) * tile_step(k); }

// The results of a pair of tiles, then copies of rows: all of them where K is padded, else the last few.
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

// Up to two tiles of rows.
struct TileRows {
  const std::int8_t* tiles[2];
  std::int64_t strides[2], first, count;
};

// What the products of a block share.
struct TileSteps {
  std::int64_t count, step, unit_size;
  std::int64_t rows_at_once;  // that are emitted after a step, so that all are before results take their place
  std::int32_t* results;      // [kPairRows][units * kTile]
};

// The first step of R tiles of rows by V units. Each result of the rows before leaves its register just ahead of the product
// that takes it, which so waits for one store and not for four.
template <int R, int V>
SWIN_INLINE static inline void first_step(std::int32_t* results) {
  constexpr std::int64_t kPitch = V * kTile * sizeof(std::int32_t);
  _tile_stored(0, results, kPitch);
  _tile_zero(0);
  _tile_dpbssd(0, 4, 6);
  if constexpr (V == 2) {
    _tile_stored(1, results + kTile, kPitch);
    _tile_zero(1);
    _tile_dpbssd(1, 4, 7);
  }
  _tile_stored(2, results + kTile * V * kTile, kPitch);
  if constexpr (R == 2) {
    _tile_zero(2);
    _tile_dpbssd(2, 5, 6);
  }
  if constexpr (V == 2) {
    _tile_stored(3, results + kTile * V * kTile + kTile, kPitch);
    if constexpr (R == 2) {
      _tile_zero(3);
      _tile_dpbssd(3, 5, 7);
    }
  }
}

// Multiplies R (1 or 2) tiles of rows by V (1 or 2) units, and emits the rows before them, whose results are still in the
// tiles. Fetches `fetched` bytes from `ahead` on to the second-level cache in each step and returns where it ended.
//
// Rows are emitted between the steps of the tiles: the vector units work on some rows while the tiles work on others.
// Behind all steps they would find no room among the instructions that the processor looks ahead to. What they share is in
// registers, as tiles need all that the load ports give; results are read where they lie, as GCC would store a copy of
// every row.
template <int R, int V, class EmitRow>
SWIN_INLINE static inline const std::int8_t* multiply_pair(const TileRows& rows, const std::int8_t* unit,
                                                           const TileSteps& steps, const TileRows& before,
                                                           const EmitRow& emit_before, const std::int8_t* ahead,
                                                           std::int64_t fetched) {
  const EmitRow emit = emit_before;
  const std::int8_t *row0 = rows.tiles[0], *row1 = rows.tiles[1];
  const std::int64_t stride0 = rows.strides[0], stride1 = rows.strides[1], unit_size = steps.unit_size;
  const std::int64_t step = steps.step, step_bytes = step * kTile, at_once = steps.rows_at_once;
  const std::int32_t* results = steps.results;
  std::int64_t row = before.first;
  const std::int64_t end = row + before.count;
  for (std::int64_t s = steps.count; s > 0; --s) {
#pragma GCC unroll 1
    for (const std::int8_t* until = ahead + fetched; ahead < until; ahead += 64) __builtin_prefetch(ahead, 0, 2);
    _tile_loadd(4, row0, stride0);
    _tile_loadd(6, unit, 64);
    if constexpr (V == 2) _tile_loadd(7, unit + unit_size, 64);
    if constexpr (R == 2) _tile_loadd(5, row1, stride1);
    row0 += step;
    row1 += step;
    unit += step_bytes;
    if (s == steps.count) {
      first_step<R, V>(steps.results);
      if (s > 2) continue;  // the results are not there yet
    } else {
      _tile_dpbssd(0, 4, 6);
      if constexpr (V == 2) _tile_dpbssd(1, 4, 7);
      if constexpr (R == 2) _tile_dpbssd(2, 5, 6);
      if constexpr (R == 2 && V == 2) _tile_dpbssd(3, 5, 7);
    }
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
  return ahead;
}

// `pairs` of rows by units [first_unit, last_unit), V at a time; fetches `fetched` bytes of the next units in each step. A
// function of its own, as GCC has no register left for its loops where they are part of another.
template <int V, class Emit>
[[gnu::noinline]] static void multiply_units(const TileRows* pairs, const TileRows* pairs_end, const std::int8_t* units,
                                             const TileSteps& steps, std::int64_t first_unit, std::int64_t last_unit,
                                             std::int64_t fetched, const Emit& emit) {
  const TileRows none{};
  const TileRows* before = &none;
  auto emit_before = emit.template operator()<V>(first_unit * kTile);
  const std::int8_t* unit = units + first_unit * steps.unit_size;
  for (std::int64_t u = first_unit; u + V <= last_unit; u += V, unit += V * steps.unit_size) {
    const std::int8_t* ahead = unit + V * steps.unit_size;
    const std::int64_t fetched_now = u + 2 * V <= last_unit ? fetched : 0;
    for (const TileRows* rows = pairs; rows < pairs_end; ++rows) {
      if (rows->count > kTile) {
        ahead = multiply_pair<2, V>(*rows, unit, steps, *before, emit_before, ahead, fetched_now);
      } else {
        ahead = multiply_pair<1, V>(*rows, unit, steps, *before, emit_before, ahead, fetched_now);
      }
      before = rows;
      if (rows == pairs) {
        const auto own = emit.template operator()<V>(u * kTile);
        static_assert(__is_trivially_copyable(decltype(own)));  // a lambda has no assignment
        std::memcpy(static_cast<void*>(&emit_before), &own, sizeof own);
      }
    }
  }
  constexpr std::int64_t kPitch = V * kTile * sizeof(std::int32_t);
  _tile_stored(0, steps.results, kPitch);
  if constexpr (V == 2) _tile_stored(1, steps.results + kTile, kPitch);
  _tile_stored(2, steps.results + kTile * V * kTile, kPitch);
  if constexpr (V == 2) _tile_stored(3, steps.results + kTile * V * kTile + kTile, kPitch);
  for (std::int64_t r = 0; r < before->count; ++r) {
    emit_before(before->first + r, reinterpret_cast<const Vi*>(steps.results + r * V * kTile));
  }
}

// See multiply_block (packed_gemm.h). rows: at most kTileBlockRows. `fetch`: the weights are not in the second-level cache yet.
template <class Emit>
static inline void multiply_tiles(const std::int8_t* x, std::int64_t stride, std::int64_t rows, std::int64_t k,
                                  const std::int8_t* units, std::int64_t first_unit, std::int64_t last_unit,
                                  void* scratch, bool prepared, bool fetch, Emit emit) {
  const std::int64_t step = tile_step(k), padded = tile_padded(k), unit_size = padded * kTile, steps = padded / step;
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
  TileRows pairs[kTileBlockRows / kPairRows];
  const std::int64_t pair_count = ceil_div(rows, kPairRows);
  for (std::int64_t p = 0; p < pair_count; ++p) {
    const std::int64_t first = p * kPairRows;
    for (std::int64_t i = 0; i < 2; ++i) {
      const std::int64_t row = first + i * kTile;
      pairs[p].tiles[i] = row < in_place ? x + row * stride : copies + (row - in_place) * padded;
      pairs[p].strides[i] = row < in_place ? stride : padded;
    }
    pairs[p].first = first;
    pairs[p].count = min_of(kPairRows, rows - first);
  }
  configure_tiles(step);
  const std::int64_t emitting = steps > 2 ? steps - 1 : steps;
  const TileSteps shared{steps, step, unit_size, ceil_div(kPairRows / kEmitRows, emitting) * kEmitRows,
                         static_cast<std::int32_t*>(scratch)};
  const std::int64_t fitting = kRowsInCache / (kPairRows * padded);
  const std::int64_t at_once = padded <= kMaxKOfRowsInCache && fitting < pair_count ? fitting : pair_count;
  const std::int64_t part = at_once < pair_count ? ceil_div(kUnitsInCache, 2 * unit_size) * 2 : last_unit - first_unit;
  for (std::int64_t first = first_unit; first < last_unit; first += part) {
    const std::int64_t last = min_of(first + part, last_unit), twos_end = last - (last - first) % 2;
    for (std::int64_t p = 0; p < pair_count; p += at_once) {
      const std::int64_t p_end = min_of(p + at_once, pair_count);
      // Each pair fetches its share of the next units, so much of each a step: all at once they would hold up the tiles'
      // own loads.
      const std::int64_t share = fetch && p == 0 ? ceil_div(ceil_div(unit_size, p_end * steps), 64) * 64 : 0;
      multiply_units<2>(pairs + p, pairs + p_end, units, shared, first, twos_end, 2 * share, emit);
      if (twos_end < last) multiply_units<1>(pairs + p, pairs + p_end, units, shared, twos_end, last, share, emit);
    }
  }
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
