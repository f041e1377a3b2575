// A plan: one input shape's operations in order, bound to memory. Graphs build plans; the engine runs them.
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

// The images of a call: float32 [batch, in_chans, height, width].
struct InputShape {
  std::int64_t batch = 0, height = 0, width = 0;
  bool operator==(const InputShape&) const = default;
};

// Where calls run one after the other: a stream, and where the caller records it into a graph of his own, that
// recording, whose replays go on using the memory of the calls in it.
struct Queue {
  void* stream = nullptr;
  std::uint64_t recording = 0;  // Backend::callers_recording
  bool operator==(const Queue&) const = default;
};

class Plan {
 public:
  using Observer = std::function<void(const Node&)>;

  // A plan's buffers belong to one queue of work: `queue` is what it will run on. `retired`: a plan of the same queue
  // that is no longer needed and leaves its memory to this one; null where there is none.
  Plan(const Backend& backend, const InputShape& input, const Queue& queue = {},
       std::unique_ptr<Plan> retired = nullptr);
  // What to give as `retired` for a plan that counts its memory and has none: for workspace_bytes alone.
  static std::unique_ptr<Plan> counter(const Backend& backend);

  // Memory of `elements` of `dtype`, followed by guard bytes, owned by the plan. What it holds is left open.
  void* buffer(std::string name, DType dtype, std::int64_t elements);
  // Has `parameter` live as long as the plan does.
  TensorView keep(Parameter parameter);
  // The same of what `make` makes, which is of the type and shape of `wanted`; a plan that counts has nothing made.
  template <class Make>
  TensorView keep(const TensorView& wanted, Make&& make) {
    if (!counts_) return keep(make());
    kept_bytes_ += wanted.numel() * size_of(wanted.dtype);
    return wanted;
  }
  // To be called behind the last `buffer`: gives back what is left of the retired plan's memory.
  void release_spare() { spare_.clear(); }
  void add(std::string name, OpKind kind, int stage, int block, OpArgs args);

  const Backend& backend() const { return *backend_; }
  const InputShape& input() const { return input_; }
  std::int64_t batch() const { return input_.batch; }
  const Queue& queue() const { return queue_; }
  const std::vector<Node>& nodes() const { return nodes_; }
  std::int64_t workspace_bytes() const;  // of its buffers and of what it keeps

  // Where the first node reads its images and the last two write: valid until the next call.
  void bind(const void* image, void* features, void* logits);
  // Runs every node whose name is not in `skip`. With `poison`, every pure output is filled with a byte pattern before
  // its node runs, and guard bytes behind every buffer are checked after it (Error naming node and buffer).
  // `observe`, where there is one, is called after each node that ran.
  void run(const ExecContext& context, const std::vector<std::string>& skip, bool poison,
           const Observer& observe) const;
  // Runs the nodes up to the last stage that has a place in `out` (one per stage, null where it is not wanted), and copies
  // what each of those stages gives: its residual stream in image order, [batch * height * width, dim] of the backend's
  // float type, ahead of patch merging and of the final norm.
  void run_stages(const ExecContext& context, const std::vector<void*>& out) const;
  // Runs every node. From the second call on, where the backend can, all nodes between those that read or write the
  // caller's memory are one recording: those addresses change from call to call, everything else belongs to the plan.
  // While the caller records, all nodes become part of that.
  void run_recorded(const ExecContext& context);
  // Median milliseconds of each node by itself, over `runs` runs after one warm-up.
  std::vector<double> time_nodes(const ExecContext& context, int runs) const;

 private:
  struct Buffer {
    std::string name;
    DeviceBuffer memory;
    std::int64_t bytes, capacity;  // of the buffer; of its memory, with the guard and what a larger buffer left
    char* guard() const { return static_cast<char*>(memory.get()) + bytes; }
  };
  void set_guards(const ExecContext& context) const;
  void check_guards(const Node& node, const ExecContext& context) const;
  void run_range(const ExecContext& context, std::size_t first, std::size_t last) const;

  const Backend* backend_;
  InputShape input_;
  Queue queue_;
  bool counts_ = false;
  bool warm_ = false;
  int recordings_left_ = 3;  // to try
  std::unique_ptr<Recording> recording_;
  std::vector<Buffer> buffers_, spare_;
  std::vector<Parameter> kept_;
  std::int64_t kept_bytes_ = 0;
  std::vector<Node> nodes_;
};

}  // namespace swin
