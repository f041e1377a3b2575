// Where the rows of window order lie in the image.
#pragma once

#include "simd.h"

namespace swin::cpu::SWIN_ISA {

// The image row (b*H + y)*W + x of window-order row `row`: window partition and cyclic shift, undone by index.
static inline std::int64_t image_row(const WindowGeometry& g, std::int64_t row) {
  const std::int64_t j = row % g.window_w;
  row /= g.window_w;
  const std::int64_t i = row % g.window_h;
  row /= g.window_h;
  const std::int64_t ww = row % (g.width / g.window_w);
  row /= g.width / g.window_w;
  const std::int64_t wh = row % (g.height / g.window_h);
  const std::int64_t b = row / (g.height / g.window_h);
  const std::int64_t y = (wh * g.window_h + i + g.shift_h) % g.height;
  const std::int64_t x = (ww * g.window_w + j + g.shift_w) % g.width;
  return (b * g.height + y) * g.width + x;
}

// Its inverse: the window-order row of image row `row`.
static inline std::int64_t window_row(const WindowGeometry& g, std::int64_t row) {
  const std::int64_t x = (row % g.width + g.width - g.shift_w) % g.width;
  row /= g.width;
  const std::int64_t y = (row % g.height + g.height - g.shift_h) % g.height;
  const std::int64_t b = row / g.height;
  const std::int64_t window = (b * (g.height / g.window_h) + y / g.window_h) * (g.width / g.window_w) + x / g.window_w;
  return window * g.window_area() + y % g.window_h * g.window_w + x % g.window_w;
}

}  // namespace swin::cpu::SWIN_ISA
