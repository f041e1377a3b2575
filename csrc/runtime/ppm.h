// Photographs in files of binary PPM, which needs no decoder: https://netpbm.sourceforge.net/doc/ppm.html.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "npy.h"

namespace swin::runtime {

// u8 [height, width, channels].
struct Photograph {
  std::int64_t height = 0, width = 0, channels = 0;
  std::vector<std::uint8_t> pixels;
};

constexpr std::int64_t kMostSide = 65536;  // swin_prepare's

// One image after the other: a file may hold several. Errors are std::runtime_error and name the file.
class PpmReader {
 public:
  PpmReader(std::string path, File file) : path_(std::move(path)), file_(std::move(file)) {}

  // The next image; false behind the last.
  bool read(Photograph& image);

 private:
  int next();
  std::int64_t number(const char* what);
  [[noreturn]] void fail(const std::string& what) const;

  std::string path_;
  File file_;
  std::int64_t count_ = 0;  // of the images that were read
};

}  // namespace swin::runtime
