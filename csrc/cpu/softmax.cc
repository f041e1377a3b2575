// softmax: out[i, :] = quantize(softmax_j(scores[i, j] * dequant * scale + bias[head, i, j] + mask[window, i, j])).
// scores s8 [BW, h, N, pitch] -> out s8 [BW, h, N, pitch]; columns N..pitch-1 are 0. Formula: swin/ops.h.
// One row at a time, in registers where it has few enough vectors.
#include "kernels.h"
#include "simd.h"

namespace swin::cpu::SWIN_ISA {
namespace {

struct SoftmaxRow {
  const std::int8_t* scores;
  const float *bias, *mask;  // mask: null where there is none
  std::int8_t* out;
  std::int64_t n, pitch;
  float scale, quant;
};

// `vectors` is ceil(n / kLanes); as a constant (kVectors > 0) the row stays in registers.
template <int kVectors>
inline void softmax_row(const SoftmaxRow& row, std::int64_t vectors, Vf* x) {
  const std::int64_t count = kVectors > 0 ? kVectors : vectors;
  const auto lanes_of = [&](std::int64_t v) { return v + 1 < count ? kLanes : row.n - v * kLanes; };
  const auto room_of = [&](std::int64_t v) { return v + 1 < count ? kLanes : min_of(kLanes, row.pitch - v * kLanes); };
  Vf largest = splat(-3.0e38f);
  for (std::int64_t v = 0; v < count; ++v) {
    const std::int64_t j = v * kLanes, lanes = lanes_of(v);
    Vf y = load(row.scores + j, room_of(v)) * row.scale + load(row.bias + j, lanes);
    if (row.mask != nullptr) y += load(row.mask + j, lanes);
    x[v] = lanes == kLanes ? y : keep(y, lanes, -3.0e38f);
    largest = max_of(largest, x[v]);
  }
  const float top = max_lane(largest);
  Vf sum{};
  for (std::int64_t v = 0; v < count; ++v) {
    x[v] = exp2_of((x[v] - top) * splat(1.44269504f));
    sum += x[v];
  }
  const float factor = row.quant / sum_of(sum);
  // Lanes past N hold exponentials of -3e38, which are 0.
  for (std::int64_t v = 0; v < count; ++v) store_s8(row.out + v * kLanes, x[v] * factor, room_of(v));
}

template <int kVectors = 9>
inline void dispatch_row(const SoftmaxRow& row, std::int64_t vectors, Vf* x) {
  if (vectors == kVectors) {
    Vf registers[kVectors];
    softmax_row<kVectors>(row, vectors, registers);
  } else if constexpr (kVectors > 1) {
    dispatch_row<kVectors - 1>(row, vectors, x);
  } else {
    softmax_row<0>(row, vectors, x);
  }
}

}  // namespace

void softmax(const SoftmaxArgs& args, const ExecContext& context) {
  const std::int64_t heads = args.scores.dim(1), n = args.scores.dim(2), pitch = args.scores.dim(3);
  const std::int64_t windows = args.mask ? args.mask.dim(0) : 1, vectors = ceil_div(n, kLanes);
  parallel_rows(context, args.scores.dim(0) * heads, 1, [&](std::int64_t first, std::int64_t last) {
    Vf* x = static_cast<Vf*>(thread_scratch(vectors * sizeof(Vf)));
    for (std::int64_t index = first; index < last; ++index) {
      const float* bias = args.bias.as<const float>() + index % heads * n * n;
      const float* mask = args.mask ? args.mask.as<const float>() + index / heads % windows * n * n : nullptr;
      for (std::int64_t i = 0; i < n; ++i) {
        const std::int64_t row = (index * n + i) * pitch;
        std::int8_t* out = args.out.as<std::int8_t>() + row;
        dispatch_row({args.scores.as<const std::int8_t>() + row, bias + i * n, mask ? mask + i * n : nullptr, out, n, pitch,
                      args.dequant * args.scale, args.quant},
                     vectors, x);
        if (pitch > vectors * kLanes) std::memset(out + n, 0, pitch - n);
      }
    }
  });
}

}  // namespace swin::cpu::SWIN_ISA
