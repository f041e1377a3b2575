#include "SwinInt8V2.h"

namespace fastertransformer::FT_GRAPH {

using swin::DType;
using swin::OpKind;
using swin::TensorView;

void append_attention_v2(swin::Plan& plan, const StageGeometry& g, BlockPosition at, const BlockWeights& w,
                         const TensorView& attn_mask, const Buffers& b) {
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

  const auto add = [&](const char* name, OpKind kind, swin::OpArgs args) {
    plan.add(name, kind, at.stage, at.block, std::move(args));
  };
  add("shift_partition", OpKind::kFused,
      swin::ShiftPartitionArgs{.residual = residual, .out = windowed, .geometry = windows, .quant = s.qkv_input.quant});
  add("qkv_gemm", OpKind::kGemm, swin::GemmS8Args{.x = windowed, .w = w.qkv.get(), .out = qkv, .factor = s.qkv_factor});
  add("qkv_bias_normalize", OpKind::kFused,
      swin::QkvBiasNormalizeArgs{.qkv = qkv,
                                 .bias = w.qkv_bias.view,
                                 .out = split,
                                 .dequant = s.qkv_aftergemm.dequant,
                                 .quant_q = s.matmul_q.quant,
                                 .quant_k = s.matmul_k.quant,
                                 .quant_v = s.matmul_v.quant});
  add("qk_gemm", OpKind::kGemm, swin::QkGemmArgs{.q = part(0), .k = part(1), .out = scores, .factor = s.qk_factor});
  add("softmax", OpKind::kFused,
      swin::HeadScaleSoftmaxArgs{.scores = scores,
                                 .head_scale = w.logit_scale.view,
                                 .bias = w.relative_position_bias.view,
                                 .mask = shifted ? attn_mask : TensorView(),
                                 .out = probabilities,
                                 .dequant = s.softmax_input.dequant,
                                 .quant = s.matmul_a.quant});
  add("pv_gemm", OpKind::kGemm,
      swin::PvGemmArgs{.p = probabilities, .v = part(2), .out = windowed, .factor = s.pv_factor});
  add("proj_gemm", OpKind::kGemm,
      swin::GemmS8Args{.x = windowed, .w = w.proj.get(), .out = projected, .factor = s.proj_factor});
  add("proj_bias_norm1_residual", OpKind::kFused,
      swin::ProjBiasNormResidualArgs{.proj = projected,
                                     .bias = w.proj_bias.view,
                                     .gamma = w.norm1_gamma.view,
                                     .beta = w.norm1_beta.view,
                                     .residual = residual,
                                     .out = tokens,
                                     .geometry = windows,
                                     .dequant = s.proj_aftergemm.dequant,
                                     .quant = s.fc1_input.quant});
}

void append_mlp_end_v2(swin::Plan& plan, const StageGeometry& g, BlockPosition at, const BlockWeights& w,
                       const Buffers& b) {
  const std::int64_t m = plan.batch() * g.tokens();
  plan.add("fc2_bias_norm2_residual", OpKind::kFused, at.stage, at.block,
           swin::BiasNormResidualArgs{.x = TensorView(b.projected, DType::kS8, {m, g.dim}),
                                      .bias = w.fc2_bias.view,
                                      .gamma = w.norm2_gamma.view,
                                      .beta = w.norm2_beta.view,
                                      .residual = TensorView(b.residual, plan.backend().ops().float_dtype, {m, g.dim}),
                                      .dequant = w.scales.fc2_aftergemm.dequant});
}

void append_downsample_v2(swin::Plan& plan, const StageGeometry& g, int stage, const StageWeights& w,
                          const Buffers& b) {
  const swin::BlockScales& s = w.blocks.back().scales;
  const std::int64_t m = plan.batch() * g.tokens(), merged = plan.batch() * g.merged_tokens();
  const DType wide = plan.backend().ops().float_dtype;
  const TensorView gathered(b.tokens, DType::kS8, {merged, 4 * g.dim});
  const TensorView reduced(b.projected, DType::kS8, {merged, 2 * g.dim});
  plan.add("patch_merge", OpKind::kFused, stage, -1,
           swin::PatchMergeArgs{.residual = TensorView(b.residual, wide, {m, g.dim}),
                                .out = gathered,
                                .batch = plan.batch(),
                                .height = g.height,
                                .width = g.width,
                                .quant = s.reduction_input.quant});
  plan.add("reduction_gemm", OpKind::kGemm, stage, -1,
           swin::GemmS8Args{.x = gathered, .w = w.merge_reduction.get(), .out = reduced, .factor = s.reduction_factor});
  plan.add("reduction_norm", OpKind::kFused, stage, -1,
           swin::DequantizeNormArgs{.x = reduced,
                                    .gamma = w.merge_gamma.view,
                                    .beta = w.merge_beta.view,
                                    .out = TensorView(b.merged, wide, {merged, 2 * g.dim}),
                                    .dequant = s.reduction_aftergemm.dequant});
}

}  // namespace fastertransformer::FT_GRAPH
