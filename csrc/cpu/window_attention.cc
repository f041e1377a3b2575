// window_attention: Q K^T, position bias, shift mask, softmax and P V of one window and head after the other, the scores
// never leaving the thread's cache; Swin-V2's cosine attention too. qkv s8 [BW*N, 3*h*d] -> out s8 [BW*N, h*d]. Formula:
// swin/ops.h.
//
// Probabilities are quantized before they are normalized, relative to their row's largest, and the sum that normalizes
// them is that of the quantized ones: the row's weights add up to one exactly, and P V gets all 127 steps.
#include "gemm_core.h"
#include "kernels.h"
#include "softmax_row.h"
#include "swin/position_bias.h"
#if defined(__AMX_INT8__)
#include "gemm_amx.h"
#endif

namespace swin::cpu::SWIN_ISA {
namespace {

constexpr const char* kOp = "window_attention";
constexpr float kLog2Of127 = 6.98868469f;

// What the rows of one head and window add; `starts`: those of `bias`, null where it is not compact.
inline LogitRows logit_rows(const WindowAttentionArgs& args, const BiasRows& bias, const std::int32_t* starts,
                            std::int64_t head, std::int64_t window) {
  const float* mask = nullptr;
  if (args.mask) {
    std::int64_t which = window % (args.mask_of ? args.mask_of : args.mask).dim(0);
    if (args.mask_of) which = args.mask_of.as<const std::int32_t>()[which];
    if (which >= 0) mask = args.mask.as<const float>() + which * bias.tokens * bias.tokens;
  }
  return {args.bias.as<const float>() + head * bias.head_stride, mask, bias.tokens, starts};
}

// To `starts`, [tokens], where a row of the bias begins; null where they lie one after the other.
inline const std::int32_t* bias_starts(const BiasRows& bias, std::int32_t* starts) {
  if (!bias.compact()) return nullptr;
  for (std::int64_t row = 0; row < bias.tokens; ++row) starts[row] = static_cast<std::int32_t>(bias.start(row));
  return starts;
}

// out[r] = factor / max(1, length of row r), 0 from row `rows` to `padded`; rows s8 [rows, d], `stride` apart. The sums of
// squares, at most 2^14 d, are whole numbers that float32 holds.
inline void inverse_lengths(const std::int8_t* x, std::int64_t stride, std::int64_t rows, std::int64_t d, float factor,
                            float* out, std::int64_t padded) {
  for (std::int64_t first = 0; first < padded; first += kSoftmaxRows) {
    const std::int64_t count = min_of(kSoftmaxRows, rows - first);
    RowVectors squares;
    RowNumbers sums;
    for (std::int64_t r = 0; r < count; ++r) {
      Vf sum{};
      for_lanes(d, [&](std::int64_t e, std::int64_t lanes) SWIN_INLINE {
        const Vf y = load(x + (first + r) * stride + e, lanes);
        sum += y * y;
      });
      squares.of[r] = sum;
    }
    squares.reduce_to(sums, count < 0 ? 0 : count, sums_of);
    for (std::int64_t v = 0; v < kRowVectors && first + v * kLanes < padded; ++v) {
      const Vf inverse = splat(factor) / sqrt_of(max_of(sums.vector(v), splat(1.0f)));
      store(out + first + v * kLanes, keep(inverse, count - v * kLanes, 0.0f), min_of(kLanes, padded - first - v * kLanes));
    }
  }
}

// What scores are multiplied with: all of them with the same, or each with a number of its row and one of its column.
struct Scale {
  float factor;
  const float *rows, *columns;  // null where there is one factor; columns [pitch], finite beyond n

  Scale from(std::int64_t row) const { return {factor, rows == nullptr ? rows : rows + row, columns}; }
};

// Rows of one window and head on their way from scores to probabilities. `pitch` is N rounded up to whole vectors.
struct SoftmaxRows {
  std::int32_t* scores;  // [n, pitch], columns from n on anything; logits in their place afterwards
  LogitRows logits;
  std::int8_t* p;  // [n, pitch], 0 from column n on
  float* factor;   // [n]: pv_factor over the row's sum of p
  std::int64_t pitch;
  float pv_factor;
  Scale scale;
};

template <int kVectors, bool kLone, bool kCosine>
inline void softmax_pass(const SoftmaxRows& s, std::int64_t first, std::int64_t rows, std::int64_t vectors) {
  const std::int64_t n = s.logits.n, pitch = s.pitch, count = kVectors > 0 ? kVectors : vectors;
  RowNumbers largest, lone, sums;
  std::int32_t* scores = s.scores + first * pitch;
  const float* row_scale = kCosine ? s.scale.rows + first : nullptr;
  // Rows of logits are as long as those of scores, or shorter by the lone column: each row is read before it is written.
  Vf* x = reinterpret_cast<Vf*>(scores);
  if constexpr (kLone) {
    for (std::int64_t r = 0; r < rows; ++r) {
      const float score = static_cast<float>(scores[r * pitch + n - 1]);
      lone.of[r] = score * (kCosine ? row_scale[r] * s.scale.columns[n - 1] : s.scale.factor);
    }
  }
  logits_of<kVectors, kLone>(
      s.logits.from(first), rows, count,
      [scores, pitch, row_scale, scale = s.scale](std::int64_t r, std::int64_t j) SWIN_INLINE {
        const Vf score = load(scores + r * pitch + j);
        return kCosine ? score * row_scale[r] * load(scale.columns + j) : score * scale.factor;
      },
      [&lone](std::int64_t r) SWIN_INLINE { return lone.of[r]; }, x, largest, lone);
  const auto probability_of = [](Vf logit, auto most) SWIN_INLINE {
    return rounded(exp2_of((logit - most) * kLog2E + kLog2Of127));
  };
  alignas(64) std::int32_t lone_p[kSoftmaxRows];
  if constexpr (kLone) {
    for (std::int64_t v = 0; v < kRowVectors; ++v) {
      const Vi q = probability_of(lone.vector(v), largest.vector(v));
      std::memcpy(lone_p + v * kLanes, &q, sizeof q);
    }
  }
  RowVectors parts;
  for (std::int64_t r = 0; r < rows; ++r) {
    std::int8_t* p = s.p + (first + r) * pitch;
    const auto probability = [&](std::int64_t v) SWIN_INLINE { return probability_of(x[r * count + v], largest.of[r]); };
    Vi sum{};
    if constexpr (kVectors > 0) {
      Vi q[kVectors + kLone];
#pragma GCC unroll 9
      for (int v = 0; v < kVectors; ++v) sum += q[v] = probability(v);
      if constexpr (kLone) q[kVectors] = first_lane(lone_p[r]);
      store_bytes(p, q, kVectors + kLone);
    } else {
      for (std::int64_t v = 0; v < count; ++v) {
        const Vi q = probability(v);
        store_bytes(p + v * kLanes, q);
        sum += q;
      }
      if constexpr (kLone) store_lone(p + count * kLanes, lone_p[r]);
    }
    parts.of[r] = __builtin_convertvector(sum, Vf);
  }
  parts.reduce_to(sums, rows, sums_of);
  for (std::int64_t v = 0; v < kRowVectors && v * kLanes < rows; ++v) {
    Vf sum = sums.vector(v);
    if constexpr (kLone) sum += load(lone_p + v * kLanes);
    store(s.factor + first + v * kLanes, splat(s.pv_factor) / sum, min_of(kLanes, rows - v * kLanes));
  }
}

// Rows [first, first + rows), at most kSoftmaxRows.
inline void softmax_some(const SoftmaxRows& s, std::int64_t first, std::int64_t rows) {
  with_row_shape(s.logits.n, [&](auto count, auto lone, std::int64_t vectors) SWIN_INLINE {
    if (s.scale.rows != nullptr) {
      softmax_pass<count.value, lone.value, true>(s, first, rows, vectors);
    } else {
      softmax_pass<count.value, lone.value, false>(s, first, rows, vectors);
    }
  });
}

// Q K^T and P V of one window and head with the micro-kernels of gemm_core.h, so many rows at a time that their scores stay
// in the second-level cache; the scratch of one thread. (In the first-level cache they were no faster, and on AVX2 3 % slower.)
class VectorHeads {
 public:
  VectorHeads(const BiasRows& bias, std::int64_t d)
      : n_(bias.tokens),
        d_(d),
        pitch_(units_of(n_) * kLanes),
        rows_at_once_(ceil_div(n_, ceil_div(n_ * pitch_ * 4, kScoreBytes))) {
    assign(static_cast<char*>(thread_scratch(assign(nullptr))));
    std::memset(starts_v_, 0, units_of(d) * kLanes * 4);
    starts_bias_ = bias_starts(bias, starts_bias_memory_);
  }

  const std::int32_t* starts_of_bias() const { return starts_bias_; }

  std::int64_t rows_at_once() const { return rows_at_once_; }

  // The softmax of as many rows.
  SoftmaxRows softmax(const LogitRows& logits, float pv_factor, const Scale& scale) const {
    return {scores_, logits, p_, factor_, pitch_, pv_factor, scale};
  }

  // What the scores of queries and keys that lie at q and k are multiplied with.
  Scale scale_of(const WindowAttentionArgs& args, std::int64_t head, const std::int8_t* q, const std::int8_t* k,
                 std::int64_t stride) {
    if (!args.head_scale) return {args.qk_factor, nullptr, nullptr};
    inverse_lengths(q, stride, n_, d_, args.head_scale.as<const float>()[head], row_scale_, n_);
    inverse_lengths(k, stride, n_, d_, 1.0f, key_scale_, pitch_);
    return {0, row_scale_, key_scale_};
  }

  // k s8 [n, d], v s8 [n, d], `stride` apart.
  void pack_keys(const std::int8_t* k, std::int64_t stride) {
    const std::int64_t steps = steps_of<SignedDot>(d_), unit = unit_bytes<SignedDot>(d_), units = units_of(n_);
    for (std::int64_t u = 0; u < units; ++u) {
      pack_unit_nk<SignedDot>(k, stride, n_, d_, u * kLanes, packed_k_ + u * unit);
      store_start<SignedDot>(starts_k_ + u * kLanes, packed_k_ + u * unit, steps);
    }
  }
  void pack_values(const std::int8_t* v, std::int64_t stride) {
    const std::int64_t unit = unit_bytes<NonNegativeDot>(n_), units = units_of(d_);
    for (std::int64_t u = 0; u < units; ++u) {
      pack_unit_kn<NonNegativeDot>(v, stride, d_, n_, u * kLanes, packed_v_ + u * unit);
    }
  }

  // scores = q k^T; q s8 [rows, d], `stride` apart.
  void multiply_keys(const std::int8_t* q, std::int64_t stride, std::int64_t rows) {
    gemm_block<SignedDot>(
        prepare_rows<SignedDot>(q, stride, rows, d_, rows_), rows, steps_of<SignedDot>(d_), packed_k_, starts_k_, 0,
        units_of(n_), [scores = scores_, pitch = pitch_]<int V>(std::int64_t column) SWIN_INLINE {
          return [=](std::int64_t row, const Vi* acc) SWIN_INLINE {
            std::memcpy(scores + row * pitch + column, acc, V * sizeof(Vi));
          };
        });
  }

  // out = p v, row by row times factor; out rows `out_stride` apart.
  void multiply_values(std::int8_t* out, std::int64_t out_stride, std::int64_t rows) {
    // P's columns from N on are zero, so its rows may be read in whole steps where they lie.
    const Rows p = NonNegativeDot::kInPlace ? Rows{reinterpret_cast<const char*>(p_), pitch_}
                                            : prepare_rows<NonNegativeDot>(p_, pitch_, rows, n_, rows_);
    gemm_block<NonNegativeDot>(p, rows, steps_of<NonNegativeDot>(n_), packed_v_, starts_v_, 0, units_of(d_),
                               [out, out_stride, d = d_, factor = factor_]<int V>(std::int64_t column) SWIN_INLINE {
                                 return [=](std::int64_t row, const Vi* acc) SWIN_INLINE {
                                   Vf y[V];
                                   for (int i = 0; i < V; ++i) y[i] = __builtin_convertvector(acc[i], Vf) * factor[row];
                                   store_s8_columns<V>(out + row * out_stride + column, y, d - column);
                                 };
                               });
  }

 private:
  static constexpr std::int64_t kScoreBytes = 96 << 10;

  // Lays the parts out from `memory` on, if there is any; returns their bytes.
  std::int64_t assign(char* memory) {
    std::int64_t offset = 0;
    const auto part = [&](std::int64_t bytes) {
      char* start = memory == nullptr ? nullptr : memory + offset;
      offset += ceil_div(bytes, 64) * 64;
      return static_cast<void*>(start);
    };
    const std::int64_t rows = rows_at_once_;
    const std::int64_t q_bytes = rows_bytes<SignedDot>(rows, d_), p_bytes = rows_bytes<NonNegativeDot>(rows, n_);
    packed_k_ = static_cast<std::int8_t*>(part(units_of(n_) * unit_bytes<SignedDot>(d_)));
    packed_v_ = static_cast<std::int8_t*>(part(units_of(d_) * unit_bytes<NonNegativeDot>(n_)));
    starts_k_ = static_cast<std::int32_t*>(part(pitch_ * 4));
    starts_v_ = static_cast<std::int32_t*>(part(units_of(d_) * kLanes * 4));
    starts_bias_memory_ = static_cast<std::int32_t*>(part(n_ * 4));
    scores_ = static_cast<std::int32_t*>(part(rows * pitch_ * 4));
    p_ = static_cast<std::int8_t*>(part(rows * pitch_));
    factor_ = static_cast<float*>(part(rows * 4));
    row_scale_ = static_cast<float*>(part(n_ * 4));
    key_scale_ = static_cast<float*>(part(pitch_ * 4));
    rows_ = part(q_bytes > p_bytes ? q_bytes : p_bytes);
    return offset;
  }

  const std::int64_t n_, d_, pitch_, rows_at_once_;
  std::int8_t *packed_k_, *packed_v_, *p_;
  std::int32_t *starts_k_, *starts_v_, *starts_bias_memory_, *scores_;
  const std::int32_t* starts_bias_;
  float *factor_, *row_scale_, *key_scale_;
  void* rows_;  // Q, then P, in the form of the GEMM
};

void attend(const WindowAttentionArgs& args, const BiasRows& bias, VectorHeads& heads_of, std::int64_t first,
            std::int64_t last) {
  const std::int64_t heads = bias.heads, n = bias.tokens, c = args.out.dim(1), d = c / heads, stride = 3 * c;
  for (std::int64_t index = first; index < last; ++index) {
    const std::int64_t window = index / heads, head = index % heads;
    const std::int8_t* q = args.qkv.as<const std::int8_t>() + window * n * stride + head * d;
    std::int8_t* out = args.out.as<std::int8_t>() + window * n * c + head * d;
    const LogitRows logits = logit_rows(args, bias, heads_of.starts_of_bias(), head, window);
    const Scale scale = heads_of.scale_of(args, head, q, q + c, stride);
    heads_of.pack_keys(q + c, stride);
    for (std::int64_t row = 0; row < n; row += heads_of.rows_at_once()) {
      const std::int64_t rows = min_of(n - row, heads_of.rows_at_once());
      heads_of.multiply_keys(q + row * stride, stride, rows);
      const SoftmaxRows softmax = heads_of.softmax(logits.from(row), args.pv_factor, scale.from(row));
      each_pass(rows, [&](std::int64_t first_row, std::int64_t count) { softmax_some(softmax, first_row, count); });
      if (row == 0) heads_of.pack_values(q + 2 * c, stride);
      heads_of.multiply_values(out + row * c, c, rows);
    }
  }
}

#if defined(__AMX_INT8__)
// The same on tiles, for windows of at most kTokens tokens, a multiple of 64, and heads of at most 64 channels, a multiple of
// four; at most 16 rows of a head at a time, so that all of it stays in the first-level cache.
//
// Rows go through four stages: scores, softmax, times V, quantization. While the vector units are at one row's softmax the
// tiles multiply the next rows' scores; and no stage reads what the one before has only just written, since a store
// of another size than the load, or one that still waits for its tile, holds the load up.
template <std::int64_t kTokens>
class TileHeads {
 public:
  static bool fits(std::int64_t n, std::int64_t d) { return n <= kTokens && d <= kChannels && d % 4 == 0; }

  TileHeads(const WindowAttentionArgs& args, const BiasRows& bias)
      : args_(args),
        bias_(bias),
        heads_(bias.heads),
        n_(bias.tokens),
        c_(args.out.dim(1)),
        d_(c_ / heads_),
        passes_(ceil_div(n_, kTile)),
        memory_(static_cast<Memory*>(thread_scratch(sizeof(Memory)))) {
    std::memset(memory_, 0, sizeof *memory_);
    bias_starts_ = bias_starts(bias, memory_->bias_starts);
    configure_tiles_as([d = d_](int tile) {  // 0..3 results, 4 and 5 Q and K, 6 and 7 P and V
      return TileShape{tile == 5 ? d / 4 : kTile, tile == 4 ? d : 64};
    });
  }
  ~TileHeads() { _tile_release(); }

  // Heads [first, last), those of a window one after the other.
  void attend(std::int64_t first, std::int64_t last) {
    const std::int64_t begin = first * passes_, end = last * passes_;
    for (std::int64_t i = begin - 1; i < end + 2; ++i) {
      if (i + 1 < end) multiply_keys(i + 1, last);
      if (i >= begin && i < end) softmax(i);
      if (i - 2 >= begin) quantize(i - 2);
      if (i + 1 < end) store_scores(i + 1);
      if (i - 1 >= begin && i - 1 < end) multiply_values(i - 1);
    }
  }

 private:
  static constexpr std::int64_t kChannels = 64, kUnit = kTokens * kTile;
  static constexpr std::int64_t kGroup = 4;  // units of keys whose scores tiles hold at once

  // What lies behind the rows of P and results meets zeros, or gives rows that nobody reads.
  struct alignas(64) Memory {
    std::int8_t keys[kTokens * kChannels], values[kTokens * kChannels], queries[kTile * kChannels];
    std::int32_t scores[2][kTile * kTokens], results[kTile * kChannels];
    std::int8_t p[2][kTile * kTokens];
    float factor[4][kTile], row_scale[kTile], key_scale[kTokens];
    std::int32_t bias_starts[kTokens];
  };

  // Rows of a head: the i-th of all heads' passes.
  struct Rows {
    std::int64_t window, head, pass, first, count;
  };
  Rows rows_of(std::int64_t i) const {
    const std::int64_t index = i / passes_, pass = i % passes_, first = pass * n_ / passes_;
    return {index / heads_, index % heads_, pass, first, (pass + 1) * n_ / passes_ - first};
  }
  const std::int8_t* queries_of(const Rows& rows) const {
    return args_.qkv.as<const std::int8_t>() + rows.window * n_ * 3 * c_ + rows.head * d_;
  }

  void multiply_keys(std::int64_t i, std::int64_t last) {
    const Rows rows = rows_of(i);
    const std::int64_t stride = 3 * c_, units = passes_, unit = d_ * kTile;
    const std::int8_t* q = queries_of(rows);
    if (rows.pass == 0) {
      for (std::int64_t u = 0; u < units; ++u) {
        pack_unit_nk<NonNegativeDot>(q + c_, stride, n_, d_, u * kTile, memory_->keys + u * unit);
      }
      if ((rows.window + 1) * heads_ < last) {  // each head fetches its share of the next window
        const std::int64_t share = n_ * 3 * d_;
        const std::int8_t* next = q - rows.head * d_ + n_ * stride + rows.head * share;
        for (std::int64_t byte = 0; byte < share; byte += 64) __builtin_prefetch(next + byte, 0, 2);
      }
    }
    if (rows.first + kTile <= n_) {
      _tile_loadd(4, q + rows.first * stride, stride);
    } else {  // what follows may lie behind the end of the tensor
      for (std::int64_t r = 0; r < rows.count; ++r) {
        std::memcpy(memory_->queries + r * d_, q + (rows.first + r) * stride, d_);
      }
      _tile_loadd(4, memory_->queries, d_);
    }
    std::int64_t first = 0;
    for (; kTokens > kGroup * kTile && first + kGroup < units; first += kGroup) {
      multiply_group(memory_->keys + first * unit, unit, kGroup);
      store_group(memory_->scores[i % 2] + first * kTile, kGroup);
    }
    multiply_group(memory_->keys + first * unit, unit, units - first);
  }

  // The intrinsics want the tile's number itself; each result has a tile of its own, so that none waits for another.
  void multiply_group(const std::int8_t* keys, std::int64_t unit, std::int64_t units) const {
#define SWIN_MULTIPLY(result)                   \
  if (units > result) {                         \
    _tile_zero(result);                         \
    _tile_loadd(5, keys + result * unit, 64);   \
    _tile_dpbssd(result, 4, 5);                 \
  }
    SWIN_MULTIPLY(0)
    SWIN_MULTIPLY(1)
    SWIN_MULTIPLY(2)
    SWIN_MULTIPLY(3)
#undef SWIN_MULTIPLY
  }
  void store_group(std::int32_t* scores, std::int64_t units) const {
    _tile_stored(0, scores, kTokens * 4);
    if (units > 1) _tile_stored(1, scores + kTile, kTokens * 4);
    if (units > 2) _tile_stored(2, scores + 2 * kTile, kTokens * 4);
    if (units > 3) _tile_stored(3, scores + 3 * kTile, kTokens * 4);
  }

  // The scores that are still in tiles.
  void store_scores(std::int64_t i) {
    const std::int64_t first = kTokens > kGroup * kTile ? (passes_ - 1) / kGroup * kGroup : 0;
    store_group(memory_->scores[i % 2] + first * kTile, passes_ - first);
  }

  void softmax(std::int64_t i) {
    const Rows rows = rows_of(i);
    const LogitRows logits = logit_rows(args_, bias_, bias_starts_, rows.head, rows.window);
    Scale scale{args_.qk_factor, nullptr, nullptr};
    if (args_.head_scale) {
      const std::int8_t* q = queries_of(rows);
      const float head_scale = args_.head_scale.as<const float>()[rows.head];
      inverse_lengths(q + rows.first * 3 * c_, 3 * c_, rows.count, d_, head_scale, memory_->row_scale, kTile);
      if (rows.pass == 0) inverse_lengths(q + c_, 3 * c_, n_, d_, 1.0f, memory_->key_scale, kTokens);
      scale = {0, memory_->row_scale, memory_->key_scale};
    }
    const SoftmaxRows softmax{memory_->scores[i % 2], logits.from(rows.first), memory_->p[i % 2], memory_->factor[i % 4],
                              kTokens,                args_.pv_factor,         scale};
    softmax_some(softmax, 0, rows.count);
  }

  void multiply_values(std::int64_t i) {
    const Rows rows = rows_of(i);
    const std::int64_t units = ceil_div(d_, kTile);
    if (rows.pass == 0) {
      for (std::int64_t u = 0; u < units; ++u) {
        pack_unit_kn<NonNegativeDot>(queries_of(rows) + 2 * c_, 3 * c_, d_, n_, u * kTile, memory_->values + u * kUnit);
      }
    }
    const std::int8_t* values = memory_->values;
    std::int32_t* results = memory_->results;
    const std::int8_t* p = memory_->p[i % 2];
    const std::int64_t steps = kTokens > 64 ? ceil_div(n_, 64) : 1;
#define SWIN_MULTIPLY(result)                                             \
  if (units > result) {                                                   \
    _tile_loadd(7, values + result * kUnit + step * 64 * kTile, 64);      \
    _tile_dpbssd(result, 6, 7);                                           \
  }
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (std::int64_t step = 0; step < steps; ++step) {
      _tile_loadd(6, p + step * 64, kTokens);
      SWIN_MULTIPLY(0)
      SWIN_MULTIPLY(1)
      SWIN_MULTIPLY(2)
      SWIN_MULTIPLY(3)
    }
#undef SWIN_MULTIPLY
    _tile_stored(0, results, kChannels * 4);
    if (units > 1) _tile_stored(1, results + kTile, kChannels * 4);
    if (units > 2) _tile_stored(2, results + 2 * kTile, kChannels * 4);
    if (units > 3) _tile_stored(3, results + 3 * kTile, kChannels * 4);
  }

  void quantize(std::int64_t i) {
    const Rows rows = rows_of(i);
    std::int8_t* out = args_.out.as<std::int8_t>() + (rows.window * n_ + rows.first) * c_ + rows.head * d_;
    const float* factor = memory_->factor[i % 4];
    for (std::int64_t r = 0; r < rows.count; ++r, out += c_) {
      for (std::int64_t column = 0; column < d_; column += 2 * kTile) {
        const std::int32_t* results = memory_->results + r * kChannels + column;
        const Vf y[2] = {load(results) * factor[r], load(results + kTile) * factor[r]};
        store_s8_columns<2>(out + column, y, d_ - column);
      }
    }
  }

  const WindowAttentionArgs& args_;
  const BiasRows& bias_;
  const std::int64_t heads_, n_, c_, d_, passes_;
  Memory* const memory_;
  const std::int32_t* bias_starts_;
};
#endif

}  // namespace

void window_attention(const WindowAttentionArgs& args, const ExecContext& context) {
  const BiasRows bias = BiasRows::of(kOp, args.bias);
  const std::int64_t n = bias.tokens, d = args.out.dim(1) / bias.heads;
  parallel_rows(context, args.out.dim(0) / n * bias.heads, 1, [&](std::int64_t first, std::int64_t last) {
#if defined(__AMX_INT8__)
    if (TileHeads<64>::fits(n, d)) {
      TileHeads<64>(args, bias).attend(first, last);
      return;
    }
    if (TileHeads<256>::fits(n, d)) {
      TileHeads<256>(args, bias).attend(first, last);
      return;
    }
#endif
    VectorHeads vectors(bias, d);
    attend(args, bias, vectors, first, last);
  });
}

}  // namespace swin::cpu::SWIN_ISA
