// When the fused graph's operations keep whole rows in one block (row_tiles.cuh).
#pragma once

#include <cstdint>

namespace swin::cuda {

inline constexpr std::int64_t kRowBlock = 128;        // rows of a block
inline constexpr std::int64_t kEnoughRowBlocks = 96;  // fewer leave more of a GPU idle than a pass over memory costs
inline constexpr int kHiddenStep = 64;                // hidden channels of a step of the MLP

inline bool rows_in_blocks(std::int64_t rows, std::int64_t channels) {
  return rows > kRowBlock * (kEnoughRowBlocks - 1) && (channels == 96 || channels == 128 || channels == 192);
}
inline bool mlp_in_blocks(std::int64_t rows, std::int64_t channels, std::int64_t hidden) {
  return rows_in_blocks(rows, channels) && hidden % kHiddenStep == 0;
}

}  // namespace swin::cuda
