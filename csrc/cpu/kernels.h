// What one instruction set's build of the CPU kernels offers to the backend.
#pragma once

#include <memory>

#include "swin/ops.h"

namespace swin::cpu {

struct Kernels {
  OpTable ops;
  // Packs s8 [N, K] for this instruction set's gemm_s8.
  std::unique_ptr<PackedWeight> (*pack_weight)(const std::int8_t* w, std::int64_t n, std::int64_t k, InputRange input);
  // Run register-only steps of the GEMM's dot product for inputs of either range, or of a float32 multiply-add, and
  // return the arithmetic operations done (a multiply-add is two).
  std::int64_t (*spin_s8)(std::int64_t iterations);
  std::int64_t (*spin_u8)(std::int64_t iterations);
  std::int64_t (*spin_grouped)(std::int64_t iterations);
  std::int64_t (*spin_f32)(std::int64_t iterations);
};

// ValueError naming image `image` of the batch as not finite. Defined outside the kernel files, which are kept free of
// what throwing brings in.
[[noreturn]] void refuse_image(std::int64_t image);

namespace portable {
const Kernels& kernels();
}
namespace avx2 {
const Kernels& kernels();
}
namespace avx_vnni {
const Kernels& kernels();
}
namespace avx512_vnni {
const Kernels& kernels();
}
namespace amx_int8 {
const Kernels& kernels();
}
namespace neon_i8mm {
const Kernels& kernels();
}
namespace neon_dotprod {
const Kernels& kernels();
}

}  // namespace swin::cpu

#ifdef SWIN_ISA  // inside one instruction set's build: its operations, one file each
namespace swin::cpu::SWIN_ISA {
#define SWIN_DECLARE_KERNEL(name, Args) void name(const Args&, const ExecContext&);
SWIN_FOR_EACH_OP(SWIN_DECLARE_KERNEL)
#undef SWIN_DECLARE_KERNEL

std::unique_ptr<PackedWeight> pack_weight(const std::int8_t* w, std::int64_t n, std::int64_t k, InputRange input);
std::int64_t spin_s8(std::int64_t iterations);
std::int64_t spin_u8(std::int64_t iterations);
std::int64_t spin_grouped(std::int64_t iterations);
std::int64_t spin_f32(std::int64_t iterations);
}  // namespace swin::cpu::SWIN_ISA
#endif
