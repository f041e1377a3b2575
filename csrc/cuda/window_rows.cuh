// Where the rows of window order lie in the image, and back: window partition and cyclic shift by index, nothing moved.
#pragma once

#include "device.cuh"

namespace swin::cuda {

// In the place of a row's number: there is none.
inline constexpr std::uint32_t kNoRow = 0xffffffffu;

class WindowRows {
 public:
  explicit WindowRows(const WindowGeometry& g)
      : window_w_(g.window_w),
        window_h_(g.window_h),
        windows_x_(g.windows_x()),
        windows_y_(g.windows_y()),
        rows_(g.height),
        columns_(g.width),
        height_(static_cast<std::uint32_t>(g.height)),
        width_(static_cast<std::uint32_t>(g.width)),
        cycle_h_(static_cast<std::uint32_t>(g.cycle_h())),
        cycle_w_(static_cast<std::uint32_t>(g.cycle_w())),
        shift_h_(static_cast<std::uint32_t>(g.shift_h)),
        shift_w_(static_cast<std::uint32_t>(g.shift_w)) {}

  // The image row (b*H + y)*W + x of window-order row `row`; kNoRow for a row of padding.
  __device__ __forceinline__ std::uint32_t image_row(std::uint32_t row) const {
    std::uint32_t j = row;
    std::uint32_t i = window_w_.split(j);
    std::uint32_t wx = window_h_.split(i);
    std::uint32_t wy = windows_x_.split(wx);
    const std::uint32_t b = windows_y_.split(wy);
    const std::uint32_t y = unshifted(wy * window_h_.divisor() + i, shift_h_, cycle_h_, height_);
    const std::uint32_t x = unshifted(wx * window_w_.divisor() + j, shift_w_, cycle_w_, width_);
    return y == kNoRow || x == kNoRow ? kNoRow : (b * height_ + y) * width_ + x;
  }

  // The other way round: the window-order row of image row `row`. Every image row has one.
  __device__ __forceinline__ std::uint32_t window_row(std::uint32_t row) const {
    std::uint32_t x = row;
    std::uint32_t y = columns_.split(x);
    const std::uint32_t b = rows_.split(y);
    y += y < shift_h_ ? cycle_h_ - shift_h_ : 0 - shift_h_;
    x += x < shift_w_ ? cycle_w_ - shift_w_ : 0 - shift_w_;
    const std::uint32_t wy = window_h_.split(y), wx = window_w_.split(x);
    const std::uint32_t window = (b * windows_y_.divisor() + wy) * windows_x_.divisor() + wx;
    return (window * window_h_.divisor() + y) * window_w_.divisor() + x;
  }

 private:
  // Coordinate `at` of the shifted image in the image itself; kNoRow where it is padding, beyond the cycle or, back in
  // its place, beyond the image.
  static __device__ __forceinline__ std::uint32_t unshifted(std::uint32_t at, std::uint32_t shift, std::uint32_t cycle,
                                                            std::uint32_t size) {
    const std::uint32_t back = at + shift;
    if (back < cycle) return back < size ? back : kNoRow;
    return at < cycle ? back - cycle : kNoRow;
  }

  FastDiv window_w_, window_h_, windows_x_, windows_y_, rows_, columns_;
  std::uint32_t height_, width_, cycle_h_, cycle_w_, shift_h_, shift_w_;
};

}  // namespace swin::cuda
