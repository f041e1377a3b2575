// window_attention: Q K^T, position bias, shift mask, softmax and P V of one window and head after the other, the scores
// never leaving the thread's cache; Swin-V2's cosine attention too. qkv s8 [BW*N, 3*h*d] -> out s8 [BW*N, h*d]. Formula:
// swin/ops.h.
//
// Probabilities are quantized before they are normalized, relative to their row's largest, and the sum that normalizes
// them is that of the quantized ones: the row's weights add up to one exactly, and P V gets all 127 steps.
#include "attention_heads.h"
#include "pass_heads.h"
#if defined(__AMX_INT8__)
#include "gemm_amx.h"
#endif

namespace swin::cpu::SWIN_ISA {
namespace {

#if defined(SWIN_PASS_HEADS)
using Heads = PassHeads;
#else
using Heads = VectorHeads;
#endif

// Bytes of all queries, keys and values that are still in the threads' second-level caches.
constexpr std::int64_t kQkvInCache = 2 << 20;

// Begins to bring the share of a head, whose queries lie at q, of the next window. A row has a head's channels in three
// places and `stride` bytes until the next one, which is no order that a processor foresees.
SWIN_INLINE inline void fetch_next_window(const std::int8_t* q, std::int64_t head, std::int64_t n, std::int64_t d,
                                          std::int64_t stride) {
  const std::int64_t share = n * 3 * d;
  const std::int8_t* next = q - head * d + n * stride + head * share;
  for (std::int64_t byte = 0; byte < share; byte += 64) __builtin_prefetch(next + byte, 0, 2);
}

void attend(const WindowAttentionArgs& args, const BiasRows& bias, std::int64_t first, std::int64_t last) {
  const std::int64_t heads = bias.heads, n = bias.tokens, c = args.out.dim(1), d = c / heads, stride = 3 * c;
  const bool far = args.qkv.nbytes() > kQkvInCache;
  Heads packed(bias, d);
  for (std::int64_t index = first; index < last; ++index) {
    const std::int64_t window = index / heads, head = index % heads;
    const std::int8_t* q = args.qkv.as<const std::int8_t>() + window * n * stride + head * d;
    std::int8_t* out = args.out.as<std::int8_t>() + window * n * c + head * d;
    const LogitRows logits = logit_rows(args, bias, packed.starts_of_bias(), head, window);
    const Scale scale = packed.scale_of(args, head, q, q + c, stride);
    packed.pack_keys(q + c, stride);
    packed.pack_values(q + 2 * c, stride);
    if (far && index + heads < last) fetch_next_window(q, head, n, d, stride);
    for (std::int64_t row = 0; row < n; row += packed.rows_at_once()) {
      const std::int64_t rows = min_of(n - row, packed.rows_at_once());
      packed.attend(q + row * stride, stride, rows, logits.from(row), scale.from(row), args.pv_factor);
      packed.multiply_values(out + row * c, c, rows);
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
      if ((rows.window + 1) * heads_ < last) fetch_next_window(q, rows.head, n_, d_, stride);
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
    const Probabilities to{memory_->p[i % 2], memory_->factor[i % 4], kTokens, args_.pv_factor};
    softmax_some({memory_->scores[i % 2], logits.from(rows.first), scale, to}, 0, rows.count);
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
  const BiasRows bias = BiasRows::of(kAttentionOp, args.bias);
  const std::int64_t n = bias.tokens, heads = args.out.dim(0) / n * bias.heads;
  parallel_rows(context, heads, 1, [&](std::int64_t first, std::int64_t last) {
#if defined(__AMX_INT8__)
    const std::int64_t d = args.out.dim(1) / bias.heads;
    if (TileHeads<64>::fits(n, d)) {
      TileHeads<64>(args, bias).attend(first, last);
      return;
    }
    if (TileHeads<256>::fits(n, d)) {
      TileHeads<256>(args, bias).attend(first, last);
      return;
    }
#endif
    attend(args, bias, first, last);
  });
}

}  // namespace swin::cpu::SWIN_ISA
