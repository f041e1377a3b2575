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
bool pack_groups(const std::int8_t* w, CpuPackedWeight& packed) {
  const std::int64_t n = packed.n, k = packed.k, words = ceil_div(k, 4);
  const Array<std::int8_t> unit(words * kWordBytes);
  std::memset(packed.starts, 0, CpuPackedWeight::start_count(n) * sizeof(std::int32_t));
  packed.grouped = group_weight(n, words, packed.input, packed.starts, [&](std::int64_t u) {
    pack_unit_nk<UnsignedQuadDot>(w, k, n, k, u * kLanes, unit);
    return static_cast<const std::int8_t*>(unit);
  });
  if (packed.grouped == nullptr) return false;
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = 0; j < k; ++j) packed.starts[i] += packed.input.lowest * w[i * k + j];
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
