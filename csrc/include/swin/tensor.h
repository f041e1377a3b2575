// A dense row-major tensor somebody else owns.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

namespace swin {

enum class DType : std::uint8_t { kF32, kF16, kBF16, kS8, kS32 };

constexpr std::int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kS8:
      return 1;
    case DType::kF16:
    case DType::kBF16:
      return 2;
    default:
      return 4;
  }
}

constexpr const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "float32";
    case DType::kF16:
      return "float16";
    case DType::kBF16:
      return "bfloat16";
    case DType::kS8:
      return "int8";
    default:
      return "int32";
  }
}

struct TensorView {
  static constexpr int kMaxRank = 5;

  void* data = nullptr;
  DType dtype = DType::kF32;
  int rank = 0;
  std::array<std::int64_t, kMaxRank> shape{};

  TensorView() = default;
  TensorView(void* data, DType dtype, std::initializer_list<std::int64_t> dims) : data(data), dtype(dtype) {
    for (std::int64_t dim : dims) shape[rank++] = dim;
  }

  explicit operator bool() const { return data != nullptr; }
  std::int64_t dim(int i) const { return shape[i]; }
  std::int64_t numel() const {
    std::int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= shape[i];
    return n;
  }
  std::int64_t nbytes() const { return data ? numel() * size_of(dtype) : 0; }

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }

  // "int8 [49, 96]"
  std::string describe() const;
};

}  // namespace swin
