// What each stage of a model computes on.
#pragma once

#include <cstdint>
#include <vector>

#include "swin/graph.h"
#include "swin/ops.h"

namespace swin {

// `window` and `shift` are after the rule that a window is at most the resolution and that a window as large as the
// resolution does not shift. Where windows do not divide the resolution, the last ones are padded (swin/ops.h).
struct StageGeometry {
  std::int64_t dim, heads, height, width, window_h, window_w, shift_h, shift_w, hidden;
  bool has_downsample, shifts, pad_first;
  std::int64_t window_area() const { return window_h * window_w; }
  std::int64_t tokens() const { return height * width; }
  std::int64_t merged_tokens() const { return ((height + 1) / 2) * ((width + 1) / 2); }
  std::int64_t windows() const { return of_block(1, 0).windows_per_image(); }
  // Rows of an image in window order: its tokens and the padding.
  std::int64_t window_rows() const { return windows() * window_area(); }
  // The windows of one of the stage's blocks; those of odd number shift.
  WindowGeometry of_block(std::int64_t batch, std::int64_t block) const {
    const bool shifted = block % 2 == 1;
    return {batch, height, width, window_h, window_w, shifted ? shift_h : 0, shifted ? shift_w : 0, pad_first};
  }
};

// ShapeError naming the stage where the configuration is not one a Swin can have.
std::vector<StageGeometry> stage_geometries(const ModelConfig& config);

// The same of images of another size, on the weights of `config`: what its position biases were made for, the windows, must
// be as large. ShapeError naming the stage where they are not.
std::vector<StageGeometry> stage_geometries(const ModelConfig& config, std::int64_t height, std::int64_t width);

// Largest side of an image, which keeps every size that follows from it within 64 bits.
inline constexpr std::int64_t kMaxImageSide = 1 << 16;

}  // namespace swin
