#include "swin/error.h"
#include "swin/graph.h"

namespace swin {

std::vector<std::string> graph_names() { return {"ft_int8", "geluless_int8", "fused_int8"}; }

std::unique_ptr<Graph> make_graph(const std::string& name, const ModelConfig& config,
                                  const std::vector<TensorView>& weights, const Backend& backend) {
  if (name == "ft_int8") return fastertransformer::ft_int8::make_graph(config, weights, backend);
  if (name == "geluless_int8") return fastertransformer::geluless_int8::make_graph(config, weights, backend);
  if (name == "fused_int8") return fused_int8::make_graph(config, weights, backend);
  throw ValueError(
      detail::concat("make_graph: there is no graph '", name, "'; this build has ft_int8, geluless_int8 and fused_int8"));
}

}  // namespace swin
