// The GEMM for AVX2 without VNNI whose weights prove its exactness: faster than vpmaddwd, equal to it to the bit.
//
// vpmaddubsw multiplies 32 pairs of u8 and s8, twice as many as vpmaddwd, but saturates to int16. Weights do not change
// after they are loaded, so what a sum of products can reach is known then: with u in 0..top (a + 128 for signed input,
// hence top 255; 127 behind a ReLU), sum_i u_i w_i lies in [-top * N, top * P], where P and N are the sums of the
// positive weights and of the negative ones' amounts. As long as P and N stay within 32767 / top, neither an instruction
// saturates nor a sum in int16 overflows, whatever the input. So for each unit of kLanes columns, the words of 4 k are put
// into groups of up to six that keep this bound in every lane, as the order of an integer sum is free:
//
//   t = vpmaddubsw(word 0) + ... + vpmaddubsw(word 5) in int16; acc += vpmaddwd(t, 1) in int32
//
// which is 13 instructions for 6 words where vpmaddwd needs 24. How full groups get depends on the weights
// (docs/epilogues.md); where they would not gain, pack_weight takes the form of gemm_core.h.
//
// Weights that fill int8, as with a scale per output channel, have lanes whose own two weights are beyond the bound. Which
// two of a word's four inputs share a lane is free as well, and so is the sign of an input: 255 - u in its place negates
// its weights, and the constant that it adds is known. So a panel may hold each word in several forms, and each item reads
// the one that suits its 16 lanes. A lane that is beyond the bound in every form leaves its larger weight to a second item.
//
// Items of a unit: the groups of six, then of four, three, two and one; for each item a word (as 4 * the number of its
// form in the panel) and kLanes x 4 weights. Rows: panels of kGroupRows rows, word by word, form by form, so that an item
// needs one address.
#pragma once

#include <utility>

#include "gemm_core.h"
#include "memory.h"

#if defined(__AVX2__) && !defined(SWIN_VNNI)
#define SWIN_GROUPED

namespace swin::cpu::SWIN_ISA {

static_assert(kLanes == 8);
#if defined(SWIN_SANITIZED)
inline constexpr int kGroupRows = 3;  // as kMaxRows
#else
inline constexpr int kGroupRows = 8;  // accumulators; beside them kWordsInRegisters of weights, and what a step needs
#endif
inline constexpr std::int64_t kPanelWordBytes = 4 * 8;  // a word of each row of a panel, at most 8, in one form
inline constexpr int kMaxGroup = 6;
inline constexpr int kGroupSizes[] = {6, 4, 3, 2, 1};  // a loop each, whose end costs a wrong branch
inline constexpr int kSizes = 5;
inline constexpr int kWordsInRegisters = 4;  // of a group: its other weights are read anew for each row
inline constexpr std::int64_t kItemBytes = kLanes * 4;
inline constexpr std::int64_t kCacheLine = 64;
inline constexpr std::int64_t kUnitsInCache = 96 << 10;  // bytes of weights that a second-level cache holds beside the rest
inline constexpr std::int64_t kMostPanelWords = 16384;  // times forms: an item's word is in 16 bits, times 4

// The forms of a word: each way to pair its inputs as they are, then the same with the second of each pair complemented.
inline constexpr int kPairings = 3, kMostForms = 2 * kPairings;
inline constexpr int kPairing[kPairings][4] = {{0, 1, 2, 3}, {0, 2, 1, 3}, {0, 3, 1, 2}};

// `n` of T, whose constructor does nothing; freed where a later one is not to be had, too.
template <class T>
class Array {
 public:
  explicit Array(std::int64_t n) : data_(static_cast<T*>(::operator new(n * sizeof(T)))) {}
  ~Array() { ::operator delete(data_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  operator T*() const { return data_; }

 private:
  T* const data_;
};

// A weight in groups; group_weight (pack_grouped.h) fills it.
class GroupedWeight {
 public:
  struct Unit {
    std::int64_t first_item;
    std::int32_t groups[kSizes];  // of each of kGroupSizes

    std::int64_t items() const {
      std::int64_t sum = 0;
      for (int i = 0; i < kSizes; ++i) sum += kGroupSizes[i] * groups[i];
      return sum;
    }
  };

  GroupedWeight(std::int64_t n_units, std::int64_t n_items, int n_forms)
      : items(n_items),
        forms(n_forms),
        units(n_units),
        words(n_items),
        weights(static_cast<std::int8_t*>(allocate_memory(n_items * kItemBytes))) {}
  GroupedWeight(const GroupedWeight&) = delete;
  GroupedWeight& operator=(const GroupedWeight&) = delete;
  ~GroupedWeight() { release_memory(weights); }

  const std::int64_t items;
  const int forms;  // of each word in a panel: 1, kPairings or kMostForms
  const Array<Unit> units;
  const Array<std::uint16_t> words;  // of an item: 4 * (its word's number * forms + its form)
  std::int8_t* const weights;        // of an item: kItemBytes
};

static inline std::int64_t panels_of(std::int64_t rows) { return ceil_div(rows, kGroupRows); }
static inline std::int64_t panel_bytes(std::int64_t k, int forms) { return ceil_div(k, 4) * forms * kPanelWordBytes; }

// A word of eight rows to `target`, in each of its forms.
template <int Forms>
SWIN_INLINE static inline void store_forms(__m256i word, char* target) {
  const auto store_form = [target](int form, __m256i value) SWIN_INLINE {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + form * kPanelWordBytes), value);
  };
  store_form(0, word);
  if constexpr (Forms > 1) {
    const __m256i second = _mm256_set1_epi16(static_cast<short>(0xff00));
    const auto paired = [&](const int* of) SWIN_INLINE {
      const int bytes = of[0] | of[1] << 8 | of[2] << 16 | of[3] << 24, next = 0x04040404;
      return _mm256_shuffle_epi8(word, _mm256_setr_epi32(bytes, bytes + next, bytes + 2 * next, bytes + 3 * next, bytes,
                                                         bytes + next, bytes + 2 * next, bytes + 3 * next));
    };
    const __m256i words[kPairings] = {word, paired(kPairing[1]), paired(kPairing[2])};
    for (int i = 0; i < kPairings; ++i) {
      if (i > 0) store_form(i, words[i]);
      if constexpr (Forms > kPairings) store_form(kPairings + i, _mm256_xor_si256(words[i], second));
    }
  }
}

// Eight rows of 32 bytes at rows[0..7], each byte flipped by `flip`, to eight words of each row.
template <int Forms>
static inline void transpose_panel(const std::int8_t* const* rows, std::int64_t offset, __m256i flip, char* panel) {
  __m256i r[8], s[8];
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[i] + offset)), flip);
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
    store_forms<Forms>(_mm256_permute2x128_si256(r[i], r[i + 4], 0x20), panel + i * Forms * kPanelWordBytes);
    store_forms<Forms>(_mm256_permute2x128_si256(r[i], r[i + 4], 0x31), panel + (i + 4) * Forms * kPanelWordBytes);
  }
}

template <int Forms>
static inline void pack_panels_in(const std::int8_t* x, std::int64_t stride, std::int64_t rows, std::int64_t k,
                                  std::uint8_t flip, char* panel) {
  constexpr std::int64_t kWordBytes = Forms * kPanelWordBytes;
  const RowGroups panels(rows, kGroupRows);
  const std::int64_t full = k / 32 * 32;
  for (std::int64_t p = 0; p < panels.all; ++p, panel += panel_bytes(k, Forms)) {
    const std::int64_t first = panels.first(p), count = panels.rows(p);
    const std::int8_t* row[8];
    for (std::int64_t i = 0; i < 8; ++i) row[i] = x + (first + min_of(i, count - 1)) * stride;  // beyond `count`: unused
    for (std::int64_t i = 0; i < full; i += 32) {
      transpose_panel<Forms>(row, i, _mm256_set1_epi8(static_cast<char>(flip)), panel + i / 4 * kWordBytes);
    }
    for (std::int64_t i = full; i < k; i += 4) {
      alignas(32) char word[kPanelWordBytes] = {};
      for (std::int64_t r = 0; r < count; ++r) {
        for (std::int64_t j = 0; j < min_of(k - i, 4); ++j) {
          word[4 * r + j] = static_cast<char>(static_cast<std::uint8_t>(row[r][i + j]) ^ flip);
        }
      }
      store_forms<Forms>(_mm256_load_si256(reinterpret_cast<const __m256i*>(word)), panel + i / 4 * kWordBytes);
    }
  }
}

// `rows` rows of k values, `stride` bytes apart, to panels of `forms` forms of each word; the signed ones plus 128.
static inline void pack_panels(const std::int8_t* x, std::int64_t stride, std::int64_t rows, std::int64_t k,
                               InputRange input, int forms, void* scratch) {
  const std::uint8_t flip = input == InputRange::kSigned ? 0x80 : 0;
  char* panel = static_cast<char*>(scratch);
  if (forms == 1) {
    pack_panels_in<1>(x, stride, rows, k, flip, panel);
  } else if (forms == kPairings) {
    pack_panels_in<kPairings>(x, stride, rows, k, flip, panel);
  } else {
    pack_panels_in<kMostForms>(x, stride, rows, k, flip, panel);
  }
}

// Where a kernel is in its unit's items, and what it fetches to the second-level cache meanwhile: a line per group, two per
// group of more than four, from `ahead` up to `end`, beyond which there is the next panel's share, or nothing to fetch.
struct GroupCursor {
  const std::uint16_t* words;
  const std::int8_t *weights, *ahead, *end;
};

// The accumulators of up to eight rows. Named: as an array, GCC 12 keeps some of them in memory in every loop.
struct GroupSums {
  __m256i row0, row1, row2, row3, row4, row5, row6, row7;

  template <int R, class Body>
  SWIN_INLINE void each(Body&& body) {
    body(row0, 0);
    if constexpr (R > 1) body(row1, 1);
    if constexpr (R > 2) body(row2, 2);
    if constexpr (R > 3) body(row3, 3);
    if constexpr (R > 4) body(row4, 4);
    if constexpr (R > 5) body(row5, 5);
    if constexpr (R > 6) body(row6, 6);
    if constexpr (R > 7) body(row7, 7);
  }
};

// Adds `count` groups of G items to the sums of R rows. With the sanitizers' checks one instance for all kernels, or each
// would take as long to compile as the rest of them.
template <int R, int G>
#if defined(SWIN_SANITIZED)
[[gnu::noinline]] static void
#else
SWIN_INLINE static inline void
#endif
add_groups(GroupSums& sums, const char* panel, std::int32_t count, GroupCursor& at) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (; count > 0; --count) {
    constexpr int kHeld = G < kWordsInRegisters ? G : kWordsInRegisters;
    const __m256i* weights = reinterpret_cast<const __m256i*>(at.weights);
    __m256i w[kHeld];
    const char* a[G];
    for (int i = 0; i < kHeld; ++i) w[i] = _mm256_load_si256(weights + i);
    for (int i = 0; i < G; ++i) a[i] = panel + at.words[i] * (kPanelWordBytes / 4);
    at.words += G;
    at.weights += G * kItemBytes;
    for (int i = 0; i < G; i += kWordsInRegisters) {
      __builtin_prefetch(at.ahead < at.end ? at.ahead : at.weights, 0, 2);
      at.ahead += kCacheLine;
    }
    sums.each<R>([&](__m256i& sum, int r) SWIN_INLINE {
      const auto product = [&](int i) SWIN_INLINE {
        std::int32_t word;
        std::memcpy(&word, a[i] + 4 * r, 4);
        const __m256i input = _mm256_set1_epi32(word);
        if (i < kHeld) return _mm256_maddubs_epi16(input, w[i]);
        __m256i result;  // as an intrinsic the weights would be read once, and then moved out of registers and in again
        asm("vpmaddubsw %2, %1, %0" : "=x"(result) : "x"(input), "m"(weights[i]));
        return result;
      };
      __m256i t = product(0);
#pragma GCC unroll 8
      for (int i = 1; i < G; ++i) {
        t = _mm256_add_epi16(t, product(i));
        asm("" : "+x"(t));  // one after the other: all products at once are more than the registers hold
      }
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(t, ones));
    });
  }
}

// R rows of a panel against a unit.
template <int R, class Emit>
SWIN_INLINE static inline void grouped_kernel(const GroupedWeight::Unit& unit, GroupCursor at, const char* panel,
                                              const std::int32_t* start, Emit emit) {
  GroupSums sums;
  sums.each<R>([&](__m256i& sum, int) SWIN_INLINE {
    sum = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(start));
    asm("" : "+x"(sum));  // of its own from here: what GCC takes for one value it would copy in every loop
  });
  [&]<int... I>(std::integer_sequence<int, I...>) SWIN_INLINE {
    (add_groups<R, kGroupSizes[I]>(sums, panel, unit.groups[I], at), ...);
  }(std::make_integer_sequence<int, kSizes>{});
  const auto emit_row = emit.template operator()<1>();
  sums.each<R>([&](const __m256i& sum, int r) SWIN_INLINE {
    const Vi result = reinterpret_cast<Vi>(sum);
    emit_row(r, &result);
  });
}

template <int R, class Emit>
SWIN_INLINE static inline void dispatch_group_rows(std::int64_t rows, const GroupedWeight::Unit& unit,
                                                   const GroupCursor& at, const char* panel, const std::int32_t* start,
                                                   Emit emit) {
  if (rows == R) {
    grouped_kernel<R>(unit, at, panel, start, emit);
  } else if constexpr (R > 1) {
    dispatch_group_rows<R - 1>(rows, unit, at, panel, start, emit);
  }
}

// gemm_block of gemm_core.h for `count` rows in panels. Meanwhile the next unit's weights are fetched, spread over what there
// is to do: waiting for them shows.
template <class Emit>
static inline void grouped_block(const GroupedWeight& w, const char* panels, std::int64_t count, std::int64_t k,
                                 const std::int32_t* starts, std::int64_t first_unit, std::int64_t last_unit,
                                 Emit emit_columns) {
  const RowGroups split(count, kGroupRows);
  if (w.forms == 1) {  // all panels meet a unit before the next one: at a small M each weight meets few rows
    for (std::int64_t u = first_unit; u < last_unit; ++u) {
      const GroupedWeight::Unit &unit = w.units[u], &next = w.units[min_of(u + 1, last_unit - 1)];
      const std::int8_t *own = w.weights + unit.first_item * kItemBytes, *ahead = w.weights + next.first_item * kItemBytes;
      const std::int64_t lines = ceil_div(ceil_div(next.items() * kItemBytes, kCacheLine), split.all);
      for (std::int64_t p = 0; p < split.all; ++p) {
        const GroupCursor at{w.words + unit.first_item, own, ahead + p * lines * kCacheLine,
                             ahead + (p + 1) * lines * kCacheLine};
        dispatch_group_rows<kGroupRows>(split.rows(p), unit, at, panels + p * panel_bytes(k, 1), starts + u * kLanes,
                                        rows_from(split.first(p), u * kLanes, emit_columns));
      }
    }
    return;
  }
  // Panels of several forms are larger, and each unit reads other parts of them: a panel stays in the first-level cache and
  // meets as many units as the second-level cache holds.
  const std::int64_t at_once = ceil_div(kUnitsInCache, ceil_div(k, 4) * kItemBytes);
  for (std::int64_t from = first_unit; from < last_unit; from += at_once) {
    for (std::int64_t p = 0; p < split.all; ++p) {
      for (std::int64_t u = from; u < min_of(last_unit, from + at_once); ++u) {
        const GroupedWeight::Unit &unit = w.units[u], &next = w.units[min_of(u + 1, last_unit - 1)];
        const std::int8_t* ahead = w.weights + next.first_item * kItemBytes;
        const GroupCursor at{w.words + unit.first_item, w.weights + unit.first_item * kItemBytes, ahead,
                             ahead + next.items() * kItemBytes};
        dispatch_group_rows<kGroupRows>(split.rows(p), unit, at, panels + p * panel_bytes(k, w.forms),
                                        starts + u * kLanes, rows_from(split.first(p), u * kLanes, emit_columns));
      }
    }
  }
}

}  // namespace swin::cpu::SWIN_ISA
#endif
