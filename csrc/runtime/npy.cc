#include "npy.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace swin::runtime {
namespace {

constexpr char kMagic[] = "\x93NUMPY";
constexpr std::size_t kMagicBytes = 6, kAlignment = 64, kMostHeader = 1 << 16;

[[noreturn]] void fail(const std::string& path, const std::string& what) {
  throw std::runtime_error(path + ": " + what);
}

// The text between `key` and what ends its value, of a header such as {'descr': '<f4', 'fortran_order': False, ...}.
std::string value_of(const std::string& header, const std::string& key, char open, char close) {
  std::size_t at = header.find("'" + key + "':");
  if (at == std::string::npos) return "";
  at = header.find(open, at + key.size() + 3);
  const std::size_t end = at == std::string::npos ? at : header.find(close, at + 1);
  return end == std::string::npos ? "" : header.substr(at + 1, end - at - 1);
}

}  // namespace

File open_file(const std::string& path) {
  File file(std::fopen(path.c_str(), "rb"));
  if (!file) fail(path, std::strerror(errno));
  return file;
}

NpyReader::NpyReader(std::string path, File file) : path_(std::move(path)), file_(std::move(file)) {
  unsigned char start[kMagicBytes + 2], length[4] = {};
  if (std::fread(start, 1, sizeof start, file_.get()) != sizeof start || std::memcmp(start, kMagic, kMagicBytes) != 0) {
    fail(path_, "no .npy file, and no binary PPM; numpy.save writes the one, djpeg the other");
  }
  const std::size_t length_bytes = start[kMagicBytes] == 1 ? 2 : 4;  // by the format's version
  if (std::fread(length, 1, length_bytes, file_.get()) != length_bytes) fail(path_, "the file is cut off");
  const std::size_t bytes = length[0] | length[1] << 8 | length[2] << 16 | static_cast<std::size_t>(length[3]) << 24;
  if (bytes > kMostHeader) fail(path_, "the header is damaged");
  std::string header(bytes, '\0');
  if (std::fread(header.data(), 1, bytes, file_.get()) != bytes) fail(path_, "the file is cut off");

  const std::string dtype = value_of(header, "descr", '\'', '\'');
  if (dtype == "<f4") item_bytes_ = 4;
  if (dtype == "|u1") item_bytes_ = 1;
  if (item_bytes_ == 0) fail(path_, "holds '" + dtype + "'; float32 ('<f4') or uint8 ('|u1') is needed");
  if (header.find("'fortran_order': False") == std::string::npos) {
    fail(path_, "is in Fortran's order; numpy.ascontiguousarray gives C's");
  }
  const std::string shape = value_of(header, "shape", '(', ')');
  for (const char* text = shape.c_str(); *text != '\0';) {
    char* end = nullptr;
    errno = 0;
    const long long dim = std::strtoll(text, &end, 10);
    if (end == text || errno != 0 || dim < 0) fail(path_, "the shape (" + shape + ") is damaged");
    shape_.push_back(dim);
    text = end;
    while (*text == ',' || *text == ' ') ++text;
  }
}

std::string NpyReader::describe() const {
  std::string text = is_u8() ? "uint8 [" : "float32 [";
  for (std::size_t i = 0; i < shape_.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(shape_[i]);
  return text + "]";
}

void NpyReader::read(void* out, std::int64_t items) {
  if (std::fread(out, item_bytes_, items, file_.get()) != static_cast<std::size_t>(items)) {
    fail(path_, "the file is cut off: it says it holds " + describe());
  }
}

NpyWriter::NpyWriter(std::string path, std::int64_t columns)
    : path_(std::move(path)),
      temporary_(path_ + "." + std::to_string(getpid()) + ".tmp"),
      columns_(columns),
      file_(std::fopen(temporary_.c_str(), "wb")) {
  if (!file_) fail();
  write_header();
}

NpyWriter::~NpyWriter() {
  if (file_) std::remove(temporary_.c_str());  // not finished
}

void NpyWriter::fail() const {
  const std::string why = std::strerror(errno);
  if (file_) std::remove(temporary_.c_str());
  swin::runtime::fail(path_, "cannot be written: " + why);
}

// Always as long, so that the number of rows can be put into it when it is known.
void NpyWriter::write_header() {
  constexpr std::size_t kBytes = 2 * kAlignment, kBefore = kMagicBytes + 2 + 2;
  std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (" + std::to_string(rows_) + ", " +
                       std::to_string(columns_) + "), }";
  header.resize(kBytes - kBefore - 1, ' ');
  header += '\n';
  const unsigned char rest[] = {1, 0, static_cast<unsigned char>(header.size() & 255),
                                static_cast<unsigned char>(header.size() >> 8)};
  if (std::fwrite(kMagic, 1, kMagicBytes, file_.get()) != kMagicBytes ||
      std::fwrite(rest, 1, sizeof rest, file_.get()) != sizeof rest ||
      std::fwrite(header.data(), 1, header.size(), file_.get()) != header.size()) {
    fail();
  }
}

void NpyWriter::write(const float* values, std::int64_t rows) {
  const std::size_t count = rows * columns_;
  if (std::fwrite(values, sizeof(float), count, file_.get()) != count) fail();
  rows_ += rows;
}

void NpyWriter::finish() {
  if (std::fseek(file_.get(), 0, SEEK_SET) != 0) fail();
  write_header();
  const bool closed = std::fclose(file_.release()) == 0;
  if (closed && std::rename(temporary_.c_str(), path_.c_str()) == 0) return;
  const std::string why = std::strerror(errno);
  std::remove(temporary_.c_str());
  swin::runtime::fail(path_, "cannot be written: " + why);
}

}  // namespace swin::runtime
