// The fused graph (docs/fused.md): four operations a block, accumulators never written, LayerNorm where its rows are
// made. Swin-V2 has its norms behind the branches, and attention by cosine.
#include <algorithm>
#include <utility>

#include "weights.h"

namespace swin::fused_int8 {
namespace {

// The memory one forward pass works in, sized for the largest stage and shared by all blocks. QKV and the hidden rows
// are never needed at the same time. M tokens are P rows in window order, more where windows are padded.
struct Buffers {
  void *residual, *merged;  // float [M, C]; the two change places at each stage
  void *tokens, *attended;  // s8 [P, C]: what enters QKV and, in image order, FC1; what enters the projection and, when
                            // a block ends, the next one's QKV: the two change places at each block
  void* wide;               // s8 [P, 3C], or [M, F]
  void* branch;             // f32 [P, C] ahead of its norm; Swin-V2 only

  Buffers(Plan& plan, const std::vector<StageGeometry>& stages, bool post_norm) {
    std::int64_t tokens_c = 0, windows_c = 0, merged_c = 0, wide_c = 0;
    for (const StageGeometry& g : stages) {
      const std::int64_t rows = plan.batch() * g.tokens(), window_rows = plan.batch() * g.window_rows();
      tokens_c = std::max(tokens_c, rows * g.dim);
      // The reduction's input, of the next stage's tokens, lies where tokens do; odd sides make it more than the stage's own.
      windows_c = std::max(windows_c, window_rows * g.dim);
      if (&g != &stages.front()) windows_c = std::max(windows_c, rows * 2 * g.dim);
      wide_c = std::max(wide_c, window_rows * 3 * g.dim);
      if (plan.backend().mlp_keeps_hidden(rows, g.dim, g.hidden)) wide_c = std::max(wide_c, rows * g.hidden);
      if (&g != &stages.front()) merged_c = std::max(merged_c, rows * g.dim);
    }
    const DType wide_type = plan.backend().ops().float_dtype;
    residual = plan.buffer("residual", wide_type, tokens_c);
    merged = plan.buffer("merged", wide_type, merged_c);
    tokens = plan.buffer("tokens", DType::kS8, windows_c);
    attended = plan.buffer("attended", DType::kS8, windows_c);
    wide = plan.buffer("wide", DType::kS8, wide_c);
    branch = post_norm ? plan.buffer("branch", DType::kF32, windows_c) : nullptr;
  }
};

struct MaskViews {
  TensorView masks, of_window;
};

class FusedInt8 : public Graph {
 public:
  FusedInt8(const ModelConfig& config, const std::vector<TensorView>& weights, const Backend& backend)
      : config_(config),
        backend_(backend),
        weights_(load_weights(config, weights, backend)) {}

  const ModelConfig& config() const override { return config_; }
  const Backend& backend() const override { return backend_; }

  std::unique_ptr<Plan> make_plan(const InputShape& input, const Queue& queue,
                                  std::unique_ptr<Plan> retired) const override {
    const std::vector<StageGeometry> stages = stage_geometries(config_, input.height, input.width);
    auto plan = std::make_unique<Plan>(backend_, input, queue, std::move(retired));
    Buffers buffers(*plan, stages, post_norm());
    plan->release_spare();
    append_patch_embed(*plan, stages.front(), buffers);
    for (std::size_t i = 0; i < stages.size(); ++i) append_stage(*plan, stages[i], static_cast<int>(i), buffers);
    append_classifier(*plan, stages.back(), buffers);
    return plan;
  }

 private:
  DType wide() const { return backend_.ops().float_dtype; }
  bool post_norm() const { return config_.version == 2; }
  NormPlace norm_place() const { return post_norm() ? NormPlace::kResPostNorm : NormPlace::kPreNorm; }

  void append_patch_embed(Plan& plan, const StageGeometry& first, const Buffers& b) const {
    const std::int64_t tokens = plan.batch() * first.tokens();
    const InputShape& input = plan.input();
    const TensorView residual(b.residual, wide(), {tokens, config_.embed_dim});
    plan.add("patch_embed", OpKind::kFloat, -1, -1,
             PatchEmbedArgs{.image = TensorView(nullptr, DType::kF32,
                                                {input.batch, config_.in_chans, input.height, input.width}),
                            .weight = weights_.patch_weight.view,
                            .out = residual,
                            .patch_size = config_.patch_size});
    plan.add("patch_embed_norm", OpKind::kFloat, -1, -1,
             PatchEmbedNormArgs{.x = residual,
                                .bias = weights_.patch_bias.view,
                                .gamma = weights_.patch_gamma.view,
                                .beta = weights_.patch_beta.view});
  }

  // What the shifted blocks of a stage mask: of the configured image size the weights say it, of others the geometry.
  MaskViews masks_of(Plan& plan, const StageGeometry& g, int stage) const {
    if (!g.shifts) return {};
    const WindowMasks& own = weights_.stages[stage].masks;
    if (plan.input().height == config_.img_h && plan.input().width == config_.img_w) {
      return {own.masks.view, own.of_window.view};
    }
    WindowMasks made;
    const std::int64_t n = g.window_area();
    const TensorView masks = plan.keep(TensorView(nullptr, wide(), {shift_mask_count(g), n, n}), [&] {
      made = upload_masks(shift_masks(g), backend_);
      return made.masks;
    });
    return {masks, plan.keep(TensorView(nullptr, DType::kS32, {g.windows()}), [&] { return made.of_window; })};
  }

  void append_stage(Plan& plan, const StageGeometry& g, int stage, Buffers& b) const {
    const StageWeights& w = weights_.stages[stage];
    const BlockWeights& first = w.blocks.front();
    const WindowGeometry windows = g.of_block(plan.batch(), 0);
    const TensorView residual(b.residual, wide(), {windows.tokens(), g.dim});
    const TensorView tokens(b.tokens, DType::kS8, {windows.window_rows(), g.dim});
    if (post_norm()) {
      plan.add("shift_partition", OpKind::kFused, stage, 0,
               ShiftPartitionArgs{.residual = residual, .out = tokens, .geometry = windows, .quant = first.qkv_quant});
    } else {
      plan.add("norm1_shift_partition", OpKind::kFused, stage, 0,
               NormShiftPartitionArgs{.residual = residual,
                                      .gamma = first.norm1_gamma.view,
                                      .beta = first.norm1_beta.view,
                                      .out = tokens,
                                      .geometry = windows,
                                      .quant = first.qkv_quant});
    }
    const MaskViews masks = masks_of(plan, g, stage);
    for (std::size_t j = 0; j < w.blocks.size(); ++j) append_block(plan, g, stage, j, masks, b);
    if (g.has_downsample) append_downsample(plan, g, stage, b);
  }

  void append_block(Plan& plan, const StageGeometry& g, int stage, std::size_t block, const MaskViews& masks,
                    Buffers& b) const {
    const StageWeights& s = weights_.stages[stage];
    const BlockWeights& w = s.blocks[block];
    const BlockWeights* next = block + 1 < s.blocks.size() ? &s.blocks[block + 1] : nullptr;
    const WindowGeometry windows = g.of_block(plan.batch(), static_cast<std::int64_t>(block));
    const std::int64_t m = windows.tokens(), p = windows.window_rows(), c = g.dim;
    const bool shifted = block % 2 == 1 && (g.shift_h > 0 || g.shift_w > 0);
    const TensorView residual(b.residual, wide(), {m, c});
    const TensorView entering(b.tokens, DType::kS8, {p, c}), tokens(b.tokens, DType::kS8, {m, c});
    const TensorView attended(b.attended, DType::kS8, {p, c});
    const TensorView qkv(b.wide, DType::kS8, {p, 3 * c});
    const auto branch = [&](std::int64_t rows) {
      return post_norm() ? TensorView(b.branch, DType::kF32, {rows, c}) : TensorView();
    };
    const auto add = [&](const char* name, OpKind kind, OpArgs args) {
      plan.add(name, kind, stage, static_cast<int>(block), std::move(args));
    };
    if (post_norm()) {
      add("qkv", OpKind::kGemm,
          LinearCosineQkvArgs{.x = entering,
                              .w = w.qkv.weight.get(),
                              .scale = w.qkv.scale.view,
                              .bias = w.qkv.bias.view,
                              .out = qkv,
                              .heads = g.heads});
    } else {
      add("qkv", OpKind::kGemm,
          LinearS8Args{
              .x = entering, .w = w.qkv.weight.get(), .scale = w.qkv.scale.view, .bias = w.qkv.bias.view, .out = qkv});
    }
    add("attention", OpKind::kFused,
        WindowAttentionArgs{.qkv = qkv,
                            .bias = w.relative_position_bias.view,
                            .mask = shifted ? masks.masks : TensorView(),
                            .mask_of = shifted ? masks.of_window : TensorView(),
                            .head_scale = w.head_scale.view,
                            .out = attended,
                            .qk_factor = w.qk_factor,
                            .pv_factor = w.pv_factor});
    // The projection's rows leave in image order, over the ones in window order that QKV read. Of a block's two norms
    // the one that stands here is norm2 ahead of the MLP, in Swin-V2 norm1 behind the attention.
    add("proj_norm", OpKind::kGemm,
        LinearResidualNormArgs{.x = attended,
                               .w = w.proj.weight.get(),
                               .scale = w.proj.scale.view,
                               .bias = w.proj.bias.view,
                               .residual = residual,
                               .gamma = post_norm() ? w.norm1_gamma.view : w.norm2_gamma.view,
                               .beta = post_norm() ? w.norm1_beta.view : w.norm2_beta.view,
                               .branch = branch(p),
                               .out = tokens,
                               .geometry = windows,
                               .quant = w.fc1_quant,
                               .norm = norm_place()});
    MlpResidualNormArgs mlp{.x = tokens,
                            .w1 = w.fc1.weight.get(),
                            .w2 = w.fc2.weight.get(),
                            .scale1 = w.fc1.scale.view,
                            .bias1 = w.fc1.bias.view,
                            .scale2 = w.fc2.scale.view,
                            .bias2 = w.fc2.bias.view,
                            .residual = residual,
                            .gamma = {},
                            .beta = {},
                            .hidden = {},
                            .branch = branch(m),
                            .out = {},
                            .geometry = {},
                            .activation = weights_.activation,
                            .hidden_quant = w.hidden_quant,
                            .quant = 0,
                            .norm = norm_place()};
    if (backend_.mlp_keeps_hidden(m, g.dim, g.hidden)) mlp.hidden = TensorView(b.wide, DType::kS8, {m, g.hidden});
    if (post_norm()) {
      mlp.gamma = w.norm2_gamma.view;
      mlp.beta = w.norm2_beta.view;
    } else if (next != nullptr) {
      mlp.gamma = next->norm1_gamma.view;
      mlp.beta = next->norm1_beta.view;
    }
    if (next != nullptr) {
      mlp.out = attended;
      mlp.geometry = g.of_block(plan.batch(), static_cast<std::int64_t>(block) + 1);
      mlp.quant = next->qkv_quant;
    }
    add("mlp_norm", OpKind::kGemm, mlp);
    std::swap(b.tokens, b.attended);
  }

  void append_downsample(Plan& plan, const StageGeometry& g, int stage, Buffers& b) const {
    const StageWeights& w = weights_.stages[stage];
    const std::int64_t merged_tokens = plan.batch() * g.merged_tokens();
    const TensorView residual(b.residual, wide(), {plan.batch() * g.tokens(), g.dim});
    const TensorView gathered(b.tokens, DType::kS8, {merged_tokens, 4 * g.dim});
    const TensorView merged(b.merged, wide(), {merged_tokens, 2 * g.dim});
    if (post_norm()) {
      plan.add("patch_merge", OpKind::kFused, stage, -1,
               PatchMergeArgs{.residual = residual,
                              .out = gathered,
                              .batch = plan.batch(),
                              .height = g.height,
                              .width = g.width,
                              .quant = w.reduction_quant});
    } else {
      plan.add("patch_merge_norm", OpKind::kFused, stage, -1,
               PatchMergeNormArgs{.residual = residual,
                                  .gamma = w.merge_gamma.view,
                                  .beta = w.merge_beta.view,
                                  .out = gathered,
                                  .batch = plan.batch(),
                                  .height = g.height,
                                  .width = g.width,
                                  .quant = w.reduction_quant});
    }
    plan.add(
        "reduction", OpKind::kGemm, stage, -1,
        LinearS8Args{
            .x = gathered, .w = w.reduction.weight.get(), .scale = w.reduction.scale.view, .bias = {}, .out = merged});
    if (post_norm()) {
      plan.add("reduction_norm", OpKind::kFused, stage, -1,
               PatchEmbedNormArgs{.x = merged, .bias = {}, .gamma = w.merge_gamma.view, .beta = w.merge_beta.view});
    }
    std::swap(b.residual, b.merged);
  }

  void append_classifier(Plan& plan, const StageGeometry& last, const Buffers& b) const {
    const std::int64_t tokens = plan.batch() * last.tokens();
    const TensorView features(nullptr, DType::kF32, {plan.batch(), last.dim});
    plan.add("final_norm_pool", OpKind::kFloat, -1, -1,
             FinalNormPoolArgs{.residual = TensorView(b.residual, wide(), {tokens, last.dim}),
                               .gamma = weights_.norm_gamma.view,
                               .beta = weights_.norm_beta.view,
                               .out = features});
    if (config_.num_classes == 0) return;
    plan.add("head", OpKind::kFloat, -1, -1,
             HeadArgs{.features = features,
                      .weight = weights_.head_weight.view,
                      .bias = weights_.head_bias.view,
                      .out = TensorView(nullptr, DType::kF32, {plan.batch(), config_.num_classes})});
  }

  const ModelConfig config_;
  const Backend& backend_;
  const ModelWeights weights_;
};

}  // namespace

std::unique_ptr<Graph> make_graph(const ModelConfig& config, const std::vector<TensorView>& weights,
                                  const Backend& backend) {
  return std::make_unique<FusedInt8>(config, weights, backend);
}

}  // namespace swin::fused_int8
