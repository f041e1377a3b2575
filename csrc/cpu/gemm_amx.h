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

// R (1 or 2) tiles of rows times V (1 or 2) units; results to out[row][V * kTile].
// `ahead`: weights to fetch from memory meanwhile, as many as this call reads; or null.
template <int R, int V>
static inline void tile_kernel(const std::int8_t* const* rows, const std::int64_t* strides, std::int64_t steps,
                               std::int64_t step, const std::int8_t* units, std::int64_t unit_size,
                               const std::int8_t* ahead, std::int32_t* out) {
  _tile_zero(0);
  if constexpr (V == 2) _tile_zero(1);
  if constexpr (R == 2) _tile_zero(2);
  if constexpr (R == 2 && V == 2) _tile_zero(3);
  for (std::int64_t s = 0; s < steps; ++s) {
    const std::int8_t* w = units + s * step * kTile;
    if (ahead != nullptr) {
      for (std::int64_t line = 0; line < step * kTile; line += 64) {
        for (int v = 0; v < V; ++v) {
          __builtin_prefetch(ahead + v * unit_size + s * step * kTile + line, 0, 2);
        }
      }
    }
    _tile_loadd(4, rows[0] + s * step, strides[0]);
    _tile_loadd(6, w, 64);
    _tile_dpbssd(0, 4, 6);
    if constexpr (V == 2) {
      _tile_loadd(7, w + unit_size, 64);
      _tile_dpbssd(1, 4, 7);
    }
    if constexpr (R == 2) {
      _tile_loadd(5, rows[1] + s * step, strides[1]);
      _tile_dpbssd(2, 5, 6);
      if constexpr (V == 2) _tile_dpbssd(3, 5, 7);
    }
  }
  constexpr std::int64_t kPitch = V * kTile * sizeof(std::int32_t);
  _tile_stored(0, out, kPitch);
  if constexpr (V == 2) _tile_stored(1, out + kTile, kPitch);
  if constexpr (R == 2) _tile_stored(2, out + kTile * V * kTile, kPitch);
  if constexpr (R == 2 && V == 2) _tile_stored(3, out + kTile * V * kTile + kTile, kPitch);
}

// A group's results, where they lie.
struct TileGroup {
  const std::int32_t* results = nullptr;  // [rows][columns], columns a multiple of 16
  std::int64_t row, rows, unit, units;
};

template <int V, class Emit>
static inline void emit_rows(const TileGroup& group, Emit emit) {
  for (std::int64_t r = 0; r < group.rows; ++r) {
    Vi acc[V];
    std::memcpy(acc, group.results + r * V * kTile, sizeof acc);
    emit.template operator()<V>(group.row + r, group.unit * kTile, acc);
  }
}
template <class Emit>
static inline void emit_group(const TileGroup& group, Emit emit) {
  if (group.results == nullptr) return;
  if (group.units == 2) {
    emit_rows<2>(group, emit);
  } else {
    emit_rows<1>(group, emit);
  }
}

// See multiply_block (packed_gemm.h). A group's results are emitted after the next group's tiles were set going: the
// vector units work on one while the tiles work on the other.
template <class Emit>
static inline void multiply_tiles(const std::int8_t* x, std::int64_t stride, std::int64_t rows, std::int64_t k,
                                  const std::int8_t* units, std::int64_t first_unit, std::int64_t last_unit,
                                  void* scratch, bool prepared, Emit emit) {
  const std::int64_t step = tile_step(k), padded = tile_padded(k), steps = padded / step, unit_size = padded * kTile;
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
  TileGroup before;
  for (std::int64_t u = first_unit; u < last_unit; u += 2) {
    const std::int64_t vectors = min_of(2, last_unit - u);
    for (std::int64_t r = 0; r < rows; r += 2 * kTile) {
      const std::int8_t* tiles[2];
      std::int64_t strides[2];
      for (std::int64_t i = 0; i < 2; ++i) {
        const std::int64_t row = r + i * kTile;
        tiles[i] = row < in_place ? x + row * stride : copies + (row - in_place) * padded;
        strides[i] = row < in_place ? stride : padded;
      }
      const TileGroup group{results, r, min_of(2 * kTile, rows - r), u, vectors};
      const std::int8_t* w = units + u * unit_size;
      const std::int8_t* ahead = r == 0 && u + 4 <= last_unit ? w + 2 * unit_size : nullptr;
      if (group.rows > kTile) {
        if (vectors == 2) {
          tile_kernel<2, 2>(tiles, strides, steps, step, w, unit_size, ahead, results);
        } else {
          tile_kernel<2, 1>(tiles, strides, steps, step, w, unit_size, ahead, results);
        }
      } else if (vectors == 2) {
        tile_kernel<1, 2>(tiles, strides, steps, step, w, unit_size, ahead, results);
      } else {
        tile_kernel<1, 1>(tiles, strides, steps, step, w, unit_size, ahead, results);
      }
      emit_group(before, emit);
      before = group;
      results = static_cast<std::int32_t*>(scratch) + (results == scratch ? kGroupResults : 0);
    }
  }
  emit_group(before, emit);
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
