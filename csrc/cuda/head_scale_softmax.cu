// head_scale_softmax: out[i, :] = quantize(softmax_j(scores[i, j] * dequant * head_scale[head] + bias[head, i, j] +
// mask[window, i, j])). scores s8 [BW, h, N, pitch], head_scale T [h], bias T [h, N, N], mask T [windows, N, N] or none
// -> out s8 [BW, h, N, pitch]; columns N..pitch-1 are 0. Formula: swin/ops.h.
//
// Layout: a warp a row, a lane every 32nd column, three passes over memory: softmax.cu's path for any shape. The
// simplest that is right; not timed yet.
#include "device.cuh"
#include "kernels.h"

namespace swin::cuda {
namespace {

constexpr int kRowThreads = 128;
constexpr float kLog2E = 1.44269504f;

struct SoftmaxShape {
  FastDiv n, rows, windows;  // rows: h * N of one window; windows of the mask, or 1
  std::int64_t pitch;
  float dequant, quant;
};

template <class T>
__global__ void __launch_bounds__(kRowThreads)
    head_scale_softmax_kernel(const SoftmaxShape shape, const std::int8_t* __restrict__ scores,
                              const T* __restrict__ head_scale, const T* __restrict__ bias, const T* __restrict__ mask,
                              std::int8_t* __restrict__ out, const unsigned count) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, n = static_cast<int>(shape.n.divisor());
  const unsigned index = blockIdx.x * (kRowThreads / kWarp) + threadIdx.x / kWarp;
  if (index >= count) return;  // a whole warp
  unsigned row = index;
  unsigned window = shape.rows.split(row);
  shape.windows.split(window);
  unsigned token = row;
  const unsigned head = shape.n.split(token);
  const T* bias_row = bias + static_cast<std::int64_t>(row) * n;
  const T* mask_row = mask == nullptr ? nullptr : mask + (static_cast<std::int64_t>(window) * n + token) * n;
  const std::int8_t* q = scores + index * shape.pitch;
  const float scale = shape.dequant * to_float(head_scale[head]) * kLog2E;
  const auto at = [&](int j) {
    float x = to_float(bias_row[j]);
    if (mask_row != nullptr) x += to_float(mask_row[j]);
    return static_cast<float>(q[j]) * scale + x * kLog2E;
  };
  float top = -3.0e38f;
  for (int j = lane; j < n; j += kWarp) top = fmaxf(top, at(j));
  top = max_over<kWarp>(top);
  float sum = 0.0f;
  for (int j = lane; j < n; j += kWarp) sum += exp2_approx(at(j) - top);
  const float factor = shape.quant * reciprocal_approx(sum_over<kWarp>(sum));
  for (int j = lane; j < shape.pitch; j += kWarp) {
    const float y[1] = {j < n ? exp2_approx(at(j) - top) * factor : 0.0f};
    store_quantized<1>(out + index * shape.pitch + j, y);
  }
}

}  // namespace

template <class T>
void head_scale_softmax(const HeadScaleSoftmaxArgs& args, const ExecContext& context) {
  const std::int64_t bw = args.scores.dim(0), heads = args.scores.dim(1), n = args.scores.dim(2);
  const SoftmaxShape shape{FastDiv(n),         FastDiv(heads * n), FastDiv(args.mask ? args.mask.dim(0) : 1),
                           args.scores.dim(3), args.dequant,       args.quant};
  const unsigned count = count32("head_scale_softmax", "rows", bw * heads * n);
  SWIN_LAUNCH("head_scale_softmax", head_scale_softmax_kernel<T>,
              static_cast<unsigned>(ceil_div(count, kRowThreads / kWarp)), kRowThreads, 0, context.stream, shape,
              args.scores.as<const std::int8_t>(), args.head_scale.as<const T>(), args.bias.as<const T>(),
              args.mask.as<const T>(), args.out.as<std::int8_t>(), count);
}

SWIN_INSTANTIATE(head_scale_softmax, HeadScaleSoftmaxArgs)

}  // namespace swin::cuda
