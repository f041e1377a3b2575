// Masks of shifted windows. After the cyclic shift the last window of a row or column holds tokens of opposite edges of the
// image, and only those of the same edge attend to each other (Liu et al. 2021, section 3.2). All other windows have none, so
// that of the many windows of a large image at most three kinds have a mask.
#pragma once

#include <cstdint>
#include <vector>

#include "swin/backend.h"
#include "swin/geometry.h"

namespace swin {

inline constexpr float kMasked = -100.0f;  // what logits of pairs from different edges add; exact in float16

// The masks that differ, f32 [count, N, N], and for each window of an image which it has; -1: none, as if of zeros.
struct DistinctMasks {
  std::vector<float> masks;
  std::vector<std::int32_t> of_window;
  std::int64_t area = 0;

  std::int64_t count() const { return static_cast<std::int64_t>(masks.size()) / (area * area); }
  // f32 [windows, N, N]
  std::vector<float> expanded() const;
};

// Of the shifted blocks of a stage. Padding counts as tokens of the image's.
DistinctMasks shift_masks(const StageGeometry& stage);
// How many of them there are, without making any.
std::int64_t shift_mask_count(const StageGeometry& stage);
// Of any masks, f32 [windows, N, N].
DistinctMasks distinct_masks(const TensorView& masks);

// Distinct masks in a backend's memory, as window_attention takes them; both without data where no window has one.
struct WindowMasks {
  Parameter masks, of_window;
};
WindowMasks upload_masks(const DistinctMasks& distinct, const Backend& backend);

}  // namespace swin
