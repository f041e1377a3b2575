#include "swin/weight_list.h"

#include "swin/error.h"

namespace swin {
namespace {

std::string describe(TensorView t) {
  static char present;
  t.data = &present;  // an empty tensor may have no memory, and still has a shape to name
  return t.describe();
}

}  // namespace

const TensorView& WeightList::next(const std::string& name, DType dtype, std::initializer_list<std::int64_t> dims) {
  const TensorView& t = list_[position_++];
  const TensorView wanted(t.data, dtype, dims);
  SWIN_CHECK(DTypeError, name, t.dtype == dtype || t.numel() == 0, "found ", t.describe(), "; ", name_of(dtype),
             " is needed");
  SWIN_CHECK(ShapeError, name, t.rank == wanted.rank && t.shape == wanted.shape, "found ", describe(t), "; ",
             describe(wanted), " is needed");
  return t;
}

Parameter WeightList::parameter(const std::string& name, DType dtype, std::initializer_list<std::int64_t> dims) {
  return backend_.upload_parameter(next(name, dtype, dims));
}

std::unique_ptr<PackedWeight> WeightList::weight(const std::string& name, std::int64_t n, std::int64_t k) {
  return backend_.pack_weight(next(name, DType::kS8, {n, k}));
}

void WeightList::empty(const std::string& name, const char* why) {
  const TensorView& t = list_[position_++];
  SWIN_CHECK(ShapeError, name, t.numel() == 0, "found ", describe(t), "; an empty tensor is needed: ", why);
}

}  // namespace swin
