// zero_padding: 0 in the rows of padding of out s8 [P, C] (zero_padding.h).
//
// Layout: a warp looks at 32 rows of window order, one a lane, and then zeros those that are padding, one after the
// other, 16 bytes a lane and step: most rows are not padding, and cost no more than their place in the image. Floor:
// C bytes a row of padding. Not timed yet.
#include "zero_padding.h"

#include "window_rows.cuh"

namespace swin::cuda {
namespace {

constexpr int kPaddingThreads = 128;

// V: bytes of a store.
template <int V>
__global__ void __launch_bounds__(kPaddingThreads)
    zero_padding_kernel(std::int8_t* __restrict__ out, const WindowRows windows, const unsigned rows, const int c) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const unsigned row = blockIdx.x * kPaddingThreads + threadIdx.x;
  const bool padding = row < rows && windows.image_row(row) == kNoRow;
  unsigned left = __ballot_sync(kAllLanes, padding);
  std::int8_t* const first = out + static_cast<std::int64_t>(row - lane) * c;
  for (; left != 0; left &= left - 1) {
    std::int8_t* const target = first + static_cast<std::int64_t>(__ffs(static_cast<int>(left)) - 1) * c;
    for (int i = V * lane; i < c; i += V * kWarp) {
      if constexpr (V == 1) {
        target[i] = 0;
      } else {
        *reinterpret_cast<S8<V>*>(target + i) = S8<V>{};
      }
    }
  }
}

}  // namespace

void zero_padding(const char* op, const TensorView& out, const WindowGeometry& geometry, void* stream) {
  if (!geometry.is_padded()) return;
  const std::int64_t c = out.dim(1), rows = geometry.window_rows();
  const auto kernel = c % 16 == 0 && is_aligned(out.data, 16) ? zero_padding_kernel<16> : zero_padding_kernel<1>;
  SWIN_LAUNCH(op, kernel, static_cast<unsigned>(ceil_div(rows, kPaddingThreads)), kPaddingThreads, 0, stream,
              out.as<std::int8_t>(), WindowRows(geometry), count32(op, "rows", rows),
              static_cast<int>(count32(op, "channels", c)));
}

}  // namespace swin::cuda
