// Which words of a weight's columns share an int16 sum, and in which form: the planning of gemm_grouped.h, once per weight,
// at load.
#pragma once

#include "gemm_grouped.h"

#if defined(SWIN_GROUPED)
#include <new>

namespace swin::cpu::SWIN_ISA {

inline constexpr int kPlannedItems = 256;   // among which groups are sought: more would find little and take longer
inline constexpr int kSampledUnits = 8;     // whose plans decide the number of forms
inline constexpr double kWorthForms = 0.92;  // of the instructions with one form, at most: each form costs packing and cache
inline constexpr std::int64_t kPanelInCache = 32 << 10;  // bytes of a panel with all its forms, for the first-level cache

// The most that the positive weights of a lane, and the negative ones, may sum up to.
static inline int group_bound(InputRange input) { return 32767 / (input == InputRange::kSigned ? 255 : 127); }

// One item's weights, in the order of its word's form, and their sums per int16 lane (2 * kLanes).
struct GroupItem {
  std::int16_t positive[2 * kLanes], negative[2 * kLanes];  // P and N
  std::int8_t weights[kItemBytes];
  std::int32_t word, form, size;  // size: of all lanes' larger sums
};

static inline __m256i load_lanes(const std::int16_t* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }

// The largest of 16 sums, each 0..32767.
static inline int largest_lane(__m256i sums) {
  const __m128i half = _mm_max_epi16(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  return 0xffff ^ (_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(half, _mm_set1_epi16(-1)))) & 0xffff);
}

// The weights of a word (kItemBytes) as its `form` needs them; false where a weight has no int8 to be negated to.
static inline bool weights_in_form(const std::int8_t* weights, int form, std::int8_t* out) {
  const int* pairing = kPairing[form % kPairings];
  for (int i = 0; i < kItemBytes; ++i) {
    const int w = weights[i / 4 * 4 + pairing[i % 4]], value = form >= kPairings && i % 2 == 1 ? -w : w;
    if (value > 127) return false;
    out[i] = static_cast<std::int8_t>(value);
  }
  return true;
}

// Takes weights in the form of `item`'s word into it, but for the larger one of each lane whose two are beyond `bound`
// together: it stays in `rest` (else 0), for an item of its own. Returns how many. Half a lane each fits into more groups than
// a full one and the excess.
static inline int take_item(const std::int8_t* weights, int bound, GroupItem& item, std::int8_t* rest) {
  int left = 0;
  item.size = 0;
  std::memcpy(item.weights, weights, kItemBytes);
  std::memset(rest, 0, kItemBytes);
  for (int lane = 0; lane < 2 * kLanes; ++lane) {
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

// Plans units of one weight, one after the other.
class UnitPlanner {
 public:
  UnitPlanner(std::int64_t words, InputRange input, int forms)
      : words_(words),
        bound_(group_bound(input)),
        forms_(forms),
        items_(words * (forms + 1)),
        choices_(most_items()),
        groups_(most_items()) {}

  std::int64_t most_items() const { return 2 * words_; }

  // `unit`: kItemBytes of weights per word, as pack_unit_nk leaves them. Finds the groups of its items.
  void plan(const std::int8_t* unit) {
    take_words(unit);
    group_count_ = 0;
    for (std::int64_t i = 0; i < choice_count_; i += kPlannedItems) group(i, min_of(choice_count_, i + kPlannedItems));
  }

  // Writes the items' words and weights, and adds to starts[kLanes] what complemented inputs make of each column.
  GroupedWeight::Unit write(std::int64_t first_item, std::uint16_t* words, std::int8_t* weights,
                            std::int32_t* starts) const {
    GroupedWeight::Unit result{first_item, {}};
    for (int s = 0; s < kSizes; ++s) {
      const int size = kGroupSizes[s];
      for (std::int64_t g = 0; g < group_count_; ++g) {
        if (groups_[g].size != size) continue;
        ++result.groups[s];
        for (int i = 0; i < size; ++i) {
          const GroupItem& item = items_[groups_[g].items[i]];
          *words++ = static_cast<std::uint16_t>(4 * (item.word * forms_ + item.form));
          std::memcpy(weights, item.weights, kItemBytes);
          weights += kItemBytes;
          if (item.form < kPairings) continue;
          for (int j = 1; j < kItemBytes; j += 2) starts[j / 4] -= 255 * item.weights[j];  // u w = 255 w + (255 - u)(-w)
        }
      }
    }
    return result;
  }

  std::int64_t item_count() const { return choice_count_; }
  // Vector instructions for a row: of each item vpmaddubsw, and of each group one less to add, vpmaddwd and its addition.
  std::int64_t instructions() const { return 2 * choice_count_ + group_count_; }

 private:
  struct Choice {
    std::int32_t first, count;  // items of which one is taken: a word's forms that fit
  };
  struct Group {
    std::int32_t size, items[kMaxGroup];
  };

  void take_words(const std::int8_t* unit) {
    choice_count_ = 0;
    std::int32_t items = 0;
    for (std::int64_t word = 0; word < words_; ++word) {
      const std::int32_t first = items;
      GroupItem fewest{};
      std::int8_t rest[kItemBytes], fewest_rest[kItemBytes];
      int least = 2 * kLanes + 1;
      for (int form = 0; form < forms_; ++form) {
        std::int8_t weights[kItemBytes];
        if (!weights_in_form(unit + word * kItemBytes, form, weights)) continue;
        GroupItem& item = items_[items];
        item.word = static_cast<std::int32_t>(word);
        item.form = form;
        const int left = take_item(weights, bound_, item, rest);
        if (left == 0) {
          ++items;
        } else if (left < least) {
          least = left;
          fewest = item;
          std::memcpy(fewest_rest, rest, kItemBytes);
        }
      }
      if (items > first) {
        choices_[choice_count_++] = {first, items - first};
        continue;
      }
      items_[items] = fewest;
      choices_[choice_count_++] = {items++, 1};
      GroupItem& second = items_[items];  // a lane holds one weight now: at most 128
      second.word = fewest.word;
      second.form = fewest.form;
      take_item(fewest_rest, bound_, second, rest);
      choices_[choice_count_++] = {items++, 1};
    }
  }

  static bool is_group_size(int size) {
    for (const int allowed : kGroupSizes) {
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
      __m256i positive = _mm256_setzero_si256(), negative = positive;
      int kept = 0, last_kept = 0;
      std::int32_t last = -1;
      for (int i = 0; i < left; ++i) {
        const Choice choice = choices_[order[i]];
        std::int32_t best = -1;
        if (group.size < kMaxGroup) {
          int least = bound_ + 1;
          for (std::int32_t j = choice.first; j < choice.first + choice.count; ++j) {
            const __m256i p = _mm256_add_epi16(positive, load_lanes(items_[j].positive));
            const __m256i n = _mm256_add_epi16(negative, load_lanes(items_[j].negative));
            const int largest = largest_lane(_mm256_max_epi16(p, n));
            if (largest >= least) continue;
            least = largest;
            best = j;
          }
        }
        if (best < 0) {
          order[kept++] = order[i];
          continue;
        }
        positive = _mm256_add_epi16(positive, load_lanes(items_[best].positive));
        negative = _mm256_add_epi16(negative, load_lanes(items_[best].negative));
        group.items[group.size++] = best;
        last = order[i];
        last_kept = kept;
      }
      left = kept;
      if (is_group_size(group.size)) continue;
      --group.size;
      for (int i = left++; i > last_kept; --i) order[i] = order[i - 1];
      order[last_kept] = last;
    }
  }

  const std::int64_t words_;
  const int bound_, forms_;
  const Array<GroupItem> items_;
  const Array<Choice> choices_;
  const Array<Group> groups_;
  std::int64_t choice_count_ = 0, group_count_ = 0;
};

// In how many forms a panel holds its words best, by the plans of some units; 0 where that needs more than `most` vector
// instructions per word and row all the same. Behind a ReLU one is enough: its bound lets any two weights share a lane.
template <class UnitOf>
static inline int forms_of(std::int64_t n_units, std::int64_t words, InputRange input, double most, UnitOf&& unit_of) {
  const std::int64_t sampled = min_of(n_units, kSampledUnits);
  const auto instructions = [&](int forms) {
    UnitPlanner planner(words, input, forms);
    std::int64_t sum = 0;
    for (std::int64_t i = 0; i < sampled; ++i) {
      planner.plan(unit_of(i * n_units / sampled));
      sum += planner.instructions();
    }
    return static_cast<double>(sum) / static_cast<double>(sampled * words);
  };
  const int many = words * kMostForms * kPanelWordBytes <= kPanelInCache ? kMostForms : kPairings;
  const double one = instructions(1);
  if (input == InputRange::kSigned && words * many <= kMostPanelWords) {
    const double with_forms = instructions(many);
    if (with_forms <= kWorthForms * one) return with_forms <= most ? many : 0;
  }
  return one <= most ? 1 : 0;
}

// The weight whose units of quad words (UnsignedQuadDot's form) `unit_of(u)` gives, in groups; null where that would need
// more than `most` vector instructions per word and row. `unit_of` may reuse its memory. starts[n]: what a sum begins with,
// added to.
template <class UnitOf>
static inline GroupedWeight* group_weight(std::int64_t n_units, std::int64_t words, InputRange input, double most,
                                          std::int32_t* starts, UnitOf&& unit_of) {
  const int forms = words <= kMostPanelWords ? forms_of(n_units, words, input, most, unit_of) : 0;
  if (forms == 0) return nullptr;
  UnitPlanner planner(words, input, forms);
  GroupedWeight room(n_units, n_units * planner.most_items(), forms);
  std::int64_t items = 0;
  for (std::int64_t u = 0; u < n_units; ++u) {
    planner.plan(unit_of(u));
    room.units[u] =
        planner.write(items, room.words + items, room.weights + items * kItemBytes, starts + u * kLanes);
    items += planner.item_count();
  }
  GroupedWeight* grouped = new GroupedWeight(n_units, items, forms);
  std::memcpy(grouped->units, room.units, n_units * sizeof(GroupedWeight::Unit));
  std::memcpy(grouped->words, room.words, items * sizeof(std::uint16_t));
  std::memcpy(grouped->weights, room.weights, items * kItemBytes);
  return grouped;
}

}  // namespace swin::cpu::SWIN_ISA
#endif
