// torch tensors as the engine's views.
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "swin/error.h"
#include "swin/tensor.h"

namespace swin::binding {

inline DType dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return DType::kF32;
    case at::kHalf: return DType::kF16;
    case at::kChar: return DType::kS8;
    case at::kInt: return DType::kS32;
    default:
      throw DTypeError(detail::concat("swin_int8: a tensor is ", t.scalar_type(),
                                      "; the engine knows float32, float16, int8 and int32"));
  }
}

inline at::ScalarType scalar_type_of(DType dtype) {
  switch (dtype) {
    case DType::kF32: return at::kFloat;
    case DType::kF16: return at::kHalf;
    case DType::kS8: return at::kChar;
    default: return at::kInt;
  }
}

// `t` must be contiguous and on the CPU; a tensor of no elements gives a view of no elements.
inline TensorView view(const at::Tensor& t) {
  SWIN_CHECK(UnsupportedError, "swin_int8", t.device().is_cpu(), "a tensor is on ", t.device().str(), "; CPU is needed");
  SWIN_CHECK(ShapeError, "swin_int8", t.is_contiguous(), "a tensor of shape ", t.sizes(), " is not contiguous");
  SWIN_CHECK(ShapeError, "swin_int8", t.dim() <= TensorView::kMaxRank, "a tensor has ", t.dim(), " dimensions; at most ",
             TensorView::kMaxRank, " are known");
  TensorView v;
  v.data = t.numel() > 0 ? const_cast<void*>(t.const_data_ptr()) : nullptr;
  v.dtype = dtype_of(t);
  for (std::int64_t size : t.sizes()) v.shape[v.rank++] = size;
  return v;
}

inline TensorView view(const std::optional<at::Tensor>& t) { return t ? view(*t) : TensorView(); }

}  // namespace swin::binding
