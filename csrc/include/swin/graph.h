// A graph turns a model's configuration and FT weight list into plans. The two graphs (FT baseline, GELU-less) are the
// same sources built twice, the second time with the patch series applied, in two namespaces.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "swin/plan.h"

namespace swin {

struct ModelConfig {
  int version = 1;  // Swin-V1 or -V2
  int int8_mode = 1;
  std::int64_t img_h = 0, img_w = 0;  // that the weights' shift masks are of; other sizes run too
  std::int64_t patch_size = 0, in_chans = 0, embed_dim = 0, num_classes = 0;
  std::vector<std::int64_t> depths, num_heads, window_size;  // one entry per stage
  double mlp_ratio = 4.0;
  bool qkv_bias = true;
  bool patch_norm = true;
  bool pad_first = false;  // where windows do not divide the tokens: pad, then shift (WindowGeometry::pad_first)
  std::optional<double> qk_scale;  // head_dim ** -0.5 where absent

  std::int64_t num_features() const { return embed_dim << (depths.size() - 1); }
  bool operator==(const ModelConfig&) const = default;
};

class Graph {
 public:
  virtual ~Graph() = default;
  virtual const ModelConfig& config() const = 0;
  virtual const Backend& backend() const = 0;
  // For images of any size that the model's windows fit (swin/geometry.h), else ShapeError. `retired`: see Plan.
  virtual std::unique_ptr<Plan> make_plan(const InputShape& input, const Queue& queue = {},
                                          std::unique_ptr<Plan> retired = nullptr) const = 0;
};

// `weights`: the FT weight list (docs/weight_format.md) in host memory; an empty slot is a view of no elements.
// The list is not needed after the call. `backend` must outlive the graph.
std::unique_ptr<Graph> make_graph(const std::string& name, const ModelConfig& config,
                                  const std::vector<TensorView>& weights, const Backend& backend);
std::vector<std::string> graph_names();

namespace fused_int8 {
// `weights`: the fused graph's list (docs/fused.md).
std::unique_ptr<Graph> make_graph(const ModelConfig& config, const std::vector<TensorView>& weights,
                                  const Backend& backend);
}  // namespace fused_int8

}  // namespace swin

namespace fastertransformer {
#define SWIN_DECLARE_GRAPH(ns)                                                                                         \
  namespace ns {                                                                                                       \
  std::unique_ptr<swin::Graph> make_graph(const swin::ModelConfig& config,                                             \
                                          const std::vector<swin::TensorView>& weights, const swin::Backend& backend); \
  }
SWIN_DECLARE_GRAPH(ft_int8)
SWIN_DECLARE_GRAPH(geluless_int8)
#undef SWIN_DECLARE_GRAPH
}  // namespace fastertransformer
