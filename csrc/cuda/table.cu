// The op table of one float type.
#include "device.cuh"
#include "kernels.h"

namespace swin::cuda {
namespace {

template <class T>
struct FloatType;
template <>
struct FloatType<__half> {
  static constexpr DType kDType = DType::kF16;
};
template <>
struct FloatType<__nv_bfloat16> {
  static constexpr DType kDType = DType::kBF16;
};

}  // namespace

template <class T>
OpTable make_table() {
  OpTable table;
  table.float_dtype = FloatType<T>::kDType;
#define SWIN_FILL_OP(name, Args) table.name = name<T>;
  SWIN_FOR_EACH_OP(SWIN_FILL_OP)
#undef SWIN_FILL_OP
  return table;
}

template OpTable make_table<__half>();
template OpTable make_table<__nv_bfloat16>();

}  // namespace swin::cuda
