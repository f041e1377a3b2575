// Where the rows of window order lie in the image, and the other way round: window partition and cyclic shift are only the
// index a row is read from. Rows are walked in order, so that each costs a few additions; a division for each would cost
// more than the row's LayerNorm.
#pragma once

#include "simd.h"

namespace swin::cpu::SWIN_ISA {

// Steps through window-order rows: row() is the image row (b*H + y)*W + x of the current one. Not for padded windows.
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

// One coordinate of image rows, and where shift and windows take it: `inside` the window that begins at `corner`.
class WindowAxis {
 public:
  WindowAxis(std::int64_t size, std::int64_t cycle, std::int64_t window, std::int64_t shift, std::int64_t at)
      : size_(size), cycle_(cycle), window_(window), shift_(shift) {
    place(at);
  }
  std::int64_t corner() const { return shifted_ - inside_; }
  std::int64_t inside() const { return inside_; }
  // To the next one; true where that is the first again.
  bool next() {
    if (++at_ == size_) {
      place(0);
      return true;
    }
    ++inside_;
    if (++shifted_ == cycle_) shifted_ = inside_ = 0;
    if (inside_ == window_) inside_ = 0;
    return false;
  }

 private:
  void place(std::int64_t at) {
    at_ = at;
    shifted_ = at >= shift_ ? at - shift_ : at - shift_ + cycle_;
    inside_ = shifted_ % window_;
  }

  const std::int64_t size_, cycle_, window_, shift_;
  std::int64_t at_, shifted_, inside_;
};

// Steps through image rows: row() is the window-order row of the current one.
class WindowRows {
 public:
  WindowRows(const WindowGeometry& g, std::int64_t image_row)
      : y_(g.height, g.cycle_h(), g.window_h, g.shift_h, image_row / g.width % g.height),
        x_(g.width, g.cycle_w(), g.window_w, g.shift_w, image_row % g.width),
        window_h_(g.window_h),
        window_w_(g.window_w),
        line_(g.windows_x() * g.window_w),
        rows_(g.windows_y() * g.window_h * line_),
        image_(image_row / (g.width * g.height) * rows_) {}
  std::int64_t row() const {
    // All rows of windows above, then windows to the left, then the window's own.
    return image_ + y_.corner() * line_ + x_.corner() * window_h_ + y_.inside() * window_w_ + x_.inside();
  }
  void next() {
    if (x_.next() && y_.next()) image_ += rows_;
  }

 private:
  WindowAxis y_, x_;
  const std::int64_t window_h_, window_w_, line_, rows_;  // of all windows: the tokens of a line; the rows of an image
  std::int64_t image_;
};

// Rows of padding of out s8 [P, c], in the window order of `g`, become 0. Where windows divide the image there are none.
static inline void zero_padding(const WindowGeometry& g, std::int64_t c, std::int8_t* out, const ExecContext& context) {
  if (!g.is_padded()) return;
  const std::int64_t lines = g.windows_y() * g.window_h, columns = g.windows_x() * g.window_w;
  const auto holds_token = [](std::int64_t shifted, std::int64_t size, std::int64_t cycle, std::int64_t shift) {
    return shifted < cycle && (shifted + shift) % cycle < size;
  };
  parallel_rows(context, g.batch * lines, 8, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t line = first; line < last; ++line) {
      const std::int64_t y = line % lines, inside = y % g.window_h, start = (line - inside) * columns;
      const bool tokens = holds_token(y, g.height, g.cycle_h(), g.shift_h);
      for (std::int64_t x = 0; x < columns; ++x) {
        if (tokens && holds_token(x, g.width, g.cycle_w(), g.shift_w)) continue;
        const std::int64_t j = x % g.window_w;
        std::memset(out + (start + (x - j) * g.window_h + inside * g.window_w + j) * c, 0, c);
      }
    }
  });
}

}  // namespace swin::cpu::SWIN_ISA
