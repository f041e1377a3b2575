// torch tensors as the engine's views.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include <cstdint>
#include <optional>

#include "swin/error.h"
#include "swin/tensor.h"

namespace swin::binding {

inline DType dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::kF32;
    case at::kHalf:
      return DType::kF16;
    case at::kBFloat16:
      return DType::kBF16;
    case at::kChar:
      return DType::kS8;
    case at::kInt:
      return DType::kS32;
    default:
      throw DTypeError(detail::concat("swin_int8: a tensor is ", t.scalar_type(),
                                      "; the engine knows float32, float16, bfloat16, int8 and int32"));
  }
}

inline at::ScalarType scalar_type_of(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return at::kFloat;
    case DType::kF16:
      return at::kHalf;
    case DType::kBF16:
      return at::kBFloat16;
    case DType::kS8:
      return at::kChar;
    default:
      return at::kInt;
  }
}

// `t` must be contiguous; a tensor of no elements gives a view of no elements.
inline TensorView view_of(const at::Tensor& t) {
  SWIN_CHECK(ShapeError, "swin_int8", t.is_contiguous(), "a tensor of shape ", t.sizes(), " is not contiguous");
  SWIN_CHECK(ShapeError, "swin_int8", t.dim() <= TensorView::kMaxRank, "a tensor has ", t.dim(),
             " dimensions; at most ", TensorView::kMaxRank, " are known");
  TensorView v;
  v.data = t.numel() > 0 ? const_cast<void*>(t.const_data_ptr()) : nullptr;
  v.dtype = dtype_of(t);
  for (std::int64_t size : t.sizes()) v.shape[v.rank++] = size;
  return v;
}

// Views of tensors that must all be on one device, which is current as long as this lives.
class Views {
 public:
  explicit Views(const at::Tensor& first)
      : device_(first.device()), guard_(device_.is_cpu() ? std::optional<at::Device>() : device_) {}

  at::Device device() const { return device_; }
  bool saw(at::ScalarType type) const { return seen_ & (std::uint64_t{1} << static_cast<int>(type)); }
  TensorView operator()(const at::Tensor& t) const {
    SWIN_CHECK(UnsupportedError, "swin_int8", t.device() == device_, "a tensor is on ", t.device().str(),
               ", another on ", device_.str(), "; all must be on one device");
    seen_ |= std::uint64_t{1} << static_cast<int>(t.scalar_type());
    return view_of(t);
  }
  TensorView operator()(const std::optional<at::Tensor>& t) const { return t ? (*this)(*t) : TensorView(); }

 private:
  at::Device device_;
  c10::OptionalDeviceGuard guard_;
  mutable std::uint64_t seen_ = 0;  // scalar types, a bit each
};

}  // namespace swin::binding
