// qkv_bias_normalize: dequantize, add the bias, scale every head's q and k to length 1, quantize, split into heads. qkv
// s8 [BW*N, 3*h*d] -> out s8 [3, BW, h, N, d]. Formula: swin/ops.h.
//
// Layout: a warp one head of one token, a lane every 32nd channel: for d = 32, as in every published Swin, one byte a
// lane, so a warp reads and writes one 32-byte sector. The simplest that is right; not timed yet.
#include "device.cuh"
#include "kernels.h"

namespace swin::cuda {
namespace {

constexpr int kNormalizeThreads = 128;

struct QkvHeads {
  FastDiv heads, parts, n;  // parts: of 3*h heads a token
  int d;
  std::int64_t bw;
  float dequant, quant[3];
};

template <class T>
__global__ void __launch_bounds__(kNormalizeThreads)
    qkv_bias_normalize_kernel(const QkvHeads shape, const std::int8_t* __restrict__ qkv, const T* __restrict__ bias,
                              std::int8_t* __restrict__ out, const unsigned count) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const unsigned index = blockIdx.x * (kNormalizeThreads / kWarp) + threadIdx.x / kWarp;
  if (index >= count) return;  // a whole warp
  unsigned part = index;
  unsigned token = shape.parts.split(part);
  const std::int8_t* x = qkv + static_cast<std::int64_t>(index) * shape.d;
  const T* b = bias + static_cast<std::int64_t>(part) * shape.d;
  unsigned head = part;
  const unsigned t = shape.heads.split(head);
  const unsigned window = shape.n.split(token);
  const auto at = [&](int e) { return static_cast<float>(x[e]) * shape.dequant + to_float(b[e]); };
  float factor = t == 0 ? shape.quant[0] : t == 1 ? shape.quant[1] : shape.quant[2];
  if (t < 2) {  // the same for the whole warp
    float squares = 0.0f;
    for (int e = lane; e < shape.d; e += kWarp) squares += at(e) * at(e);
    const float length = sqrtf(sum_over<kWarp>(squares));
    factor /= length < kNormalizeEps ? kNormalizeEps : length;  // NaN stays NaN
  }
  std::int8_t* target = out + (((t * shape.bw + window) * shape.heads.divisor() + head) * shape.n.divisor() + token) *
                                  static_cast<std::int64_t>(shape.d);
  for (int e = lane; e < shape.d; e += kWarp) {
    const float y[1] = {at(e) * factor};
    store_quantized<1>(target + e, y);
  }
}

}  // namespace

template <class T>
void qkv_bias_normalize(const QkvBiasNormalizeArgs& args, const ExecContext& context) {
  const std::int64_t bw = args.out.dim(1), heads = args.out.dim(2), n = args.out.dim(3), d = args.out.dim(4);
  const QkvHeads shape{FastDiv(heads),
                       FastDiv(3 * heads),
                       FastDiv(n),
                       static_cast<int>(d),
                       bw,
                       args.dequant,
                       {args.quant_q, args.quant_k, args.quant_v}};
  const std::int64_t count = bw * n * 3 * heads;
  SWIN_LAUNCH("qkv_bias_normalize", qkv_bias_normalize_kernel<T>,
              static_cast<unsigned>(ceil_div(count, kNormalizeThreads / kWarp)), kNormalizeThreads, 0, context.stream,
              shape, args.qkv.as<const std::int8_t>(), args.bias.as<const T>(), args.out.as<std::int8_t>(),
              count32("qkv_bias_normalize", "heads of tokens", count));
}

SWIN_INSTANTIATE(qkv_bias_normalize, QkvBiasNormalizeArgs)

}  // namespace swin::cuda
