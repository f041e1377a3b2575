// head_scale_softmax: out[i, :] = quantize(softmax_j(scores[i, j] * dequant * head_scale[head] + bias[head, i, j] +
// mask[window, i, j])), Swin-V2's cosine attention. scores s8 [BW, h, N, pitch] -> out s8 [BW, h, N, pitch]; columns
// N..pitch-1 are 0. Formula: swin/ops.h. One row at a time, its exponentials kept in the thread's scratch.
#include "kernels.h"
#include "simd.h"

namespace swin::cpu::SWIN_ISA {

void head_scale_softmax(const HeadScaleSoftmaxArgs& args, const ExecContext& context) {
  const std::int64_t heads = args.scores.dim(1), n = args.scores.dim(2), pitch = args.scores.dim(3);
  const std::int64_t windows = args.mask ? args.mask.dim(0) : 1;
  const float* head_scale = args.head_scale.as<const float>();
  parallel_rows(context, args.scores.dim(0) * heads, 1, [&](std::int64_t first, std::int64_t last) {
    float* row = static_cast<float*>(thread_scratch((n + kLanes) * sizeof(float)));
    for (std::int64_t index = first; index < last; ++index) {
      const float scale = args.dequant * head_scale[index % heads];
      const float* bias = args.bias.as<const float>() + index % heads * n * n;
      const float* mask = args.mask ? args.mask.as<const float>() + index / heads % windows * n * n : nullptr;
      for (std::int64_t i = 0; i < n; ++i) {
        const std::int8_t* q = args.scores.as<const std::int8_t>() + (index * n + i) * pitch;
        std::int8_t* out = args.out.as<std::int8_t>() + (index * n + i) * pitch;
        Vf largest = splat(-3.0e38f);
        for_lanes(n, [&](std::int64_t j, std::int64_t lanes) {
          Vf x = load(q + j, lanes) * scale + load(bias + i * n + j, lanes);
          if (mask) x += load(mask + i * n + j, lanes);
          x = keep(x, lanes, -3.0e38f);
          store(row + j, x);
          largest = max_of(largest, x);
        });
        const float top = max_lane(largest);
        Vf sum{};
        for_lanes(n, [&](std::int64_t j, std::int64_t) {
          const Vf e = exp_nonpositive(load(row + j) - top);
          store(row + j, e);
          sum += e;
        });
        const float factor = args.quant / sum_of(sum);
        for_lanes(n, [&](std::int64_t j, std::int64_t lanes) { store_s8(out + j, load(row + j) * factor, lanes); });
        if (pitch > n) std::memset(out + n, 0, pitch - n);
      }
    }
  });
}

}  // namespace swin::cpu::SWIN_ISA
