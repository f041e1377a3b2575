// One Swin block: window attention, then the MLP, each around the residual stream.
#pragma once

#include "SwinInt8Buffers.h"
#include "SwinInt8Weights.h"

namespace fastertransformer::FT_GRAPH {

// Where a block stands.
struct BlockPosition {
  int stage, block;
};

// Appends the block's operations (docs/architecture.md, ops 1 to 12) to `plan`. Reads and updates `buffers.residual`.
void append_block(swin::Plan& plan, const swin::ModelConfig& config, const StageGeometry& stage, BlockPosition position,
                  const BlockWeights& weights, const swin::TensorView& attn_mask, const Buffers& buffers);

}  // namespace fastertransformer::FT_GRAPH
