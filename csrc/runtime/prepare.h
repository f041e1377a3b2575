// Photographs to what a model takes: resized and cropped as timm's evaluation transform does it, through torchvision,
// with an image of Pillow's.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "resize.h"

namespace swin::runtime {

// What an engine file's `input` says of it, in timm's words.
struct Preparation {
  std::string interpolation, crop_mode;  // "bicubic", "center"; empty where the file does not say
  double crop_pct = 0;                   // what share of the resized image the crop is; 0 where the file does not say
  std::string wrong;                     // in words: which of them is no such thing at all
};

// Where an image goes: what it is resized to, and where the crop begins in that. Negative: so much is filled ahead of
// it.
struct Placement {
  std::int64_t height, width, top, left;
};

// Of an image of from_height x from_width in one of height x width. ValueError where `how` does not say it, or a side
// would be of no pixels or too many; UnsupportedError for a crop mode that is none of timm's.
Placement placement_of(const Preparation& how, std::int64_t from_height, std::int64_t from_width, std::int64_t height,
                       std::int64_t width);

// The image as the model takes it, up to the normalization: u8 [height, width, channels], of 1 or 3 channels. `mean`,
// one per channel, is the colour that crop mode "border" fills with; the others fill with black. Errors as
// placement_of's, and UnsupportedError for an interpolation that is none of timm's; std::bad_alloc without memory.
std::vector<std::uint8_t> prepare(const Preparation& how, const Pixels& image, const std::vector<double>& mean,
                                  std::int64_t height, std::int64_t width, int threads);

}  // namespace swin::runtime
