// The CUDA backend's operations: one file each, for float16 and bfloat16 as the float type of residual stream and
// parameters. Contracts: swin/ops.h. An op launches on ExecContext::stream; it neither allocates nor synchronises.
#pragma once

#include "swin/ops.h"

namespace swin::cuda {

#define SWIN_DECLARE_KERNEL(name, Args) \
  template <class T>                    \
  void name(const Args&, const ExecContext&);
SWIN_FOR_EACH_OP(SWIN_DECLARE_KERNEL)
#undef SWIN_DECLARE_KERNEL

// T is __half or __nv_bfloat16.
template <class T>
OpTable make_table();

}  // namespace swin::cuda
