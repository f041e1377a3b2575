// The FT weight list, taken apart once into named tensors in the backend's layout.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "swin/backend.h"
#include "swin/ft_format.h"
#include "swin/graph.h"

namespace fastertransformer::FT_GRAPH {

struct BlockWeights {
  std::unique_ptr<swin::PackedWeight> qkv, proj, fc1, fc2;
  swin::Parameter qkv_bias, proj_bias, fc1_bias, fc2_bias;
  swin::Parameter norm1_gamma, norm1_beta, norm2_gamma, norm2_beta;
  swin::Parameter relative_position_bias;  // [heads, N, N]
  swin::Parameter logit_scale;             // [heads], what cosine attention multiplies with; Swin-V2 only
  swin::BlockScales scales;
};

struct StageWeights {
  std::vector<BlockWeights> blocks;
  swin::Parameter merge_gamma, merge_beta;              // [4C], Swin-V2 [2C]; none in the last stage
  std::unique_ptr<swin::PackedWeight> merge_reduction;  // [2C, 4C]; none in the last stage
  swin::Parameter attn_mask;                            // [windows, N, N]; none where the stage does not shift
};

struct ModelWeights {
  std::vector<StageWeights> stages;
  swin::Parameter patch_weight, patch_bias, patch_gamma, patch_beta;
  swin::Parameter norm_gamma, norm_beta;
  swin::Parameter head_weight, head_bias;  // none where num_classes is 0
};

// A stage's geometry: `window` and `shift` are after the rule that a window is at most the resolution and that a
// window as large as the resolution does not shift.
struct StageGeometry {
  std::int64_t dim, heads, height, width, window_h, window_w, shift_h, shift_w, hidden;
  bool has_downsample, shifts;
  std::int64_t window_area() const { return window_h * window_w; }
  std::int64_t windows() const { return (height / window_h) * (width / window_w); }
};

// ShapeError naming the stage where the configuration is not one a Swin can have.
std::vector<StageGeometry> stage_geometries(const swin::ModelConfig& config);

// ShapeError, DTypeError or ValueError naming the tensor or the scale that does not fit.
ModelWeights load_weights(const swin::ModelConfig& config, const std::vector<swin::TensorView>& list,
                          const swin::Backend& backend);

}  // namespace fastertransformer::FT_GRAPH
