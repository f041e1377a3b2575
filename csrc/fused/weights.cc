#include "weights.h"

#include <algorithm>
#include <cmath>

#include "swin/error.h"
#include "swin/position_bias.h"

namespace swin::fused_int8 {
namespace {

// Tensors per block, per stage behind its blocks, and at the end without and with a head.
constexpr std::size_t kBlockTensors = 18, kStageTensors = 6, kFinalTensors = 6, kHeadTensors = 2;
constexpr double kMostHeadScale = 100;  // exp of Swin-V2's logit_scale counts up to this

enum Amax { kQkvInput, kMatmulQ, kMatmulK, kMatmulV, kProjInput, kFc1Input, kFc2Input, kAmaxCount };

const float* floats(const TensorView& t) { return t.as<const float>(); }

constexpr const char* kQuantizers[kAmaxCount] = {"attn.qkv._input_quantizer",     "attn.matmul_q_input_quantizer",
                                                 "attn.matmul_k_input_quantizer", "attn.matmul_v_input_quantizer",
                                                 "attn.proj._input_quantizer",    "mlp.fc1._input_quantizer",
                                                 "mlp.fc2._input_quantizer"};

void need_positive(const std::string& name, float value) {
  SWIN_CHECK(ValueError, name, std::isfinite(value) && value > 0, "found ", value,
             "; a positive number is needed: calibrate the checkpoint (pyharness/quantize.py) and convert it again");
}

// Reads one Linear: weight, weight_scale and bias stand in this order in the list.
class LinearReader {
 public:
  LinearReader(WeightList& list, const Backend& backend, std::string name, std::int64_t n, std::int64_t k)
      : backend_(backend), name_(std::move(name)), n_(n), weight_(list.next(name_ + ".weight", DType::kS8, {n, k})) {
    for (std::int64_t i = 0; i < n * k; ++i) {
      SWIN_CHECK(ValueError, name_ + ".weight", weight_.as<const std::int8_t>()[i] != -128, "row ", i / k, ", column ",
                 i % k, " is -128; -127 to 127 is needed: convert the checkpoint again");
    }
    const TensorView& scale = list.next(name_ + ".weight_scale", DType::kF32, {n});
    scale_ = floats(scale);
    for (std::int64_t i = 0; i < n; ++i) need_positive(name_ + ".weight_scale[" + std::to_string(i) + "]", scale_[i]);
  }

  void read_bias(WeightList& list) { bias_ = floats(list.next(name_ + ".bias", DType::kF32, {n_})); }

  // What the inputs are known to be, where that is less than any int8.
  void expect(InputRange input) { input_ = input; }

  // scale[i] = weight_scale[i] * factor(i), bias[i] = bias[i] * bias_factor(i), computed in double.
  template <class Factor, class BiasFactor>
  Linear fold(Factor&& factor, BiasFactor&& bias_factor) {
    linear_.weight = backend_.pack_weight(weight_, input_);
    std::vector<float> scale(n_), bias(n_);
    for (std::int64_t i = 0; i < n_; ++i) scale[i] = static_cast<float>(double(scale_[i]) * factor(i));
    linear_.scale = backend_.upload_float32(TensorView(scale.data(), DType::kF32, {n_}));
    if (bias_ != nullptr) {
      for (std::int64_t i = 0; i < n_; ++i) bias[i] = static_cast<float>(double(bias_[i]) * bias_factor(i));
      linear_.bias = backend_.upload_float32(TensorView(bias.data(), DType::kF32, {n_}));
    }
    return std::move(linear_);
  }
  Linear fold(double factor) {
    return fold([=](std::int64_t) { return factor; }, [](std::int64_t) { return 1.0; });
  }

 private:
  const Backend& backend_;
  std::string name_;
  std::int64_t n_;
  TensorView weight_;
  InputRange input_ = InputRange::kSigned;
  const float* scale_ = nullptr;
  const float* bias_ = nullptr;
  Linear linear_;
};

// exp(min(logit_scale, log 100)) of each head, what cosine attention applies.
Parameter load_head_scale(WeightList& list, const std::string& name, std::int64_t heads, const Backend& backend) {
  const float* learnt = floats(list.next(name, DType::kF32, {heads}));
  std::vector<float> scale(heads);
  for (std::int64_t i = 0; i < heads; ++i) {
    SWIN_CHECK(ValueError, name, std::isfinite(learnt[i]), "head ", i, " has ", learnt[i], "; a number is needed");
    scale[i] = static_cast<float>(std::exp(std::min(double(learnt[i]), std::log(kMostHeadScale))));
  }
  return backend.upload_float32(TensorView(scale.data(), DType::kF32, {heads}));
}

// In the form that the backend is fastest with, where the bias has it.
Parameter upload_position_bias(const TensorView& bias, const StageGeometry& g, const Backend& backend) {
  if (backend.takes_compact_bias(g.window_area())) {
    std::vector<float> compact = compact_position_bias(bias, g.window_h, g.window_w);
    const TensorView form(compact.data(), DType::kF32, {g.heads, g.window_w, 2 * g.window_h - 1, g.window_w});
    if (!compact.empty()) return backend.upload_parameter(form);
  }
  return backend.upload_parameter(bias);
}

BlockWeights load_block(WeightList& list, const std::string& name, const ModelConfig& config, const StageGeometry& g,
                        Activation activation, const Backend& backend) {
  const std::int64_t c = g.dim, area = g.window_area();
  const bool relu = activation == Activation::kRelu;
  BlockWeights w;
  LinearReader qkv(list, backend, name + ".attn.qkv", 3 * c, c);
  if (config.qkv_bias) {
    qkv.read_bias(list);
  } else {
    list.empty(name + ".attn.qkv.bias", "the model has no QKV bias");
  }
  LinearReader proj(list, backend, name + ".attn.proj", c, c);
  proj.read_bias(list);
  LinearReader fc1(list, backend, name + ".mlp.fc1", g.hidden, c);
  if (relu) {
    list.empty(name + ".mlp.fc1.bias", "the first block's is empty, which makes the model GELU-less");
  } else {
    fc1.read_bias(list);
  }
  LinearReader fc2(list, backend, name + ".mlp.fc2", c, g.hidden);
  fc2.read_bias(list);
  w.norm1_gamma = list.parameter(name + ".norm1.weight", DType::kF32, {c});
  w.norm1_beta = list.parameter(name + ".norm1.bias", DType::kF32, {c});
  w.norm2_gamma = list.parameter(name + ".norm2.weight", DType::kF32, {c});
  w.norm2_beta = list.parameter(name + ".norm2.bias", DType::kF32, {c});
  // A Swin-V2 rounds q and k by their own largest: they have no amax, and stay in units of their own.
  const bool cosine = config.version == 2;
  const float* amax = floats(list.next(name + ".amax", DType::kF32, {cosine ? kAmaxCount - 2 : kAmaxCount}));
  double step[kAmaxCount];
  for (int i = 0; i < kAmaxCount; ++i) {
    step[i] = 1;
    if (cosine && (i == kMatmulQ || i == kMatmulK)) continue;
    need_positive(name + "." + kQuantizers[i] + ": amax", *amax);
    step[i] = double(*amax++) / 127.0;
  }
  const TensorView& bias = list.next(name + ".attn.relative_position_bias", DType::kF32, {g.heads, area, area});
  w.relative_position_bias = upload_position_bias(bias, g, backend);
  if (cosine) w.head_scale = load_head_scale(list, name + ".attn.logit_scale", g.heads, backend);

  const auto third = [&](std::int64_t i) { return step[kMatmulQ + i / c]; };
  w.qkv = qkv.fold([&](std::int64_t i) { return step[kQkvInput] / third(i); },
                   [&](std::int64_t i) { return 1.0 / third(i); });
  w.proj = proj.fold(step[kProjInput]);
  // ReLU commutes with a positive factor, so there FC1's scale quantizes too; GELU does not, and is quantized after.
  w.fc1 = fc1.fold(relu ? step[kFc1Input] / step[kFc2Input] : step[kFc1Input]);
  w.hidden_quant = static_cast<float>(1.0 / step[kFc2Input]);
  fc2.expect(relu ? InputRange::kNonNegative : InputRange::behind_gelu(w.hidden_quant));
  w.fc2 = fc2.fold(step[kFc2Input]);
  if (!cosine) {
    const double scale = config.qk_scale.value_or(1.0 / std::sqrt(static_cast<double>(c / g.heads)));
    w.qk_factor = static_cast<float>(step[kMatmulQ] * step[kMatmulK] * scale);
  }
  w.pv_factor = static_cast<float>(step[kMatmulV] / step[kProjInput]);
  w.qkv_quant = static_cast<float>(1.0 / step[kQkvInput]);
  w.fc1_quant = static_cast<float>(1.0 / step[kFc1Input]);
  return w;
}

StageWeights load_stage(WeightList& list, std::size_t index, const ModelConfig& config, const StageGeometry& g,
                        Activation activation, const Backend& backend) {
  const std::string name = "layers." + std::to_string(index);
  StageWeights w;
  for (std::int64_t block = 0; block < config.depths[index]; ++block) {
    w.blocks.push_back(load_block(list, name + ".blocks." + std::to_string(block), config, g, activation, backend));
  }
  if (g.has_downsample) {
    const std::int64_t normed = config.version == 2 ? 2 * g.dim : 4 * g.dim;  // behind the reduction, or ahead of it
    w.merge_gamma = list.parameter(name + ".downsample.norm.weight", DType::kF32, {normed});
    w.merge_beta = list.parameter(name + ".downsample.norm.bias", DType::kF32, {normed});
    LinearReader reduction(list, backend, name + ".downsample.reduction", 2 * g.dim, 4 * g.dim);
    const float* amax = floats(list.next(name + ".downsample.amax", DType::kF32, {1}));
    need_positive(name + ".downsample.reduction._input_quantizer: amax", amax[0]);
    w.reduction = reduction.fold(double(amax[0]) / 127.0);
    w.reduction_quant = static_cast<float>(127.0 / double(amax[0]));
  } else {
    for (const char* part : {".norm.weight", ".norm.bias", ".reduction.weight", ".reduction.weight_scale", ".amax"}) {
      list.empty(name + ".downsample" + part, "the last stage has no downsample");
    }
  }
  if (g.shifts) {
    const std::int64_t n = g.window_area();
    w.masks = upload_masks(distinct_masks(list.next(name + ".attn_mask", DType::kF32, {g.windows(), n, n})), backend);
  } else {
    list.empty(name + ".attn_mask", "no block of this stage shifts");
  }
  return w;
}

}  // namespace

ModelWeights load_weights(const ModelConfig& config, const std::vector<TensorView>& list, const Backend& backend) {
  const std::vector<StageGeometry> stages = stage_geometries(config);
  std::size_t needed = kFinalTensors + (config.num_classes > 0 ? kHeadTensors : 0);
  const std::size_t block_tensors = kBlockTensors + (config.version == 2 ? 1 : 0);  // logit_scale
  for (std::int64_t depth : config.depths) needed += depth * block_tensors + kStageTensors;
  SWIN_CHECK(ShapeError, "weight list", list.size() == needed, "found ", list.size(), " tensors; ", needed,
             " are needed: ", block_tensors, " a block, ", kStageTensors, " a stage, ", kFinalTensors,
             " at the end and ", kHeadTensors, " for the head (docs/fused.md)");
  WeightList reader(list, backend);
  ModelWeights w;
  constexpr std::size_t kFc1Bias = 8;  // of the first block: empty where the model is GELU-less
  w.activation = list[kFc1Bias].numel() == 0 ? Activation::kRelu : Activation::kGelu;
  for (std::size_t i = 0; i < stages.size(); ++i) {
    w.stages.push_back(load_stage(reader, i, config, stages[i], w.activation, backend));
  }
  const std::int64_t e = config.embed_dim, last = config.num_features();
  w.patch_weight = reader.parameter("patch_embed.proj.weight", DType::kF32,
                                    {e, config.in_chans * config.patch_size * config.patch_size});
  w.patch_bias = reader.parameter("patch_embed.proj.bias", DType::kF32, {e});
  if (config.patch_norm) {
    w.patch_gamma = reader.parameter("patch_embed.norm.weight", DType::kF32, {e});
    w.patch_beta = reader.parameter("patch_embed.norm.bias", DType::kF32, {e});
  } else {
    reader.empty("patch_embed.norm.weight", "patch_norm is off");
    reader.empty("patch_embed.norm.bias", "patch_norm is off");
  }
  w.norm_gamma = reader.parameter("norm.weight", DType::kF32, {last});
  w.norm_beta = reader.parameter("norm.bias", DType::kF32, {last});
  if (config.num_classes > 0) {
    w.head_weight = reader.parameter("head.weight", DType::kF32, {config.num_classes, last});
    w.head_bias = reader.parameter("head.bias", DType::kF32, {config.num_classes});
  }
  return w;
}

}  // namespace swin::fused_int8
