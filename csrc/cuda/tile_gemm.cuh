// The s8 GEMM of the fused operations: tiles on tensor cores, and an epilogue that gets the accumulators in registers.
//
// acc[m, n] = sum_k x[m, k] * w[n, k] in int32; x s8 [M, K], w s8 [N, K], row-major, of any shape and alignment.
//
// Layout. A block computes kM x kN accumulators; each warp has a part of them in registers, 32 or 64 columns.
// K goes by in steps of 64 bytes through shared memory, kStages of them under way (cp.async; Turing copies at once).
// - k order: lane t of four owns bytes 16t..16t+15 of a row's 64, which are its shares of two m16n8k32 products: one
//   16-byte load of shared memory where the fragments' own order takes four words. A sum over k may run in any order.
// - rows lie one after the other, unpadded: eight lanes' loads are then two whole rows, 128 bytes in 32 banks.
// - column order: column c of tile j of J is column (c/2)*2J + 2j + c%2 of the warp's, so a lane ends up with 8 or 16
//   adjacent columns of a row: the epilogue reads and stores 8 bytes of s8 or 16 of a two-byte type at once.
// - of a warp's 64 x 64 accumulators each byte of shared memory makes 32 products, of 64 x 32 a third less; a multiprocessor
//   reads 128 bytes of it a cycle, and Ampere's makes 2048 products meanwhile, Hopper's up to 4096.
// - rows and columns beyond the matrix repeat the last one and are not stored; bytes beyond K are zeros.
// Floor: M*K + N*K + what the epilogue moves in bytes, 2*M*N*K operations. Not timed yet.
#pragma once

#include "device.cuh"

namespace swin::cuda {

inline constexpr int kStepK = 64;
inline constexpr int kStages = 3;
inline constexpr int kOwned = 8;  // adjacent columns of a lane that an epilogue gets at once

// kWarpsM x kWarpsN warps, each 16 * kRowTiles rows and 8 * kColumnTiles columns.
template <int kM_, int kN_, int kWarpsM_, int kWarpsN_>
struct Tile {
  static constexpr int kM = kM_, kN = kN_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kThreads = kWarp * kWarpsM * kWarpsN;
  static constexpr int kRowTiles = kM / kWarpsM / 16, kColumnTiles = kN / kWarpsN / 8;
  static constexpr int kLaneColumns = 2 * kColumnTiles;
  static constexpr int kStepBytes = (kM + kN) * kStepK;  // of shared memory
  static constexpr int kSharedBytes = kStages * kStepBytes;
  static_assert(kRowTiles * 16 * kWarpsM == kM && kColumnTiles * 8 * kWarpsN == kN);
};

struct GemmOperands {
  const std::int8_t *x, *w;
  unsigned rows, columns;  // M and N
  int k;
};

// Whether rows of K can be copied 16 bytes at a time.
inline bool takes_copies(const GemmOperands& g) { return g.k % 16 == 0 && is_aligned(g.x, 16) && is_aligned(g.w, 16); }

template <class Tile>
using Accumulators = int[Tile::kRowTiles][Tile::kColumnTiles][4];

// Bytes [from, from + 64) of rows [first, first + kRows) of source [bound, k] to shared memory. kAligned: k and the
// address are multiples of 16.
template <int kRows, int kThreads, bool kAligned>
__device__ __forceinline__ void load_step(std::int8_t* target, const std::int8_t* source, unsigned first, unsigned bound,
                                          int k, int from) {
  constexpr int kPieces = kRows * (kStepK / 16);
#pragma unroll(kAligned ? kPieces / kThreads + 1 : 1)
  for (int j = 0; j < (kPieces + kThreads - 1) / kThreads; ++j) {
    const int i = static_cast<int>(threadIdx.x) + j * kThreads;
    if (kPieces % kThreads != 0 && i >= kPieces) break;
    const int at = from + 16 * (i % (kStepK / 16));
    const std::int8_t* row = source + static_cast<std::int64_t>(min(first + i / (kStepK / 16), bound - 1)) * k;
    if constexpr (kAligned) {
      copy16_async(target + 16 * i, at < k ? row + at : row, at < k);
    } else {
      Words4 bytes{};
#pragma unroll
      for (int b = 0; b < 16; ++b) {
        const std::uint32_t byte = at + b < k ? static_cast<std::uint8_t>(row[at + b]) : 0;
        bytes.word[b / 4] |= byte << (8 * (b % 4));
      }
      store_words(target + 16 * i, bytes);
    }
  }
}

template <int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void clear(int (&acc)[kRowTiles][kColumnTiles][4]) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[i][j][e] = 0;
    }
  }
}

// acc += 64 bytes of K of this warp's rows and columns; x and w are where they begin in shared memory.
template <int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void multiply_step(const std::int8_t* x, const std::int8_t* w,
                                              int (&acc)[kRowTiles][kColumnTiles][4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
  Words4 b[kColumnTiles];
#pragma unroll
  for (int j = 0; j < kColumnTiles; ++j) {
    b[j] = load_words(w + ((g / 2) * (2 * kColumnTiles) + 2 * j + g % 2) * kStepK + 16 * t);
  }
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
    const Words4 upper = load_words(x + (16 * i + g) * kStepK + 16 * t);
    const Words4 lower = load_words(x + (16 * i + 8 + g) * kStepK + 16 * t);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const std::uint32_t a[4] = {upper.word[2 * s], lower.word[2 * s], upper.word[2 * s + 1], lower.word[2 * s + 1]};
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
        const std::uint32_t words[2] = {b[j].word[2 * s], b[j].word[2 * s + 1]};
        mma_s8_16832(acc[i][j], a, words);
      }
    }
  }
}

// The accumulators of this warp in the block's tile at (first_row, first_column).
template <class Tile, bool kAligned>
__device__ __forceinline__ void multiply_tile(const GemmOperands& g, unsigned first_row, unsigned first_column,
                                              std::int8_t* shared, Accumulators<Tile>& acc) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warp_row = warp / Tile::kWarpsN * 16 * Tile::kRowTiles;
  const int warp_column = warp % Tile::kWarpsN * 8 * Tile::kColumnTiles;
  clear(acc);
  const int steps = (g.k + kStepK - 1) / kStepK;
  const auto load = [&](int step, int stage) {
    std::int8_t* x = shared + stage * Tile::kStepBytes;
    load_step<Tile::kM, Tile::kThreads, kAligned>(x, g.x, first_row, g.rows, g.k, step * kStepK);
    load_step<Tile::kN, Tile::kThreads, kAligned>(x + Tile::kM * kStepK, g.w, first_column, g.columns, g.k, step * kStepK);
  };
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) load(step, step);
    commit_copies();
  }
  int stage = 0;
  for (int step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();  // this step's bytes are there, and nobody reads the stage any more that is filled next
    const int next = step + kStages - 1;
    if (next < steps) load(next, stage == 0 ? kStages - 1 : stage - 1);
    commit_copies();
    const std::int8_t* x = shared + stage * Tile::kStepBytes;
    multiply_step(x + warp_row * kStepK, x + (Tile::kM + warp_column) * kStepK, acc);
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
}

// What a tile's accumulators become. An epilogue has
//   Column<V> column(n)                              what its columns n .. n + V - 1 share; it stays in registers
//   void store(row, n, const Column<V>&, float (&acc)[V])
// with V = kOwned where all columns come in eights at aligned addresses, else V = 1. One that kCombines has in between
//   void combine(n, const Column<V>&, float (&acc)[V])
// for all lanes of the warp, whose 32 columns of a row are four lanes', and for rows beyond the matrix too. Its N is a
// multiple of 32. One that kAdds to what its output holds has
//   Before<V> load(row, n)                           what it finds there, of all rows before the first is stored
// and store gets it as its last argument.
template <class Tile, bool kAligned, class Epilogue>
__global__ void __launch_bounds__(Tile::kThreads)
    tile_gemm_kernel(const GemmOperands g, const FastDiv column_tiles, const Epilogue epilogue) {
  static_assert(Tile::kLaneColumns % kOwned == 0);
  static_assert(!Epilogue::kCombines || Tile::kLaneColumns == kOwned, "32 columns of a row are four lanes'");
  SWIN_DYNAMIC_SHARED(shared);
  unsigned column_block = blockIdx.x;
  const unsigned first_row = column_tiles.split(column_block) * Tile::kM, first_column = column_block * Tile::kN;
  Accumulators<Tile> acc;
  multiply_tile<Tile, kAligned>(g, first_row, first_column, shared, acc);

  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const unsigned row = first_row + warp / Tile::kWarpsN * 16 * Tile::kRowTiles + lane / 4;
  const unsigned column =
      first_column + warp % Tile::kWarpsN * 8 * Tile::kColumnTiles + lane % 4 * Tile::kLaneColumns;
  if (Epilogue::kCombines && column >= g.columns) return;  // a whole warp, as N is a multiple of 32
  constexpr int V = kAligned ? kOwned : 1;
#pragma unroll
  for (int part = 0; part < Tile::kLaneColumns; part += V) {
    if (!Epilogue::kCombines && column + part >= g.columns) break;
    const auto shares = epilogue.template column<V>(column + part);
    typename Epilogue::template Before<V> before[Tile::kRowTiles][2];
    if constexpr (Epilogue::kAdds) {
#pragma unroll
      for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const unsigned r = row + 16 * i + 8 * half;
          if (r < g.rows) before[i][half] = epilogue.template load<V>(r, column + part);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const unsigned r = row + 16 * i + 8 * half;
        if (!Epilogue::kCombines && r >= g.rows) continue;
        float values[V];
#pragma unroll
        for (int v = 0; v < V; ++v) values[v] = __int2float_rn(acc[i][(part + v) / 2][2 * half + (part + v) % 2]);
        if constexpr (Epilogue::kCombines) {
          epilogue.combine(column + part, shares, values);
          if (r >= g.rows) continue;
        }
        if constexpr (Epilogue::kAdds) {
          epilogue.store(r, column + part, shares, values, before[i][half]);
        } else {
          epilogue.store(r, column + part, shares, values);
        }
      }
    }
  }
}

// 128 x 96: Swin's channels are multiples of 96 (T, S, L) or 128; 64 x 64 where that would leave a GPU idle.
using LargeTile = Tile<128, 96, 2, 3>;
using SmallTile = Tile<64, 64, 2, 2>;
inline constexpr std::int64_t kEnoughTiles = 256;  // about two for each multiprocessor of the largest GPUs

// Lets a block of `kernel` have `bytes` of dynamic shared memory, which may be more than it gets without asking.
template <class... Parameters>
void allow_shared(const char* op, void (*kernel)(Parameters...), std::size_t bytes) {
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw Error(detail::concat(op, ": no ", bytes, " bytes of shared memory for a block: ", cudaGetErrorString(status)));
}

template <class Tile, bool kAligned, class Epilogue>
void launch_tiles(const char* op, const GemmOperands& g, const Epilogue& epilogue, void* stream) {
  const auto kernel = tile_gemm_kernel<Tile, kAligned, Epilogue>;
  if (Tile::kSharedBytes > 48 << 10) allow_shared(op, kernel, Tile::kSharedBytes);
  const std::int64_t columns = ceil_div(g.columns, Tile::kN), blocks = ceil_div(g.rows, Tile::kM) * columns;
  SWIN_LAUNCH(op, kernel, count32(op, "tiles", blocks), Tile::kThreads, Tile::kSharedBytes, stream, g, FastDiv(columns),
              epilogue);
}

// Operands that take copies, columns in eights.
template <class Epilogue>
void launch_aligned_tiles(const char* op, const GemmOperands& g, const Epilogue& epilogue, void* stream) {
  if (ceil_div(g.rows, LargeTile::kM) * ceil_div(g.columns, LargeTile::kN) >= kEnoughTiles) {
    launch_tiles<LargeTile, true>(op, g, epilogue, stream);
  } else {
    launch_tiles<SmallTile, true>(op, g, epilogue, stream);
  }
}

// `vectors`: the epilogue takes columns in eights.
template <class Epilogue>
void launch_tile_gemm(const char* op, const GemmOperands& g, bool vectors, const Epilogue& epilogue, void* stream) {
  if (vectors && g.columns % kOwned == 0 && takes_copies(g)) {
    launch_aligned_tiles(op, g, epilogue, stream);
  } else {
    launch_tiles<SmallTile, false>(op, g, epilogue, stream);
  }
}

}  // namespace swin::cuda
