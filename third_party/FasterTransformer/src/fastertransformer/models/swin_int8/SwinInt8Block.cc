#include "SwinInt8Block.h"

#include <cmath>

#include "SwinInt8V2.h"

namespace fastertransformer::FT_GRAPH {

using swin::DType;
using swin::OpKind;
using swin::TensorView;

namespace {

// Ops 1 to 8: norm1 to norm2, residual added on the way.
void append_attention(swin::Plan& plan, const swin::ModelConfig& config, const StageGeometry& g, BlockPosition at,
                      const BlockWeights& w, const TensorView& attn_mask, const Buffers& b) {
  const swin::BlockScales& s = w.scales;
  const bool shifted = at.block % 2 == 1 && (g.shift_h > 0 || g.shift_w > 0);
  const swin::WindowGeometry windows = g.of_block(plan.batch(), at.block);
  const std::int64_t m = windows.tokens(), p = windows.window_rows(), c = g.dim, n = g.window_area(), d = c / g.heads;
  const std::int64_t bw = plan.batch() * g.windows(), pitch = plan.backend().score_pitch(n);

  const TensorView residual(b.residual, plan.backend().ops().float_dtype, {m, c});
  const TensorView windowed(b.tokens, DType::kS8, {p, c}), tokens(b.tokens, DType::kS8, {m, c});
  const TensorView qkv(b.qkv, DType::kS8, {p, 3 * c});
  const TensorView split(b.qkv_split, DType::kS8, {3, bw, g.heads, n, d});
  const auto part = [&](int i) {
    return TensorView(static_cast<std::int8_t*>(b.qkv_split) + i * p * c, DType::kS8, {bw, g.heads, n, d});
  };
  const TensorView scores(b.scores, DType::kS8, {bw, g.heads, n, pitch});
  const TensorView probabilities(b.probabilities, DType::kS8, {bw, g.heads, n, pitch});
  const TensorView projected(b.projected, DType::kS8, {p, c});
  const float scale = static_cast<float>(config.qk_scale.value_or(1.0 / std::sqrt(static_cast<double>(d))));

  const auto add = [&](const char* name, OpKind kind, swin::OpArgs args) {
    plan.add(name, kind, at.stage, at.block, std::move(args));
  };
  add("norm1_shift_partition", OpKind::kFused,
      swin::NormShiftPartitionArgs{.residual = residual,
                                   .gamma = w.norm1_gamma.view,
                                   .beta = w.norm1_beta.view,
                                   .out = windowed,
                                   .geometry = windows,
                                   .quant = s.qkv_input.quant});
  add("qkv_gemm", OpKind::kGemm, swin::GemmS8Args{.x = windowed, .w = w.qkv.get(), .out = qkv, .factor = s.qkv_factor});
  add("qkv_bias", OpKind::kFused,
      swin::QkvBiasArgs{.qkv = qkv,
                        .bias = w.qkv_bias.view,
                        .out = split,
                        .dequant = s.qkv_aftergemm.dequant,
                        .quant_q = s.matmul_q.quant,
                        .quant_k = s.matmul_k.quant,
                        .quant_v = s.matmul_v.quant});
  add("qk_gemm", OpKind::kGemm, swin::QkGemmArgs{.q = part(0), .k = part(1), .out = scores, .factor = s.qk_factor});
  add("softmax", OpKind::kFused,
      swin::SoftmaxArgs{.scores = scores,
                        .bias = w.relative_position_bias.view,
                        .mask = shifted ? attn_mask : TensorView(),
                        .out = probabilities,
                        .dequant = s.softmax_input.dequant,
                        .scale = scale,
                        .quant = s.matmul_a.quant});
  add("pv_gemm", OpKind::kGemm,
      swin::PvGemmArgs{.p = probabilities, .v = part(2), .out = windowed, .factor = s.pv_factor});
  add("proj_gemm", OpKind::kGemm,
      swin::GemmS8Args{.x = windowed, .w = w.proj.get(), .out = projected, .factor = s.proj_factor});
  add("proj_bias_residual_norm2", OpKind::kFused,
      swin::ProjBiasResidualNormArgs{.proj = projected,
                                     .bias = w.proj_bias.view,
                                     .residual = residual,
                                     .gamma = w.norm2_gamma.view,
                                     .beta = w.norm2_beta.view,
                                     .out = tokens,
                                     .geometry = windows,
                                     .dequant = s.proj_aftergemm.dequant,
                                     .quant = s.fc1_input.quant});
}

// Ops 9 to 12: FC1, activation, FC2, residual.
void append_mlp(swin::Plan& plan, const swin::ModelConfig& config, const StageGeometry& g, BlockPosition at,
                const BlockWeights& w, const Buffers& b) {
  const swin::BlockScales& s = w.scales;
  const std::int64_t m = plan.batch() * g.tokens();
  const TensorView residual(b.residual, plan.backend().ops().float_dtype, {m, g.dim});
  const TensorView tokens(b.tokens, DType::kS8, {m, g.dim});
  const TensorView hidden(b.hidden, DType::kS8, {m, g.hidden});
  const TensorView activated(b.activated, DType::kS8, {m, g.hidden});
  // int8_mode 2 keeps FC2's accumulators: there is no after-GEMM quantizer, and the residual op dequantizes from s32.
  const bool s32 = config.int8_mode == 2;
  const TensorView out(b.projected, s32 ? DType::kS32 : DType::kS8, {m, g.dim});

  const auto add = [&](const char* name, OpKind kind, swin::OpArgs args) {
    plan.add(name, kind, at.stage, at.block, std::move(args));
  };
  add("fc1_gemm", OpKind::kGemm,
      swin::GemmS8Args{.x = tokens, .w = w.fc1.get(), .out = hidden, .factor = s.fc1_factor});
  add("fc1_bias_gelu", OpKind::kFused,
      swin::BiasGeluArgs{.x = hidden,
                         .bias = w.fc1_bias.view,
                         .out = activated,
                         .dequant = s.fc1_aftergemm.dequant,
                         .quant = s.fc2_input.quant});
  add("fc2_gemm", OpKind::kGemm,
      swin::GemmS8Args{.x = activated, .w = w.fc2.get(), .out = out, .factor = s32 ? 0.0f : s.fc2_factor});
  if (config.version == 2) {
    append_mlp_end_v2(plan, g, at, w, b);
    return;
  }
  add("fc2_bias_residual", OpKind::kFused,
      swin::BiasResidualArgs{
          .x = out,
          .bias = w.fc2_bias.view,
          .residual = residual,
          .dequant = s32 ? s.fc2_input.dequant_div_127 * s.fc2_weight_amax : s.fc2_aftergemm.dequant});
}

}  // namespace

void append_block(swin::Plan& plan, const swin::ModelConfig& config, const StageGeometry& stage, BlockPosition position,
                  const BlockWeights& weights, const TensorView& attn_mask, const Buffers& buffers) {
  if (config.version == 2) {
    append_attention_v2(plan, stage, position, weights, attn_mask, buffers);
  } else {
    append_attention(plan, config, stage, position, weights, attn_mask, buffers);
  }
  append_mlp(plan, config, stage, position, weights, buffers);
}

}  // namespace fastertransformer::FT_GRAPH
