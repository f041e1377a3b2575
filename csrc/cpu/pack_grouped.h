// Which words of a weight's columns share an int16 sum, and in which form: the planning of gemm_grouped.h, once per weight,
// at load.
#pragma once

#include "gemm_grouped.h"

#if defined(SWIN_GROUPED)
#include <new>

namespace swin::cpu::SWIN_ISA {

inline constexpr int kPlannedItems = 256;    // among which groups are sought: more would find little and take longer
inline constexpr int kSampledUnits = 8;      // whose plans decide the number of forms, and of units of a span
inline constexpr double kWorthForms = 0.92;  // of the cycles with one form, at most: each form costs cache
inline constexpr std::int64_t kPanelInCache = 32 << 10;  // bytes of a panel with all its forms, for the first-level cache

// Cycles of a product of a row, a word and a unit in a group of so many words, of narrow and of wide spans; and with
// the kernels of gemm_core.h (Zen 3, docs/epilogues.md).
inline constexpr double kGroupCycles[kWideUnits][kMaxGroup + 1] = {{0, 1.32, 1.04, 0.95, 0.91, 0.92, 0.92},
                                                                   {0, 1.12, 0.88, 0.83, 0.77, 0.75, 0.74}};
inline constexpr double kSignedDotCycles = 1.4, kNonNegativeDotCycles = 1.07;

// The most that the positive weights of a lane, and the negative ones, may sum up to.
static inline int group_bound(InputRange input) { return 32767 / input.top(); }

// One item's weights for U units, in the order of its word's form, and their sums per int16 lane.
template <int U>
struct GroupItem {
  static constexpr int kBytes = U * kWordBytes, kInt16Lanes = kBytes / 2;
  std::int16_t positive[kInt16Lanes], negative[kInt16Lanes];  // P and N
  std::int8_t weights[kBytes];
  std::int32_t word, form, size;  // size: of all lanes' larger sums
};

// Sums of all int16 lanes, 0..32767 each.
template <int U>
struct LaneSums {
  __m256i of[U];

  LaneSums plus(const std::int16_t* x) const {
    LaneSums result;
    for (int i = 0; i < U; ++i) {
      result.of[i] = _mm256_add_epi16(of[i], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x) + i));
    }
    return result;
  }
};

// The largest lane of both.
template <int U>
static inline int largest_lane(const LaneSums<U>& a, const LaneSums<U>& b) {
  __m256i most = _mm256_max_epi16(a.of[0], b.of[0]);
  for (int i = 1; i < U; ++i) most = _mm256_max_epi16(most, _mm256_max_epi16(a.of[i], b.of[i]));
  const __m128i half = _mm_max_epi16(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  return 0xffff ^ (_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(half, _mm_set1_epi16(-1)))) & 0xffff);
}

// `bytes` of weights of a word as its `form` needs them; false where a weight has no int8 to be negated to.
static inline bool weights_in_form(const std::int8_t* weights, int bytes, int form, std::int8_t* out) {
  const int* pairing = kPairing[form % kPairings];
  for (int i = 0; i < bytes; ++i) {
    const int w = weights[i / 4 * 4 + pairing[i % 4]], value = form >= kPairings && i % 2 == 1 ? -w : w;
    if (value > 127) return false;
    out[i] = static_cast<std::int8_t>(value);
  }
  return true;
}

// Takes weights in the form of `item`'s word into it, but for the larger one of each lane whose two are beyond `bound`
// together: it stays in `rest` (else 0), for an item of its own. Returns how many. Half a lane each fits into more groups than
// a full one and the excess.
template <int U>
static inline int take_item(const std::int8_t* weights, int bound, GroupItem<U>& item, std::int8_t* rest) {
  int left = 0;
  item.size = 0;
  std::memcpy(item.weights, weights, sizeof item.weights);
  std::memset(rest, 0, sizeof item.weights);
  for (int lane = 0; lane < item.kInt16Lanes; ++lane) {
    std::int8_t* w = item.weights + 2 * lane;
    const int sum = w[0] + w[1];
    if ((w[0] < 0) == (w[1] < 0) && (sum > bound || -sum > bound)) {
      const int larger = (w[0] < 0) == (w[0] < w[1]) ? 0 : 1;
      rest[2 * lane + larger] = w[larger];
      w[larger] = 0;
      ++left;
    }
    const int positive = (w[0] > 0 ? w[0] : 0) + (w[1] > 0 ? w[1] : 0), negative = positive - w[0] - w[1];
    item.positive[lane] = static_cast<std::int16_t>(positive);
    item.negative[lane] = static_cast<std::int16_t>(negative);
    item.size += positive > negative ? positive : negative;
  }
  return left;
}

// Plans spans of U units of one weight, one after the other.
template <int U>
class SpanPlanner {
 public:
  using Item = GroupItem<U>;

  SpanPlanner(std::int64_t words, InputRange input, int forms)
      : words_(words),
        top_(input.top()),
        bound_(group_bound(input)),
        forms_(forms),
        items_(words * (forms + 1)),
        choices_(most_items()),
        groups_(most_items()) {}

  std::int64_t most_items() const { return 2 * words_; }

  // `span`: Item::kBytes of weights per word, four of a column after the other. Finds the groups of its items.
  void plan(const std::int8_t* span) {
    take_words(span);
    group_count_ = 0;
    for (std::int64_t i = 0; i < choice_count_; i += kPlannedItems) group(i, min_of(choice_count_, i + kPlannedItems));
  }

  // Writes the items' words and weights, and adds to `starts` of the span's columns what complemented inputs make of
  // them.
  GroupedWeight::Span write(std::int64_t first_item, std::uint16_t* words, std::int8_t* weights,
                            std::int32_t* starts) const {
    GroupedWeight::Span result{first_item, {}};
    for (int size = kMaxGroup; size > 0; --size) {
      for (std::int64_t g = 0; g < group_count_; ++g) {
        if (groups_[g].size != size) continue;
        ++result.groups[size];
        for (int i = 0; i < size; ++i) {
          const Item& item = items_[groups_[g].items[i]];
          *words++ = static_cast<std::uint16_t>(4 * (item.word * forms_ + item.form));
          std::memcpy(weights, item.weights, Item::kBytes);
          weights += Item::kBytes;
          if (item.form < kPairings) continue;
          for (int j = 1; j < Item::kBytes; j += 2)
            starts[j / 4] -= top_ * item.weights[j];  // u w = top w + (top - u)(-w)
        }
      }
    }
    return result;
  }

  std::int64_t item_count() const { return choice_count_; }
  // Of a row and a unit.
  double cycles() const {
    double sum = 0;
    for (std::int64_t g = 0; g < group_count_; ++g) sum += groups_[g].size * kGroupCycles[U - 1][groups_[g].size];
    return sum;
  }

 private:
  struct Choice {
    std::int32_t first, count;  // items of which one is taken: a word's forms that fit
  };
  struct Group {
    std::int32_t size, items[kMaxGroup];
  };

  void take_words(const std::int8_t* span) {
    choice_count_ = 0;
    std::int32_t items = 0;
    for (std::int64_t word = 0; word < words_; ++word) {
      const std::int32_t first = items;
      Item fewest{};
      std::int8_t rest[Item::kBytes], fewest_rest[Item::kBytes];
      int least = Item::kInt16Lanes + 1;
      for (int form = 0; form < forms_; ++form) {
        std::int8_t weights[Item::kBytes];
        if (!weights_in_form(span + word * Item::kBytes, Item::kBytes, form, weights)) continue;
        Item& item = items_[items];
        item.word = static_cast<std::int32_t>(word);
        item.form = form;
        const int left = take_item(weights, bound_, item, rest);
        if (left == 0) {
          ++items;
        } else if (left < least) {
          least = left;
          fewest = item;
          std::memcpy(fewest_rest, rest, Item::kBytes);
        }
      }
      if (items > first) {
        choices_[choice_count_++] = {first, items - first};
        continue;
      }
      items_[items] = fewest;
      choices_[choice_count_++] = {items++, 1};
      Item& second = items_[items];  // a lane holds one weight now: at most 128
      second.word = fewest.word;
      second.form = fewest.form;
      take_item(fewest_rest, bound_, second, rest);
      choices_[choice_count_++] = {items++, 1};
    }
  }

  // A narrow span has no loop for groups of five.
  static bool is_group_size(int size) {
    if (U > 1) return true;
    for (const int allowed : kNarrowSizes) {
      if (size == allowed) return true;
    }
    return false;
  }

  // The groups of choices [first, last): the largest first, with the largest that still fit, each in the form that leaves
  // the most room. What makes a group one too large for a loop waits for another.
  void group(std::int64_t first, std::int64_t last) {
    std::int32_t order[kPlannedItems];
    int left = 0;
    for (std::int64_t i = first; i < last; ++i) {
      const std::int32_t size = items_[choices_[i].first].size;
      int at = left++;
      for (; at > 0 && items_[choices_[order[at - 1]].first].size < size; --at) order[at] = order[at - 1];
      order[at] = static_cast<std::int32_t>(i);
    }
    while (left > 0) {
      Group& group = groups_[group_count_++];
      group.size = 0;
      LaneSums<U> positive{}, negative{};
      int kept = 0, last_kept = 0;
      std::int32_t last_taken = -1;
      for (int i = 0; i < left; ++i) {
        const Choice choice = choices_[order[i]];
        std::int32_t best = -1;
        if (group.size < kMaxGroup) {
          int least = bound_ + 1;
          for (std::int32_t j = choice.first; j < choice.first + choice.count; ++j) {
            const int largest = largest_lane(positive.plus(items_[j].positive), negative.plus(items_[j].negative));
            if (largest >= least) continue;
            least = largest;
            best = j;
          }
        }
        if (best < 0) {
          order[kept++] = order[i];
          continue;
        }
        positive = positive.plus(items_[best].positive);
        negative = negative.plus(items_[best].negative);
        group.items[group.size++] = best;
        last_taken = order[i];
        last_kept = kept;
      }
      left = kept;
      if (is_group_size(group.size)) continue;
      --group.size;
      for (int i = left++; i > last_kept; --i) order[i] = order[i - 1];
      order[last_kept] = last_taken;
    }
  }

  const std::int64_t words_;
  const int top_, bound_, forms_;
  const Array<Item> items_;
  const Array<Choice> choices_;
  const Array<Group> groups_;
  std::int64_t choice_count_ = 0, group_count_ = 0;
};

// The weights of a matrix [n, 4 * words] in units, of which `unit_of(u)` gives the kWordBytes of each word (and may
// reuse its memory), as spans of U units: word by word; beyond n zeros.
template <int U, class UnitOf>
class Spans {
 public:
  Spans(std::int64_t n, std::int64_t words, const UnitOf& unit_of)
      : count(spans_of(n, U)), units_(units_of(n)), words_(words), unit_of_(unit_of), bytes_(words * U * kWordBytes) {}

  const std::int8_t* of(std::int64_t span) const {
    std::memset(bytes_, 0, words_ * U * kWordBytes);
    for (std::int64_t v = 0; v < U && span * U + v < units_; ++v) {
      const std::int8_t* unit = unit_of_(span * U + v);
      for (std::int64_t i = 0; i < words_; ++i)
        std::memcpy(bytes_ + (i * U + v) * kWordBytes, unit + i * kWordBytes, kWordBytes);
    }
    return bytes_;
  }

  const std::int64_t count;

 private:
  const std::int64_t units_, words_;
  const UnitOf& unit_of_;
  const Array<std::int8_t> bytes_;
};

// How a weight is multiplied: in spans of so many units, each word of a row in so many forms; 0: in another way.
struct GroupedForm {
  int units = 0, forms = 0;
  double cycles = 0;  // of a product of a row, a word and a unit
};

// Spans of U units and words in `forms` forms, by the plans of some spans.
template <int U, class UnitOf>
static inline GroupedForm grouped_form(int forms, std::int64_t n, std::int64_t words, InputRange input,
                                       const UnitOf& unit_of) {
  const Spans<U, UnitOf> spans(n, words, unit_of);
  const std::int64_t sampled = min_of(spans.count, kSampledUnits / U);
  SpanPlanner<U> planner(words, input, forms);
  double cycles = 0;
  for (std::int64_t i = 0; i < sampled; ++i) {
    planner.plan(spans.of(i * spans.count / sampled));
    cycles += planner.cycles();
  }
  return {U, forms, cycles / static_cast<double>(sampled * words)};
}

// The best of them. Several forms gain where any two weights may share a lane only with inputs complemented: not behind
// an activation, whose bound is larger.
template <class UnitOf>
static inline GroupedForm best_form(std::int64_t n, std::int64_t words, InputRange input, const UnitOf& unit_of) {
  GroupedForm best{0, 0, input == InputRange::kNonNegative ? kNonNegativeDotCycles : kSignedDotCycles};
  const auto consider = [&](const GroupedForm& form, double worth) {
    if (form.cycles < worth * best.cycles) best = form;
  };
  if (words > kMostPanelWords) return best;
  consider(grouped_form<kWideUnits>(1, n, words, input, unit_of), 1);
  consider(grouped_form<1>(1, n, words, input, unit_of), 1);
  const int many = words * kMostForms * kRowsAtOnce * 4 <= kPanelInCache ? kMostForms : kPairings;
  if (input == InputRange::kSigned && words * many <= kMostPanelWords) {
    consider(grouped_form<1>(many, n, words, input, unit_of), kWorthForms);
  }
  return best;
}

// The weight of Spans in groups of `form`. starts[n]: what a sum begins with, added to.
template <int U, class UnitOf>
static inline GroupedWeight* group_spans(const GroupedForm& form, std::int64_t n, std::int64_t words, InputRange input,
                                         std::int32_t* starts, const UnitOf& unit_of) {
  const Spans<U, UnitOf> spans(n, words, unit_of);
  SpanPlanner<U> planner(words, input, form.forms);
  GroupedWeight room(spans.count, spans.count * planner.most_items(), U, form.forms);
  std::int64_t items = 0;
  for (std::int64_t s = 0; s < spans.count; ++s) {
    planner.plan(spans.of(s));
    room.spans[s] =
        planner.write(items, room.words + items, room.weights + items * U * kWordBytes, starts + s * U * kLanes);
    items += planner.item_count();
  }
  GroupedWeight* grouped = new GroupedWeight(spans.count, items, U, form.forms);
  std::memcpy(grouped->spans, room.spans, spans.count * sizeof(GroupedWeight::Span));
  std::memcpy(grouped->words, room.words, items * sizeof(std::uint16_t));
  std::memcpy(grouped->weights, room.weights, items * U * kWordBytes);
  return grouped;
}

// The same in the form that is best; null where another way to multiply is as fast.
template <class UnitOf>
static inline GroupedWeight* group_weight(std::int64_t n, std::int64_t words, InputRange input, std::int32_t* starts,
                                          const UnitOf& unit_of) {
  const GroupedForm form = best_form(n, words, input, unit_of);
  if (form.units == 0) return nullptr;
  if (form.units == 1) return group_spans<1>(form, n, words, input, starts, unit_of);
  return group_spans<kWideUnits>(form, n, words, input, starts, unit_of);
}

}  // namespace swin::cpu::SWIN_ISA
#endif
