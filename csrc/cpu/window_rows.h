// Where the rows of window order lie in the image, and the other way round: window partition and cyclic shift are only the
// index a row is read from. Rows are walked in order, so that each costs a few additions; a division for each would cost
// more than the row's LayerNorm.
#pragma once

#include "simd.h"

namespace swin::cpu::SWIN_ISA {

// Steps through window-order rows: row() is the image row (b*H + y)*W + x of the current one.
class ImageRows {
 public:
  ImageRows(const WindowGeometry& g, std::int64_t window_order_row) : g_(g) {
    std::int64_t row = window_order_row;
    j_ = row % g.window_w;
    row /= g.window_w;
    i_ = row % g.window_h;
    row /= g.window_h;
    left_ = row % (g.width / g.window_w) * g.window_w;
    row /= g.width / g.window_w;
    top_ = row % (g.height / g.window_h) * g.window_h;
    image_ = row / (g.height / g.window_h) * g.height;
  }
  std::int64_t row() const {
    std::int64_t y = top_ + i_ + g_.shift_h, x = left_ + j_ + g_.shift_w;
    if (y >= g_.height) y -= g_.height;
    if (x >= g_.width) x -= g_.width;
    return (image_ + y) * g_.width + x;
  }
  void next() {
    if (++j_ < g_.window_w) return;
    j_ = 0;
    if (++i_ < g_.window_h) return;
    i_ = 0;
    if ((left_ += g_.window_w) < g_.width) return;
    left_ = 0;
    if ((top_ += g_.window_h) < g_.height) return;
    top_ = 0;
    image_ += g_.height;
  }

 private:
  const WindowGeometry& g_;
  std::int64_t image_, top_, left_, i_, j_;  // the image's first line; the window's corner; the place in the window
};

// Steps through image rows: row() is the window-order row of the current one.
class WindowRows {
 public:
  WindowRows(const WindowGeometry& g, std::int64_t image_row) : g_(g) {
    x_ = image_row % g.width;
    y_ = image_row / g.width % g.height;
    image_ = image_row / (g.width * g.height) * g.width * g.height;
    place(y_, g.shift_h, g.height, g.window_h, top_, i_);
    place(x_, g.shift_w, g.width, g.window_w, left_, j_);
  }
  std::int64_t row() const {
    // All rows of windows above, then windows to the left, then the window's own.
    return image_ + top_ * g_.width + left_ * g_.window_h + i_ * g_.window_w + j_;
  }
  void next() {
    step(g_.width, g_.window_w, left_, j_);
    if (++x_ < g_.width) return;
    x_ = 0;
    step(g_.height, g_.window_h, top_, i_);
    if (++y_ < g_.height) return;
    y_ = 0;
    image_ += g_.width * g_.height;
  }

 private:
  // The corner of the window, and the place in it, of coordinate `at` after the shift.
  static void place(std::int64_t at, std::int64_t shift, std::int64_t size, std::int64_t window, std::int64_t& corner,
                    std::int64_t& inside) {
    const std::int64_t shifted = at >= shift ? at - shift : at - shift + size;
    inside = shifted % window;
    corner = shifted - inside;
  }
  static void step(std::int64_t size, std::int64_t window, std::int64_t& corner, std::int64_t& inside) {
    if (++inside < window) return;
    inside = 0;
    if ((corner += window) == size) corner = 0;
  }

  const WindowGeometry& g_;
  std::int64_t image_, top_, left_, i_, j_, x_, y_;
};

}  // namespace swin::cpu::SWIN_ISA
