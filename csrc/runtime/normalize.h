// Pixels to what a model takes, as torchvision's ToTensor and Normalize do it.
#pragma once

#include <cstdint>

namespace swin::runtime {

// u8 pixels [batch, height, width, channels] -> f32 images [batch, channels, height, width], on up to `threads`
// threads: (pixel / 255 - mean[c]) / std[c], each step rounded to float32.
void normalize(const std::uint8_t* pixels, std::int64_t batch, std::int64_t height, std::int64_t width,
               std::int64_t channels, const float* mean, const float* std, float* images, int threads);

}  // namespace swin::runtime
