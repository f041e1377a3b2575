// patch_merge: gather 2x2 neighbours to 4C channels and quantize: Swin-V2, whose norm comes behind the reduction.
// residual f32 [B*H*W, C] -> out s8 [B*ceil(H/2)*ceil(W/2), 4C]. Formula: swin/ops.h.
#include "kernels.h"
#include "neighbours.h"
#include "simd.h"

namespace swin::cpu::SWIN_ISA {

void patch_merge(const PatchMergeArgs& args, const ExecContext& context) {
  const std::int64_t c = args.residual.dim(1);
  parallel_rows(context, args.out.dim(0), 16, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t r = first; r < last; ++r) {
      const Neighbours neighbours(args, r);
      for (std::int64_t part = 0; part < 4; ++part) {
        const float* in = neighbours.rows[part];
        std::int8_t* out = args.out.as<std::int8_t>() + (r * 4 + part) * c;
        if (in == nullptr) {
          std::memset(out, 0, c);
          continue;
        }
        for_lanes(c, [&](std::int64_t i, std::int64_t n) { store_s8(out + i, load(in + i, n) * args.quant, n); });
      }
    }
  });
}

}  // namespace swin::cpu::SWIN_ISA
