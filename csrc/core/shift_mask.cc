#include "swin/shift_mask.h"

#include <algorithm>
#include <string_view>
#include <unordered_map>

namespace swin {
namespace {

// Which edge the i-th token of the last window along an axis is of: `shift` of them wrapped around.
bool wrapped(std::int64_t i, std::int64_t window, std::int64_t shift) { return i >= window - shift; }

void append_mask(const StageGeometry& g, bool last_row, bool last_column, std::vector<float>& masks) {
  const auto region = [&](std::int64_t token) {
    const bool below = last_row && wrapped(token / g.window_w, g.window_h, g.shift_h);
    const bool right = last_column && wrapped(token % g.window_w, g.window_w, g.shift_w);
    return 2 * below + right;
  };
  for (std::int64_t i = 0; i < g.window_area(); ++i) {
    for (std::int64_t j = 0; j < g.window_area(); ++j) masks.push_back(region(i) == region(j) ? 0.0f : kMasked);
  }
}

}  // namespace

std::vector<float> DistinctMasks::expanded() const {
  const std::int64_t size = area * area;
  std::vector<float> all(of_window.size() * size);
  for (std::size_t window = 0; window < of_window.size(); ++window) {
    if (of_window[window] >= 0) std::copy_n(masks.data() + of_window[window] * size, size, all.data() + window * size);
  }
  return all;
}

DistinctMasks shift_masks(const StageGeometry& g) {
  const WindowGeometry windows = g.of_block(1, 1);
  DistinctMasks distinct{{}, {}, g.window_area()};
  std::int32_t kinds[2][2] = {{-1, -1}, {-1, -1}};
  for (std::int64_t y = 0; y < windows.windows_y(); ++y) {
    for (std::int64_t x = 0; x < windows.windows_x(); ++x) {
      const bool last_row = g.shift_h > 0 && y + 1 == windows.windows_y();
      const bool last_column = g.shift_w > 0 && x + 1 == windows.windows_x();
      std::int32_t& kind = kinds[last_row][last_column];
      if (kind < 0 && (last_row || last_column)) {
        kind = static_cast<std::int32_t>(distinct.count());
        append_mask(g, last_row, last_column, distinct.masks);
      }
      distinct.of_window.push_back(kind);
    }
  }
  return distinct;
}

std::int64_t shift_mask_count(const StageGeometry& g) {
  const WindowGeometry windows = g.of_block(1, 1);
  // Of rows and of columns of windows: those that have an edge within, the last ones, and those that have none.
  const bool edge_y = g.shift_h > 0, plain_y = !edge_y || windows.windows_y() > 1;
  const bool edge_x = g.shift_w > 0, plain_x = !edge_x || windows.windows_x() > 1;
  return (edge_y + plain_y) * (edge_x + plain_x) - (plain_y && plain_x);
}

DistinctMasks distinct_masks(const TensorView& masks) {
  const std::int64_t area = masks.dim(1), size = area * area;
  DistinctMasks distinct{{}, {}, area};
  std::unordered_map<std::string_view, std::int32_t> known;  // by their bytes
  for (std::int64_t window = 0; window < masks.dim(0); ++window) {
    const float* mask = masks.as<const float>() + window * size;
    if (std::all_of(mask, mask + size, [](float x) { return x == 0; })) {
      distinct.of_window.push_back(-1);
      continue;
    }
    const std::string_view bytes(reinterpret_cast<const char*>(mask), size * sizeof(float));
    const auto [it, added] = known.try_emplace(bytes, static_cast<std::int32_t>(known.size()));
    if (added) distinct.masks.insert(distinct.masks.end(), mask, mask + size);
    distinct.of_window.push_back(it->second);
  }
  return distinct;
}

WindowMasks upload_masks(const DistinctMasks& distinct, const Backend& backend) {
  if (distinct.masks.empty()) return {};
  const auto data = [](const auto& values) { return const_cast<void*>(static_cast<const void*>(values.data())); };
  const std::int64_t windows = static_cast<std::int64_t>(distinct.of_window.size());
  return {backend.upload_parameter(
              TensorView(data(distinct.masks), DType::kF32, {distinct.count(), distinct.area, distinct.area})),
          backend.upload_int32(TensorView(data(distinct.of_window), DType::kS32, {windows}))};
}

}  // namespace swin
