// Contracts and costs of the op table; nothing here knows a backend.
#include "swin/ops.h"

#include "swin/error.h"
#include "swin/position_bias.h"

namespace swin {

std::string TensorView::describe() const {
  if (data == nullptr) return "no tensor";
  std::string text = std::string(name_of(dtype)) + " [";
  for (int i = 0; i < rank; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

namespace {

// 2^31 / 128^2: from there on an int32 accumulator could overflow.
constexpr std::int64_t kMaxGemmK = 131072;

void expect(const char* op, const char* what, const TensorView& t, DType dtype,
            std::initializer_list<std::int64_t> dims) {
  const TensorView wanted(t.data, dtype, dims);
  SWIN_CHECK(ShapeError, op, t.data != nullptr || wanted.numel() == 0, what, " is missing");
  SWIN_CHECK(DTypeError, op, t.dtype == dtype, what, " is ", t.describe(), "; ", name_of(dtype), " is needed");
  SWIN_CHECK(ShapeError, op, t.rank == wanted.rank && t.shape == wanted.shape, what, " is ", t.describe(), "; ",
             wanted.describe(), " is needed");
}

void expect_rank(const char* op, const char* what, const TensorView& t, int rank) {
  SWIN_CHECK(ShapeError, op, t.data != nullptr, what, " is missing");
  SWIN_CHECK(ShapeError, op, t.rank == rank, what, " is ", t.describe(), "; rank ", rank, " is needed");
  for (int i = 0; i < rank; ++i) {
    SWIN_CHECK(ShapeError, op, t.dim(i) > 0, what, " is ", t.describe(), "; every size must be positive");
  }
}

void expect_s8_or_s32(const char* op, const char* what, const TensorView& t) {
  SWIN_CHECK(DTypeError, op, t.dtype == DType::kS8 || t.dtype == DType::kS32, what, " is ", t.describe(),
             "; int8 or int32 is needed");
}

void check_geometry(const char* op, const WindowGeometry& g) {
  SWIN_CHECK(ShapeError, op,
             g.batch > 0 && g.height > 0 && g.width > 0 && g.window_h > 0 && g.window_w > 0 && g.window_h <= g.height &&
                 g.window_w <= g.width,
             "batch ", g.batch, ", ", g.height, "x", g.width, " tokens have no windows of ", g.window_h, "x",
             g.window_w);
  SWIN_CHECK(ShapeError, op, g.shift_h >= 0 && g.shift_h < g.height && g.shift_w >= 0 && g.shift_w < g.width, "shift ",
             g.shift_h, ",", g.shift_w, " is outside the image of ", g.height, "x", g.width, " tokens");
}

void check(const PatchEmbedArgs& a, DType f) {
  const char* op = "patch_embed";
  expect_rank(op, "image", a.image, 4);
  const std::int64_t p = a.patch_size;
  SWIN_CHECK(ShapeError, op, p > 0 && a.image.dim(2) % p == 0 && a.image.dim(3) % p == 0, "image ", a.image.describe(),
             " does not divide into patches of ", p);
  expect_rank(op, "weight", a.weight, 2);
  expect(op, "image", a.image, DType::kF32, {a.image.dim(0), a.image.dim(1), a.image.dim(2), a.image.dim(3)});
  expect(op, "weight", a.weight, f, {a.weight.dim(0), a.image.dim(1) * p * p});
  expect(op, "out", a.out, f, {a.image.dim(0) * (a.image.dim(2) / p) * (a.image.dim(3) / p), a.weight.dim(0)});
}

void check(const PatchEmbedNormArgs& a, DType f) {
  const char* op = "patch_embed_norm";
  expect_rank(op, "x", a.x, 2);
  expect(op, "x", a.x, f, {a.x.dim(0), a.x.dim(1)});
  if (a.bias) expect(op, "bias", a.bias, f, {a.x.dim(1)});
  SWIN_CHECK(ShapeError, op, bool(a.gamma) == bool(a.beta), "gamma and beta must both be there or both be absent");
  if (a.gamma) {
    expect(op, "gamma", a.gamma, f, {a.x.dim(1)});
    expect(op, "beta", a.beta, f, {a.x.dim(1)});
  }
}

void check(const NormShiftPartitionArgs& a, DType f) {
  const char* op = "norm_shift_partition";
  check_geometry(op, a.geometry);
  expect_rank(op, "residual", a.residual, 2);
  const std::int64_t m = a.geometry.tokens(), c = a.residual.dim(1);
  expect(op, "residual", a.residual, f, {m, c});
  expect(op, "gamma", a.gamma, f, {c});
  expect(op, "beta", a.beta, f, {c});
  expect(op, "out", a.out, DType::kS8, {a.geometry.window_rows(), c});
}

void check(const GemmS8Args& a, DType) {
  const char* op = "gemm_s8";
  SWIN_CHECK(ShapeError, op, a.w != nullptr, "weight is missing");
  expect_rank(op, "x", a.x, 2);
  expect_s8_or_s32(op, "out", a.out);
  expect(op, "x", a.x, DType::kS8, {a.x.dim(0), a.w->k});
  expect(op, "out", a.out, a.out.dtype, {a.x.dim(0), a.w->n});
  SWIN_CHECK(ValueError, op, a.epilogue == Epilogue::kNone || a.out.dtype == DType::kS8,
             "the ReLU epilogue needs an int8 output, found ", a.out.describe());
  SWIN_CHECK(ShapeError, op, a.w->k > 0 && a.w->k < kMaxGemmK, "K is ", a.w->k, "; 1 to ", kMaxGemmK - 1,
             " keeps int32 exact");
}

void check(const QkvBiasArgs& a, DType f) {
  const char* op = "qkv_bias";
  expect_rank(op, "out", a.out, 5);
  const std::int64_t m = a.out.dim(1) * a.out.dim(3), c = a.out.dim(2) * a.out.dim(4);
  expect(op, "out", a.out, DType::kS8, {3, a.out.dim(1), a.out.dim(2), a.out.dim(3), a.out.dim(4)});
  expect(op, "qkv", a.qkv, DType::kS8, {m, 3 * c});
  expect(op, "bias", a.bias, f, {3 * c});
}

void check(const QkGemmArgs& a, DType) {
  const char* op = "qk_gemm";
  expect_rank(op, "q", a.q, 4);
  expect_rank(op, "out", a.out, 4);
  const auto& s = a.q.shape;
  expect(op, "q", a.q, DType::kS8, {s[0], s[1], s[2], s[3]});
  expect(op, "k", a.k, DType::kS8, {s[0], s[1], s[2], s[3]});
  expect(op, "out", a.out, DType::kS8, {s[0], s[1], s[2], a.out.dim(3)});
  SWIN_CHECK(ShapeError, op, a.out.dim(3) >= s[2], "pitch ", a.out.dim(3), " is less than the window's ", s[2]);
}

void check(const SoftmaxArgs& a, DType f) {
  const char* op = "softmax";
  expect_rank(op, "scores", a.scores, 4);
  const auto& s = a.scores.shape;
  expect(op, "scores", a.scores, DType::kS8, {s[0], s[1], s[2], s[3]});
  SWIN_CHECK(ShapeError, op, s[3] >= s[2], "pitch ", s[3], " is less than the window's ", s[2]);
  expect(op, "bias", a.bias, f, {s[1], s[2], s[2]});
  expect(op, "out", a.out, DType::kS8, {s[0], s[1], s[2], s[3]});
  if (a.mask) {
    expect_rank(op, "mask", a.mask, 3);
    expect(op, "mask", a.mask, f, {a.mask.dim(0), s[2], s[2]});
    SWIN_CHECK(ShapeError, op, s[0] % a.mask.dim(0) == 0, s[0], " windows are not a multiple of the mask's ",
               a.mask.dim(0));
  }
}

void check(const PvGemmArgs& a, DType) {
  const char* op = "pv_gemm";
  expect_rank(op, "p", a.p, 4);
  expect_rank(op, "v", a.v, 4);
  const auto& s = a.v.shape;
  expect(op, "p", a.p, DType::kS8, {s[0], s[1], s[2], a.p.dim(3)});
  expect(op, "v", a.v, DType::kS8, {s[0], s[1], s[2], s[3]});
  SWIN_CHECK(ShapeError, op, a.p.dim(3) >= s[2], "pitch ", a.p.dim(3), " is less than the window's ", s[2]);
  expect(op, "out", a.out, DType::kS8, {s[0] * s[2], s[1] * s[3]});
}

void check(const ProjBiasResidualNormArgs& a, DType f) {
  const char* op = "proj_bias_residual_norm";
  check_geometry(op, a.geometry);
  expect_rank(op, "residual", a.residual, 2);
  const std::int64_t m = a.geometry.tokens(), c = a.residual.dim(1);
  expect(op, "proj", a.proj, DType::kS8, {a.geometry.window_rows(), c});
  expect(op, "bias", a.bias, f, {c});
  expect(op, "residual", a.residual, f, {m, c});
  expect(op, "gamma", a.gamma, f, {c});
  expect(op, "beta", a.beta, f, {c});
  expect(op, "out", a.out, DType::kS8, {m, c});
}

void check(const BiasGeluArgs& a, DType f) {
  const char* op = "bias_gelu";
  expect_rank(op, "x", a.x, 2);
  expect(op, "x", a.x, DType::kS8, {a.x.dim(0), a.x.dim(1)});
  expect(op, "bias", a.bias, f, {a.x.dim(1)});
  expect(op, "out", a.out, DType::kS8, {a.x.dim(0), a.x.dim(1)});
}

void check(const BiasResidualArgs& a, DType f) {
  const char* op = "bias_residual";
  expect_rank(op, "residual", a.residual, 2);
  expect_s8_or_s32(op, "x", a.x);
  expect(op, "residual", a.residual, f, {a.residual.dim(0), a.residual.dim(1)});
  expect(op, "x", a.x, a.x.dtype, {a.residual.dim(0), a.residual.dim(1)});
  expect(op, "bias", a.bias, f, {a.residual.dim(1)});
}

void check(const PatchMergeNormArgs& a, DType f) {
  const char* op = "patch_merge_norm";
  SWIN_CHECK(ShapeError, op, a.batch > 0 && a.height > 0 && a.width > 0, "batch ", a.batch, ", ", a.height, "x", a.width,
             " tokens; all must be positive");
  expect_rank(op, "residual", a.residual, 2);
  const std::int64_t m = a.batch * a.height * a.width, c = a.residual.dim(1);
  expect(op, "residual", a.residual, f, {m, c});
  expect(op, "gamma", a.gamma, f, {4 * c});
  expect(op, "beta", a.beta, f, {4 * c});
  expect(op, "out", a.out, DType::kS8, {a.merged_tokens(), 4 * c});
}

void check(const DequantizeArgs& a, DType f) {
  const char* op = "dequantize";
  expect_rank(op, "x", a.x, 2);
  expect_s8_or_s32(op, "x", a.x);
  expect(op, "out", a.out, f, {a.x.dim(0), a.x.dim(1)});
}

// The operands of a GEMM whose result has a scale and a bias per channel; an absent bias is 0.
void check_linear(const char* op, const TensorView& x, const PackedWeight* w, const TensorView& scale,
                  const TensorView& bias) {
  SWIN_CHECK(ShapeError, op, w != nullptr, "weight is missing");
  expect_rank(op, "x", x, 2);
  expect(op, "x", x, DType::kS8, {x.dim(0), w->k});
  SWIN_CHECK(ShapeError, op, w->k > 0 && w->k < kMaxGemmK, "K is ", w->k, "; 1 to ", kMaxGemmK - 1,
             " keeps int32 exact");
  SWIN_CHECK(ValueError, op, w->input == InputRange::kSigned, "the weight was packed for inputs of ", w->input.lowest,
             "..127; here they are any int8");
  expect(op, "scale", scale, DType::kF32, {w->n});
  if (bias) expect(op, "bias", bias, DType::kF32, {w->n});
}

void check(const LinearS8Args& a, DType f) {
  const char* op = "linear_s8";
  check_linear(op, a.x, a.w, a.scale, a.bias);
  SWIN_CHECK(DTypeError, op, a.out.dtype == DType::kS8 || a.out.dtype == f, "out is ", a.out.describe(), "; int8 or ",
             name_of(f), " is needed");
  expect(op, "out", a.out, a.out.dtype, {a.x.dim(0), a.w->n});
}

void check(const LinearCosineQkvArgs& a, DType) {
  const char* op = "linear_cosine_qkv";
  check_linear(op, a.x, a.w, a.scale, a.bias);
  SWIN_CHECK(ShapeError, op, a.heads > 0 && a.w->n % (3 * a.heads) == 0, "the weight's ", a.w->n,
             " rows do not divide into q, k and v of ", a.heads, " heads");
  expect(op, "out", a.out, DType::kS8, {a.x.dim(0), a.w->n});
}

void check(const WindowAttentionArgs& a, DType f) {
  const char* op = "window_attention";
  const BiasRows bias = BiasRows::of(op, a.bias);
  SWIN_CHECK(DTypeError, op, a.bias.dtype == f, "bias is ", a.bias.describe(), "; ", name_of(f), " is needed");
  expect_rank(op, "out", a.out, 2);
  const std::int64_t heads = bias.heads, n = bias.tokens, rows = a.out.dim(0), c = a.out.dim(1);
  SWIN_CHECK(ShapeError, op, rows % n == 0 && c % heads == 0, "out is ", a.out.describe(),
             ", which does not divide into windows of ", n, " tokens and ", heads, " heads");
  expect(op, "out", a.out, DType::kS8, {rows, c});
  expect(op, "qkv", a.qkv, DType::kS8, {rows, 3 * c});
  if (a.head_scale) expect(op, "head_scale", a.head_scale, DType::kF32, {heads});
  if (a.mask) {
    expect_rank(op, "mask", a.mask, 3);
    expect(op, "mask", a.mask, f, {a.mask.dim(0), n, n});
    if (a.mask_of) expect_rank(op, "mask_of", a.mask_of, 1);
    const std::int64_t windows = (a.mask_of ? a.mask_of : a.mask).dim(0);
    if (a.mask_of) expect(op, "mask_of", a.mask_of, DType::kS32, {windows});
    SWIN_CHECK(ShapeError, op, rows / n % windows == 0, rows / n, " windows are not a multiple of the mask's ", windows);
  }
  SWIN_CHECK(ShapeError, op, a.mask || !a.mask_of, "mask_of says which mask a window has, and there is no mask");
}

// A residual of [m, c], its LayerNorm and int8 output of `out_rows` as far as an operation has them (Args:
// LinearResidualNormArgs or MlpResidualNormArgs); `rows` of the GEMM that y comes from.
template <class Args>
void check_residual_norm(const char* op, const Args& a, std::int64_t m, std::int64_t rows, std::int64_t out_rows,
                         std::int64_t c, DType f) {
  expect(op, "residual", a.residual, f, {m, c});
  if (a.norm == NormPlace::kResPostNorm) expect(op, "branch", a.branch, DType::kF32, {rows, c});
  if (a.out || a.norm == NormPlace::kResPostNorm) {
    expect(op, "gamma", a.gamma, f, {c});
    expect(op, "beta", a.beta, f, {c});
  }
  if (a.out) expect(op, "out", a.out, DType::kS8, {out_rows, c});
}

void check_rows(const char* op, const TensorView& x, std::int64_t rows) {
  SWIN_CHECK(ShapeError, op, x.dim(0) == rows, "x is ", x.describe(), "; ", rows, " rows are needed");
}

void check(const LinearResidualNormArgs& a, DType f) {
  const char* op = "linear_residual_norm";
  check_linear(op, a.x, a.w, a.scale, a.bias);
  check_geometry(op, a.geometry);
  check_rows(op, a.x, a.geometry.window_rows());
  SWIN_CHECK(ShapeError, op, a.out.data != nullptr, "out is missing");
  check_residual_norm(op, a, a.geometry.tokens(), a.x.dim(0), a.geometry.tokens(), a.w->n, f);
}

void check(const MlpResidualNormArgs& a, DType f) {
  const char* op = "mlp_residual_norm";
  check_linear(op, a.x, a.w1, a.scale1, a.bias1);
  const std::int64_t m = a.x.dim(0), c = a.w1->k, hidden = a.w1->n;
  SWIN_CHECK(ShapeError, op, a.w2 != nullptr && a.w2->n == c && a.w2->k == hidden, "the second weight must be [", c,
             ", ", hidden, "]");
  expect(op, "scale2", a.scale2, DType::kF32, {c});
  if (a.bias2) expect(op, "bias2", a.bias2, DType::kF32, {c});
  const bool relu = a.activation == Activation::kRelu;
  SWIN_CHECK(ValueError, op, relu != bool(a.bias1),
             relu ? "with ReLU there is no FC1 bias" : "GELU needs the FC1 bias");
  const InputRange given = relu ? InputRange::kNonNegative : InputRange::behind_gelu(a.hidden_quant);
  SWIN_CHECK(ValueError, op, a.w2->input.holds(given), "the second weight was packed for inputs of ",
             a.w2->input.lowest, "..127; the activation gives ", given.lowest, "..127");
  if (a.hidden) expect(op, "hidden", a.hidden, DType::kS8, {m, hidden});
  if (a.out) {
    check_geometry(op, a.geometry);
    check_rows(op, a.x, a.geometry.tokens());
  }
  check_residual_norm(op, a, m, m, a.out ? a.geometry.window_rows() : 0, c, f);
}

void check(const FinalNormPoolArgs& a, DType f) {
  const char* op = "final_norm_pool";
  expect_rank(op, "residual", a.residual, 2);
  expect_rank(op, "out", a.out, 2);
  const std::int64_t c = a.residual.dim(1);
  expect(op, "residual", a.residual, f, {a.residual.dim(0), c});
  expect(op, "gamma", a.gamma, f, {c});
  expect(op, "beta", a.beta, f, {c});
  expect(op, "out", a.out, DType::kF32, {a.out.dim(0), c});
  SWIN_CHECK(ShapeError, op, a.residual.dim(0) % a.out.dim(0) == 0, a.residual.dim(0), " tokens do not divide into ",
             a.out.dim(0), " images");
}

void check(const HeadArgs& a, DType f) {
  const char* op = "head";
  expect_rank(op, "features", a.features, 2);
  expect_rank(op, "weight", a.weight, 2);
  expect(op, "features", a.features, DType::kF32, {a.features.dim(0), a.features.dim(1)});
  expect(op, "weight", a.weight, f, {a.weight.dim(0), a.features.dim(1)});
  expect(op, "bias", a.bias, f, {a.weight.dim(0)});
  expect(op, "out", a.out, DType::kF32, {a.features.dim(0), a.weight.dim(0)});
}

void check(const ShiftPartitionArgs& a, DType f) {
  const char* op = "shift_partition";
  check_geometry(op, a.geometry);
  expect_rank(op, "residual", a.residual, 2);
  const std::int64_t m = a.geometry.tokens(), c = a.residual.dim(1);
  expect(op, "residual", a.residual, f, {m, c});
  expect(op, "out", a.out, DType::kS8, {a.geometry.window_rows(), c});
}

void check(const QkvBiasNormalizeArgs& a, DType f) {
  const char* op = "qkv_bias_normalize";
  expect_rank(op, "out", a.out, 5);
  const std::int64_t m = a.out.dim(1) * a.out.dim(3), c = a.out.dim(2) * a.out.dim(4);
  expect(op, "out", a.out, DType::kS8, {3, a.out.dim(1), a.out.dim(2), a.out.dim(3), a.out.dim(4)});
  expect(op, "qkv", a.qkv, DType::kS8, {m, 3 * c});
  expect(op, "bias", a.bias, f, {3 * c});
}

void check(const HeadScaleSoftmaxArgs& a, DType f) {
  const char* op = "head_scale_softmax";
  expect_rank(op, "scores", a.scores, 4);
  const auto& s = a.scores.shape;
  expect(op, "scores", a.scores, DType::kS8, {s[0], s[1], s[2], s[3]});
  SWIN_CHECK(ShapeError, op, s[3] >= s[2], "pitch ", s[3], " is less than the window's ", s[2]);
  expect(op, "head_scale", a.head_scale, f, {s[1]});
  expect(op, "bias", a.bias, f, {s[1], s[2], s[2]});
  expect(op, "out", a.out, DType::kS8, {s[0], s[1], s[2], s[3]});
  if (a.mask) {
    expect_rank(op, "mask", a.mask, 3);
    expect(op, "mask", a.mask, f, {a.mask.dim(0), s[2], s[2]});
    SWIN_CHECK(ShapeError, op, s[0] % a.mask.dim(0) == 0, s[0], " windows are not a multiple of the mask's ",
               a.mask.dim(0));
  }
}

void check(const ProjBiasNormResidualArgs& a, DType f) {
  const char* op = "proj_bias_norm_residual";
  check_geometry(op, a.geometry);
  expect_rank(op, "residual", a.residual, 2);
  const std::int64_t m = a.geometry.tokens(), c = a.residual.dim(1);
  expect(op, "proj", a.proj, DType::kS8, {a.geometry.window_rows(), c});
  expect(op, "bias", a.bias, f, {c});
  expect(op, "gamma", a.gamma, f, {c});
  expect(op, "beta", a.beta, f, {c});
  expect(op, "residual", a.residual, f, {m, c});
  expect(op, "out", a.out, DType::kS8, {m, c});
}

void check(const BiasNormResidualArgs& a, DType f) {
  const char* op = "bias_norm_residual";
  expect_rank(op, "residual", a.residual, 2);
  const std::int64_t m = a.residual.dim(0), c = a.residual.dim(1);
  expect(op, "x", a.x, DType::kS8, {m, c});
  expect(op, "bias", a.bias, f, {c});
  expect(op, "gamma", a.gamma, f, {c});
  expect(op, "beta", a.beta, f, {c});
  expect(op, "residual", a.residual, f, {m, c});
}

void check(const PatchMergeArgs& a, DType f) {
  const char* op = "patch_merge";
  SWIN_CHECK(ShapeError, op, a.batch > 0 && a.height > 0 && a.width > 0, "batch ", a.batch, ", ", a.height, "x", a.width,
             " tokens; all must be positive");
  expect_rank(op, "residual", a.residual, 2);
  const std::int64_t m = a.batch * a.height * a.width, c = a.residual.dim(1);
  expect(op, "residual", a.residual, f, {m, c});
  expect(op, "out", a.out, DType::kS8, {a.merged_tokens(), 4 * c});
}

void check(const DequantizeNormArgs& a, DType f) {
  const char* op = "dequantize_norm";
  expect_rank(op, "x", a.x, 2);
  const std::int64_t m = a.x.dim(0), c = a.x.dim(1);
  expect(op, "x", a.x, DType::kS8, {m, c});
  expect(op, "gamma", a.gamma, f, {c});
  expect(op, "beta", a.beta, f, {c});
  expect(op, "out", a.out, f, {m, c});
}

OpCost cost_of(std::initializer_list<TensorView> reads, std::initializer_list<TensorView> writes,
               std::int64_t operations) {
  OpCost c;
  for (const TensorView& t : reads) c.bytes_read += t.nbytes();
  for (const TensorView& t : writes) c.bytes_written += t.nbytes();
  c.operations = operations;
  return c;
}

// Operations of floating-point work are counted per element, as the formula in ops.h writes them: bias 1, residual 1,
// quantize 3 (multiply, round, clamp), dequantize 1, LayerNorm 7, softmax 5, GELU 4.
OpCost cost(const PatchEmbedArgs& a) {
  return cost_of({a.image, a.weight}, {a.out}, 2 * a.out.numel() * a.weight.dim(1));
}
OpCost cost(const PatchEmbedNormArgs& a) {
  return cost_of({a.x, a.bias, a.gamma, a.beta}, {a.x}, a.x.numel() * ((a.gamma ? 7 : 0) + (a.bias ? 1 : 0)));
}
OpCost cost(const NormShiftPartitionArgs& a) {
  return cost_of({a.residual, a.gamma, a.beta}, {a.out}, a.out.numel() * 10);
}
OpCost cost(const GemmS8Args& a) {
  OpCost c = cost_of({a.x}, {a.out}, 2 * a.x.dim(0) * a.w->n * a.w->k);
  c.bytes_read += a.w->n * a.w->k;
  return c;
}
OpCost cost(const QkvBiasArgs& a) { return cost_of({a.qkv, a.bias}, {a.out}, a.out.numel() * 5); }
OpCost cost(const QkGemmArgs& a) { return cost_of({a.q, a.k}, {a.out}, 2 * a.q.numel() * a.q.dim(2)); }
OpCost cost(const SoftmaxArgs& a) {
  return cost_of({a.scores, a.bias, a.mask}, {a.out},
                 a.scores.numel() / a.scores.dim(3) * a.scores.dim(2) * (a.mask ? 12 : 11));
}
OpCost cost(const PvGemmArgs& a) { return cost_of({a.p, a.v}, {a.out}, 2 * a.v.numel() * a.v.dim(2)); }
OpCost cost(const ProjBiasResidualNormArgs& a) {
  return cost_of({a.proj, a.bias, a.residual, a.gamma, a.beta}, {a.residual, a.out}, a.out.numel() * 13);
}
OpCost cost(const BiasGeluArgs& a) { return cost_of({a.x, a.bias}, {a.out}, a.out.numel() * 9); }
OpCost cost(const BiasResidualArgs& a) {
  return cost_of({a.x, a.bias, a.residual}, {a.residual}, a.residual.numel() * 3);
}
OpCost cost(const PatchMergeNormArgs& a) { return cost_of({a.residual, a.gamma, a.beta}, {a.out}, a.out.numel() * 10); }
OpCost cost(const DequantizeArgs& a) { return cost_of({a.x}, {a.out}, a.out.numel()); }
// Args: LinearS8Args or LinearCosineQkvArgs.
template <class Args>
OpCost linear_cost(const Args& a) {
  OpCost c = cost_of({a.x, a.scale, a.bias}, {a.out}, 2 * a.x.dim(0) * a.w->n * a.w->k);
  c.bytes_read += a.w->n * a.w->k;
  return c;
}
OpCost cost(const LinearS8Args& a) { return linear_cost(a); }
OpCost cost(const LinearCosineQkvArgs& a) { return linear_cost(a); }
OpCost cost(const WindowAttentionArgs& a) {
  const std::int64_t tokens = BiasRows::of("window_attention", a.bias).tokens;
  return cost_of({a.qkv, a.bias, a.mask, a.mask_of, a.head_scale}, {a.out}, 4 * a.out.numel() * tokens);
}
OpCost cost(const LinearResidualNormArgs& a) {
  OpCost c = cost_of({a.x, a.scale, a.bias, a.residual, a.gamma, a.beta}, {a.residual, a.out},
                     2 * a.x.dim(0) * a.w->n * a.w->k);
  c.bytes_read += a.w->n * a.w->k;
  return c;
}
OpCost cost(const MlpResidualNormArgs& a) {
  OpCost c = cost_of({a.x, a.scale1, a.bias1, a.scale2, a.bias2, a.residual, a.gamma, a.beta}, {a.residual, a.out},
                     4 * a.x.dim(0) * a.w1->n * a.w1->k);
  c.bytes_read += 2 * a.w1->n * a.w1->k;
  return c;
}
OpCost cost(const FinalNormPoolArgs& a) {
  return cost_of({a.residual, a.gamma, a.beta}, {a.out}, a.residual.numel() * 8);
}
OpCost cost(const HeadArgs& a) {
  return cost_of({a.features, a.weight, a.bias}, {a.out}, 2 * a.out.numel() * a.weight.dim(1));
}

OpCost cost(const ShiftPartitionArgs& a) { return cost_of({a.residual}, {a.out}, a.out.numel() * 3); }
OpCost cost(const QkvBiasNormalizeArgs& a) {
  // Of q and k, two thirds of the tensor, also a square, a sum and a division per element.
  return cost_of({a.qkv, a.bias}, {a.out}, a.out.numel() * 7);
}
OpCost cost(const HeadScaleSoftmaxArgs& a) {
  return cost_of({a.scores, a.head_scale, a.bias, a.mask}, {a.out},
                 a.scores.numel() / a.scores.dim(3) * a.scores.dim(2) * (a.mask ? 12 : 11));
}
OpCost cost(const ProjBiasNormResidualArgs& a) {
  return cost_of({a.proj, a.bias, a.gamma, a.beta, a.residual}, {a.residual, a.out}, a.out.numel() * 13);
}
OpCost cost(const BiasNormResidualArgs& a) {
  return cost_of({a.x, a.bias, a.gamma, a.beta, a.residual}, {a.residual}, a.residual.numel() * 10);
}
OpCost cost(const PatchMergeArgs& a) { return cost_of({a.residual}, {a.out}, a.out.numel() * 3); }
OpCost cost(const DequantizeNormArgs& a) { return cost_of({a.x, a.gamma, a.beta}, {a.out}, a.out.numel() * 8); }

std::vector<TensorView> outputs(const PatchEmbedNormArgs& a) { return {a.x}; }
std::vector<TensorView> outputs(const BiasResidualArgs& a) { return {a.residual}; }
std::vector<TensorView> outputs(const ProjBiasResidualNormArgs& a) { return {a.residual, a.out}; }
std::vector<TensorView> outputs(const LinearResidualNormArgs& a) { return {a.residual, a.out}; }
std::vector<TensorView> outputs(const MlpResidualNormArgs& a) {
  if (!a.out) return {a.residual};
  return {a.residual, a.out};
}
std::vector<TensorView> outputs(const ProjBiasNormResidualArgs& a) { return {a.residual, a.out}; }
std::vector<TensorView> outputs(const BiasNormResidualArgs& a) { return {a.residual}; }
template <class Args>
std::vector<TensorView> outputs(const Args& a) {
  return {a.out};
}

bool in_place(const PatchEmbedNormArgs&) { return true; }
bool in_place(const BiasResidualArgs&) { return true; }
bool in_place(const ProjBiasResidualNormArgs&) { return true; }
bool in_place(const LinearResidualNormArgs&) { return true; }
bool in_place(const MlpResidualNormArgs&) { return true; }
bool in_place(const ProjBiasNormResidualArgs&) { return true; }
bool in_place(const BiasNormResidualArgs&) { return true; }
template <class Args>
bool in_place(const Args&) {
  return false;
}

#define SWIN_NAME_OP(name, Args) \
  [[maybe_unused]] const char* name_of_args(const Args&) { return #name; }
SWIN_FOR_EACH_OP(SWIN_NAME_OP)
#undef SWIN_NAME_OP

#define SWIN_KERNEL_OP(name, Args) \
  auto kernel_of(const OpTable& table, const Args&) { return table.name; }
SWIN_FOR_EACH_OP(SWIN_KERNEL_OP)
#undef SWIN_KERNEL_OP

// Calls `f` with the arguments an op was built with; an empty variant is a programming error.
template <class F>
auto visit_op(const OpArgs& args, F&& f) {
  return std::visit(
      [&](const auto& a) {
        if constexpr (std::is_same_v<std::decay_t<decltype(a)>, std::monostate>) {
          throw ValueError("op table: no operation was given");
          return decltype(f(std::declval<const HeadArgs&>()))();
        } else {
          return f(a);
        }
      },
      args);
}

}  // namespace

const char* op_name(const OpArgs& args) {
  return visit_op(args, [](const auto& a) { return name_of_args(a); });
}

void check_args(const OpArgs& args, DType float_dtype) {
  visit_op(args, [&](const auto& a) { check(a, float_dtype); });
}

void run_op(const OpTable& table, const char* backend, const OpArgs& args, const ExecContext& context) {
  visit_op(args, [&](const auto& a) {
    auto kernel = kernel_of(table, a);
    SWIN_CHECK(UnsupportedError, name_of_args(a), kernel != nullptr, "the ", backend,
               " backend of this build does not have this operation");
    check(a, table.float_dtype);
    kernel(a, context);
  });
}

OpCost op_cost(const OpArgs& args) {
  return visit_op(args, [](const auto& a) { return cost(a); });
}

std::vector<TensorView> op_outputs(const OpArgs& args) {
  return visit_op(args, [](const auto& a) { return outputs(a); });
}

bool updates_in_place(const OpArgs& args) {
  return visit_op(args, [](const auto& a) { return in_place(a); });
}

}  // namespace swin
