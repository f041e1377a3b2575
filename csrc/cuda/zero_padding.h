// The rows of padding in window order, which operations that write window order leave to this.
#pragma once

#include "swin/ops.h"

namespace swin::cuda {

// Zeros the rows of `out` s8 [P, C], in the window order of `geometry`, that have no row in the image; where windows
// divide the image there are none, and nothing is launched. `op`: who asks, for errors.
void zero_padding(const char* op, const TensorView& out, const WindowGeometry& geometry, void* stream);

}  // namespace swin::cuda
