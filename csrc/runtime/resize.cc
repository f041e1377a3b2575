// Resampling is separable: every row by itself to the new width, and every column to the new height, rounded to 8 bits
// in between. A new pixel is the sum of a run of old ones times weights, which are the filter's values at their
// distances, divided by their sum, in 22-bit fixed point. All of that, the order and the rounding included, is Pillow's
// (docs/runtime.md).
#include "resize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numbers>
#include <utility>
#include <vector>

#include "thread_pool.h"

namespace swin::runtime {
namespace {

// Of a weight: 32 less 8 of a pixel, and two for weights that together are more than 1.
constexpr int kFractionBits = 22;
constexpr std::uint32_t kHalf = 1u << (kFractionBits - 1);
constexpr std::int64_t kLanes = 8;   // numbers that the loops below are unrolled by
constexpr std::int64_t kBlock = 32;  // bytes of a row that are summed at a time
constexpr std::int64_t kTaskRows = 8;

double sinc(double x) {
  if (x == 0) return 1;
  x *= std::numbers::pi;
  return std::sin(x) / x;
}

// How far from a new pixel's centre the filter reaches, in new pixels where the image gets smaller, else in old ones.
double reach_of(Filter filter) {
  switch (filter) {
    case Filter::kBox:
      return 0.5;
    case Filter::kBicubic:
      return 2;
    case Filter::kLanczos:
      return 3;
    default:
      return 1;
  }
}

double value_at(Filter filter, double x) {
  if (filter == Filter::kBox) return x > -0.5 && x <= 0.5 ? 1 : 0;
  if (filter == Filter::kLanczos) return x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0;
  x = std::abs(x);
  if (filter == Filter::kBicubic) {  // Keys' cubic convolution, 1981
    constexpr double a = -0.5;
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
  }
  if (x >= 1) return 0;
  if (filter == Filter::kHamming) {
    // The constants are of float32 in Pillow, which reaches some bytes of a photograph.
    return sinc(x) * (double{0.54f} + double{0.46f} * std::cos(x * std::numbers::pi));
  }
  return 1 - x;
}

// What the new pixels begin .. begin + count - 1 along one side are sums of.
struct Sums {
  struct Run {
    std::int64_t first, length;  // of the old pixels
  };
  std::vector<Run> runs;
  std::int64_t pitch = 0;  // places of a run's weights
  std::vector<std::int32_t> weights;

  const std::int32_t* of(std::int64_t i) const { return weights.data() + i * pitch; }
  std::int64_t begin() const {
    return std::min_element(runs.begin(), runs.end(), [](auto& a, auto& b) { return a.first < b.first; })->first;
  }
  std::int64_t end() const {
    std::int64_t last = 0;
    for (const Run& run : runs) last = std::max(last, run.first + run.length);
    return last;
  }
};

Sums sums_of(Filter filter, std::int64_t from, std::int64_t to, std::int64_t begin, std::int64_t count) {
  const double scale = static_cast<double>(from) / static_cast<double>(to);
  const double spread = std::max(scale, 1.0), reach = reach_of(filter) * spread, per_old = 1.0 / spread;
  Sums sums;
  sums.pitch = std::min(static_cast<std::int64_t>(std::ceil(reach)) * 2 + 1, from);
  sums.runs.resize(count);
  sums.weights.resize(count * sums.pitch);
  std::vector<double> values(sums.pitch);
  for (std::int64_t i = 0; i < count; ++i) {
    const double centre = (static_cast<double>(begin + i) + 0.5) * scale;
    const std::int64_t first = std::max<std::int64_t>(0, static_cast<std::int64_t>(centre - reach + 0.5));
    const std::int64_t last = std::min(from, static_cast<std::int64_t>(centre + reach + 0.5));
    const std::int64_t length = last - first;
    double sum = 0;
    for (std::int64_t k = 0; k < length; ++k) {
      values[k] = value_at(filter, (static_cast<double>(k + first) - centre + 0.5) * per_old);
      sum += values[k];
    }
    for (std::int64_t k = 0; k < length; ++k) {
      const double weight = (sum == 0 ? values[k] : values[k] / sum) * (1 << kFractionBits);
      sums.weights[i * sums.pitch + k] = static_cast<std::int32_t>(weight < 0 ? weight - 0.5 : weight + 0.5);
    }
    sums.runs[i] = {first, length};
  }
  return sums;
}

std::uint8_t in_8_bits(std::uint32_t sum) {
  return static_cast<std::uint8_t>(std::clamp(static_cast<std::int32_t>(sum) >> kFractionBits, 0, 255));
}

std::int64_t rounded_up(std::int64_t n, std::int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// The sums of one row, with a weight for each of its bytes and zeros behind them, so that whole lanes can be taken.
struct RowSums {
  std::int64_t begin = 0, bytes = 0;  // the part of an old row that is read, from a pixel on
  Sums sums;                          // in bytes of that part
};

RowSums row_sums(Sums pixels, std::int64_t channels) {
  RowSums row{pixels.begin(), 0, {}};
  row.bytes = (pixels.end() - row.begin) * channels;
  const std::int64_t step = channels * kLanes;
  row.sums.pitch = rounded_up(pixels.pitch * channels, step);
  row.sums.runs = std::move(pixels.runs);
  row.sums.weights.resize(row.sums.runs.size() * row.sums.pitch);
  for (std::size_t i = 0; i < row.sums.runs.size(); ++i) {
    Sums::Run& run = row.sums.runs[i];
    std::int32_t* weights = row.sums.weights.data() + i * row.sums.pitch;
    for (std::int64_t k = 0; k < run.length * channels; ++k) weights[k] = pixels.of(i)[k / channels];
    run = {(run.first - row.begin) * channels, rounded_up(run.length * channels, step)};
  }
  return row;
}

// The two loops that take the time: plain ones, which compilers make vectors of, for the instructions of whoever has
// them inlined. 32 bits hold every sum; unsigned, so that no order of adding up could overflow.
template <std::int64_t kChannels>
inline __attribute__((always_inline)) void sum_pixels(const RowSums& row, const std::uint8_t* old, std::uint8_t* out) {
  constexpr std::int64_t kStep = kChannels * kLanes;
  const std::int64_t count = static_cast<std::int64_t>(row.sums.runs.size());
  for (std::int64_t i = 0; i < count; ++i) {
    const Sums::Run run = row.sums.runs[i];
    const std::uint8_t* bytes = old + run.first;
    const std::int32_t* weights = row.sums.of(i);
    std::uint32_t lanes[kStep] = {};
    for (std::int64_t k = 0; k < run.length; k += kStep) {
      for (std::int64_t lane = 0; lane < kStep; ++lane) {
        lanes[lane] += bytes[k + lane] * static_cast<std::uint32_t>(weights[k + lane]);
      }
    }
    for (std::int64_t c = 0; c < kChannels; ++c) {
      std::uint32_t sum = kHalf;
      for (std::int64_t lane = c; lane < kStep; lane += kChannels) sum += lanes[lane];
      out[i * kChannels + c] = in_8_bits(sum);
    }
  }
}

// Of `bytes` bytes of the rows of one run, from `rows` on.
inline __attribute__((always_inline)) void sum_rows(const std::uint8_t* rows, std::int64_t stride,
                                                    const std::int32_t* weights, std::int64_t length,
                                                    std::int64_t bytes, std::uint8_t* out) {
  for (std::int64_t at = 0; bytes < kBlock && at < bytes; ++at) {
    std::uint32_t sum = kHalf;
    for (std::int64_t k = 0; k < length; ++k) sum += rows[k * stride + at] * static_cast<std::uint32_t>(weights[k]);
    out[at] = in_8_bits(sum);
  }
  for (std::int64_t block = 0; bytes >= kBlock && block < bytes; block += kBlock) {
    const std::int64_t at = std::min(block, bytes - kBlock);  // the last one over what the one before has done
    std::uint32_t lanes[kBlock];
    for (std::int64_t lane = 0; lane < kBlock; ++lane) lanes[lane] = kHalf;
    for (std::int64_t k = 0; k < length; ++k) {
      const std::uint8_t* row = rows + k * stride + at;
      const std::uint32_t weight = static_cast<std::uint32_t>(weights[k]);
      for (std::int64_t lane = 0; lane < kBlock; ++lane) lanes[lane] += row[lane] * weight;
    }
    for (std::int64_t lane = 0; lane < kBlock; ++lane) out[at + lane] = in_8_bits(lanes[lane]);
  }
}

using SumPixels = void (*)(const RowSums&, const std::uint8_t*, std::uint8_t*);
using SumRows = void (*)(const std::uint8_t*, std::int64_t, const std::int32_t*, std::int64_t, std::int64_t,
                         std::uint8_t*);

void grey_pixels(const RowSums& r, const std::uint8_t* old, std::uint8_t* out) { sum_pixels<1>(r, old, out); }
void colour_pixels(const RowSums& r, const std::uint8_t* old, std::uint8_t* out) { sum_pixels<3>(r, old, out); }
void whole_rows(const std::uint8_t* rows, std::int64_t stride, const std::int32_t* weights, std::int64_t length,
                std::int64_t bytes, std::uint8_t* out) {
  sum_rows(rows, stride, weights, length, bytes, out);
}

#if defined(__x86_64__)  // whose first processors multiply no four numbers of 32 bits at a time
#define SWIN_AVX2 __attribute__((target("avx2")))
SWIN_AVX2 void grey_pixels_avx2(const RowSums& r, const std::uint8_t* old, std::uint8_t* out) {
  sum_pixels<1>(r, old, out);
}
SWIN_AVX2 void colour_pixels_avx2(const RowSums& r, const std::uint8_t* old, std::uint8_t* out) {
  sum_pixels<3>(r, old, out);
}
SWIN_AVX2 void whole_rows_avx2(const std::uint8_t* rows, std::int64_t stride, const std::int32_t* weights,
                               std::int64_t length, std::int64_t bytes, std::uint8_t* out) {
  sum_rows(rows, stride, weights, length, bytes, out);
}
bool has_avx2() { return __builtin_cpu_supports("avx2"); }
#else
constexpr auto grey_pixels_avx2 = grey_pixels, colour_pixels_avx2 = colour_pixels;
constexpr auto whole_rows_avx2 = whole_rows;
bool has_avx2() { return false; }
#endif

// f(first row, behind the last one) of all rows, a few a task.
template <class F>
void for_rows(int threads, std::int64_t rows, F f) {
  struct Job {
    F& f;
    std::int64_t rows;
  } job{f, rows};
  cpu::run_tasks(
      threads, (rows + kTaskRows - 1) / kTaskRows,
      [](void* closure, std::int64_t task) {
        const Job& j = *static_cast<const Job*>(closure);
        j.f(task * kTaskRows, std::min((task + 1) * kTaskRows, j.rows));
      },
      &job);
}

// Which old pixel each new one of the region is. Pillow adds the scale up, and so its rounding errors.
std::vector<std::int64_t> nearest(std::int64_t from, std::int64_t to, std::int64_t begin, std::int64_t count) {
  const double scale = static_cast<double>(from) / static_cast<double>(to);
  std::vector<std::int64_t> found(count);
  double at = scale * 0.5;
  for (std::int64_t i = 0; i < begin; ++i) at += scale;
  for (std::int64_t& pixel : found) {
    pixel = std::min(static_cast<std::int64_t>(at), from - 1);
    at += scale;
  }
  return found;
}

void resize_to_nearest(const Pixels& image, std::int64_t height, std::int64_t width, const Region& region,
                       std::uint8_t* out, std::int64_t out_stride, int threads) {
  const std::vector<std::int64_t> rows = nearest(image.height, height, region.top, region.height);
  const std::vector<std::int64_t> columns = nearest(image.width, width, region.left, region.width);
  for_rows(threads, region.height, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t y = first; y < last; ++y) {
      const std::uint8_t* row = image.data + rows[y] * image.stride;
      std::uint8_t* to = out + y * out_stride;
      for (std::int64_t x = 0; x < region.width; ++x, to += image.channels) {
        std::memcpy(to, row + columns[x] * image.channels, image.channels);
      }
    }
  });
}

}  // namespace

std::optional<Filter> filter_named(std::string_view name) {
  constexpr std::pair<std::string_view, Filter> kNames[] = {
      {"nearest", Filter::kNearest}, {"box", Filter::kBox},         {"bilinear", Filter::kBilinear},
      {"hamming", Filter::kHamming}, {"bicubic", Filter::kBicubic}, {"lanczos", Filter::kLanczos}};
  for (const auto& [known, filter] : kNames) {
    if (name == known) return filter;
  }
  return {};
}

void resize(const Pixels& image, std::int64_t height, std::int64_t width, Filter filter, const Region& region,
            std::uint8_t* out, std::int64_t out_stride, int threads, bool plain) {
  const bool wide = !plain && has_avx2(), same_width = image.width == width, same_height = image.height == height;
  const std::int64_t bytes = region.width * image.channels;
  if (filter == Filter::kNearest && !(same_width && same_height)) {
    resize_to_nearest(image, height, width, region, out, out_stride, threads);
    return;
  }
  Sums columns;
  RowSums row;
  if (!same_height) columns = sums_of(filter, image.height, height, region.top, region.height);
  if (!same_width) row = row_sums(sums_of(filter, image.width, width, region.left, region.width), image.channels);
  const bool grey = image.channels == 1;
  const SumPixels sum_row = wide ? (grey ? grey_pixels_avx2 : colour_pixels_avx2) : grey ? grey_pixels : colour_pixels;
  const SumRows sum_columns = wide ? whole_rows_avx2 : whole_rows;
  const std::int64_t room = row.bytes + image.channels * kLanes;  // of an old row, and zeros behind it for whole lanes
  const auto scratch = [&] {
    std::uint8_t* memory = static_cast<std::uint8_t*>(cpu::thread_scratch(room));
    std::memset(memory + row.bytes, 0, room - row.bytes);
    return memory;
  };
  // As Pillow does since 13.0. Before that it began with the rows of every image.
  const bool columns_first = height < image.height && image.height - height > 2 * (image.width - width);
  if (same_width || same_height || columns_first) {
    const std::int64_t left = (same_width ? region.left : row.begin) * image.channels;
    const std::int64_t needed = same_width ? bytes : row.bytes;
    for_rows(threads, region.height, [&](std::int64_t first, std::int64_t last) {
      std::uint8_t* old = same_width ? nullptr : scratch();
      for (std::int64_t y = first; y < last; ++y) {
        std::uint8_t* to = same_width ? out + y * out_stride : old;
        if (same_height) {
          std::memcpy(to, image.data + (region.top + y) * image.stride + left, needed);
        } else {
          const Sums::Run run = columns.runs[y];
          sum_columns(image.data + run.first * image.stride + left, image.stride, columns.of(y), run.length, needed,
                      to);
        }
        if (!same_width) sum_row(row, old, out + y * out_stride);
      }
    });
    return;
  }
  const std::int64_t first_row = columns.begin(), rows = columns.end() - first_row;
  std::vector<std::uint8_t> narrowed(rows * bytes);
  for_rows(threads, rows, [&](std::int64_t first, std::int64_t last) {
    std::uint8_t* old = scratch();
    for (std::int64_t y = first; y < last; ++y) {
      std::memcpy(old, image.data + (first_row + y) * image.stride + row.begin * image.channels, row.bytes);
      sum_row(row, old, narrowed.data() + y * bytes);
    }
  });
  for_rows(threads, region.height, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t y = first; y < last; ++y) {
      const Sums::Run run = columns.runs[y];
      sum_columns(narrowed.data() + (run.first - first_row) * bytes, bytes, columns.of(y), run.length, bytes,
                  out + y * out_stride);
    }
  });
}

}  // namespace swin::runtime
