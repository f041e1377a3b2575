// Tests of resizing: what follows by hand, and that every instruction set gives the same. That it is Pillow's, the
// Python tests show (tests/python/test_prepare.py). Plain checks, no framework; every failure is printed and the
// program's status says whether there was one.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "checks.h"
#include "prepare.h"
#include "resize.h"
#include "swin/error.h"

namespace {

using swin::UnsupportedError;
using swin::ValueError;
using swin::runtime::Filter;
using swin::runtime::Pixels;
using swin::runtime::Placement;
using swin::runtime::Preparation;
using swin::runtime::Region;

using Bytes = std::vector<std::uint8_t>;

// One row of grey pixels.
Bytes resized(const Bytes& row, std::int64_t width, Filter filter) {
  const std::int64_t from = static_cast<std::int64_t>(row.size());
  Bytes out(width);
  swin::runtime::resize({row.data(), 1, from, 1, from}, 1, width, filter, {0, 0, 1, width}, out.data(), width, 1);
  return out;
}

void a_row_by_hand() {
  EXPECT((resized({10, 21}, 1, Filter::kBox) == Bytes{16}));       // 15.5, and a half goes up
  EXPECT((resized({10, 21}, 1, Filter::kBilinear) == Bytes{16}));  // both half a pixel away
  EXPECT((resized({7}, 3, Filter::kLanczos) == Bytes{7, 7, 7}));
  EXPECT((resized({0, 200}, 4, Filter::kBilinear) == Bytes{0, 50, 150, 200}));
  EXPECT((resized({0, 200}, 4, Filter::kNearest) == Bytes{0, 0, 200, 200}));
  EXPECT((resized({1, 2, 3, 4}, 2, Filter::kNearest) == Bytes{2, 4}));
  EXPECT((resized({0, 255, 0, 255}, 4, Filter::kBicubic) == Bytes{0, 255, 0, 255}));
  // Keys' cubic at 1/4 and 3/4 of a pixel: 0.8671875 and 0.2265625, and -0.0234375 and -0.0703125 at one more. Beyond
  // 255 and below 0 it ends.
  const Bytes edge = resized({0, 0, 0, 255, 255, 255}, 12, Filter::kBicubic);
  EXPECT((edge == Bytes{0, 0, 0, 0, 0, 52, 203, 255, 255, 255, 255, 255}));
}

// Where the row's end and the memory's are one, nothing behind it is read: the sanitizers see that.
struct Image {
  std::int64_t height, width, channels, stride;
  std::unique_ptr<std::uint8_t[]> memory;

  Image(std::int64_t height, std::int64_t width, std::int64_t channels, std::int64_t gap, std::mt19937& random)
      : height(height), width(width), channels(channels), stride(width * channels + gap) {
    const std::int64_t bytes = (height - 1) * stride + width * channels;
    memory.reset(new std::uint8_t[bytes]);
    std::generate_n(memory.get(), bytes,
                    [&] { return static_cast<std::uint8_t>(std::clamp<int>(random() % 512, 128, 383) - 128); });
  }
  Pixels view() const { return {memory.get(), height, width, channels, stride}; }
};

// Any part of the result is that part of the whole, on any number of threads, with any instructions; nothing else is
// written.
void parts_and_instructions_make_no_difference() {
  std::mt19937 random(1);
  const auto between = [&](std::int64_t least, std::int64_t most) {
    return least + static_cast<std::int64_t>(random() % (most - least + 1));
  };
  constexpr Filter kFilters[] = {Filter::kNearest, Filter::kBox,     Filter::kBilinear,
                                 Filter::kHamming, Filter::kBicubic, Filter::kLanczos};
  for (int turn = 0; turn < 600; ++turn) {
    const std::int64_t channels = turn % 3 == 0 ? 1 : 3;
    const Image image(between(1, 90), between(1, 90), channels, between(0, 2), random);
    const std::int64_t height = turn % 7 == 0 ? image.height : between(1, 60);
    const std::int64_t width = turn % 5 == 0 ? image.width : between(1, 60);
    const Filter filter = kFilters[turn % 6];
    const std::int64_t row = width * channels;
    Bytes whole(height * row, 1);
    swin::runtime::resize(image.view(), height, width, filter, {0, 0, height, width}, whole.data(), row, 1, true);
    Region part{between(0, height - 1), between(0, width - 1), 0, 0};
    part.height = between(1, height - part.top);
    part.width = between(1, width - part.left);
    const std::int64_t stride = part.width * channels + 5;
    Bytes out(part.height * stride, 77);
    swin::runtime::resize(image.view(), height, width, filter, part, out.data(), stride, 3);
    bool same = true;
    for (std::int64_t y = 0; y < part.height; ++y) {
      const std::uint8_t* found = out.data() + y * stride;
      same &=
          std::equal(found, found + part.width * channels, whole.data() + (part.top + y) * row + part.left * channels);
      same &= std::all_of(found + part.width * channels, found + stride, [](std::uint8_t byte) { return byte == 77; });
    }
    EXPECT(same);
  }
}

void expect_placed(const Preparation& how, std::int64_t from_height, std::int64_t from_width, const Placement& wanted,
                   int line) {
  const Placement p = swin::runtime::placement_of(how, from_height, from_width, 224, 224);
  if (p.height == wanted.height && p.width == wanted.width && p.top == wanted.top && p.left == wanted.left) return;
  std::printf("line %d: %d x %d at %d, %d\n", line, int(p.height), int(p.width), int(p.top), int(p.left));
  ++g_failures;
}

void photographs_are_placed() {
  const Preparation center{"bicubic", "", 0.9, ""}, squash{"bicubic", "squash", 0.9, ""},
      border{"bicubic", "border", 1, ""};
  expect_placed(center, 480, 640, {248, 330, 12, 53}, __LINE__);  // 330.67 and 53 of 106
  expect_placed(center, 640, 481, {329, 248, 52, 12}, __LINE__);  // 52.5, and a half goes to the even one
  expect_placed(center, 1, 65536, {248, 16252928, 12, 8126352}, __LINE__);
  expect_placed(squash, 480, 640, {248, 248, 12, 12}, __LINE__);
  expect_placed(border, 480, 640, {168, 224, -28, 0}, __LINE__);
  expect_placed({"bicubic", "", 1.1, ""}, 100, 100, {203, 203, -10, -10}, __LINE__);
  const auto place = [](const Preparation& how) { swin::runtime::placement_of(how, 10, 10, 224, 224); };
  expect_error<ValueError>("resized to 0x0", [&] { place({"bicubic", "", 225, ""}); }, __LINE__);
  expect_error<ValueError>("would be resized to", [&] { place({"bicubic", "", 1e-300, ""}); }, __LINE__);
  expect_error<ValueError>("'crop_pct'", [&] { place({"bicubic", "", 0, ""}); }, __LINE__);
  expect_error<UnsupportedError>("'left'", [&] { place({"bicubic", "left", 1, ""}); }, __LINE__);
}

}  // namespace

int main() {
  a_row_by_hand();
  parts_and_instructions_make_no_difference();
  photographs_are_placed();
  std::printf(g_failures ? "%d failed\n" : "all passed\n", g_failures);
  return g_failures ? 1 : 0;
}
