#include "prepare.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "swin/error.h"
#include "swin/json.h"

namespace swin::runtime {
namespace {

constexpr const char* kWhere = "swin_prepare";

// A whole number, or one in the middle of two: then the even one, as Python rounds.
std::int64_t rounded(double x) { return static_cast<std::int64_t>(std::nearbyint(x)); }

// Sides are bounded where this is known to be a size.
std::int64_t as_side(double x) { return static_cast<std::int64_t>(std::min(x, 1e15)); }

// timm's ResizeKeepRatio: the one side, or with `longest` the other, becomes what it should be.
void keep_ratio(double from_height, double from_width, double height, double width, bool longest, Placement& to) {
  const double of_height = from_height / height, of_width = from_width / width;
  const double ratio = longest ? std::max(of_height, of_width) : std::min(of_height, of_width);
  to.height = rounded(std::min(from_height / ratio, 1e15));
  to.width = rounded(std::min(from_width / ratio, 1e15));
}

// Where a crop begins, torchvision's CenterCrop.
std::int64_t offset(std::int64_t image, std::int64_t crop) {
  if (crop > image) return -((crop - image) / 2);
  return rounded(static_cast<double>(image - crop) / 2);
}

}  // namespace

Placement placement_of(const Preparation& how, std::int64_t from_height, std::int64_t from_width, std::int64_t height,
                       std::int64_t width) {
  SWIN_CHECK(ValueError, kWhere, how.crop_pct > 0,
             "the engine file does not say how large a share of an image is taken ('crop_pct'); resize it, and use "
             "swin_normalize");
  const std::string mode = how.crop_mode.empty() ? "center" : how.crop_mode;
  const bool border = mode == "border";
  SWIN_CHECK(UnsupportedError, kWhere, mode == "center" || mode == "squash" || border,
             "the engine file's crop_mode is ", in_quotes(mode), "; 'center', 'squash' or 'border' is needed");
  // The sizes that the crop would have before it is taken.
  const double full_height = std::floor(static_cast<double>(height) / how.crop_pct);
  const double full_width = std::floor(static_cast<double>(width) / how.crop_pct);
  Placement to{as_side(full_height), as_side(full_width), 0, 0};
  if (full_height >= 1 && full_width >= 1 && mode != "squash") {
    if (border || full_height != full_width) {
      keep_ratio(static_cast<double>(from_height), static_cast<double>(from_width), full_height, full_width, border,
                 to);
    } else {  // torchvision's Resize of the shorter side rounds down
      std::int64_t& longer = from_width <= from_height ? to.height : to.width;
      const auto [less, more] = std::minmax(from_height, from_width);
      longer = as_side(full_height * static_cast<double>(more) / static_cast<double>(less));
    }
  }
  const auto fits = [](std::int64_t side) { return side >= 1 && side <= kMostResizedSide; };
  SWIN_CHECK(ValueError, kWhere, fits(to.height) && fits(to.width), "an image of ", from_height, "x", from_width,
             " would be resized to ", to.height, "x", to.width, " (crop_mode '", mode, "', crop_pct ", how.crop_pct,
             "); sides of 1 to ", kMostResizedSide, " are needed");
  to.top = offset(to.height, height);
  to.left = offset(to.width, width);
  return to;
}

std::vector<std::uint8_t> prepare(const Preparation& how, const Pixels& image, const std::vector<double>& mean,
                                  std::int64_t height, std::int64_t width, int threads) {
  SWIN_CHECK(ValueError, kWhere, how.wrong.empty(), "the engine file does not say how images are resized: ", how.wrong);
  SWIN_CHECK(
      ValueError, kWhere, !how.interpolation.empty(),
      "the engine file does not say how images are resized ('interpolation'); resize them, and use swin_normalize");
  const std::optional<Filter> filter = filter_named(how.interpolation);
  SWIN_CHECK(UnsupportedError, kWhere, filter.has_value(), "the engine file's interpolation is ",
             in_quotes(how.interpolation),
             "; 'nearest', 'box', 'bilinear', 'hamming', 'bicubic' or 'lanczos' is needed");
  const Placement to = placement_of(how, image.height, image.width, height, width);
  std::vector<std::uint8_t> out(height * width * image.channels);
  const Region region{std::max<std::int64_t>(to.top, 0), std::max<std::int64_t>(to.left, 0),
                      std::min(to.height, height), std::min(to.width, width)};
  if (how.crop_mode == "border" && (region.height < height || region.width < width)) {
    std::uint8_t colour[3] = {};
    for (std::int64_t c = 0; c < image.channels; ++c) {
      const double value = std::nearbyint(255 * mean[c]);
      SWIN_CHECK(UnsupportedError, kWhere, value >= 0 && value <= 255, "the engine file's mean is ", mean[c],
                 ", which crop_mode 'border' fills with; a number from 0 to 1 is needed");
      colour[c] = static_cast<std::uint8_t>(value);
    }
    for (std::size_t i = 0; i < out.size(); ++i) out[i] = colour[i % image.channels];
  }
  const std::int64_t above = std::max<std::int64_t>(-to.top, 0), ahead = std::max<std::int64_t>(-to.left, 0);
  resize(image, to.height, to.width, *filter, region, out.data() + (above * width + ahead) * image.channels,
         width * image.channels, threads);
  return out;
}

}  // namespace swin::runtime
