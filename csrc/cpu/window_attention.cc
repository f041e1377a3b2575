// window_attention: Q K^T, position bias, shift mask, softmax and P V of one window and head after the other, the scores
// never leaving the thread's cache. qkv s8 [BW*N, 3*h*d] -> out s8 [BW*N, h*d]. Formula: swin/ops.h.
//
// Probabilities are quantized before they are normalized, relative to their row's largest, and the sum that normalizes
// them is that of the quantized ones: the row's weights add up to one exactly, and P V gets all 127 steps.
#include "gemm_core.h"
#include "kernels.h"

namespace swin::cpu::SWIN_ISA {
namespace {

constexpr float kLog2E = 1.44269504f, kLog2Of127 = 6.98868469f;

// Rows of one window and head on their way from scores to probabilities. `pitch` is N rounded up to whole vectors.
struct SoftmaxRows {
  const std::int32_t* scores;  // [n, pitch], columns from n on anything
  const float *bias, *mask;    // [n, n]; mask: null where there is none
  std::int8_t* p;              // [n, pitch], 0 from column n on
  float* factor;               // [n]: pv_factor over the row's sum of p
  std::int64_t n, pitch;
  float qk_factor, pv_factor;
};

// kVectors = pitch / kLanes as a constant keeps a row in registers; 0: any, through `memory`.
template <int kVectors, bool kMasked>
inline void softmax_rows(const SoftmaxRows& s, Vf* memory) {
  const std::int64_t count = kVectors > 0 ? kVectors : s.pitch / kLanes, last = s.n - (count - 1) * kLanes;
  Vf registers[kVectors > 0 ? kVectors : 1];
  Vf* x = kVectors > 0 ? registers : memory;
  for (std::int64_t row = 0; row < s.n; ++row) {
    Vf largest = splat(-3.0e38f);
    for (std::int64_t v = 0; v < count; ++v) {
      const std::int64_t j = v * kLanes, lanes = v + 1 < count ? kLanes : last;
      Vf y = load(s.scores + row * s.pitch + j) * s.qk_factor + load(s.bias + row * s.n + j, lanes);
      if constexpr (kMasked) y += load(s.mask + row * s.n + j, lanes);
      x[v] = v + 1 < count ? y : keep(y, lanes, -3.0e38f);
      largest = max_of(largest, x[v]);
    }
    const Vf top = splat(max_lane(largest));
    Vi sum{};
    for (std::int64_t v = 0; v < count; ++v) {
      const Vi q = rounded(exp2_of((x[v] - top) * kLog2E + kLog2Of127));
      store_bytes(s.p + row * s.pitch + v * kLanes, q);
      sum += q;
    }
    s.factor[row] = s.pv_factor / sum_of(__builtin_convertvector(sum, Vf));
  }
}

template <int kVectors = 9>
inline void dispatch_rows_of(const SoftmaxRows& s, Vf* memory) {
  if (s.pitch == kVectors * kLanes) {
    if (s.mask != nullptr) {
      softmax_rows<kVectors, true>(s, memory);
    } else {
      softmax_rows<kVectors, false>(s, memory);
    }
  } else if constexpr (kVectors > 1) {
    dispatch_rows_of<kVectors - 1>(s, memory);
  } else if (s.mask != nullptr) {
    softmax_rows<0, true>(s, memory);
  } else {
    softmax_rows<0, false>(s, memory);
  }
}

// The scratch of one thread.
struct Scratch {
  std::int8_t *packed_k, *packed_v, *p;
  std::int32_t *starts_k, *starts_v;
  std::int32_t* scores;
  float* factor;
  void* rows;  // Q, then P, in the form of the GEMM
  Vf* row;     // one row of scores

  // Lays the parts out from `memory` on, if there is any; returns their bytes.
  std::int64_t assign(char* memory, std::int64_t n, std::int64_t d) {
    const std::int64_t pitch = units_of(n) * kLanes, columns = units_of(d) * kLanes;
    std::int64_t offset = 0;
    const auto part = [&](std::int64_t bytes) {
      char* start = memory + offset;
      offset += ceil_div(bytes, 64) * 64;
      return static_cast<void*>(start);
    };
    const std::int64_t q_bytes = rows_bytes<SignedDot>(n, d), p_bytes = rows_bytes<NonNegativeDot>(n, n);
    packed_k = static_cast<std::int8_t*>(part(units_of(n) * unit_bytes<SignedDot>(d)));
    packed_v = static_cast<std::int8_t*>(part(units_of(d) * unit_bytes<NonNegativeDot>(n)));
    starts_k = static_cast<std::int32_t*>(part(pitch * 4));
    starts_v = static_cast<std::int32_t*>(part(columns * 4));
    scores = static_cast<std::int32_t*>(part(n * pitch * 4));
    p = static_cast<std::int8_t*>(part(n * pitch));
    factor = static_cast<float*>(part(n * 4));
    rows = part(q_bytes > p_bytes ? q_bytes : p_bytes);
    row = static_cast<Vf*>(part(pitch * 4));
    return offset;
  }
};

}  // namespace

void window_attention(const WindowAttentionArgs& args, const ExecContext& context) {
  const std::int64_t heads = args.bias.dim(0), n = args.bias.dim(1), c = args.out.dim(1), d = c / heads;
  const std::int64_t windows = args.out.dim(0) / n, masks = args.mask ? args.mask.dim(0) : 1;
  const std::int64_t key_units = units_of(n), value_units = units_of(d), pitch = key_units * kLanes;
  const std::int64_t key_steps = steps_of<SignedDot>(d), value_steps = steps_of<NonNegativeDot>(n);
  const std::int64_t key_unit = unit_bytes<SignedDot>(d), value_unit = unit_bytes<NonNegativeDot>(n);
  parallel_rows(context, windows * heads, 1, [&](std::int64_t first, std::int64_t last) {
    Scratch s;
    s.assign(static_cast<char*>(thread_scratch(s.assign(nullptr, n, d))), n, d);
    for (std::int64_t u = 0; u < value_units; ++u) std::memset(s.starts_v + u * kLanes, 0, kLanes * 4);
    for (std::int64_t index = first; index < last; ++index) {
      const std::int64_t window = index / heads, head = index % heads;
      const std::int8_t* q = args.qkv.as<const std::int8_t>() + window * n * 3 * c + head * d;
      const float* bias = args.bias.as<const float>() + head * n * n;
      const float* mask = args.mask ? args.mask.as<const float>() + window % masks * n * n : nullptr;
      for (std::int64_t u = 0; u < key_units; ++u) {
        pack_unit_nk<SignedDot>(q + c, 3 * c, n, d, u * kLanes, s.packed_k + u * key_unit);
        store_start<SignedDot>(s.starts_k + u * kLanes, s.packed_k + u * key_unit, key_steps);
      }
      for (std::int64_t u = 0; u < value_units; ++u) {
        pack_unit_kn<NonNegativeDot>(q + 2 * c, 3 * c, d, n, u * kLanes, s.packed_v + u * value_unit);
      }
      gemm_block<SignedDot>(prepare_rows<SignedDot>(q, 3 * c, n, d, s.rows), n, key_steps, s.packed_k, s.starts_k, 0,
                            key_units,
                            [scores = s.scores, pitch]<int V>(std::int64_t row, std::int64_t column, const Vi* acc)
                                SWIN_INLINE { std::memcpy(scores + row * pitch + column, acc, V * sizeof(Vi)); });
      dispatch_rows_of({s.scores, bias, mask, s.p, s.factor, n, pitch, args.qk_factor, args.pv_factor}, s.row);
      // P's columns from N on are zero, so its rows may be read in whole steps where they lie.
      const Rows p = NonNegativeDot::kInPlace ? Rows{reinterpret_cast<const char*>(s.p), pitch}
                                              : prepare_rows<NonNegativeDot>(s.p, pitch, n, n, s.rows);
      std::int8_t* out = args.out.as<std::int8_t>() + window * n * c + head * d;
      gemm_block<NonNegativeDot>(p, n, value_steps, s.packed_v, s.starts_v, 0, value_units,
                                 [out, c, d, factor = s.factor]<int V>(std::int64_t row, std::int64_t column,
                                                                       const Vi* acc) SWIN_INLINE {
                                   Vf y[V];
                                   for (int v = 0; v < V; ++v) y[v] = __builtin_convertvector(acc[v], Vf) * factor[row];
                                   store_s8_columns<V>(out + row * c + column, y, d - column);
                                 });
    }
  });
}

}  // namespace swin::cpu::SWIN_ISA
