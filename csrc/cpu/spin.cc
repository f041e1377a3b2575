// What the registers alone can do: steps of the GEMMs' dot products and of a float32 multiply-add, as many at once as
// hide their latency. The ceilings that docs and benchmarks compare with.
#include "gemm_core.h"
#include "gemm_grouped.h"
#include "gemm_mmla.h"
#include "kernels.h"
#if defined(__AMX_INT8__)
#include "gemm_amx.h"
#endif

namespace swin::cpu::SWIN_ISA {
namespace {

constexpr int kChains = 12;

#if defined(__AMX_INT8__)
std::int64_t spin_tiles(std::int64_t iterations) {
  configure_tiles(64);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (std::int64_t i = 0; i < iterations; ++i) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_release();
  return iterations * 4 * kTile * kTile * 64 * 2;
}
#else
template <class Dot>
std::int64_t spin_dot(std::int64_t iterations) {
  Vi acc[kChains] = {};
  Vi a = broadcast(0x01010101);
  const Vi w = broadcast(0x01010101);
  for (std::int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < kChains; ++j) {
      asm volatile("" : "+x"(a));  // else a product of constants would be taken out of the loop
      acc[j] = Dot::dot(acc[j], a, w);
      asm volatile("" : "+x"(acc[j]));
    }
  }
  return iterations * kChains * kLanes * Dot::kStepK * 2;
}
#endif

}  // namespace

std::int64_t spin_s8(std::int64_t iterations) {
#if defined(__AMX_INT8__)
  return spin_tiles(iterations / 16);
#elif defined(SWIN_MMLA)
  return spin_dot<MatrixDot>(iterations);
#else
  return spin_dot<SignedDot>(iterations);
#endif
}

std::int64_t spin_u8(std::int64_t iterations) {
#if defined(__AMX_INT8__)
  return spin_tiles(iterations / 16);
#elif defined(SWIN_MMLA)
  return spin_dot<MatrixDot>(iterations);
#else
  return spin_dot<NonNegativeDot>(iterations);
#endif
}

// Groups of kMaxGroup words, as full as weights allow; 0 where the GEMM has no such form.
std::int64_t spin_grouped([[maybe_unused]] std::int64_t iterations) {
#if defined(SWIN_GROUPED)
  const __m256i ones = _mm256_set1_epi16(1);
  constexpr int kRows = 8;
  __m256i acc[kRows] = {}, a = ones, w = ones;
  for (std::int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      __m256i t = _mm256_setzero_si256();
#pragma GCC unroll 6
      for (int word = 0; word < kMaxGroup; ++word) {
        asm volatile("" : "+x"(a));  // as in spin_dot
        const __m256i product = _mm256_maddubs_epi16(a, w);
        t = word == 0 ? product : _mm256_add_epi16(t, product);
      }
      acc[r] = _mm256_add_epi32(acc[r], _mm256_madd_epi16(t, ones));
      asm volatile("" : "+x"(acc[r]));
    }
  }
  return iterations * kRows * kMaxGroup * kLanes * 4 * 2;
#else
  return 0;
#endif
}

std::int64_t spin_f32(std::int64_t iterations) {
  Vf acc[kChains] = {};
  const Vf a = splat(1.0f), b = splat(0.5f);
  for (std::int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < kChains; ++j) {
      acc[j] = acc[j] * a + b;
      asm volatile("" : "+x"(acc[j]));
    }
  }
  return iterations * kChains * kLanes * 2;
}

}  // namespace swin::cpu::SWIN_ISA
