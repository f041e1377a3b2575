// The fused graph's weight list (docs/fused.md), taken apart once: weights packed, scales and biases folded into the
// factors that the operations apply.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "swin/geometry.h"
#include "swin/shift_mask.h"
#include "swin/weight_list.h"

namespace swin::fused_int8 {

// A GEMM's weights and what its accumulators are multiplied with and added to.
struct Linear {
  std::unique_ptr<PackedWeight> weight;
  Parameter scale, bias;  // no bias: none
};

struct BlockWeights {
  Linear qkv, proj, fc1, fc2;
  Parameter norm1_gamma, norm1_beta, norm2_gamma, norm2_beta;
  Parameter relative_position_bias;  // [heads, N, N], or compact (swin/position_bias.h)
  Parameter head_scale;              // [heads] of cosine attention; none in Swin-V1, which has qk_factor
  float qk_factor = 0, pv_factor;
  float qkv_quant, fc1_quant, hidden_quant;  // 127 / amax of QKV's, FC1's and FC2's input
};

struct StageWeights {
  std::vector<BlockWeights> blocks;
  Parameter merge_gamma, merge_beta;  // [4C], in Swin-V2 [2C]; none in the last stage
  Linear reduction;                   // [2C, 4C]; none in the last stage
  float reduction_quant = 0;
  WindowMasks masks;  // of images of the configured size; none where the stage does not shift there
};

struct ModelWeights {
  Activation activation;
  std::vector<StageWeights> stages;
  Parameter patch_weight, patch_bias, patch_gamma, patch_beta;
  Parameter norm_gamma, norm_beta;
  Parameter head_weight, head_bias;  // none where num_classes is 0
};

// ShapeError, DTypeError or ValueError naming the tensor that does not fit.
ModelWeights load_weights(const ModelConfig& config, const std::vector<TensorView>& list, const Backend& backend);

}  // namespace swin::fused_int8
