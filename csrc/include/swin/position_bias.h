// The relative position bias of a window's tokens without its repetitions.
//
// It depends on the offset of two tokens alone, so that row (y, x) of a head, one bias for each key (v, u), is a piece of one
// long row for each x: bias[head, y*w + x, v*w + u] = compact[head, x, h-1-y + v, u] in windows of h x w tokens, and the last
// two dimensions taken as one, the N = h*w columns of row (y, x) lie one after the other from (h-1-y)*w on. A window of 16 x 16
// has an eighth of the bytes, and neighbouring rows share most of them.
#pragma once

#include <cstdint>
#include <vector>

#include "swin/tensor.h"

namespace swin {

// Where the rows of a bias lie: [heads, N, N], or compact [heads, w, 2h-1, w].
struct BiasRows {
  std::int64_t heads = 0, tokens = 0, head_stride = 0;
  std::int64_t window_h = 0, window_w = 0;  // 0: not compact

  // ShapeError naming `op` where it has neither form.
  static BiasRows of(const char* op, const TensorView& bias);

  bool compact() const { return window_w != 0; }
  // Of a row, from its head on.
  std::int64_t start(std::int64_t row) const {
    if (!compact()) return row * tokens;
    return ((row % window_w) * (2 * window_h - 1) + window_h - 1 - row / window_w) * window_w;
  }
};

// float32 [heads, N, N] in its compact form, N = window_h * window_w; empty where it is no relative position bias, whose
// rows would be such pieces.
std::vector<float> compact_position_bias(const TensorView& bias, std::int64_t window_h, std::int64_t window_w);

}  // namespace swin
