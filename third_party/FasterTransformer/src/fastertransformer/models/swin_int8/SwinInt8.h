// The Swin INT8 graph, V1 and V2, after FasterTransformer's architecture (see this folder's README).
#pragma once

#include "SwinInt8Weights.h"

namespace fastertransformer::FT_GRAPH {

class SwinInt8 : public swin::Graph {
 public:
  SwinInt8(const swin::ModelConfig& config, const std::vector<swin::TensorView>& weights, const swin::Backend& backend);

  const swin::ModelConfig& config() const override { return config_; }
  const swin::Backend& backend() const override { return backend_; }
  std::unique_ptr<swin::Plan> make_plan(const swin::InputShape& input, const swin::Queue& queue,
                                        std::unique_ptr<swin::Plan> retired) const override;

 private:
  swin::ModelConfig config_;
  const swin::Backend& backend_;
  ModelWeights weights_;
};

}  // namespace fastertransformer::FT_GRAPH
