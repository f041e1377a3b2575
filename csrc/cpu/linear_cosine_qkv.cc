// linear_cosine_qkv: linear_s8 for Swin-V2's cosine attention: the head of a row of q or k is rounded to 127ths of its
// largest. x s8 [M, K], w s8 [3*h*d, K] -> out s8 [M, 3*h*d]. Formula: swin/ops.h.
//
// Some columns at a time, whole heads, go as floats into the thread's scratch, and from there, while they are in cache,
// to int8. The largest of several rows' heads are found together, as in softmax_row.h.
#include "kernels.h"
#include "linear.h"
#include "softmax_row.h"

namespace swin::cpu::SWIN_ISA {
namespace {

constexpr std::int64_t kColumnsAtOnce = 128;  // about as many; of 128 rows 64 KiB

// Units that hold whole heads of d columns: the least common multiple of d and a unit's columns.
inline std::int64_t units_together(std::int64_t d) {
  std::int64_t units = 1;
  while (units * kLanes % d != 0) ++units;
  return units;
}

// Calls body(v, lanes) for the vectors of d channels: kVectors whole ones, or with 0 any number.
template <int kVectors, class Body>
SWIN_INLINE inline void each_vector(std::int64_t d, Body&& body) {
  if constexpr (kVectors > 0) {
#pragma GCC unroll 8
    for (std::int64_t v = 0; v < kVectors; ++v) body(v * kLanes, static_cast<std::int64_t>(kLanes));
  } else {
    for_lanes(d, body);
  }
}

// Calls body(Constant<vectors>{}) where a head has 1, 2, 4 or 8 whole vectors, else body(Constant<0>{}).
template <int kVectors = 8, class Body>
SWIN_INLINE inline void with_head_of(std::int64_t d, Body&& body) {
  if (d == kVectors * kLanes) {
    body(Constant<kVectors>{});
  } else if constexpr (kVectors > 1) {
    with_head_of<kVectors / 2>(d, body);
  } else {
    body(Constant<0>{});
  }
}

// One head of some rows of floats [rows, .], `pitch` apart, to int8.
struct HeadRows {
  const float* y;
  std::int64_t pitch, rows, d;
  std::int8_t* out;
  std::int64_t out_pitch;

  // out = clamp(rne(y * factor)); |y * factor| is below 2^31 where kBounded.
  template <int kVectors, bool kBounded>
  SWIN_INLINE void quantize(std::int64_t row, float factor) const {
    const float* x = y + row * pitch;
    std::int8_t* target = out + row * out_pitch;
    if constexpr (kVectors % 2 == 0 && kVectors > 0) {
#pragma GCC unroll 4
      for (std::int64_t v = 0; v < kVectors; v += 2) {
        const Vf pair[2] = {load(x + v * kLanes) * factor, load(x + (v + 1) * kLanes) * factor};
        store_s8_columns<2, false, kBounded>(target + v * kLanes, pair, 2 * kLanes);
      }
    } else {
      each_vector<kVectors>(d, [&](std::int64_t e, std::int64_t lanes)
                                   SWIN_INLINE { store_s8(target + e, load(x + e, lanes) * factor, lanes); });
    }
  }

  template <int kVectors>
  void by_amax() const {
    for (std::int64_t r = 0; r < rows; ++r) quantize<kVectors, false>(r, 1.0f);
  }

  template <int kVectors>
  void by_largest() const {
    each_pass(rows, [&](std::int64_t first, std::int64_t count) SWIN_INLINE {
      RowVectors most_of;
      RowNumbers factor;
      for (std::int64_t r = 0; r < count; ++r) {
        Vf most{};
        each_vector<kVectors>(d, [&](std::int64_t e, std::int64_t lanes) SWIN_INLINE {
          most = max_size_of(most, load(y + (first + r) * pitch + e, lanes));
        });
        most_of.of[r] = most;
      }
      most_of.reduce_to(factor, count, largest_of);
      for (std::int64_t v = 0; v < kRowVectors; ++v) {
        store(factor.of + v * kLanes, splat(127.0f) / max_of(factor.vector(v), splat(kNormalizeEps)));
      }
      for (std::int64_t r = 0; r < count; ++r) quantize<kVectors, true>(first + r, factor.of[r]);
    });
  }
};

struct CosineQkv {
  const CpuPackedWeight& w;
  const Channels channels;
  const std::int8_t* x;
  std::int8_t* out;
  std::int64_t m, k, n, d, cosines;  // cosines: columns of q and k

  CosineQkv(const LinearCosineQkvArgs& args)
      : w(static_cast<const CpuPackedWeight&>(*args.w)),
        channels(args.scale, args.bias, w.n),
        x(args.x.as<const std::int8_t>()),
        out(args.out.as<std::int8_t>()),
        m(args.x.dim(0)),
        k(w.k),
        n(w.n),
        d(n / (3 * args.heads)),
        cosines(n / 3 * 2) {}

#if defined(SWIN_MASKED_LANES)
  bool heads_in_registers() const { return d == 2 * kLanes; }

  void run_in_registers(const ExecContext& context) const {
    const auto body = [&](const BlockTask& task, void* scratch) {
      std::int8_t* rows = out + task.first * n;
      multiply_block<Inputs::kSigned>(
          w, x + task.first * k, k, task, scratch,
          [rows, n = n, cosines = cosines, channels = channels]<int V>(std::int64_t column) SWIN_INLINE {
            return [rows = rows + column, n, cosine = column < cosines, columns = channels.at<V>(column)](
                       std::int64_t row, const Vi* acc) SWIN_INLINE {
              Vf y[V], largest{};
              for (int v = 0; v < V; ++v) {
                y[v] = columns.value(acc, v);
                largest = max_size_of(largest, y[v]);
              }
              if (cosine) {
                const float most = max_lane(largest);
                const Vf factor = splat(127.0f / (most > kNormalizeEps ? most : kNormalizeEps));
                for (int v = 0; v < V; ++v) y[v] *= factor;
              }
              store_s8_columns<V>(rows + row * n, y, V * kLanes);
            };
          });
    };
    parallel_blocks(context, m, w, block_bytes(w, kBlockRows), body, 2);
  }
#else
  bool heads_in_registers() const { return false; }
  void run_in_registers(const ExecContext&) const {}
#endif

  void run_through_scratch(const ExecContext& context) const {
    const std::int64_t together = units_of_tasks(units_together(d)),
                       parts = ceil_div(kColumnsAtOnce, together * kLanes);
    const std::int64_t units_at_once = parts * together, pitch = units_at_once * kLanes;
    const std::int64_t gemm_bytes = block_bytes(w, kBlockRows);
    const auto body = [&](BlockTask task, void* scratch) {
      float* y = reinterpret_cast<float*>(static_cast<char*>(scratch) + gemm_bytes);
      std::int64_t target[kBlockRows];
      for (std::int64_t r = 0; r < task.rows; ++r) target[r] = r * pitch;
      const std::int64_t end = task.last_unit;
      for (; task.first_unit < end; task.first_unit = task.last_unit, task.same_rows = true) {
        task.last_unit = min_of(end, task.first_unit + units_at_once);
        const std::int64_t first = task.first_unit * kLanes, last = min_of(n, task.last_unit * kLanes);
        multiply_and_store(w, x + task.first * k, task, scratch, channels, FloatRows{y - first, target}, {});
        for (std::int64_t column = first; column < last; column += d) {
          const HeadRows head{y + column - first, pitch, task.rows, d, out + task.first * n + column, n};
          with_head_of(d, [&](auto vectors) {
            if (column < cosines) {
              head.by_largest<vectors.value>();
            } else {
              head.by_amax<vectors.value>();
            }
          });
        }
      }
    };
    const std::int64_t float_bytes = kBlockRows * pitch * static_cast<std::int64_t>(sizeof(float));
    parallel_blocks(context, m, w, gemm_bytes + float_bytes, body, together);
  }
};

}  // namespace

void linear_cosine_qkv(const LinearCosineQkvArgs& args, const ExecContext& context) {
  const CosineQkv qkv(args);
  if (qkv.heads_in_registers()) {
    qkv.run_in_registers(context);
  } else {
    qkv.run_through_scratch(context);
  }
}

}  // namespace swin::cpu::SWIN_ISA
