// A plan: one batch size's operations in order, bound to memory. Graphs build plans; the engine runs them.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "swin/backend.h"
#include "swin/ops.h"

namespace swin {

enum class OpKind { kGemm, kFused, kFloat };

struct Node {
  std::string name;  // docs/architecture.md's name: "qkv_gemm", "fc1_bias_gelu", ...
  OpKind kind;
  int stage;  // -1: before or after the stages
  int block;  // -1: outside blocks
  OpArgs args;
};

class Plan {
 public:
  using Observer = std::function<void(const Node&)>;

  // A plan's buffers belong to one queue of work: `stream` is the ExecContext's it will run on.
  Plan(const Backend& backend, std::int64_t batch, void* stream = nullptr)
      : backend_(&backend), batch_(batch), stream_(stream) {}

  // Zeroed memory of `elements` of `dtype`, followed by guard bytes, owned by the plan.
  void* buffer(std::string name, DType dtype, std::int64_t elements);
  void add(std::string name, OpKind kind, int stage, int block, OpArgs args);

  const Backend& backend() const { return *backend_; }
  std::int64_t batch() const { return batch_; }
  void* stream() const { return stream_; }
  const std::vector<Node>& nodes() const { return nodes_; }
  std::int64_t workspace_bytes() const;

  // Where the first node reads its images and the last two write: valid until the next call.
  void bind(const void* image, void* features, void* logits);
  // Runs every node whose name is not in `skip`. With `poison`, every pure output is filled with a byte pattern before
  // its node runs, and the guard bytes behind every buffer are checked after it (Error naming node and buffer).
  // `observe`, where there is one, is called after each node that ran.
  void run(const ExecContext& context, const std::vector<std::string>& skip, bool poison,
           const Observer& observe) const;
  // Runs the nodes up to the last stage that has a place in `out` (one per stage, null where it is not wanted), and copies
  // what each of those stages gives: its residual stream in image order, [batch * height * width, dim] of the backend's
  // float type, ahead of patch merging and of the final norm.
  void run_stages(const ExecContext& context, const std::vector<void*>& out) const;
  // Runs every node. From the second call on, where the backend can, all nodes between those that read or write the
  // caller's memory are one recording: those addresses change from call to call, everything else belongs to the plan.
  void run_recorded(const ExecContext& context);
  // Median milliseconds of each node by itself, over `runs` runs after one warm-up.
  std::vector<double> time_nodes(const ExecContext& context, int runs) const;

 private:
  struct Buffer {
    std::string name;
    DeviceBuffer memory;
    std::int64_t bytes;
  };
  void check_guards(const Node& node) const;
  void run_range(const ExecContext& context, std::size_t first, std::size_t last) const;

  const Backend* backend_;
  std::int64_t batch_;
  void* stream_;
  bool warm_ = false;
  std::unique_ptr<Recording> recording_;
  std::vector<Buffer> buffers_;
  std::vector<Node> nodes_;
};

}  // namespace swin
