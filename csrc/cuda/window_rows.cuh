// Where the rows of window order lie in the image, and back: window partition and cyclic shift by index, nothing moved.
#pragma once

#include "device.cuh"

namespace swin::cuda {

class WindowRows {
 public:
  explicit WindowRows(const WindowGeometry& g)
      : window_w_(g.window_w),
        window_h_(g.window_h),
        windows_x_(g.width / g.window_w),
        windows_y_(g.height / g.window_h),
        rows_(g.height),
        columns_(g.width),
        height_(static_cast<std::uint32_t>(g.height)),
        width_(static_cast<std::uint32_t>(g.width)),
        shift_h_(static_cast<std::uint32_t>(g.shift_h)),
        shift_w_(static_cast<std::uint32_t>(g.shift_w)) {}

  // The image row (b*H + y)*W + x of window-order row `row`.
  __device__ __forceinline__ std::uint32_t image_row(std::uint32_t row) const {
    std::uint32_t j = row;
    std::uint32_t i = window_w_.split(j);
    std::uint32_t wx = window_h_.split(i);
    std::uint32_t wy = windows_x_.split(wx);
    const std::uint32_t b = windows_y_.split(wy);
    std::uint32_t y = wy * window_h_.divisor() + i + shift_h_;
    std::uint32_t x = wx * window_w_.divisor() + j + shift_w_;
    if (y >= height_) y -= height_;
    if (x >= width_) x -= width_;
    return (b * height_ + y) * width_ + x;
  }

  // The other way round: the window-order row of image row `row`.
  __device__ __forceinline__ std::uint32_t window_row(std::uint32_t row) const {
    std::uint32_t x = row;
    std::uint32_t y = columns_.split(x);
    const std::uint32_t b = rows_.split(y);
    y += y < shift_h_ ? height_ - shift_h_ : 0 - shift_h_;
    x += x < shift_w_ ? width_ - shift_w_ : 0 - shift_w_;
    const std::uint32_t wy = window_h_.split(y), wx = window_w_.split(x);
    const std::uint32_t window = (b * windows_y_.divisor() + wy) * windows_x_.divisor() + wx;
    return (window * window_h_.divisor() + y) * window_w_.divisor() + x;
  }

 private:
  FastDiv window_w_, window_h_, windows_x_, windows_y_, rows_, columns_;
  std::uint32_t height_, width_, shift_h_, shift_w_;
};

}  // namespace swin::cuda
