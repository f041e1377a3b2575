// 8-bit images to another size, byte for byte as Pillow's Image.resize does it: torchvision's and timm's transforms
// resize with it, and a model's accuracy holds for images that it made.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

namespace swin::runtime {

// Those of Pillow. But for the nearest neighbour, all become wider where an image gets smaller, which is the
// antialiasing.
enum class Filter { kNearest, kBox, kBilinear, kHamming, kBicubic, kLanczos };

// By timm's and torchvision's name, such as "bicubic"; nothing for another.
std::optional<Filter> filter_named(std::string_view name);

// u8 [height, width, channels], of 1 or 3 channels, `stride` bytes from row to row.
struct Pixels {
  const std::uint8_t* data;
  std::int64_t height, width, channels, stride;
};

// A rectangle within an image.
struct Region {
  std::int64_t top, left, height, width;
};

constexpr std::int64_t kMostResizedSide = std::int64_t{1} << 28;

// Of `image`, resized to height x width (each 1 to kMostResizedSide), the region: u8 [region.height, region.width,
// channels] to `out`, `out_stride` bytes from row to row. Only what the region needs is computed, on up to `threads`
// threads. `plain`: with no other instructions than every processor has; the result is the same. std::bad_alloc without
// memory.
void resize(const Pixels& image, std::int64_t height, std::int64_t width, Filter filter, const Region& region,
            std::uint8_t* out, std::int64_t out_stride, int threads, bool plain = false);

}  // namespace swin::runtime
