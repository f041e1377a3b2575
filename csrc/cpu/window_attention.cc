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

// One row of scores x [vectors * kLanes], beyond N very negative: p = rne(127 * exp(x - max)) as bytes; their sum.
template <int kVectors>
inline float softmax_row(const float* x, std::int64_t vectors, std::int8_t* p) {
  const std::int64_t count = kVectors > 0 ? kVectors : vectors;
  Vf largest = load(x);
  for (std::int64_t v = 1; v < count; ++v) largest = max_of(largest, load(x + v * kLanes));
  const Vf shift = splat(kLog2Of127 - max_lane(largest) * kLog2E);
  Vi sum{};
  for (std::int64_t v = 0; v < count; ++v) {
    const Vi q = rounded(exp2_of(load(x + v * kLanes) * kLog2E + shift));
    store_bytes(p + v * kLanes, q);
    sum += q;
  }
  return sum_of(__builtin_convertvector(sum, Vf));
}

template <int kVectors = 9>
inline float dispatch_row(const float* x, std::int64_t vectors, std::int8_t* p) {
  if (vectors == kVectors) return softmax_row<kVectors>(x, vectors, p);
  if constexpr (kVectors > 1) return dispatch_row<kVectors - 1>(x, vectors, p);
  return softmax_row<0>(x, vectors, p);
}

// The scratch of one thread.
struct Scratch {
  std::int8_t *packed_k, *packed_v, *p;
  std::int32_t *starts_k, *starts_v;
  float *scores, *factor;
  void* rows;  // Q, then P, in the form of the GEMM

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
    scores = static_cast<float*>(part(n * pitch * 4));
    p = static_cast<std::int8_t*>(part(n * pitch));
    factor = static_cast<float*>(part(n * 4));
    rows = part(q_bytes > p_bytes ? q_bytes : p_bytes);
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
  const float qk_factor = args.qk_factor;
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
                            key_units, [&]<int V>(std::int64_t row, std::int64_t column, const Vi* acc) {
                              for (int v = 0; v < V; ++v) {
                                const std::int64_t j = column + v * kLanes, lanes = min_of(kLanes, n - j);
                                Vf x = __builtin_convertvector(acc[v], Vf) * qk_factor + load(bias + row * n + j, lanes);
                                if (mask != nullptr) x += load(mask + row * n + j, lanes);
                                store(s.scores + row * pitch + j, lanes == kLanes ? x : keep(x, lanes, -3.0e38f));
                              }
                            });
      for (std::int64_t row = 0; row < n; ++row) {
        const float sum = dispatch_row(s.scores + row * pitch, key_units, s.p + row * pitch);
        s.factor[row] = args.pv_factor / sum;
      }
      // P's columns from N on are zero, so its rows may be read in whole steps where they lie.
      const Rows p = NonNegativeDot::kInPlace ? Rows{reinterpret_cast<const char*>(s.p), pitch}
                                              : prepare_rows<NonNegativeDot>(s.p, pitch, n, n, s.rows);
      std::int8_t* out = args.out.as<std::int8_t>() + window * n * c + head * d;
      gemm_block<NonNegativeDot>(p, n, value_steps, s.packed_v, s.starts_v, 0, value_units,
                                 [&]<int V>(std::int64_t row, std::int64_t column, const Vi* acc) {
                                   Vf y[V];
                                   for (int v = 0; v < V; ++v) y[v] = __builtin_convertvector(acc[v], Vf) * s.factor[row];
                                   store_s8_columns<V>(out + row * c + column, y, d - column);
                                 });
    }
  });
}

}  // namespace swin::cpu::SWIN_ISA
