// What each stage of a model computes on.
#pragma once

#include <cstdint>
#include <vector>

#include "swin/graph.h"

namespace swin {

// `window` and `shift` are after the rule that a window is at most the resolution and that a window as large as the
// resolution does not shift.
struct StageGeometry {
  std::int64_t dim, heads, height, width, window_h, window_w, shift_h, shift_w, hidden;
  bool has_downsample, shifts;
  std::int64_t window_area() const { return window_h * window_w; }
  std::int64_t windows() const { return (height / window_h) * (width / window_w); }
};

// ShapeError naming the stage where the configuration is not one a Swin can have.
std::vector<StageGeometry> stage_geometries(const ModelConfig& config);

}  // namespace swin
