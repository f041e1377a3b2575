#include "SwinInt8Weights.h"

#include <cmath>
#include <cstring>

#include "swin/error.h"

namespace fastertransformer::FT_GRAPH {

using swin::DType;
using swin::DTypeError;
using swin::Parameter;
using swin::ScaleQuad;
using swin::ShapeError;
using swin::TensorView;
using swin::ValueError;
using swin::WeightList;

namespace {

void need_scale(const std::string& block, const char* quantizer, const ScaleQuad& q) {
  SWIN_CHECK(ValueError, block, std::isfinite(q.amax) && q.amax > 0, quantizer, " has amax ", q.amax,
             "; a positive number is needed: calibrate the checkpoint (pyharness/quantize.py) and convert it again");
  const float step = q.amax / 127.0f;
  SWIN_CHECK(ValueError, block, std::abs(q.dequant - step) <= 1e-4f * step && std::abs(q.quant * step - 1.0f) <= 1e-4f,
             quantizer, " has amax ", q.amax, " but amax/127 = ", q.dequant, " and 127/amax = ", q.quant,
             ": the scale list is damaged or not in FT's order");
}

void need_positive(const std::string& block, const char* what, float value) {
  SWIN_CHECK(ValueError, block, std::isfinite(value) && value > 0, what, " is ", value,
             "; a positive number is needed: calibrate the checkpoint (pyharness/quantize.py) and convert it again");
}

void check_scales(const std::string& name, const swin::BlockScales& s, bool has_downsample, bool s32_outputs) {
  need_scale(name, "attn.qkv._input_quantizer", s.qkv_input);
  need_scale(name, "attn.qkv._aftergemm_quantizer", s.qkv_aftergemm);
  need_scale(name, "attn.matmul_q_input_quantizer", s.matmul_q);
  need_scale(name, "attn.matmul_k_input_quantizer", s.matmul_k);
  need_scale(name, "attn.matmul_v_input_quantizer", s.matmul_v);
  need_scale(name, "attn.matmul_a_input_quantizer", s.matmul_a);
  need_scale(name, "attn.softmax_input_quantizer", s.softmax_input);
  need_scale(name, "attn.proj._input_quantizer", s.proj_input);
  need_scale(name, "attn.proj._aftergemm_quantizer", s.proj_aftergemm);
  need_scale(name, "mlp.fc1._input_quantizer", s.fc1_input);
  need_scale(name, "mlp.fc1._aftergemm_quantizer", s.fc1_aftergemm);
  need_scale(name, "mlp.fc2._input_quantizer", s.fc2_input);
  need_positive(name, "the scale list's QKV GEMM factor", s.qkv_factor);
  need_positive(name, "the scale list's QK^T GEMM factor", s.qk_factor);
  need_positive(name, "the scale list's PV GEMM factor", s.pv_factor);
  need_positive(name, "the scale list's proj GEMM factor", s.proj_factor);
  need_positive(name, "the scale list's FC1 GEMM factor", s.fc1_factor);
  need_positive(name, "the weight amax of mlp.fc2", s.fc2_weight_amax);
  if (!s32_outputs) {
    need_scale(name, "mlp.fc2._aftergemm_quantizer", s.fc2_aftergemm);
    need_positive(name, "the scale list's FC2 GEMM factor", s.fc2_factor);
  }
  if (has_downsample) {
    need_scale(name, "downsample.reduction._input_quantizer", s.reduction_input);
    need_positive(name, "the weight amax of downsample.reduction", s.reduction_weight_amax);
    if (!s32_outputs) {
      need_scale(name, "downsample.reduction._aftergemm_quantizer", s.reduction_aftergemm);
      need_positive(name, "the scale list's reduction GEMM factor", s.reduction_factor);
    }
  }
}

// The list holds what was learnt, a logarithm; cosine attention multiplies with exp(min(logit_scale, log 100)).
Parameter load_logit_scale(WeightList& list, const std::string& name, std::int64_t heads, const swin::Backend& backend) {
  const TensorView& learnt = list.next(name, DType::kF32, {heads});
  std::vector<float> scale(heads);
  for (std::int64_t h = 0; h < heads; ++h) {
    const double x = learnt.as<const float>()[h];
    SWIN_CHECK(ValueError, name, std::isfinite(x), "head ", h, " has ", x, "; the checkpoint is damaged");
    scale[h] = static_cast<float>(std::exp(std::min(x, std::log(100.0))));
  }
  return backend.upload_parameter(TensorView(scale.data(), DType::kF32, {heads}));
}

BlockWeights load_block(WeightList& list, const std::string& name, const swin::ModelConfig& config, const StageGeometry& g,
                        const swin::Backend& backend) {
  const std::int64_t c = g.dim, area = g.window_area();
  BlockWeights w;
  w.qkv = list.weight(name + ".attn.qkv.weight", 3 * c, c);
  if (config.qkv_bias) {
    w.qkv_bias = list.parameter(name + ".attn.qkv.bias", DType::kF16, {3 * c});
  } else {
    list.empty(name + ".attn.qkv.bias", "the model has no QKV bias");
    std::vector<float> zeros(3 * c, 0.0f);
    w.qkv_bias = backend.upload_parameter(TensorView(zeros.data(), DType::kF32, {3 * c}));
  }
  w.proj = list.weight(name + ".attn.proj.weight", c, c);
  w.proj_bias = list.parameter(name + ".attn.proj.bias", DType::kF16, {c});
  w.fc1 = list.weight(name + ".mlp.fc1.weight", g.hidden, c);
  w.fc1_bias = list.parameter(name + ".mlp.fc1.bias", DType::kF16, {g.hidden});
  const TensorView fc2 = list.next(name + ".mlp.fc2.weight", DType::kS8, {c, g.hidden});
  w.fc2_bias = list.parameter(name + ".mlp.fc2.bias", DType::kF16, {c});
  w.norm1_gamma = list.parameter(name + ".norm1.weight", DType::kF16, {c});
  w.norm1_beta = list.parameter(name + ".norm1.bias", DType::kF16, {c});
  w.norm2_gamma = list.parameter(name + ".norm2.weight", DType::kF16, {c});
  w.norm2_beta = list.parameter(name + ".norm2.bias", DType::kF16, {c});
  const TensorView scales = list.next(name + ".amaxList", DType::kF32, {swin::kScaleListLength});
  const TensorView host_scales = list.next(name + ".h_amaxList", DType::kF32, {swin::kScaleListLength});
  SWIN_CHECK(ValueError, name, std::memcmp(scales.data, host_scales.data, scales.nbytes()) == 0,
             "amaxList and h_amaxList differ; they must be copies of each other");
  w.scales = swin::decode_scales(scales.as<const float>());
  check_scales(name, w.scales, g.has_downsample, config.int8_mode == 2);
  w.fc2 = backend.pack_weight(fc2, swin::InputRange::behind_gelu(w.scales.fc2_input.quant));
  w.relative_position_bias = list.parameter(name + ".attn.relative_position_bias", DType::kF16, {g.heads, area, area});
  list.empty(name + ".attn.relative_position_bias_padded", "attention runs unfused");
  if (config.version == 2) w.logit_scale = load_logit_scale(list, name + ".attn.logit_scale", g.heads, backend);
  return w;
}

StageWeights load_stage(WeightList& list, std::size_t index, const swin::ModelConfig& config, const StageGeometry& g,
                        const swin::Backend& backend) {
  const std::string name = "layers." + std::to_string(index);
  StageWeights w;
  for (std::int64_t block = 0; block < config.depths[index]; ++block) {
    w.blocks.push_back(load_block(list, name + ".blocks." + std::to_string(block), config, g, backend));
  }
  if (g.has_downsample) {
    const std::int64_t normed = (config.version == 2 ? 2 : 4) * g.dim;  // Swin-V2 normalizes behind the reduction
    w.merge_gamma = list.parameter(name + ".downsample.norm.weight", DType::kF16, {normed});
    w.merge_beta = list.parameter(name + ".downsample.norm.bias", DType::kF16, {normed});
    w.merge_reduction = list.weight(name + ".downsample.reduction.weight", 2 * g.dim, 4 * g.dim);
  } else {
    for (const char* part : {".downsample.norm.weight", ".downsample.norm.bias", ".downsample.reduction.weight"}) {
      list.empty(name + part, "the last stage has no downsample");
    }
  }
  if (g.shifts) {
    w.attn_mask = list.parameter(name + ".attn_mask", DType::kF16, {g.windows(), g.window_area(), g.window_area()});
  } else {
    list.empty(name + ".attn_mask", "no block of this stage shifts");
  }
  list.empty(name + ".attn_mask_padded", "attention runs unfused");
  return w;
}

}  // namespace

ModelWeights load_weights(const swin::ModelConfig& config, const std::vector<TensorView>& list,
                          const swin::Backend& backend) {
  const std::vector<StageGeometry> stages = stage_geometries(config);
  std::size_t needed = swin::kFinalWeightCount + (config.num_classes > 0 ? swin::kHeadWeightCount : 0);
  const std::int64_t per_block = config.version == 2 ? swin::kBlockWeightV2Count : swin::kBlockWeightCount;
  for (std::int64_t depth : config.depths) needed += depth * per_block + swin::kStageWeightCount;
  SWIN_CHECK(ShapeError, "weight list", list.size() == needed, "found ", list.size(), " tensors; ", needed,
             " are needed: ", per_block,
             " a block, 5 a stage, 6 at the end and 2 for the head (docs/weight_format.md)");

  WeightList cursor(list, backend);
  ModelWeights w;
  for (std::size_t i = 0; i < stages.size(); ++i) w.stages.push_back(load_stage(cursor, i, config, stages[i], backend));
  const std::int64_t e = config.embed_dim, last = config.num_features();
  w.patch_weight =
      cursor.parameter("patch_embed.proj.weight", DType::kF16, {e, config.in_chans * config.patch_size * config.patch_size});
  w.patch_bias = cursor.parameter("patch_embed.proj.bias", DType::kF16, {e});
  if (config.patch_norm) {
    w.patch_gamma = cursor.parameter("patch_embed.norm.weight", DType::kF16, {e});
    w.patch_beta = cursor.parameter("patch_embed.norm.bias", DType::kF16, {e});
  } else {
    cursor.empty("patch_embed.norm.weight", "patch_norm is off");
    cursor.empty("patch_embed.norm.bias", "patch_norm is off");
  }
  w.norm_gamma = cursor.parameter("norm.weight", DType::kF16, {last});
  w.norm_beta = cursor.parameter("norm.bias", DType::kF16, {last});
  if (config.num_classes > 0) {
    w.head_weight = cursor.parameter("head.weight", DType::kF16, {config.num_classes, last});
    w.head_bias = cursor.parameter("head.bias", DType::kF16, {config.num_classes});
  }
  return w;
}

}  // namespace fastertransformer::FT_GRAPH
