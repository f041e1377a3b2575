// The kernels as host code sees them, without CUDA's headers.
#pragma once

#include "swin/ops.h"

namespace swin::cuda {

OpTable float16_table();
OpTable bfloat16_table();
// UnsupportedError where this build holds no kernel image that `device` (compute capability `sm`, 90 for 9.0) can run.
void require_kernels(int device, int sm);

}  // namespace swin::cuda
