#include "SwinInt8.h"

#include <utility>

#include "SwinInt8Block.h"
#include "SwinInt8V2.h"
#include "swin/shift_mask.h"

namespace fastertransformer::FT_GRAPH {

using swin::DType;
using swin::OpKind;
using swin::TensorView;

namespace {

// Patch embedding: image to residual stream.
void append_patch_embed(swin::Plan& plan, const swin::ModelConfig& c, const ModelWeights& w, const Buffers& b) {
  const swin::InputShape& input = plan.input();
  const std::int64_t tokens = input.batch * (input.height / c.patch_size) * (input.width / c.patch_size);
  const TensorView residual(b.residual, plan.backend().ops().float_dtype, {tokens, c.embed_dim});
  plan.add("patch_embed", OpKind::kFloat, -1, -1,
           swin::PatchEmbedArgs{.image = TensorView(nullptr, DType::kF32,
                                                    {input.batch, c.in_chans, input.height, input.width}),
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

// What the shifted blocks of a stage mask: of the configured image size the weights say it, of others the geometry.
TensorView stage_mask(swin::Plan& plan, const swin::ModelConfig& c, const StageGeometry& g, const StageWeights& w) {
  if (!g.shifts) return {};
  if (plan.input().height == c.img_h && plan.input().width == c.img_w) return w.attn_mask.view;
  const swin::Backend& backend = plan.backend();
  const std::int64_t n = g.window_area();
  return plan.keep(TensorView(nullptr, backend.ops().float_dtype, {g.windows(), n, n}), [&] {
    std::vector<float> masks = shift_masks(g).expanded();
    return backend.upload_parameter(TensorView(masks.data(), DType::kF32, {g.windows(), n, n}));
  });
}

}  // namespace

SwinInt8::SwinInt8(const swin::ModelConfig& config, const std::vector<TensorView>& weights,
                   const swin::Backend& backend)
    : config_(config), backend_(backend), weights_(load_weights(config, weights, backend)) {}

std::unique_ptr<swin::Plan> SwinInt8::make_plan(const swin::InputShape& input, const swin::Queue& queue,
                                                std::unique_ptr<swin::Plan> retired) const {
  const std::vector<StageGeometry> stages = stage_geometries(config_, input.height, input.width);
  auto plan = std::make_unique<swin::Plan>(backend_, input, queue, std::move(retired));
  Buffers buffers(*plan, config_, stages);
  plan->release_spare();
  append_patch_embed(*plan, config_, weights_, buffers);
  for (std::size_t i = 0; i < stages.size(); ++i) {
    const StageWeights& weights = weights_.stages[i];
    const TensorView attn_mask = stage_mask(*plan, config_, stages[i], weights);
    for (std::size_t j = 0; j < weights.blocks.size(); ++j) {
      append_block(*plan, config_, stages[i], {static_cast<int>(i), static_cast<int>(j)}, weights.blocks[j], attn_mask,
                   buffers);
    }
    if (stages[i].has_downsample) append_downsample(*plan, config_, stages[i], static_cast<int>(i), weights, buffers);
  }
  append_classifier(*plan, config_, stages.back(), weights_, buffers);
  return plan;
}

std::unique_ptr<swin::Graph> make_graph(const swin::ModelConfig& config, const std::vector<TensorView>& weights,
                                        const swin::Backend& backend) {
  return std::make_unique<SwinInt8>(config, weights, backend);
}

}  // namespace fastertransformer::FT_GRAPH
