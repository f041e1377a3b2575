// patch_merge_norm: gather 2x2 neighbours to 4C channels, LayerNorm, quantize. residual f32 [B*H*W, C] -> out s8
// [B*ceil(H/2)*ceil(W/2), 4C]. Formula: swin/ops.h.
#include "kernels.h"
#include "neighbours.h"
#include "norm.h"

namespace swin::cpu::SWIN_ISA {

void patch_merge_norm(const PatchMergeNormArgs& args, const ExecContext& context) {
  const std::int64_t c = args.residual.dim(1), pitch = ceil_div(4 * c, kLanes) * kLanes;
  parallel_rows(context, args.out.dim(0), 8, [&](std::int64_t first, std::int64_t last) {
    // Each row of 4C in one piece, so that a vector may span two neighbours where C is no multiple of the lanes.
    float* rows = static_cast<float*>(thread_scratch(NormQuantize::kTogether * pitch * sizeof(float)));
    NormQuantize norm(args.gamma.as<const float>(), args.beta.as<const float>(), 4 * c, args.quant);
    for (std::int64_t r = first; r < last; ++r) {
      float* row = rows + (r - first) % NormQuantize::kTogether * pitch;
      const Neighbours neighbours(args, r);
      for (std::int64_t part = 0; part < 4; ++part) {
        const float* in = neighbours.rows[part];
        if (in != nullptr) {
          std::memcpy(row + part * c, in, c * sizeof(float));
        } else {
          std::memset(row + part * c, 0, c * sizeof(float));
        }
      }
      norm.add(row, args.out.as<std::int8_t>() + r * 4 * c);
    }
    norm.flush();
  });
}

}  // namespace swin::cpu::SWIN_ISA
