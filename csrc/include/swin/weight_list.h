// A weight list as a graph reads it: in order, each tensor checked and named in every complaint.
#pragma once

#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "swin/backend.h"

namespace swin {

class WeightList {
 public:
  WeightList(const std::vector<TensorView>& list, const Backend& backend) : list_(list), backend_(backend) {}

  // The next tensor. DTypeError or ShapeError where it is not `dtype` of `dims`.
  const TensorView& next(const std::string& name, DType dtype, std::initializer_list<std::int64_t> dims);
  // The next tensor, `dtype` of `dims`, in the backend's layout.
  Parameter parameter(const std::string& name, DType dtype, std::initializer_list<std::int64_t> dims);
  // The next tensor, s8 [n, k], packed for any int8.
  std::unique_ptr<PackedWeight> weight(const std::string& name, std::int64_t n, std::int64_t k);
  // Passes over the next tensor; ShapeError where it has elements.
  void empty(const std::string& name, const char* why);

 private:
  const std::vector<TensorView>& list_;
  const Backend& backend_;
  std::size_t position_ = 0;
};

}  // namespace swin
