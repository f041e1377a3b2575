// patch_merge_norm: gather 2x2 neighbours to 4C channels, LayerNorm, quantize. residual f32 [B*H*W, C] -> out s8
// [B*(H/2)*(W/2), 4C]. The gather is four row pointers; nothing is copied. Formula: swin/ops.h.
#include "kernels.h"
#include "norm.h"

namespace swin::cpu::SWIN_ISA {

void patch_merge_norm(const PatchMergeNormArgs& args, const ExecContext& context) {
  const std::int64_t c = args.residual.dim(1), width = args.width, half_w = args.width / 2;
  const float* gamma = args.gamma.as<const float>();
  const float* beta = args.beta.as<const float>();
  parallel_rows(context, args.out.dim(0), 8, [&](std::int64_t first, std::int64_t last) {
    // A row of 4C in one piece, so that a vector may span two neighbours where C is no multiple of the lanes.
    float* row = static_cast<float*>(thread_scratch((4 * c + kLanes) * sizeof(float)));
    for (std::int64_t r = first; r < last; ++r) {
      const std::int64_t y = r / half_w, x = r % half_w;  // y counts rows of all images: H is even
      const float* corner = args.residual.as<const float>() + (2 * y * width + 2 * x) * c;
      std::memcpy(row, corner, c * sizeof(float));
      std::memcpy(row + c, corner + width * c, c * sizeof(float));
      std::memcpy(row + 2 * c, corner + c, c * sizeof(float));
      std::memcpy(row + 3 * c, corner + (width + 1) * c, c * sizeof(float));
      std::int8_t* out = args.out.as<std::int8_t>() + r * 4 * c;
      const RowStats stats = row_stats(row, 4 * c);
      for_lanes(4 * c, [&](std::int64_t i, std::int64_t n) {
        store_s8(out + i, normalize(load(row + i, n), stats, gamma, beta, i, n) * args.quant, n);
      });
    }
  });
}

}  // namespace swin::cpu::SWIN_ISA
