// head_scale_softmax: out[i, :] = quantize(softmax_j(scores[i, j] * dequant * head_scale[head] + bias[head, i, j] +
// mask[window, i, j])), Swin-V2's cosine attention. scores s8 [BW, h, N, pitch] -> out s8 [BW, h, N, pitch]; columns
// N..pitch-1 are 0. Formula: swin/ops.h.
#include "kernels.h"
#include "softmax_row.h"

namespace swin::cpu::SWIN_ISA {

void head_scale_softmax(const HeadScaleSoftmaxArgs& args, const ExecContext& context) {
  const std::int64_t heads = args.scores.dim(1), n = args.scores.dim(2), pitch = args.scores.dim(3);
  const std::int64_t windows = args.mask ? args.mask.dim(0) : 1;
  const float* head_scale = args.head_scale.as<const float>();
  parallel_rows(context, args.scores.dim(0) * heads, 1, [&](std::int64_t first, std::int64_t last) {
    Vf* x = static_cast<Vf*>(thread_scratch(softmax_scratch_bytes(n)));
    for (std::int64_t index = first; index < last; ++index) {
      const float* mask = args.mask ? args.mask.as<const float>() + index / heads % windows * n * n : nullptr;
      const LogitRows logits{args.bias.as<const float>() + index % heads * n * n, mask, n};
      const float scale = args.dequant * head_scale[index % heads];
      const SoftmaxS8 of{args.scores.as<const std::int8_t>() + index * n * pitch, logits,
                         args.out.as<std::int8_t>() + index * n * pitch, pitch, scale, args.quant};
      softmax_s8(of, x);
    }
  });
}

}  // namespace swin::cpu::SWIN_ISA
