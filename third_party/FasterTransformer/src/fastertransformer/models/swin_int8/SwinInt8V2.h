// Where a Swin-V2 block differs from a Swin-V1 block: cosine attention, and every LayerNorm behind its branch instead
// of ahead of it. The MLP up to FC2's GEMM is SwinInt8Block's.
#pragma once

#include "SwinInt8Block.h"

namespace fastertransformer::FT_GRAPH {

// Ops 1 to 8 of docs/architecture.md, "Swin-V2": the attention and norm1, up to FC1's input.
void append_attention_v2(swin::Plan& plan, const StageGeometry& g, BlockPosition at, const BlockWeights& w,
                         const swin::TensorView& attn_mask, const Buffers& b);
// Op 12: FC2's bias, norm2, and the residual.
void append_mlp_end_v2(swin::Plan& plan, const StageGeometry& g, BlockPosition at, const BlockWeights& w,
                       const Buffers& b);
// Between two stages: merges 2x2 tokens, reduces, and normalizes what the reduction gave into `b.merged`.
void append_downsample_v2(swin::Plan& plan, const StageGeometry& g, int stage, const StageWeights& w, const Buffers& b);

}  // namespace fastertransformer::FT_GRAPH
