// One instruction set's operations as a table.
#include "kernels.h"

namespace swin::cpu::SWIN_ISA {

const Kernels& kernels() {
  static const Kernels all = [] {
    Kernels k{};
    k.ops.float_dtype = DType::kF32;
#define SWIN_FILL_OP(name, Args) k.ops.name = name;
    SWIN_FOR_EACH_OP(SWIN_FILL_OP)
#undef SWIN_FILL_OP
    k.pack_weight = pack_weight;
    k.spin_s8 = spin_s8;
    k.spin_u8 = spin_u8;
    k.spin_grouped = spin_grouped;
    k.spin_f32 = spin_f32;
    return k;
  }();
  return all;
}

}  // namespace swin::cpu::SWIN_ISA
