// patch_merge_norm: gather 2x2 neighbours to 4C channels, LayerNorm, quantize. residual f32 [B*H*W, C] -> out s8
// [B*ceil(H/2)*ceil(W/2), 4C]. Formula: swin/ops.h.
#include "kernels.h"
#include "neighbours.h"
#include "norm.h"

namespace swin::cpu::SWIN_ISA {

void patch_merge_norm(const PatchMergeNormArgs& args, const ExecContext& context) {
  const std::int64_t c = args.residual.dim(1);
  const float* gamma = args.gamma.as<const float>();
  const float* beta = args.beta.as<const float>();
  parallel_rows(context, args.out.dim(0), 8, [&](std::int64_t first, std::int64_t last) {
    // A row of 4C in one piece, so that a vector may span two neighbours where C is no multiple of the lanes.
    float* row = static_cast<float*>(thread_scratch((4 * c + kLanes) * sizeof(float)));
    for (std::int64_t r = first; r < last; ++r) {
      const Neighbours neighbours(args, r);
      for (std::int64_t part = 0; part < 4; ++part) {
        const float* in = neighbours.rows[part];
        if (in != nullptr) {
          std::memcpy(row + part * c, in, c * sizeof(float));
        } else {
          std::memset(row + part * c, 0, c * sizeof(float));
        }
      }
      std::int8_t* out = args.out.as<std::int8_t>() + r * 4 * c;
      const RowStats stats = row_stats(row, 4 * c);
      for_lanes(4 * c, [&](std::int64_t i, std::int64_t n) {
        store_s8(out + i, normalize(load(row + i, n), stats, gamma, beta, i, n) * args.quant, n);
      });
    }
  });
}

}  // namespace swin::cpu::SWIN_ISA
