#include "SwinInt8.h"

#include <utility>

#include "SwinInt8Block.h"
#include "SwinInt8V2.h"

namespace fastertransformer::FT_GRAPH {

using swin::DType;
using swin::OpKind;
using swin::TensorView;

namespace {

// Patch embedding: image to residual stream.
void append_patch_embed(swin::Plan& plan, const swin::ModelConfig& c, const ModelWeights& w, const Buffers& b) {
  const std::int64_t tokens = plan.batch() * (c.img_h / c.patch_size) * (c.img_w / c.patch_size);
  const TensorView residual(b.residual, plan.backend().ops().float_dtype, {tokens, c.embed_dim});
  plan.add("patch_embed", OpKind::kFloat, -1, -1,
           swin::PatchEmbedArgs{.image = TensorView(nullptr, DType::kF32, {plan.batch(), c.in_chans, c.img_h, c.img_w}),
                                .weight = w.patch_weight.view,
                                .out = residual,
                                .patch_size = c.patch_size});
  plan.add("patch_embed_norm", OpKind::kFloat, -1, -1,
           swin::PatchEmbedNormArgs{
               .x = residual, .bias = w.patch_bias.view, .gamma = w.patch_gamma.view, .beta = w.patch_beta.view});
}

// Between two stages: merges 2x2 tokens into `b.merged` and makes that the residual stream.
void append_downsample(swin::Plan& plan, const swin::ModelConfig& config, const StageGeometry& g, int stage,
                       const StageWeights& w, Buffers& b) {
  if (config.version == 2) {
    append_downsample_v2(plan, g, stage, w, b);
    std::swap(b.residual, b.merged);
    return;
  }
  // Every block of a stage carries the reduction's scales; the last block's are read.
  const swin::BlockScales& s = w.blocks.back().scales;
  const std::int64_t m = plan.batch() * g.tokens(), merged = plan.batch() * g.merged_tokens();
  const DType wide = plan.backend().ops().float_dtype;
  const bool s32 = config.int8_mode == 2;
  const TensorView gathered(b.tokens, DType::kS8, {merged, 4 * g.dim});
  const TensorView reduced(b.projected, s32 ? DType::kS32 : DType::kS8, {merged, 2 * g.dim});
  plan.add("patch_merge_norm", OpKind::kFused, stage, -1,
           swin::PatchMergeNormArgs{.residual = TensorView(b.residual, wide, {m, g.dim}),
                                    .gamma = w.merge_gamma.view,
                                    .beta = w.merge_beta.view,
                                    .out = gathered,
                                    .batch = plan.batch(),
                                    .height = g.height,
                                    .width = g.width,
                                    .quant = s.reduction_input.quant});
  plan.add("reduction_gemm", OpKind::kGemm, stage, -1,
           swin::GemmS8Args{
               .x = gathered, .w = w.merge_reduction.get(), .out = reduced, .factor = s32 ? 0.0f : s.reduction_factor});
  plan.add("reduction_dequantize", OpKind::kFused, stage, -1,
           swin::DequantizeArgs{.x = reduced,
                                .out = TensorView(b.merged, wide, {merged, 2 * g.dim}),
                                .dequant = s32 ? s.reduction_input.dequant_div_127 * s.reduction_weight_amax
                                               : s.reduction_aftergemm.dequant});
  std::swap(b.residual, b.merged);
}

// Final LayerNorm, average pool and head. The engine binds where features and logits go.
void append_classifier(swin::Plan& plan, const swin::ModelConfig& c, const StageGeometry& last, const ModelWeights& w,
                       const Buffers& b) {
  const std::int64_t tokens = plan.batch() * last.tokens();
  const TensorView features(nullptr, DType::kF32, {plan.batch(), last.dim});
  plan.add(
      "final_norm_pool", OpKind::kFloat, -1, -1,
      swin::FinalNormPoolArgs{.residual = TensorView(b.residual, plan.backend().ops().float_dtype, {tokens, last.dim}),
                              .gamma = w.norm_gamma.view,
                              .beta = w.norm_beta.view,
                              .out = features});
  if (c.num_classes == 0) return;
  plan.add("head", OpKind::kFloat, -1, -1,
           swin::HeadArgs{.features = features,
                          .weight = w.head_weight.view,
                          .bias = w.head_bias.view,
                          .out = TensorView(nullptr, DType::kF32, {plan.batch(), c.num_classes})});
}

}  // namespace

SwinInt8::SwinInt8(const swin::ModelConfig& config, const std::vector<TensorView>& weights,
                   const swin::Backend& backend)
    : config_(config),
      backend_(backend),
      stages_(stage_geometries(config)),
      weights_(load_weights(config, weights, backend)) {}

std::unique_ptr<swin::Plan> SwinInt8::make_plan(std::int64_t batch, void* stream) const {
  auto plan = std::make_unique<swin::Plan>(backend_, batch, stream);
  Buffers buffers(*plan, config_, stages_);
  append_patch_embed(*plan, config_, weights_, buffers);
  for (std::size_t i = 0; i < stages_.size(); ++i) {
    const StageWeights& stage = weights_.stages[i];
    for (std::size_t j = 0; j < stage.blocks.size(); ++j) {
      append_block(*plan, config_, stages_[i], {static_cast<int>(i), static_cast<int>(j)}, stage.blocks[j],
                   stage.attn_mask, buffers);
    }
    if (stages_[i].has_downsample) append_downsample(*plan, config_, stages_[i], static_cast<int>(i), stage, buffers);
  }
  append_classifier(*plan, config_, stages_.back(), weights_, buffers);
  return plan;
}

std::unique_ptr<swin::Graph> make_graph(const swin::ModelConfig& config, const std::vector<TensorView>& weights,
                                        const swin::Backend& backend) {
  return std::make_unique<SwinInt8>(config, weights, backend);
}

}  // namespace fastertransformer::FT_GRAPH
