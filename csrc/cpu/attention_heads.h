// Q K^T and P V of windows and heads with the micro-kernels of gemm_core.h, and the ways from scores to probabilities
// that differ between instruction sets; window_attention.cc has AMX's.
#pragma once

#include "attention_softmax.h"

namespace swin::cpu::SWIN_ISA {

// Keys and values of one window and head as the micro-kernels read them, and probabilities of up to `rows_at_once` of
// its queries; the scratch of one thread.
class PackedHeads {
 public:
  // What the scores of queries and keys that lie at q and k are multiplied with.
  Scale scale_of(const WindowAttentionArgs& args, std::int64_t head, const std::int8_t* q, const std::int8_t* k,
                 std::int64_t stride) {
    if (!args.head_scale) return {args.qk_factor, nullptr, nullptr};
    inverse_lengths(q, stride, n_, d_, args.head_scale.as<const float>()[head], row_scale_, n_);
    inverse_lengths(k, stride, n_, d_, 1.0f, key_scale_, pitch_);
    return {0, row_scale_, key_scale_};
  }

  const std::int32_t* starts_of_bias() const { return starts_bias_; }

  std::int64_t rows_at_once() const { return rows_at_once_; }

  // v s8 [n, d], `stride` apart.
  void pack_values(const std::int8_t* v, std::int64_t stride) {
    const std::int64_t unit = unit_bytes<NonNegativeDot>(n_), units = units_of(d_);
    for (std::int64_t u = 0; u < units; ++u) {
      pack_unit_kn<NonNegativeDot>(v, stride, d_, n_, u * kLanes, packed_v_ + u * unit);
    }
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

 protected:
  // `own_bytes`: what the derived class asks for, to be found at own_.
  PackedHeads(const BiasRows& bias, std::int64_t d, std::int64_t rows_at_once, std::int64_t own_bytes)
      : n_(bias.tokens), d_(d), pitch_(units_of(n_) * kLanes), rows_at_once_(rows_at_once) {
    assign(static_cast<char*>(thread_scratch(assign(nullptr, own_bytes))), own_bytes);
    std::memset(starts_v_, 0, units_of(d) * kLanes * 4);
    starts_bias_ = bias_starts(bias, starts_bias_memory_);
  }

  // Units of keys, k s8 [n, d], `stride` apart.
  void pack_keys(const std::int8_t* k, std::int64_t stride, std::int64_t units) {
    const std::int64_t steps = steps_of<SignedDot>(d_), unit = unit_bytes<SignedDot>(d_);
    for (std::int64_t u = 0; u < units; ++u) {
      pack_unit_nk<SignedDot>(k, stride, n_, d_, u * kLanes, packed_k_ + u * unit);
      store_start<SignedDot>(starts_k_ + u * kLanes, packed_k_ + u * unit, steps);
    }
  }

  Probabilities probabilities(float pv_factor) const { return {p_, factor_, pitch_, pv_factor}; }

  const std::int64_t n_, d_, pitch_, rows_at_once_;
  std::int8_t *packed_k_, *packed_v_, *p_;
  std::int32_t *starts_k_, *starts_v_, *starts_bias_memory_;
  const std::int32_t* starts_bias_;
  float *factor_, *row_scale_, *key_scale_;
  void *rows_, *own_;  // rows_: Q, then P, in the form of the GEMM

 private:
  // Lays the parts out from `memory` on, if there is any; returns their bytes.
  std::int64_t assign(char* memory, std::int64_t own_bytes) {
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
    p_ = static_cast<std::int8_t*>(part(rows * pitch_));
    factor_ = static_cast<float*>(part(rows * 4));
    row_scale_ = static_cast<float*>(part(n_ * 4));
    key_scale_ = static_cast<float*>(part(pitch_ * 4));
    rows_ = part(q_bytes > p_bytes ? q_bytes : p_bytes);
    own_ = part(own_bytes);
    return offset;
  }
};

#if !defined(SWIN_PASS_HEADS)
// Scores of so many rows at a time that they stay in the second-level cache. (In the first-level cache they were no
// faster, and on AVX2 3 % slower.)
class VectorHeads : public PackedHeads {
 public:
  VectorHeads(const BiasRows& bias, std::int64_t d)
      : PackedHeads(bias, d, rows_of(bias.tokens), score_bytes(bias.tokens)) {}

  void pack_keys(const std::int8_t* k, std::int64_t stride) { PackedHeads::pack_keys(k, stride, units_of(n_)); }

  // The probabilities of the queries q s8 [rows, d], `stride` apart, to which `logits` and `scale` belong.
  void attend(const std::int8_t* q, std::int64_t stride, std::int64_t rows, const LogitRows& logits, const Scale& scale,
              float pv_factor) {
    std::int32_t* scores = static_cast<std::int32_t*>(own_);
    gemm_block<SignedDot>(prepare_rows<SignedDot>(q, stride, rows, d_, rows_), rows, steps_of<SignedDot>(d_), packed_k_,
                          starts_k_, 0, units_of(n_), [scores, pitch = pitch_]<int V>(std::int64_t column) SWIN_INLINE {
                            return [=](std::int64_t row, const Vi* acc) SWIN_INLINE {
                              for (int v = 0; v < V; ++v) {  // not all at once, which GCC does through memory
                                const Vi score = acc[v];
                                std::memcpy(scores + row * pitch + column + v * kLanes, &score, sizeof score);
                              }
                            };
                          });
    const SoftmaxRows softmax{scores, logits, scale, probabilities(pv_factor)};
    each_pass(rows, [&](std::int64_t first, std::int64_t count) { softmax_some(softmax, first, count); });
  }

 private:
  static constexpr std::int64_t kScoreBytes = 96 << 10;

  static std::int64_t rows_of(std::int64_t n) {
    return ceil_div(n, ceil_div(n * units_of(n) * kLanes * 4, kScoreBytes));
  }
  static std::int64_t score_bytes(std::int64_t n) { return rows_of(n) * units_of(n) * kLanes * 4; }
};
#endif

}  // namespace swin::cpu::SWIN_ISA
