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

}  // namespace swin::cpu::SWIN_ISA
