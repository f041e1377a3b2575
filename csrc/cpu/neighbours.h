// The 2x2 tokens that patch merging makes one of.
#pragma once

#include "simd.h"

namespace swin::cpu::SWIN_ISA {

// Of row r of the merged image: rows of the residual stream in the order (row, column) = (0,0) (1,0) (0,1) (1,1); null
// beyond an odd side, where zeros lie. Args: PatchMergeArgs or PatchMergeNormArgs.
struct Neighbours {
  const float* rows[4];

  template <class Args>
  Neighbours(const Args& args, std::int64_t r) {
    const std::int64_t c = args.residual.dim(1), half_h = (args.height + 1) / 2, half_w = (args.width + 1) / 2;
    const std::int64_t x = r % half_w * 2, y = r / half_w % half_h * 2, image = r / (half_w * half_h);
    for (int part = 0; part < 4; ++part) {
      const std::int64_t line = y + part % 2, column = x + part / 2;
      rows[part] = line < args.height && column < args.width
                       ? args.residual.template as<const float>() + ((image * args.height + line) * args.width + column) * c
                       : nullptr;
    }
  }
};

}  // namespace swin::cpu::SWIN_ISA
