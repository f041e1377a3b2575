// Rows as the GEMM of gemm_grouped.h reads them: panels, word by word of 4 k, each word in one form or several.
#pragma once

#include "gemm_core.h"

#if defined(__AVX2__) && !defined(SWIN_VNNI)
#define SWIN_GROUPED

namespace swin::cpu::SWIN_ISA {

static_assert(kLanes == 8);
inline constexpr std::int64_t kMostPanelRows = 56;
inline constexpr std::int64_t kRowsAtOnce = 8;  // that are packed, and have room in a panel of their own
#if defined(SWIN_SANITIZED)
inline constexpr int kGroupRows = 3;  // in a panel of their own, as kMaxRows
#else
inline constexpr int kGroupRows = static_cast<int>(kRowsAtOnce);
#endif

// The forms of a word: each way to pair its inputs as they are, then the same with the second of each pair
// complemented.
inline constexpr int kPairings = 3, kMostForms = 2 * kPairings;
inline constexpr int kPairing[kPairings][4] = {{0, 1, 2, 3}, {0, 2, 1, 3}, {0, 3, 1, 2}};

// What makes u, 0..top, of an input of lowest..127: u = a - lowest; complemented: top - u.
struct UnsignedInputs {
  __m256i minus_lowest, second, beyond_top;  // bytes: -lowest; 255 in the second of each pair; and 255 - top there

  explicit UnsignedInputs(InputRange range)
      : minus_lowest(_mm256_set1_epi8(static_cast<char>(-range.lowest))),
        second(_mm256_set1_epi16(static_cast<short>(0xff00))),
        beyond_top(_mm256_set1_epi16(static_cast<short>((255 - range.top()) << 8))) {}

  SWIN_INLINE __m256i complement_second(__m256i u) const {
    return _mm256_sub_epi8(_mm256_xor_si256(u, second), beyond_top);
  }
};

// How `count` rows lie in panels: all together in one, or in panels of up to kGroupRows, as equal as can be
// (RowGroups).
struct PanelLayout {
  bool together;
  std::int64_t count, words;
  int forms;

  PanelLayout(bool together, std::int64_t count, std::int64_t k, int forms)
      : together(together), count(count), words(ceil_div(k, 4)), forms(forms) {}

  std::int64_t rows() const {
    return together ? ceil_div(count, kRowsAtOnce) * kRowsAtOnce : kRowsAtOnce;
  }                                                   // with room
  std::int64_t stride() const { return rows() * 4; }  // bytes, from one word in one of its forms to the next
  std::int64_t panel_bytes() const { return words * forms * stride(); }
  std::int64_t bytes() const { return (together ? 1 : ceil_div(count, kGroupRows)) * panel_bytes(); }
};

// A word of eight rows to `target`, in each of its forms.
template <int Forms>
SWIN_INLINE static inline void store_forms(__m256i word, const UnsignedInputs& inputs, std::int64_t stride,
                                           char* target) {
  const auto store_form = [=](int form, __m256i value) SWIN_INLINE {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + form * stride), value);
  };
  store_form(0, word);
  if constexpr (Forms > 1) {
    const auto paired = [&](const int* of) SWIN_INLINE {
      const int bytes = of[0] | of[1] << 8 | of[2] << 16 | of[3] << 24, next = 0x04040404;
      return _mm256_shuffle_epi8(word, _mm256_setr_epi32(bytes, bytes + next, bytes + 2 * next, bytes + 3 * next, bytes,
                                                         bytes + next, bytes + 2 * next, bytes + 3 * next));
    };
    const __m256i words[kPairings] = {word, paired(kPairing[1]), paired(kPairing[2])};
    for (int i = 0; i < kPairings; ++i) {
      if (i > 0) store_form(i, words[i]);
      if constexpr (Forms > kPairings) store_form(kPairings + i, inputs.complement_second(words[i]));
    }
  }
}

// Eight rows of 32 bytes at rows[0..7] + offset to eight words of each row.
template <int Forms>
static inline void transpose_rows(const std::int8_t* const* rows, std::int64_t offset, const UnsignedInputs& inputs,
                                  std::int64_t stride, char* target) {
  __m256i r[8], s[8];
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm256_add_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[i] + offset)), inputs.minus_lowest);
  }
  for (int i = 0; i < 8; i += 2) {
    s[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    s[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {  // words 0, 1, 2, 3 (and 4 to 7 in the upper half) of rows i to i + 3
    r[i] = _mm256_unpacklo_epi64(s[i], s[i + 2]);
    r[i + 1] = _mm256_unpackhi_epi64(s[i], s[i + 2]);
    r[i + 2] = _mm256_unpacklo_epi64(s[i + 1], s[i + 3]);
    r[i + 3] = _mm256_unpackhi_epi64(s[i + 1], s[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    char* word = target + i * Forms * stride;
    store_forms<Forms>(_mm256_permute2x128_si256(r[i], r[i + 4], 0x20), inputs, stride, word);
    store_forms<Forms>(_mm256_permute2x128_si256(r[i], r[i + 4], 0x31), inputs, stride, word + 4 * Forms * stride);
  }
}

// Up to kRowsAtOnce rows of k values, `row_stride` bytes apart, to their place in a panel.
template <int Forms>
static inline void pack_rows(const std::int8_t* x, std::int64_t row_stride, std::int64_t count, std::int64_t k,
                             InputRange range, std::int64_t stride, char* target) {
  const UnsignedInputs inputs(range);
  const std::int8_t* row[kRowsAtOnce];
  for (std::int64_t i = 0; i < kRowsAtOnce; ++i)
    row[i] = x + min_of(i, count - 1) * row_stride;  // beyond `count`: unused
  std::int64_t i = 0;
  for (; i + 32 <= k; i += 32) transpose_rows<Forms>(row, i, inputs, stride, target + i / 4 * Forms * stride);
  for (; i < k; i += 4) {
    alignas(32) char word[kRowsAtOnce * 4] = {};
    for (std::int64_t r = 0; r < count; ++r) {
      for (std::int64_t j = 0; j < min_of(k - i, 4); ++j)
        word[4 * r + j] = static_cast<char>(row[r][i + j] - range.lowest);
    }
    store_forms<Forms>(_mm256_load_si256(reinterpret_cast<const __m256i*>(word)), inputs, stride,
                       target + i / 4 * Forms * stride);
  }
}

// Rows of k values of `range`, `row_stride` bytes apart, to panels.
static inline void pack_panels(const std::int8_t* x, std::int64_t row_stride, std::int64_t k, InputRange range,
                               const PanelLayout& layout, void* scratch) {
  const auto pack = [&](std::int64_t first, std::int64_t rows, std::int64_t offset) {
    const std::int8_t* from = x + first * row_stride;
    char* target = static_cast<char*>(scratch) + offset;
    if (layout.forms == 1) {
      pack_rows<1>(from, row_stride, rows, k, range, layout.stride(), target);
    } else if (layout.forms == kPairings) {
      pack_rows<kPairings>(from, row_stride, rows, k, range, layout.stride(), target);
    } else {
      pack_rows<kMostForms>(from, row_stride, rows, k, range, layout.stride(), target);
    }
  };
  if (layout.together) {
    for (std::int64_t r = 0; r < layout.count; r += kRowsAtOnce) pack(r, min_of(kRowsAtOnce, layout.count - r), 4 * r);
    return;
  }
  const RowGroups groups(layout.count, kGroupRows);
  for (std::int64_t g = 0; g < groups.all; ++g) pack(groups.first(g), groups.rows(g), g * layout.panel_bytes());
}

}  // namespace swin::cpu::SWIN_ISA
#endif
