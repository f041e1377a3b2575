// The op table: every operation of the Swin INT8 graphs, declared once. Each backend fills the table; what it leaves
// empty is an error that names the op, never a silent fallback.
//
// Conventions
//   All tensors are dense and row-major. "float" is the backend's residual and parameter type (OpTable::float_dtype:
//   float32 on CPU). s8 means int8, full range -128..127.
//   quantize(x, s)  = clamp(rne(x * s), -128, 127), rne = round half to even, computed in float32; NaN gives 0.
//   dequantize(q,s) = q * s.
//   B images, H x W tokens, M = B*H*W rows, C channels, h heads of d, windows of N = window_h * window_w tokens,
//   BW = B * windows per image, P = BW*N rows in window order: row ((b*nWh + wh)*nWw + ww)*N + i*window_w + j is (y, x) =
//   (wh*window_h + i, ww*window_w + j) of the shifted image, token ((y + shift_h) % H, (x + shift_w) % W) of the original.
//   Where windows do not divide the image, it is padded on the right and at the bottom, and P > M. Rows of padding are 0
//   where an op writes window order, and left out where one reads it. WindowGeometry::pad_first says what comes first:
//     false  the shift, as in timm: the shifted image is padded, rows of y >= H or x >= W
//     true   padding, as in Microsoft's code: H and W above are the padded sizes, and tokens beyond the image are padding
#pragma once

#include <cstdint>
#include <variant>
#include <vector>

#include "swin/tensor.h"

namespace swin {

inline constexpr float kLayerNormEps = 1e-5f;
inline constexpr float kNormalizeEps = 1e-12f;  // smallest length that cosine attention divides by

// Windows that cover `size` tokens, the last one perhaps in part.
constexpr std::int64_t windows_along(std::int64_t size, std::int64_t window) { return (size + window - 1) / window; }

struct WindowGeometry {
  std::int64_t batch = 0, height = 0, width = 0;
  std::int64_t window_h = 0, window_w = 0, shift_h = 0, shift_w = 0;
  bool pad_first = false;

  std::int64_t tokens() const { return batch * height * width; }
  std::int64_t window_area() const { return window_h * window_w; }
  std::int64_t windows_y() const { return windows_along(height, window_h); }
  std::int64_t windows_x() const { return windows_along(width, window_w); }
  std::int64_t windows_per_image() const { return windows_y() * windows_x(); }
  std::int64_t window_rows() const { return batch * windows_per_image() * window_area(); }
  bool is_padded() const { return window_rows() != tokens(); }
  // What the cyclic shift counts modulo.
  std::int64_t cycle_h() const { return pad_first ? windows_y() * window_h : height; }
  std::int64_t cycle_w() const { return pad_first ? windows_x() * window_w : width; }
};

// What a GEMM's activations are known to be: lowest..127. A backend may have faster exact ways to multiply the fewer
// values that are; which they are has to be known when the weights are packed.
struct InputRange {
  std::int32_t lowest;  // -128..0

  static const InputRange kSigned, kNonNegative;  // any int8; 0..127, as behind a ReLU
  // GELU's values times `quant`, rounded to int8: GELU is never below -0.169971.
  static constexpr InputRange behind_gelu(float quant) {
    const float lowest = -0.17f * quant;
    return {lowest > -127.0f && lowest <= 0 ? static_cast<std::int32_t>(lowest) - 1 : -128};
  }
  constexpr std::int32_t top() const { return 127 - lowest; }  // of what is left of an input less `lowest`
  constexpr bool holds(InputRange other) const { return lowest <= other.lowest; }
  friend constexpr bool operator==(InputRange a, InputRange b) { return a.lowest == b.lowest; }
};
inline constexpr InputRange InputRange::kSigned{-128}, InputRange::kNonNegative{0};

// s8 weights [N, K] in the layout a backend's GEMM wants; made once, at load.
class PackedWeight {
 public:
  PackedWeight(std::int64_t n, std::int64_t k, InputRange input = InputRange::kSigned) : n(n), k(k), input(input) {}
  virtual ~PackedWeight() = default;
  PackedWeight(const PackedWeight&) = delete;
  PackedWeight& operator=(const PackedWeight&) = delete;

  const std::int64_t n, k;
  const InputRange input;
};

enum class Epilogue { kNone, kRelu };

// The convolution of the patch embedding as a floating-point GEMM, without its bias.
// image f32 [B, in_chans, H*p, W*p], weight float [C, in_chans*p*p] -> out float [B*H*W, C].
// ValueError naming the image where one holds NaN or infinity: INT8 would turn it into plausible numbers.
struct PatchEmbedArgs {
  TensorView image, weight, out;
  std::int64_t patch_size = 0;
};

// x = LayerNorm(x + bias) * gamma + beta in place; gamma and beta without data: only the bias; bias without data: none.
// x float [M, C]; bias, gamma, beta float [C]. Also what the fused graph has behind Swin-V2's reduction.
struct PatchEmbedNormArgs {
  TensorView x, bias, gamma, beta;
};

// out[window order] = quantize(LayerNorm(residual)[shifted], quant). residual float [M, C] -> out s8 [P, C].
struct NormShiftPartitionArgs {
  TensorView residual, gamma, beta, out;
  WindowGeometry geometry;
  float quant = 0;
};

// acc[m, n] = sum_k x[m, k] * w[n, k], exact in int32. x s8 [M, K], within w's InputRange; w s8 [N, K].
// out s8 [M, N]:  clamp(rne(float(acc) * factor), -128, 127); with kRelu clamp(rne(max(0, float(acc)*factor)), 0, 127).
// out s32 [M, N]: acc; factor is ignored and kRelu is refused.
struct GemmS8Args {
  TensorView x;
  const PackedWeight* w = nullptr;
  TensorView out;
  float factor = 0;
  Epilogue epilogue = Epilogue::kNone;
};

// out[t] = quantize(dequantize(qkv, dequant) + bias, quant[t]) for t = q, k, v.
// qkv s8 [BW*N, 3*h*d], bias float [3*h*d] -> out s8 [3, BW, h, N, d].
struct QkvBiasArgs {
  TensorView qkv, bias, out;
  float dequant = 0, quant_q = 0, quant_k = 0, quant_v = 0;
};

// Per window and head: out[i, j] = clamp(rne(float(sum_e q[i, e] * k[j, e]) * factor)), j < N; columns N..pitch-1 are
// 0. q, k s8 [BW, h, N, d] -> out s8 [BW, h, N, pitch].
struct QkGemmArgs {
  TensorView q, k, out;
  float factor = 0;
};

// out[i, :] = quantize(softmax_j(scores[i, j] * dequant * scale + bias[head, i, j] + mask[window, i, j]), quant), j <
// N; columns N..pitch-1 are 0. scores s8 [BW, h, N, pitch], bias float [h, N, N], mask float [windows, N, N] or none.
struct SoftmaxArgs {
  TensorView scores, bias, mask, out;
  float dequant = 0, scale = 0, quant = 0;
};

// out[window*N + i, head*d + e] = clamp(rne(float(sum_j p[i, j] * v[j, e]) * factor)), j < N.
// p s8 [BW, h, N, pitch] of 0..127 (quantized probabilities), v s8 [BW, h, N, d] -> out s8 [BW*N, h*d].
struct PvGemmArgs {
  TensorView p, v, out;
  float factor = 0;
};

// residual += dequantize(proj, dequant)[window reversed, unshifted] + bias; out = quantize(LayerNorm(residual), quant).
// proj s8 [P, C] in window order; residual float [M, C], out s8 [M, C] in image order.
struct ProjBiasResidualNormArgs {
  TensorView proj, bias, residual, gamma, beta, out;
  WindowGeometry geometry;
  float dequant = 0, quant = 0;
};

// out = quantize(GELU(dequantize(x, dequant) + bias), quant), GELU in its erf form. x s8 [M, F] -> out s8 [M, F].
struct BiasGeluArgs {
  TensorView x, bias, out;
  float dequant = 0, quant = 0;
};

// residual += dequantize(x, dequant) + bias. x s8 or s32 [M, C], residual float [M, C].
struct BiasResidualArgs {
  TensorView x, bias, residual;
  float dequant = 0;
};

// Gathers 2x2 neighbours (row parity, column parity) in the order (0,0) (1,0) (0,1) (1,1) to 4C channels;
// out = quantize(LayerNorm(gathered), quant). Beyond an odd H or W lie zeros.
// residual float [B*H*W, C] -> out s8 [B*ceil(H/2)*ceil(W/2), 4C].
struct PatchMergeNormArgs {
  TensorView residual, gamma, beta, out;
  std::int64_t batch = 0, height = 0, width = 0;
  float quant = 0;
  std::int64_t merged_tokens() const { return batch * ((height + 1) / 2) * ((width + 1) / 2); }
};

// out = x * dequant. x s8 or s32 [M, C] -> out float [M, C].
struct DequantizeArgs {
  TensorView x, out;
  float dequant = 0;
};

// --- the fused graph's (docs/fused.md). Scales and biases of channels are f32 on every backend: in float16 a scale would
// lose its bits, or be 0.

// acc as in gemm_s8. out s8: clamp(rne(float(acc) * scale[n] + bias[n]), -128, 127); out float: the same sum, unrounded.
// x s8 [M, K], w's InputRange kSigned, scale, bias f32 [N] (no bias: 0) -> out s8 or float [M, N].
struct LinearS8Args {
  TensorView x;
  const PackedWeight* w = nullptr;
  TensorView scale, bias, out;
};

// linear_s8 for Swin-V2's cosine attention, y = float(acc) * scale[n] + bias[n]. Columns are q, k, v of `heads` heads of d.
// A row's head of q or k is rounded to 127ths of its largest, since a cosine does not change with its length:
//   out = clamp(rne(y * (127 / max(kNormalizeEps, max_e |y[e]|))), -128, 127); v: out = clamp(rne(y), -128, 127).
// x s8 [M, K], w's InputRange kSigned, scale, bias f32 [3*h*d] (no bias: 0) -> out s8 [M, 3*h*d].
struct LinearCosineQkvArgs {
  TensorView x;
  const PackedWeight* w = nullptr;
  TensorView scale, bias, out;
  std::int64_t heads = 0;
};

// Attention of one window and head after the other: with q, k, v the thirds of a row of qkv, split by head,
//   x[j] = float(sum_e q[i, e] * k[j, e]) * qk_factor + bias[head, i, j] + mask[window, i, j]
//   p[j] = rne(127 * exp(x[j] - max_j x[j])), 0..127
//   out[window*N + i, head*d + e] = clamp(rne(float(sum_j p[j] * v[j, e]) * pv_factor / float(sum_j p[j])), -128, 127).
// With head_scale (Swin-V2) qk_factor is ignored, and the first term of x[j] is a cosine's:
//   float(sum_e q[i, e] * k[j, e]) * head_scale[head] / (len(q[i]) * len(k[j])), len(a) = sqrt(max(1, sum_e a[e]^2)).
// qkv s8 [BW*N, 3*h*d], bias float [h, N, N], or compact (swin/position_bias.h) where Backend::takes_compact_bias says so,
// mask float [windows, N, N] or none, head_scale f32 [h] or none -> out s8 [BW*N, h*d].
// With mask_of, s32 [windows], mask is float [D, N, N], and a window of an image has the mask_of[window]-th; -1: it has none.
struct WindowAttentionArgs {
  TensorView qkv, bias, mask, mask_of, head_scale, out;
  float qk_factor = 0, pv_factor = 0;
};

// Where the LayerNorm of a residual operation stands, whose branch gives y.
//   kPreNorm      ahead of the next branch (Swin-V1): residual += y; out = quantize(LayerNorm(residual), quant)
//   kResPostNorm  behind its own branch (Swin-V2):    residual += LayerNorm(y); out = quantize(residual, quant)
enum class NormPlace { kPreNorm, kResPostNorm };

// y = float(acc) * scale[n] + bias[n], from window order to image order; residual and out as `norm` says, in image order.
// x s8 [P, K] in the window order of `geometry`; w's InputRange kSigned; scale, bias f32 [C]; gamma, beta
// float [C]; residual float [M, C], out s8 [M, C]; branch f32 [P, C]: memory for y, needed with kResPostNorm.
struct LinearResidualNormArgs {
  TensorView x;
  const PackedWeight* w = nullptr;
  TensorView scale, bias, residual, gamma, beta, branch, out;
  WindowGeometry geometry;
  float quant = 0;
  NormPlace norm = NormPlace::kPreNorm;
};

enum class Activation { kRelu, kGelu };

// hidden: kRelu  clamp(rne(max(0, float(acc1) * scale1[f])), 0, 127), and there is no bias1
//         kGelu  clamp(rne(GELU(float(acc1) * scale1[f] + bias1[f]) * hidden_quant), -128, 127)
// y = float(acc2) * scale2[n] + bias2[n]; residual and out as `norm` says, out in the window order of `geometry`.
// Without out the residual alone is updated, and with kPreNorm there is no gamma and beta then.
// x s8 [M, C] in image order, w1 [F, C] (its InputRange kSigned), w2 [C, F] (an InputRange that holds what the
// activation gives), scales and biases f32, residual float [M, C], out s8 [P, C]; hidden s8 [M, F] or none: memory for
// all hidden rows, as Backend::mlp_keeps_hidden says; branch f32 [M, C]: memory for y, needed with kResPostNorm.
struct MlpResidualNormArgs {
  TensorView x;
  const PackedWeight *w1 = nullptr, *w2 = nullptr;
  TensorView scale1, bias1, scale2, bias2, residual, gamma, beta, hidden, branch, out;
  WindowGeometry geometry;
  Activation activation = Activation::kRelu;
  float hidden_quant = 0, quant = 0;
  NormPlace norm = NormPlace::kPreNorm;
};

// out[b] = mean over tokens of LayerNorm(residual). residual float [B*L, C] -> out f32 [B, C].
struct FinalNormPoolArgs {
  TensorView residual, gamma, beta, out;
};

// out = features @ weight^T + bias. features f32 [B, C], weight float [K, C], bias float [K] -> out f32 [B, K].
struct HeadArgs {
  TensorView features, weight, bias, out;
};

// Swin-V2's own operations (docs/architecture.md, "Swin-V2").

// out[window order] = quantize(residual[shifted], quant). residual float [M, C] -> out s8 [P, C].
struct ShiftPartitionArgs {
  TensorView residual, out;
  WindowGeometry geometry;
  float quant = 0;
};

// x = dequantize(qkv, dequant) + bias; q and k of every head divided by max(sqrt(sum_e x_e^2), kNormalizeEps);
// out[t] = quantize(x, quant[t]) for t = q, k, v. qkv s8 [BW*N, 3*h*d], bias float [3*h*d] -> out s8 [3, BW, h, N, d].
struct QkvBiasNormalizeArgs {
  TensorView qkv, bias, out;
  float dequant = 0, quant_q = 0, quant_k = 0, quant_v = 0;
};

// As softmax, with a scale of each head's own: out[i, :] = quantize(softmax_j(scores[i, j] * dequant * head_scale[head]
// + bias[head, i, j] + mask[window, i, j]), quant), j < N; columns N..pitch-1 are 0. scores s8 [BW, h, N, pitch],
// head_scale float [h], bias float [h, N, N], mask float [windows, N, N] or none -> out s8 [BW, h, N, pitch].
struct HeadScaleSoftmaxArgs {
  TensorView scores, head_scale, bias, mask, out;
  float dequant = 0, quant = 0;
};

// residual += LayerNorm(dequantize(proj, dequant) + bias)[window reversed, unshifted]; out = quantize(residual, quant).
// proj s8 [P, C] in window order; residual float [M, C], out s8 [M, C] in image order.
struct ProjBiasNormResidualArgs {
  TensorView proj, bias, gamma, beta, residual, out;
  WindowGeometry geometry;
  float dequant = 0, quant = 0;
};

// residual += LayerNorm(dequantize(x, dequant) + bias). x s8 [M, C], residual float [M, C].
struct BiasNormResidualArgs {
  TensorView x, bias, gamma, beta, residual;
  float dequant = 0;
};

// Gathers as patch_merge_norm; out = quantize(gathered, quant).
// residual float [B*H*W, C] -> out s8 [B*ceil(H/2)*ceil(W/2), 4C].
struct PatchMergeArgs {
  TensorView residual, out;
  std::int64_t batch = 0, height = 0, width = 0;
  float quant = 0;
  std::int64_t merged_tokens() const { return batch * ((height + 1) / 2) * ((width + 1) / 2); }
};

// out = LayerNorm(x * dequant). x s8 [M, C] -> out float [M, C].
struct DequantizeNormArgs {
  TensorView x, gamma, beta, out;
  float dequant = 0;
};

#define SWIN_FOR_EACH_FUSED_OP(X)                      \
  X(linear_s8, LinearS8Args)                           \
  X(linear_cosine_qkv, LinearCosineQkvArgs)            \
  X(window_attention, WindowAttentionArgs)             \
  X(linear_residual_norm, LinearResidualNormArgs)      \
  X(mlp_residual_norm, MlpResidualNormArgs)

#define SWIN_FOR_EACH_FT_OP(X)                         \
  X(patch_embed, PatchEmbedArgs)                       \
  X(patch_embed_norm, PatchEmbedNormArgs)              \
  X(norm_shift_partition, NormShiftPartitionArgs)      \
  X(gemm_s8, GemmS8Args)                               \
  X(qkv_bias, QkvBiasArgs)                             \
  X(qk_gemm, QkGemmArgs)                               \
  X(softmax, SoftmaxArgs)                              \
  X(pv_gemm, PvGemmArgs)                               \
  X(proj_bias_residual_norm, ProjBiasResidualNormArgs) \
  X(bias_gelu, BiasGeluArgs)                           \
  X(bias_residual, BiasResidualArgs)                   \
  X(patch_merge_norm, PatchMergeNormArgs)              \
  X(dequantize, DequantizeArgs)                        \
  X(final_norm_pool, FinalNormPoolArgs)                \
  X(head, HeadArgs)                                    \
  X(shift_partition, ShiftPartitionArgs)               \
  X(qkv_bias_normalize, QkvBiasNormalizeArgs)          \
  X(head_scale_softmax, HeadScaleSoftmaxArgs)          \
  X(proj_bias_norm_residual, ProjBiasNormResidualArgs) \
  X(bias_norm_residual, BiasNormResidualArgs)          \
  X(patch_merge, PatchMergeArgs)                       \
  X(dequantize_norm, DequantizeNormArgs)

#define SWIN_FOR_EACH_OP(X) SWIN_FOR_EACH_FT_OP(X) SWIN_FOR_EACH_FUSED_OP(X)

// How and where one call runs. `threads` bounds the CPU threads used; `stream` is a backend's queue (null on CPU).
struct ExecContext {
  int threads = 1;
  void* stream = nullptr;
};

struct OpTable {
  DType float_dtype = DType::kF32;
#define SWIN_DECLARE_OP(name, Args) void (*name)(const Args&, const ExecContext&) = nullptr;
  SWIN_FOR_EACH_OP(SWIN_DECLARE_OP)
#undef SWIN_DECLARE_OP
};

#define SWIN_VARIANT_OP(name, Args) , Args
using OpArgs = std::variant<std::monostate SWIN_FOR_EACH_OP(SWIN_VARIANT_OP)>;
#undef SWIN_VARIANT_OP

// What an op moves and computes, from its arguments alone.
struct OpCost {
  std::int64_t bytes_read = 0;
  std::int64_t bytes_written = 0;
  std::int64_t operations = 0;  // a multiply-add counts as two
};

// The op's name in the table.
const char* op_name(const OpArgs& args);
// Throws ShapeError, DTypeError or ValueError where `args` break the op's contract.
void check_args(const OpArgs& args, DType float_dtype);
// Checks, then runs; UnsupportedError where `table` lacks the op.
void run_op(const OpTable& table, const char* backend, const OpArgs& args, const ExecContext& context);
OpCost op_cost(const OpArgs& args);
// Tensors the op writes (an in-place one included).
std::vector<TensorView> op_outputs(const OpArgs& args);
// Whether the op reads its first output's old contents.
bool updates_in_place(const OpArgs& args);

}  // namespace swin
