// The GEMM for AVX2 without VNNI whose weights prove its exactness: faster than vpmaddwd, equal to it to the bit.
//
// vpmaddubsw multiplies 32 pairs of u8 and s8, twice as many as vpmaddwd, but saturates to int16. Weights do not change
// after they are loaded, so what a sum of products can reach is known then: with u in 0..top (a - lowest, of inputs
// whose InputRange is lowest..127: top is 255 for any int8, 127 behind a ReLU, little more behind a GELU), it lies in
// [-top * N, top * P], where P and N are the sums of the positive weights and of the negative ones' amounts. As long as
// P and N stay within 32767 / top, neither an instruction saturates nor a sum in int16 overflows, whatever the input.
// So for each span of one or two units of columns, the words of 4 k are put into groups of up to six that keep this
// bound in every lane, as the order of an integer sum is free:
//
//   t = vpmaddubsw(word 0) + ... + vpmaddubsw(word 5) in int16; acc += vpmaddwd(t, 1) in int32
//
// which is 13 instructions for 6 words where vpmaddwd needs 24. How full groups get depends on the weights
// (docs/epilogues.md); where they would not gain, pack_weight takes the form of gemm_core.h.
//
// Wide spans have two units. A group's weights, up to twelve vectors, stay in registers while all rows of a block pass,
// and the rows' sums lie in the first-level cache: a row's word, once loaded, meets two vectors, and what a group costs
// beside its products is shared by all rows.
//
// Narrow spans have one unit, whose sums for eight rows stay in registers. Each product needs a load, but half as many
// lanes bind a group, and a panel of eight rows is small enough for the first-level cache with each word in several
// forms. Weights that fill int8, as with a scale per output channel, need them: they have lanes whose own two weights
// are beyond the bound. Which two of a word's four inputs share a lane is free as well, and so is the sign of an input:
// top - u in its place negates its weights, and the constant that it adds is known. So a panel may hold each word in
// several forms, and each item reads the one that suits its 16 lanes. A lane that is beyond the bound in every form
// leaves its larger weight to a second item.
//
// Items of a span: the groups of six, then of five and so on; for each item a word (4 * the number of its form in the
// panel) and a vector of weights for each unit.
#pragma once

#include <iterator>
#include <utility>

#include "grouped_panels.h"
#include "memory.h"

#if defined(SWIN_GROUPED)
namespace swin::cpu::SWIN_ISA {

inline constexpr int kWideUnits = 2;
inline constexpr int kMaxGroup = 6;                     // of two units their weights leave four registers
inline constexpr int kNarrowSizes[] = {6, 4, 3, 2, 1};  // a loop each, whose end costs a wrong branch
inline constexpr int kWordsInRegisters = 4;  // of a narrow group: its other weights are read anew for each row
inline constexpr std::int64_t kWordBytes = kLanes * 4;  // of weights, for a unit
inline constexpr std::int64_t kCacheLine = 64;
inline constexpr std::int64_t kWeightsAhead = 2048;      // bytes ahead that a wide span's weights are fetched
inline constexpr std::int64_t kUnitsInCache = 96 << 10;  // bytes of weights that a second-level cache holds beside the rest
inline constexpr std::int64_t kMostPanelWords = 16384;  // times forms: an item's word is in 16 bits, times 4

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
  struct Span {
    std::int64_t first_item;
    std::int32_t groups[kMaxGroup + 1];  // by the number of their words

    std::int64_t items() const {
      std::int64_t sum = 0;
      for (int i = 1; i <= kMaxGroup; ++i) sum += i * groups[i];
      return sum;
    }
  };

  GroupedWeight(std::int64_t n_spans, std::int64_t n_items, int n_units, int n_forms)
      : items(n_items),
        units(n_units),
        forms(n_forms),
        spans(n_spans),
        words(n_items),
        weights(static_cast<std::int8_t*>(allocate_memory(n_items * n_units * kWordBytes))) {}
  GroupedWeight(const GroupedWeight&) = delete;
  GroupedWeight& operator=(const GroupedWeight&) = delete;
  ~GroupedWeight() { release_memory(weights); }

  PanelLayout layout(std::int64_t rows, std::int64_t k) const { return {units == kWideUnits, rows, k, forms}; }

  const std::int64_t items;
  const int units;  // of a span: 1 or kWideUnits
  const int forms;  // of each word in a panel: 1, kPairings or kMostForms
  const Array<Span> spans;
  const Array<std::uint16_t> words;  // of an item: 4 * (its word's number * forms + its form)
  std::int8_t* const weights;        // of an item: kWordBytes for each unit
};

// Spans of n columns; starts of sums are there for whole wide spans.
static inline std::int64_t spans_of(std::int64_t n, int units) { return ceil_div(units_of(n), units); }
static inline std::int64_t grouped_starts(std::int64_t n) { return spans_of(n, kWideUnits) * kWideUnits * kLanes; }

// Where a kernel is in a narrow span's items, and what it fetches to the second-level cache meanwhile: a line per
// group, two per group of more than four, from `ahead` up to `end`, beyond which there is the next panel's share, or
// nothing to fetch.
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
    for (int i = 0; i < G; ++i) a[i] = panel + at.words[i] * kRowsAtOnce;
    at.words += G;
    at.weights += G * kWordBytes;
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

// R rows of a panel against a narrow span.
template <int R, class Emit>
SWIN_INLINE static inline void narrow_kernel(const GroupedWeight::Span& span, GroupCursor at, const char* panel,
                                             const std::int32_t* start, Emit emit) {
  GroupSums sums;
  sums.each<R>([&](__m256i& sum, int) SWIN_INLINE {
    sum = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(start));
    asm("" : "+x"(sum));  // of its own from here: what GCC takes for one value it would copy in every loop
  });
  [&]<std::size_t... I>(std::index_sequence<I...>) SWIN_INLINE {
    (add_groups<R, kNarrowSizes[I]>(sums, panel, span.groups[kNarrowSizes[I]], at), ...);
  }(std::make_index_sequence<std::size(kNarrowSizes)>{});
  Vi results[R];
  sums.each<R>([&](const __m256i& sum, int r) SWIN_INLINE { results[r] = reinterpret_cast<Vi>(sum); });
  emit_all<R, 1>(emit.template operator()<1>(), 0, results);
}

template <int R, class Emit>
SWIN_INLINE static inline void dispatch_group_rows(std::int64_t rows, const GroupedWeight::Span& span,
                                                   const GroupCursor& at, const char* panel, const std::int32_t* start,
                                                   Emit emit) {
  if (rows == R) {
    narrow_kernel<R>(span, at, panel, start, emit);
  } else if constexpr (R > 1) {
    dispatch_group_rows<R - 1>(rows, span, at, panel, start, emit);
  }
}

// grouped_block for narrow spans. Meanwhile the next unit's weights are fetched, spread over what there is to do:
// waiting for them shows.
template <class Emit>
static inline void narrow_block(const GroupedWeight& w, const char* panels, std::int64_t count,
                                const PanelLayout& layout, const std::int32_t* starts, std::int64_t first_unit,
                                std::int64_t last_unit, Emit emit_columns) {
  const RowGroups split(count, kGroupRows);
  if (w.forms == 1) {  // all panels meet a unit before the next one: at a small M each weight meets few rows
    for (std::int64_t u = first_unit; u < last_unit; ++u) {
      const GroupedWeight::Span &unit = w.spans[u], &next = w.spans[min_of(u + 1, last_unit - 1)];
      const std::int8_t *own = w.weights + unit.first_item * kWordBytes,
                        *ahead = w.weights + next.first_item * kWordBytes;
      const std::int64_t lines = ceil_div(ceil_div(next.items() * kWordBytes, kCacheLine), split.all);
      for (std::int64_t p = 0; p < split.all; ++p) {
        const GroupCursor at{w.words + unit.first_item, own, ahead + p * lines * kCacheLine,
                             ahead + (p + 1) * lines * kCacheLine};
        dispatch_group_rows<kGroupRows>(split.rows(p), unit, at, panels + p * layout.panel_bytes(), starts + u * kLanes,
                                        rows_from(split.first(p), u * kLanes, emit_columns));
      }
    }
    return;
  }
  // Panels of several forms are larger, and each unit reads other parts of them: a panel stays in the first-level cache and
  // meets as many units as the second-level cache holds.
  const std::int64_t at_once = ceil_div(kUnitsInCache, layout.words * kWordBytes);
  for (std::int64_t from = first_unit; from < last_unit; from += at_once) {
    for (std::int64_t p = 0; p < split.all; ++p) {
      for (std::int64_t u = from; u < min_of(last_unit, from + at_once); ++u) {
        const GroupedWeight::Span &unit = w.spans[u], &next = w.spans[min_of(u + 1, last_unit - 1)];
        const std::int8_t* ahead = w.weights + next.first_item * kWordBytes;
        const GroupCursor at{w.words + unit.first_item, w.weights + unit.first_item * kWordBytes, ahead,
                             ahead + next.items() * kWordBytes};
        dispatch_group_rows<kGroupRows>(split.rows(p), unit, at, panels + p * layout.panel_bytes(), starts + u * kLanes,
                                        rows_from(split.first(p), u * kLanes, emit_columns));
      }
    }
  }
}

// A panel of all rows, their sums (kWideUnits from one row to the next), and where a kernel is in a wide span's items.
struct WideRows {
  const char* panel;
  std::int64_t panel_rows, rows;  // with and without what fills it up
  __m256i* sums;
  const std::uint16_t* words;
  const std::int8_t* weights;
};

// Adds `count` times S groups of G items to the sums of all rows. S small groups at once share what reading and writing
// a sum costs.
template <int G, int S = 1>
[[gnu::noinline]] static void add_wide_groups(WideRows& at, std::int64_t count) {
  constexpr int kItems = G * S;
  const __m256i ones = _mm256_set1_epi16(1);
  for (; count > 0; --count) {
    __m256i w[kItems][kWideUnits];
    const char* a[kItems];
    for (int i = 0; i < kItems; ++i) {
      const std::int8_t* weights = at.weights + i * kWideUnits * kWordBytes;
      for (int u = 0; u < kWideUnits; ++u) {
        w[i][u] = _mm256_load_si256(reinterpret_cast<const __m256i*>(weights) + u);
        asm("" : "+x"(w[i][u]));  // in registers: or they would be read anew for each row
      }
      __builtin_prefetch(weights + kWeightsAhead, 0, 3);
      a[i] = at.panel + at.words[i] * at.panel_rows;
    }
    at.words += kItems;
    at.weights += kItems * kWideUnits * kWordBytes;
    __m256i* sums = at.sums;
#pragma GCC unroll 1
    for (std::int64_t r = 0; r < at.rows; ++r, sums += kWideUnits) {
      __m256i sum[kWideUnits];
      for (int u = 0; u < kWideUnits; ++u) sum[u] = sums[u];
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) {
        __m256i t[kWideUnits];
#pragma GCC unroll 8
        for (int i = s * G; i < (s + 1) * G; ++i) {
          std::int32_t word;
          std::memcpy(&word, a[i] + 4 * r, 4);
          const __m256i input = _mm256_set1_epi32(word);
          for (int u = 0; u < kWideUnits; ++u) {
            const __m256i product = _mm256_maddubs_epi16(input, w[i][u]);
            t[u] = i == s * G ? product : _mm256_add_epi16(t[u], product);
            asm("" : "+x"(t[u]));  // as in add_groups
          }
        }
        for (int u = 0; u < kWideUnits; ++u) sum[u] = _mm256_add_epi32(sum[u], _mm256_madd_epi16(t[u], ones));
      }
      for (int u = 0; u < kWideUnits; ++u) sums[u] = sum[u];
    }
  }
}

// grouped_block for wide spans.
template <class Emit>
static inline void wide_block(const GroupedWeight& w, const char* panel, std::int64_t rows, const PanelLayout& layout,
                              const std::int32_t* starts, std::int64_t first_unit, std::int64_t last_unit,
                              Emit emit_columns) {
  __m256i sums[kMostPanelRows * kWideUnits];
  for (std::int64_t u = first_unit; u < last_unit; u += kWideUnits) {
    const __m256i* start = reinterpret_cast<const __m256i*>(starts + u * kLanes);
    const __m256i low = _mm256_loadu_si256(start), high = _mm256_loadu_si256(start + 1);
    for (std::int64_t r = 0; r < rows; ++r) {
      sums[r * kWideUnits] = low;
      sums[r * kWideUnits + 1] = high;
    }
    const GroupedWeight::Span& span = w.spans[u / kWideUnits];
    WideRows at{panel,
                layout.rows(),
                rows,
                sums,
                w.words + span.first_item,
                w.weights + span.first_item * kWideUnits * kWordBytes};
    add_wide_groups<6>(at, span.groups[6]);
    add_wide_groups<5>(at, span.groups[5]);
    add_wide_groups<4>(at, span.groups[4]);
    add_wide_groups<3>(at, span.groups[3]);
    add_wide_groups<2, 2>(at, span.groups[2] / 2);
    add_wide_groups<2>(at, span.groups[2] % 2);
    add_wide_groups<1, 4>(at, span.groups[1] / 4);
    add_wide_groups<1>(at, span.groups[1] % 4);
    const Vi* results = reinterpret_cast<const Vi*>(sums);
    if (last_unit - u >= kWideUnits) {
      const auto emit = emit_columns.template operator()<kWideUnits>(u * kLanes);
      constexpr int kRows = kEmitVectors / kWideUnits;
      std::int64_t r = 0;
      for (; r + kRows <= rows; r += kRows) emit_rows<kRows, kWideUnits>(emit, r, results + r * kWideUnits);
      for (; r < rows; ++r) emit(r, results + r * kWideUnits);
    } else {
      const auto emit = emit_columns.template operator()<1>(u * kLanes);
      for (std::int64_t r = 0; r < rows; ++r) emit(r, results + r * kWideUnits);
    }
  }
}

// gemm_block of gemm_core.h for `rows` rows in panels of w's layout. Begins at a multiple of kWideUnits.
template <class Emit>
static inline void grouped_block(const GroupedWeight& w, const char* panels, std::int64_t rows, std::int64_t k,
                                 const std::int32_t* starts, std::int64_t first_unit, std::int64_t last_unit,
                                 Emit emit_columns) {
  const PanelLayout layout = w.layout(rows, k);
  if (w.units == kWideUnits) {
    wide_block(w, panels, rows, layout, starts, first_unit, last_unit, emit_columns);
  } else {
    narrow_block(w, panels, rows, layout, starts, first_unit, last_unit, emit_columns);
  }
}

}  // namespace swin::cpu::SWIN_ISA
#endif
