#include "ppm.h"

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cstring>
#include <stdexcept>

namespace swin::runtime {
namespace {

constexpr std::int64_t kMaxval = 255;
constexpr std::size_t kPiece = std::size_t{1} << 22;  // no more memory is asked for than the file has, and this
constexpr const char* kNeeded =
    "; a binary PPM (P6) of 8 bits is needed: `convert -depth 8 IN OUT.ppm`, or djpeg of a JPEG";

}  // namespace

void PpmReader::fail(const std::string& what) const {
  throw std::runtime_error(path_ + ": " + (count_ > 0 ? "image " + std::to_string(count_) + ": " : "") + what);
}

int PpmReader::next() {
  const int c = std::fgetc(file_.get());
  if (c == EOF) fail(std::ferror(file_.get()) ? std::strerror(errno) : "the file is cut off");
  return c;
}

// Behind white space and comments; the one character after it is read too.
std::int64_t PpmReader::number(const char* what) {
  int c = next();
  for (bool comment = false; comment || std::isspace(c) || c == '#'; c = next()) {
    comment = c != '\n' && (comment || c == '#');
  }
  std::int64_t value = 0;
  if (!std::isdigit(c)) fail("no " + std::string(what) + " is in its header" + kNeeded);
  for (; std::isdigit(c); c = next()) value = std::min<std::int64_t>(10 * value + (c - '0'), 100'000'000);
  if (!std::isspace(c)) fail("something else follows the " + std::string(what) + " in its header" + kNeeded);
  return value;
}

bool PpmReader::read(Photograph& image) {
  int c = std::fgetc(file_.get());
  if (c == EOF && count_ > 0 && !std::ferror(file_.get())) return false;
  std::ungetc(c, file_.get());
  if (next() != 'P')
    fail(std::string(count_ > 0 ? "something follows the image before that is" : "is") + " no PPM" + kNeeded);
  const char kind = static_cast<char>(next());
  if (kind != '6') {
    const std::string name = kind == '2' || kind == '5'   ? " is grey"
                             : kind == '1' || kind == '4' ? " is black and white"
                             : kind == '3'                ? " is a PPM in text"
                                                          : " is another format";
    fail((std::isprint(static_cast<unsigned char>(kind)) ? std::string("P") + kind : std::string("it")) + name +
         kNeeded);
  }
  image.width = number("width");
  image.height = number("height");
  const std::int64_t maxval = number("maxval");
  if (std::min(image.width, image.height) < 1 || std::max(image.width, image.height) > kMostSide) {
    fail("is " + std::to_string(image.width) + " wide and " + std::to_string(image.height) + " high; sides of 1 to " +
         std::to_string(kMostSide) + " are needed");
  }
  if (maxval != kMaxval) {
    fail("has values up to " + std::to_string(maxval) + (maxval > kMaxval ? " in 16 bits" : "") + kNeeded);
  }
  image.channels = 3;
  const std::size_t bytes = static_cast<std::size_t>(image.width) * image.height * image.channels;
  image.pixels.clear();
  for (std::size_t done = 0; done < bytes;) {
    const std::size_t piece = std::min(kPiece, bytes - done);
    image.pixels.resize(done + piece);
    if (std::fread(image.pixels.data() + done, 1, piece, file_.get()) != piece) {
      fail("the file is cut off: it says it holds " + std::to_string(image.width) + "x" + std::to_string(image.height) +
           " pixels");
    }
    done += piece;
  }
  ++count_;
  return true;
}

}  // namespace swin::runtime
