// The memory one forward pass works in, sized for the largest stage and shared by all blocks. M tokens are P rows in window
// order, more where windows are padded.
#pragma once

#include <algorithm>
#include <vector>

#include "SwinInt8Weights.h"

namespace fastertransformer::FT_GRAPH {

struct Buffers {
  void* residual;       // float [M, C]
  void* merged;         // float [M, C]: the residual behind a downsample; the two change places at each stage
  void* tokens;         // s8 [P, C]: what enters a GEMM
  void* qkv;            // s8 [P, 3C]
  void* qkv_split;      // s8 [3, BW, h, N, d]
  void* scores;         // s8 [BW, h, N, pitch]
  void* probabilities;  // s8 [BW, h, N, pitch]
  void* projected;      // s8 [P, C]; s8 or s32 behind FC2 and the reduction
  void* hidden;         // s8 [M, F]
  void* activated;      // s8 [M, F]

  Buffers(swin::Plan& plan, const swin::ModelConfig& config, const std::vector<StageGeometry>& stages) {
    std::int64_t tokens_c = 0, windows_c = 0, merged_c = 0, scores_n = 0, hidden_f = 0;
    for (const StageGeometry& g : stages) {
      const std::int64_t rows = plan.batch() * g.tokens(), window_rows = plan.batch() * g.window_rows();
      tokens_c = std::max(tokens_c, rows * g.dim);
      windows_c = std::max(windows_c, window_rows * g.dim);
      if (&g != &stages.front()) {
        merged_c = std::max(merged_c, rows * g.dim);
        windows_c = std::max(windows_c, rows * 2 * g.dim);  // what enters the reduction
      }
      hidden_f = std::max(hidden_f, rows * g.hidden);
      scores_n = std::max(scores_n, window_rows * g.heads * plan.backend().score_pitch(g.window_area()));
    }
    const swin::DType wide = plan.backend().ops().float_dtype;
    const swin::DType s8 = swin::DType::kS8;
    residual = plan.buffer("residual", wide, tokens_c);
    merged = plan.buffer("merged", wide, merged_c);
    tokens = plan.buffer("tokens", s8, windows_c);
    qkv = plan.buffer("qkv", s8, 3 * windows_c);
    qkv_split = plan.buffer("qkv_split", s8, 3 * windows_c);
    scores = plan.buffer("scores", s8, scores_n);
    probabilities = plan.buffer("probabilities", s8, scores_n);
    projected = plan.buffer("projected", config.int8_mode == 2 ? swin::DType::kS32 : s8, windows_c);
    hidden = plan.buffer("hidden", s8, hidden_f);
    activated = plan.buffer("activated", s8, hidden_f);
  }
};

}  // namespace fastertransformer::FT_GRAPH
