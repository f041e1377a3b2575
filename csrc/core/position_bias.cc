#include "swin/position_bias.h"

#include <cstring>

#include "swin/error.h"

namespace swin {

BiasRows BiasRows::of(const char* op, const TensorView& bias) {
  BiasRows rows;
  rows.heads = bias.dim(0);
  rows.head_stride = rows.heads > 0 ? bias.numel() / rows.heads : 0;
  if (bias.rank == 4) {
    rows.window_h = (bias.dim(2) + 1) / 2;
    rows.window_w = bias.dim(1);
    rows.tokens = rows.window_h * rows.window_w;
  } else {
    rows.tokens = bias.dim(1);
  }
  const bool expanded = bias.rank == 3 && bias.dim(2) == rows.tokens;
  const bool compact = bias.rank == 4 && bias.dim(2) % 2 == 1 && bias.dim(3) == rows.window_w;
  SWIN_CHECK(ShapeError, op, rows.heads > 0 && rows.tokens > 0 && (expanded || compact), "bias is ", bias.describe(),
             "; [heads, N, N] or [heads, w, 2h-1, w] is needed for windows of N = h*w tokens");
  return rows;
}

std::vector<float> compact_position_bias(const TensorView& bias, std::int64_t window_h, std::int64_t window_w) {
  const std::int64_t heads = bias.dim(0), n = window_h * window_w;
  const TensorView form(nullptr, DType::kF32, {heads, window_w, 2 * window_h - 1, window_w});
  const BiasRows rows = BiasRows::of("position bias", form);
  std::vector<float> compact(form.numel());
  const std::size_t bytes = n * sizeof(float);
  for (std::int64_t head = 0; head < heads; ++head) {
    float* const pieces = compact.data() + head * rows.head_stride;
    const float* const row = bias.as<const float>() + head * n * n;
    for (std::int64_t i = 0; i < n; ++i) std::memcpy(pieces + rows.start(i), row + i * n, bytes);
    for (std::int64_t i = 0; i < n; ++i) {
      if (std::memcmp(pieces + rows.start(i), row + i * n, bytes) != 0) return {};
    }
  }
  return compact;
}

}  // namespace swin
