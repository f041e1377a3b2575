// Which words of a weight's columns share an int16 sum: the planning of gemm_grouped.h, once per weight, at load.
#pragma once

#include "gemm_grouped.h"

#if defined(SWIN_GROUPED)
#include <new>

namespace swin::cpu::SWIN_ISA {

inline constexpr int kPlannedItems = 256;  // among which groups are sought: more would find little and take longer

// The most that the positive weights of a lane, and the negative ones, may sum up to.
static inline int group_bound(InputRange input) { return 32767 / (input == InputRange::kSigned ? 255 : 127); }

// One item's weights as sums per int16 lane (2 * kLanes).
struct GroupItem {
  std::int16_t positive[2 * kLanes], negative[2 * kLanes];  // P and N
  std::int8_t weights[kItemBytes];
  std::int32_t word, size;  // size: of all lanes' larger sums
};

static inline __m256i load_lanes(const std::int16_t* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }
static inline bool within(__m256i sum, __m256i bound) {
  return _mm256_testz_si256(_mm256_cmpgt_epi16(sum, bound), _mm256_set1_epi16(-1));
}

// Takes the weights of a word (kItemBytes) into `item`, but for the larger one of each lane whose two are beyond `bound`
// together: it stays in `rest` (else 0), for an item of its own. True where there is any. Half a lane each fits into more
// groups than a full one and the excess.
static inline bool take_item(const std::int8_t* weights, int bound, std::int64_t word, GroupItem& item,
                             std::int8_t* rest) {
  bool left = false;
  item.word = static_cast<std::int32_t>(word);
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
      left = true;
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
  UnitPlanner(std::int64_t words, InputRange input)
      : words_(words),
        bound_(group_bound(input)),
        items_(static_cast<GroupItem*>(::operator new(most_items() * sizeof(GroupItem)))),
        groups_(static_cast<Group*>(::operator new(most_items() * sizeof(Group)))) {}
  UnitPlanner(const UnitPlanner&) = delete;
  UnitPlanner& operator=(const UnitPlanner&) = delete;
  ~UnitPlanner() {
    ::operator delete(items_);
    ::operator delete(groups_);
  }

  std::int64_t most_items() const { return 2 * words_; }

  // `unit`: kItemBytes of weights per word, as pack_unit_nk leaves them. Writes the items' words and weights.
  GroupedWeight::Unit plan(const std::int8_t* unit, std::int64_t first_item, std::uint16_t* words, std::int8_t* weights) {
    take_items(unit);
    item_groups_ = 0;
    for (std::int64_t i = 0; i < item_count_; i += kPlannedItems) group(i, min_of(item_count_, i + kPlannedItems));
    GroupedWeight::Unit result{first_item, {}};
    for (int size = kMaxGroup; size > 0; --size) {
      for (std::int64_t g = 0; g < item_groups_; ++g) {
        if (groups_[g].size != size) continue;
        ++result.groups[kMaxGroup - size];
        for (int i = 0; i < size; ++i) {
          const GroupItem& item = items_[groups_[g].items[i]];
          *words++ = static_cast<std::uint16_t>(4 * item.word);
          std::memcpy(weights, item.weights, kItemBytes);
          weights += kItemBytes;
        }
      }
    }
    return result;
  }

  std::int64_t item_count() const { return item_count_; }
  // Vector instructions for a row: of each item vpmaddubsw, and of each group one less to add, vpmaddwd and its addition.
  std::int64_t instructions() const { return 2 * item_count_ + item_groups_; }

 private:
  struct Group {
    std::int32_t size, items[kMaxGroup];
  };

  void take_items(const std::int8_t* unit) {
    item_count_ = 0;
    for (std::int64_t word = 0; word < words_; ++word) {
      std::int8_t rest[kItemBytes], none[kItemBytes];
      if (take_item(unit + word * kItemBytes, bound_, word, items_[item_count_++], rest)) {
        take_item(rest, bound_, word, items_[item_count_++], none);  // a lane holds one weight now: at most 128
      }
    }
  }

  // Groups of items [first, last): the largest first, with the largest that still fit.
  void group(std::int64_t first, std::int64_t last) {
    std::int32_t order[kPlannedItems];
    int left = 0;
    for (std::int64_t i = first; i < last; ++i) {
      int at = left++;
      for (; at > 0 && items_[order[at - 1]].size < items_[i].size; --at) order[at] = order[at - 1];
      order[at] = static_cast<std::int32_t>(i);
    }
    const __m256i bound = _mm256_set1_epi16(static_cast<std::int16_t>(bound_));
    while (left > 0) {
      Group& group = groups_[item_groups_++];
      group.size = 0;
      __m256i positive = _mm256_setzero_si256(), negative = positive;
      int kept = 0;
      for (int i = 0; i < left; ++i) {
        const GroupItem& item = items_[order[i]];
        const __m256i p = _mm256_add_epi16(positive, load_lanes(item.positive));
        const __m256i n = _mm256_add_epi16(negative, load_lanes(item.negative));
        if (group.size < kMaxGroup && within(_mm256_max_epi16(p, n), bound)) {
          positive = p;
          negative = n;
          group.items[group.size++] = order[i];
        } else {
          order[kept++] = order[i];
        }
      }
      left = kept;
    }
  }

  const std::int64_t words_;
  const int bound_;
  GroupItem* const items_;
  Group* const groups_;
  std::int64_t item_count_ = 0, item_groups_ = 0;
};

// The weight whose units of quad words (UnsignedQuadDot's form) `unit_of(u)` gives, in groups; null where that would need
// more than `most` vector instructions per word and row. `unit_of` may reuse its memory.
template <class UnitOf>
static inline GroupedWeight* group_weight(std::int64_t n_units, std::int64_t words, InputRange input, double most,
                                          UnitOf&& unit_of) {
  UnitPlanner planner(words, input);
  GroupedWeight room(n_units, n_units * planner.most_items());
  std::int64_t items = 0, instructions = 0;
  for (std::int64_t u = 0; u < n_units; ++u) {
    room.units[u] = planner.plan(unit_of(u), items, room.words + items, room.weights + items * kItemBytes);
    items += planner.item_count();
    instructions += planner.instructions();
  }
  if (instructions > most * static_cast<double>(n_units * words)) return nullptr;
  GroupedWeight* grouped = new GroupedWeight(n_units, items);
  std::memcpy(grouped->units, room.units, n_units * sizeof(GroupedWeight::Unit));
  std::memcpy(grouped->words, room.words, items * sizeof(std::uint16_t));
  std::memcpy(grouped->weights, room.weights, items * kItemBytes);
  return grouped;
}

}  // namespace swin::cpu::SWIN_ISA
#endif
