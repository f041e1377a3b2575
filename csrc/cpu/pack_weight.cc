// pack_weight: w s8 [N, K], row-major, in the form that this instruction set's GEMM reads. Once, at load.
#include "kernels.h"
#include "pack_grouped.h"
#include "packed_gemm.h"

namespace swin::cpu::SWIN_ISA {
namespace {

#if !defined(__AMX_INT8__)
template <class Dot>
void pack_units(const std::int8_t* w, CpuPackedWeight& packed) {
  const std::int64_t size = unit_bytes<Dot>(packed.k);
  packed.allocate_units();
  for (std::int64_t u = 0; u < units_of(packed.n); ++u) {
    std::int8_t* unit = packed.units + u * size;
    pack_unit_nk<Dot>(w, packed.k, packed.n, packed.k, u * kLanes, unit);
    store_start<Dot>(packed.starts + u * kLanes, unit, steps_of<Dot>(packed.k));
  }
}
#endif

#if defined(SWIN_GROUPED)
// Vector instructions per word of 4 k and row from which the other forms are as fast: they need 4 and 3.
double most_instructions(InputRange input) { return input == InputRange::kSigned ? 3.7 : 2.8; }

bool pack_groups(const std::int8_t* w, CpuPackedWeight& packed) {
  const std::int64_t words = ceil_div(packed.k, 4);
  const Array<std::int8_t> unit(words * kItemBytes);
  std::memset(packed.starts, 0, units_of(packed.n) * kLanes * sizeof(std::int32_t));
  packed.grouped = group_weight(units_of(packed.n), words, packed.input, most_instructions(packed.input), packed.starts,
                                [&](std::int64_t u) {
                                  pack_unit_nk<UnsignedQuadDot>(w, packed.k, packed.n, packed.k, u * kLanes, unit);
                                  return static_cast<const std::int8_t*>(unit);
                                });
  if (packed.grouped == nullptr) return false;
  const std::int32_t offset = packed.input == InputRange::kSigned ? 128 : 0;
  for (std::int64_t n = 0; n < packed.n; ++n) {
    for (std::int64_t k = 0; k < packed.k; ++k) packed.starts[n] -= offset * w[n * packed.k + k];
  }
  return true;
}
#endif

}  // namespace

std::unique_ptr<PackedWeight> pack_weight(const std::int8_t* w, std::int64_t n, std::int64_t k, InputRange input) {
  auto packed = std::make_unique<CpuPackedWeight>(n, k, input);
#if defined(__AMX_INT8__)
  packed->allocate_units();
  for (std::int64_t u = 0; u < units_of(n); ++u) {
    pack_tile_unit(w, n, k, u * kLanes, packed->units + u * CpuPackedWeight::bytes_per_unit(k, input));
  }
#else
#if defined(SWIN_GROUPED)
  if (pack_groups(w, *packed)) return packed;
#endif
#if defined(SWIN_MMLA)
  pack_units<MatrixDot>(w, *packed);
#else
  if (input == InputRange::kNonNegative) {
    pack_units<NonNegativeDot>(w, *packed);
  } else {
    pack_units<SignedDot>(w, *packed);
  }
#endif
#endif
  return packed;
}

}  // namespace swin::cpu::SWIN_ISA
