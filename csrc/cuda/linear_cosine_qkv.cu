// linear_cosine_qkv: linear_s8 for cosine attention, each head of q and k of a row rounded to 127ths of its largest.
// x s8 [M, K], w s8 [3*h*d, K], scale, bias f32 [3*h*d] -> out s8 [M, 3*h*d]. Formula: swin/ops.h.
//
// Heads of 32: tile_gemm.cuh, where the 32 columns of a head are those of four lanes, so that a row's largest is two
// shuffles away. Layout and floor: there.
// Other heads and alignments: a warp a row and head, every product made twice, for the largest and for the rounding.
#include "kernels.h"
#include "linear_epilogues.cuh"

namespace swin::cuda {
namespace {

constexpr const char* kOp = "linear_cosine_qkv";
constexpr int kHead = 4 * kOwned;
constexpr int kThreads = 128;

// What y of q and k is multiplied with: 127 over its head's largest.
__device__ __forceinline__ float step_of(float largest) {
  return 127.0f * reciprocal_approx(fmaxf(largest, kNormalizeEps));
}

// Heads of kHead columns.
struct QuantizeHeads : ChannelScale {
  static constexpr bool kCombines = true;
  std::int8_t* out;
  std::int64_t n;
  unsigned first_v;  // column

  __device__ __forceinline__ void combine(unsigned at, const Column<kOwned>& c, float (&x)[kOwned]) const {
    c.apply(x);
    if (at >= first_v) return;  // a whole warp
    float largest = 0;
#pragma unroll
    for (int i = 0; i < kOwned; ++i) largest = fmaxf(largest, fabsf(x[i]));
    const float step = step_of(max_over<4>(largest));
#pragma unroll
    for (int i = 0; i < kOwned; ++i) x[i] *= step;
  }
  __device__ __forceinline__ void store(unsigned row, unsigned at, const Column<kOwned>&,
                                        const float (&x)[kOwned]) const {
    store_quantized<kOwned>(out + row * n + at, x);
  }
};

struct HeadShape {
  FastDiv heads;  // of q, k and v together
  unsigned items, first_v;
  int d;
};

// Any shape and alignment.
__global__ void __launch_bounds__(kThreads)
    cosine_qkv_rows_kernel(const GemmOperands g, const HeadShape shape, const ChannelScale scales,
                           std::int8_t* __restrict__ out) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  unsigned head = blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (head >= shape.items) return;  // a whole warp
  const std::int64_t row = shape.heads.split(head);
  const unsigned first = head * shape.d;
  const std::int8_t* x = g.x + row * g.k;
  const auto value = [&](unsigned n) {
    const std::int8_t* w = g.w + static_cast<std::int64_t>(n) * g.k;
    int sum = 0;
    for (int i = 0; i < g.k; ++i) sum += x[i] * w[i];
    float y[1] = {__int2float_rn(sum)};
    scales.column<1>(n).apply(y);
    return y[0];
  };
  float step = 1;
  if (first < shape.first_v) {
    float largest = 0;
    for (int e = lane; e < shape.d; e += kWarp) largest = fmaxf(largest, fabsf(value(first + e)));
    step = step_of(max_over<kWarp>(largest));
  }
  for (int e = lane; e < shape.d; e += kWarp) {
    store_quantized<1>(out + row * g.columns + first + e, {value(first + e) * step});
  }
}

}  // namespace

template <class T>
void linear_cosine_qkv(const LinearCosineQkvArgs& args, const ExecContext& context) {
  const GemmOperands g = operands(kOp, args.x, *args.w);
  const ChannelScale scales{args.scale.as<const float>(), args.bias.as<const float>()};
  std::int8_t* out = args.out.as<std::int8_t>();
  const std::int64_t d = args.w->n / (3 * args.heads);
  const unsigned first_v = g.columns / 3 * 2;
  if (d == kHead && is_aligned(out, kOwned) && takes_copies(g)) {
    launch_aligned_tiles(kOp, g, QuantizeHeads{scales, out, args.w->n, first_v}, context.stream);
    return;
  }
  const HeadShape shape{FastDiv(3 * args.heads), count32(kOp, "heads of all rows", args.x.dim(0) * 3 * args.heads),
                        first_v, static_cast<int>(d)};
  SWIN_LAUNCH(kOp, cosine_qkv_rows_kernel, static_cast<unsigned>(ceil_div(shape.items, kThreads / kWarp)), kThreads, 0,
              context.stream, g, shape, scales, out);
}

SWIN_INSTANTIATE(linear_cosine_qkv, LinearCosineQkvArgs)

}  // namespace swin::cuda
