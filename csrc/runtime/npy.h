// Arrays in NumPy's .npy files: the images a program reads and the results it writes.
#pragma once

#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

namespace swin::runtime {

struct CloseFile {
  void operator()(std::FILE* file) const { std::fclose(file); }
};
using File = std::unique_ptr<std::FILE, CloseFile>;

// For reading; std::runtime_error naming it where the system refuses.
File open_file(const std::string& path);

// An .npy file of float32 or uint8 in C order, read piece by piece. Errors are std::runtime_error and name the file.
class NpyReader {
 public:
  NpyReader(std::string path, File file);

  const std::vector<std::int64_t>& shape() const { return shape_; }
  bool is_u8() const { return item_bytes_ == 1; }
  std::string describe() const;  // "uint8 [10, 224, 224, 3]"
  // The next `items` elements into `out`.
  void read(void* out, std::int64_t items);

 private:
  std::string path_;
  File file_;
  std::vector<std::int64_t> shape_;
  std::size_t item_bytes_ = 0;
};

// Writes float32 [rows, columns] under another name, and gives it its own when all is there.
class NpyWriter {
 public:
  NpyWriter(std::string path, std::int64_t columns);
  ~NpyWriter();
  NpyWriter(const NpyWriter&) = delete;
  NpyWriter& operator=(const NpyWriter&) = delete;
  void write(const float* values, std::int64_t rows);
  void finish();

 private:
  void write_header();
  [[noreturn]] void fail() const;

  std::string path_, temporary_;
  std::int64_t rows_ = 0, columns_;
  File file_;
};

}  // namespace swin::runtime
