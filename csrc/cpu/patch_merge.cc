// patch_merge: gather 2x2 neighbours to 4C channels and quantize: Swin-V2, whose norm comes behind the reduction.
// residual f32 [B*H*W, C] -> out s8 [B*(H/2)*(W/2), 4C]. Formula: swin/ops.h.
#include "kernels.h"
#include "simd.h"

namespace swin::cpu::SWIN_ISA {

void patch_merge(const PatchMergeArgs& args, const ExecContext& context) {
  const std::int64_t c = args.residual.dim(1), width = args.width, half_w = args.width / 2;
  const std::int64_t neighbours[4] = {0, width, 1, width + 1};  // (row, column) = (0,0) (1,0) (0,1) (1,1)
  parallel_rows(context, args.out.dim(0), 16, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t r = first; r < last; ++r) {
      const std::int64_t y = r / half_w, x = r % half_w;  // y counts rows of all images: H is even
      for (std::int64_t part = 0; part < 4; ++part) {
        const float* in = args.residual.as<const float>() + (2 * y * width + 2 * x + neighbours[part]) * c;
        std::int8_t* out = args.out.as<std::int8_t>() + (r * 4 + part) * c;
        for_lanes(c, [&](std::int64_t i, std::int64_t n) { store_s8(out + i, load(in + i, n) * args.quant, n); });
      }
    }
  });
}

}  // namespace swin::cpu::SWIN_ISA
