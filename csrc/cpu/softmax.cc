// softmax: out[i, :] = quantize(softmax_j(scores[i, j] * dequant * scale + bias[head, i, j] + mask[window, i, j])).
// scores s8 [BW, h, N, pitch] -> out s8 [BW, h, N, pitch]; columns N..pitch-1 are 0. Formula: swin/ops.h.
#include "kernels.h"
#include "softmax_row.h"

namespace swin::cpu::SWIN_ISA {
namespace {

template <int kVectors, bool kLone>
static inline void softmax_rows_s8(const SoftmaxS8& s, std::int64_t vectors, Vf* x) {
  const std::int64_t n = s.logits.n, pitch = s.pitch, count = kVectors > 0 ? kVectors : vectors;
  const auto room_of = [&](std::int64_t v) { return v + 1 < count ? kLanes : min_of(kLanes, pitch - v * kLanes); };
  each_pass(n, [&](std::int64_t first, std::int64_t rows) SWIN_INLINE {
    RowNumbers largest, lone, sums;
    const std::int8_t* scores = s.scores + first * pitch;
    const float scale = s.scale;
    logits_of<kVectors, kLone>(
        s.logits.from(first), rows, count,
        [=](std::int64_t r, std::int64_t j) SWIN_INLINE { return load(scores + r * pitch + j, room_of(j / kLanes)) * scale; },
        [=](std::int64_t r) SWIN_INLINE { return static_cast<float>(scores[r * pitch + n - 1]) * scale; }, x, largest, lone);
    RowVectors parts;
    for (std::int64_t r = 0; r < rows; ++r) {
      Vf sum{};
#pragma GCC unroll 9
      for (std::int64_t v = 0; v < count; ++v) {
        Vf& e = x[r * count + v];
        e = exp2_of((e - largest.of[r]) * splat(kLog2E));
        sum += e;
      }
      parts.of[r] = sum;
    }
    parts.reduce_to(sums, rows, sums_of);
    RowNumbers factors;
    std::int8_t lone_out[kSoftmaxRows];
    for (std::int64_t v = 0; v < kRowVectors; ++v) {
      Vf sum = sums.vector(v), e{};
      if constexpr (kLone) sum += e = exp2_of((lone.vector(v) - largest.vector(v)) * splat(kLog2E));
      const Vf factor = splat(s.quant) / sum;
      store(factors.of + v * kLanes, factor);
      if constexpr (kLone) store_s8(lone_out + v * kLanes, e * factor);
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      std::int8_t* out = s.out + (first + r) * pitch;
      // Lanes past N hold exponentials of -3e38, which are 0.
#pragma GCC unroll 9
      for (std::int64_t v = 0; v < count; ++v) {
        store_s8(out + v * kLanes, x[r * count + v] * factors.of[r], kLone ? kLanes : room_of(v));
      }
      if constexpr (kLone) {
        std::int64_t column = count * kLanes;
        for (; column + kLanes <= pitch; column += kLanes) store_lone(out + column, column < n ? lone_out[r] : 0);
        if (column < pitch) std::memset(out + column, 0, pitch - column);
        if (n > column) out[n - 1] = lone_out[r];
      } else if (pitch > count * kLanes) {
        std::memset(out + n, 0, pitch - n);
      }
    }
  });
}

}  // namespace

void softmax_s8(const SoftmaxS8& s, Vf* x) {
  with_row_shape(s.logits.n, [&](auto count, auto lone, std::int64_t vectors) SWIN_INLINE {
    softmax_rows_s8<count.value, lone.value>(s, vectors, x);
  });
}

void softmax(const SoftmaxArgs& args, const ExecContext& context) {
  const std::int64_t heads = args.scores.dim(1), n = args.scores.dim(2), pitch = args.scores.dim(3);
  const std::int64_t windows = args.mask ? args.mask.dim(0) : 1;
  parallel_rows(context, args.scores.dim(0) * heads, 1, [&](std::int64_t first, std::int64_t last) {
    Vf* x = static_cast<Vf*>(thread_scratch(softmax_scratch_bytes(n)));
    for (std::int64_t index = first; index < last; ++index) {
      const float* mask = args.mask ? args.mask.as<const float>() + index / heads % windows * n * n : nullptr;
      const LogitRows logits{args.bias.as<const float>() + index % heads * n * n, mask, n};
      const SoftmaxS8 of{args.scores.as<const std::int8_t>() + index * n * pitch, logits,
                         args.out.as<std::int8_t>() + index * n * pitch, pitch, args.dequant * args.scale, args.quant};
      softmax_s8(of, x);
    }
  });
}

}  // namespace swin::cpu::SWIN_ISA
