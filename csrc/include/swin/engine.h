// An engine: one graph and its plans, one per input shape and concurrent caller. Safe from several threads.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "swin/graph.h"

namespace swin {

// Of the images of one call, which may never be made: no product of sizes is beyond 64 bits then.
constexpr std::int64_t kMostPixels = std::int64_t{1} << 34;

struct RunOptions {
  std::vector<std::string> skip;  // node names to leave out
  bool poison = false;            // see Plan::run
  Plan::Observer observe;         // see Plan::run
};

class Engine {
 public:
  explicit Engine(std::unique_ptr<Graph> graph) : graph_(std::move(graph)) {}

  const ModelConfig& config() const { return graph_->config(); }
  // image f32 [batch, in_chans, height, width]; features f32 [batch, num_features]; logits f32 [batch, num_classes] or null.
  // Every size that the model's windows fit runs, else ShapeError (swin/geometry.h).
  void forward(const void* image, const InputShape& input, void* features, void* logits, const RunOptions& options,
               const ExecContext& context);
  // image as above; out: one place per stage, null where it is not wanted, for the residual stream behind it, [batch,
  // height, width, dim] of the backend's float type. No further than the last stage that is wanted.
  void forward_stages(const void* image, const InputShape& input, const std::vector<void*>& out,
                      const ExecContext& context);
  // The nodes of one input shape as JSON: [{"name":..., "kind":..., "stage":..., "block":..., "shape":..., ...}].
  std::string describe(const InputShape& input);
  // Bytes of buffers one forward pass of such images works in, beside the weights, and of the masks of shifted windows,
  // which for images of another size than the model's are the plan's own. Counted, not allocated.
  std::int64_t workspace_bytes(const InputShape& input);
  std::vector<double> time_nodes(const void* image, const InputShape& input, int runs, const ExecContext& context);

 private:
  class Lease;  // a plan taken from the cache, given back when it goes out of scope

  std::unique_ptr<Graph> graph_;
  // Within one mutex of all engines.
  std::vector<std::unique_ptr<Plan>> idle_;  // most recently used last
  std::size_t at_work_ = 0, most_at_once_ = 0;  // calls
};

}  // namespace swin
