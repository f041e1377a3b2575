// Attention with AVX-512 VNNI, and with AMX what its tiles do not take. A window's queries go in passes of as many rows
// as a vector has lanes, and the products of one pass stand between the largest logits of the pass before and its
// exponentials: what these wait for is filled with those.
#pragma once

#include "attention_heads.h"

#if defined(SWIN_PASS_HEADS)
namespace swin::cpu::SWIN_ISA {

class PassHeads : public PackedHeads {
 public:
  PassHeads(const BiasRows& bias, std::int64_t d)
      : PackedHeads(bias, d, ceil_div(bias.tokens, ceil_div(bias.tokens, kRowsAtOnce)), own_bytes(bias.tokens, d)),
        lone_(has_lone_column(n_)),
        vectors_(lone_ ? n_ / kLanes : units_of(n_)) {
    lone_key_ = static_cast<std::int8_t*>(own_);
    lone_unit_ = lone_key_ + lone_key_bytes(d);
    scores_ = reinterpret_cast<Vi*>(lone_unit_ + unit_bytes<SignedDot>(d));
    x_[0] = reinterpret_cast<Vf*>(scores_ + kSoftmaxRows * ceil_div(vectors_, kAtOnce) * kAtOnce);
    x_[1] = x_[0] + kSoftmaxRows * vectors_;
  }

  // k s8 [n, d], `stride` apart.
  void pack_keys(const std::int8_t* k, std::int64_t stride) {
    PackedHeads::pack_keys(k, stride, vectors_);
    if (!lone_) return;
    const std::int8_t* last = k + (n_ - 1) * stride;
    std::memcpy(lone_key_, last, d_);  // what lies behind it meets zeros
    std::int32_t sum = 0;
    for (std::int64_t i = 0; i < d_; ++i) sum += last[i];
    lone_start_ = -SignedDot::kOffset * sum;
  }

  // The probabilities of the queries q s8 [rows, d], `stride` apart, to which `logits` and `scale` belong.
  void attend(const std::int8_t* q, std::int64_t stride, std::int64_t rows, const LogitRows& logits, const Scale& scale,
              float pv_factor) {
    const Queries queries{q, stride, rows, logits, scale};
    with_row_shape<kMostOfPass>(n_, [&](auto count, auto lone, std::int64_t) SWIN_INLINE {
      if (scale.rows != nullptr) {
        attend_rows<count.value, lone.value, true>(queries, probabilities(pv_factor));
      } else {
        attend_rows<count.value, lone.value, false>(queries, probabilities(pv_factor));
      }
    });
  }

 private:
  static constexpr std::int64_t kRowsAtOnce =
      4 * kSoftmaxRows;  // probabilities are kept of, until they meet the values

  // With AMX one instance for all: tiles take windows up to 256 tokens and heads up to 64 channels, a multiple of four.
#if defined(__AMX_INT8__)
  static constexpr int kMostOfPass = 0;
#else
  static constexpr int kMostOfPass = kMostVectors;
#endif

  // Accumulators of as many rows and vectors, the vectors' keys and a word of a row fill the registers.
  static constexpr int kAtOnce = 4;
  static constexpr int rows_with(int vectors) {
#if defined(SWIN_SANITIZED)
    return 2;
#else
    return vectors == kAtOnce ? 6 : 8;
#endif
  }
  // Of a row of `vectors`, as equal parts as can be; 0: of many.
  static constexpr int at_once(int vectors) {
    const int parts = (vectors + kAtOnce - 1) / kAtOnce;
    return parts == 0 ? kAtOnce : (vectors + parts - 1) / parts;
  }

  struct Queries {
    const std::int8_t* q;
    std::int64_t stride, rows;
    LogitRows logits;
    Scale scale;
  };

  // Rows [first, first + rows) between their products and their exponentials.
  struct Pass {
    std::int64_t first, rows;
    Vf* x;
    RowVectors most;
    Vf lone;
  };

  static std::int64_t lone_key_bytes(std::int64_t d) { return ceil_div(rows_bytes<SignedDot>(1, d), 64) * 64; }
  static std::int64_t own_bytes(std::int64_t n, std::int64_t d) {
    return lone_key_bytes(d) + unit_bytes<SignedDot>(d) + 3 * kSoftmaxRows * (units_of(n) + kAtOnce) * sizeof(Vf);
  }

  template <int kVectors, bool kLone, bool kCosine>
  void attend_rows(const Queries& queries, const Probabilities& to) {
    const std::int64_t passes = ceil_div(queries.rows, kSoftmaxRows);
    Pass pass[2];
    logits<kVectors, kLone, kCosine>(queries, 0, passes, pass[0]);
    for (std::int64_t i = 0; i < passes; ++i) {
      Pass& own = pass[i % 2];
      PassLogits logits_of_pass{own.x, {}, {}};
      own.most.reduce_to(logits_of_pass.largest, own.rows, largest_of);
      if constexpr (kLone) {
        store(logits_of_pass.largest.of, max_of(logits_of_pass.largest.vector(0), own.lone));
        store(logits_of_pass.lone.of, own.lone);
      }
      if (i + 1 < passes) logits<kVectors, kLone, kCosine>(queries, i + 1, passes, pass[(i + 1) % 2]);
      probabilities_pass<kVectors, kLone>(logits_of_pass, own.rows, vectors_, to.from(own.first));
    }
  }

  template <int kVectors, bool kLone, bool kCosine>
  SWIN_INLINE void logits(const Queries& queries, std::int64_t i, std::int64_t passes, Pass& pass) {
    pass.first = i * queries.rows / passes;
    pass.rows = (i + 1) * queries.rows / passes - pass.first;
    pass.x = x_[i % 2];
    const LogitRows logits = queries.logits.from(pass.first);
    const Scale scale = queries.scale.from(pass.first);
    alignas(64) float lone_bias[kSoftmaxRows] = {}, lone_mask[kSoftmaxRows] = {};
    if constexpr (kLone) {  // stored one by one long before they are read together: a load waits for stores that small
      for (std::int64_t r = 0; r < pass.rows; ++r) lone_bias[r] = logits.bias_row(r)[n_ - 1];
      if (logits.mask != nullptr) {
        for (std::int64_t r = 0; r < pass.rows; ++r) lone_mask[r] = logits.mask[r * n_ + n_ - 1];
      }
    }
    const Rows rows =
        prepare_rows<SignedDot>(queries.q + pass.first * queries.stride, queries.stride, pass.rows, d_, rows_);
    multiply_keys(rows, pass.rows, at_once(kVectors));
    whole_logits_of<kVectors, kLone>(
        logits, pass.rows, vectors_,
        [this, &scale](std::int64_t r, std::int64_t j) SWIN_INLINE {
          constexpr std::int64_t kWidth = at_once(kVectors);
          const std::int64_t v = j / kLanes, chunk = v / kWidth;
          const Vf score = __builtin_convertvector(scores_[(chunk * kSoftmaxRows + r) * kAtOnce + v % kWidth], Vf);
          return kCosine ? score * scale.rows[r] * load(scale.columns + j) : score * scale.factor;
        },
        pass.x, pass.most);
    if constexpr (kLone) {
      const Vf factor = kCosine ? load(scale.rows, pass.rows) * scale.columns[n_ - 1] : splat(scale.factor);
      pass.lone = lone_scores(rows, pass.rows) * factor + load(lone_bias) + load(lone_mask);
    }
  }

  // scores_[chunk][r][v] = q k^T, `width` vectors of columns a chunk.
  __attribute__((noinline)) void multiply_keys(Rows q, std::int64_t rows, int width) {
    for (std::int64_t first = 0, chunk = 0; first < vectors_; first += width, ++chunk) {
      with_vectors_at_once<kAtOnce>(min_of(width, vectors_ - first), [&](auto vectors) SWIN_INLINE {
        constexpr int V = vectors.value;
        const RowGroups groups(rows, rows_with(V));
        for (std::int64_t g = 0; g < groups.all; ++g) {
          const std::int64_t row = groups.first(g);
          Vi* scores = scores_ + (chunk * kSoftmaxRows + row) * kAtOnce;
          dispatch<V, rows_with(V)>(groups.rows(g), q.data + row * q.stride, q.stride,
                                    packed_k_ + first * unit_bytes<SignedDot>(d_), starts_k_ + first * kLanes,
                                    [scores]<int>() SWIN_INLINE {
                                      return [scores](int r, const Vi* acc) SWIN_INLINE {
#pragma GCC unroll 4
                                        for (int v = 0; v < V; ++v) scores[r * kAtOnce + v] = acc[v];
                                      };
                                    });
        }
      });
    }
  }

  template <int V, class Body>
  SWIN_INLINE static void with_vectors_at_once(std::int64_t vectors, Body&& body) {
    if (vectors == V) {
      body(Constant<V>{});
    } else if constexpr (V > 1) {
      with_vectors_at_once<V - 1>(vectors, body);
    }
  }

  template <int V, int R, class Emit>
  SWIN_INLINE void dispatch(std::int64_t rows, const char* data, std::int64_t stride, const std::int8_t* units,
                            const std::int32_t* start, const Emit& emit) {
    if (rows == R) {
      micro_kernel<SignedDot, R, V>(data, stride, steps_of<SignedDot>(d_), units, nullptr, start, emit);
    } else if constexpr (R > 1) {
      dispatch<V, R - 1>(rows, data, stride, units, start, emit);
    }
  }

  // The last column's scores, a row of q in each lane: the rows packed in the keys' place, the last key in a row's.
  Vf lone_scores(Rows q, std::int64_t rows) {
    pack_unit_nk<SignedDot>(reinterpret_cast<const std::int8_t*>(q.data), q.stride, rows, q.stride, 0, lone_unit_);
    Vi even = broadcast(lone_start_), odd{};  // one sum would wait for itself
    const auto add = [&](Vi& sum, std::int64_t s) SWIN_INLINE {
      std::int32_t word;
      std::memcpy(&word, lone_key_ + s * 4, 4);
      sum = SignedDot::dot(sum, load_vector(lone_unit_ + s * kStepBytes<SignedDot>), broadcast(word));
    };
    const std::int64_t steps = steps_of<SignedDot>(d_);
    std::int64_t s = 0;
    for (; s + 2 <= steps; s += 2) {
      add(even, s);
      add(odd, s + 1);
    }
    if (s < steps) add(even, s);
    return __builtin_convertvector(even + odd, Vf);
  }

  const bool lone_;
  const std::int64_t vectors_;  // of a row, without a lone column
  std::int8_t *lone_key_, *lone_unit_;
  std::int32_t lone_start_ = 0;
  Vi* scores_;
  Vf* x_[2];
};

}  // namespace swin::cpu::SWIN_ISA
#endif
