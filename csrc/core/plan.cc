#include "swin/plan.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "swin/error.h"

namespace swin {
namespace {
constexpr std::int64_t kGuardBytes = 64;
constexpr unsigned char kGuard = 0xA5;
constexpr unsigned char kPoison = 0x7D;  // 125 as int8, 2.1e37 as float32: visible wherever it leaks into a result
}  // namespace

void* Plan::buffer(std::string name, DType dtype, std::int64_t elements) {
  const std::int64_t bytes = elements * size_of(dtype);
  DeviceBuffer memory = backend_->allocate(bytes + kGuardBytes);
  void* data = memory.get();
  backend_->fill(static_cast<char*>(data) + bytes, kGuard, kGuardBytes);
  buffers_.push_back({std::move(name), std::move(memory), bytes});
  return data;
}

void Plan::add(std::string name, OpKind kind, int stage, int block, OpArgs args) {
  nodes_.push_back({std::move(name), kind, stage, block, std::move(args)});
}

std::int64_t Plan::workspace_bytes() const {
  std::int64_t total = 0;
  for (const Buffer& buffer : buffers_) total += buffer.bytes + kGuardBytes;
  return total;
}

void Plan::bind(const void* image, void* features, void* logits) {
  for (Node& node : nodes_) {
    if (auto* a = std::get_if<PatchEmbedArgs>(&node.args)) a->image.data = const_cast<void*>(image);
    if (auto* a = std::get_if<FinalNormPoolArgs>(&node.args)) a->out.data = features;
    if (auto* a = std::get_if<HeadArgs>(&node.args)) {
      a->features.data = features;
      a->out.data = logits;
    }
  }
}

void Plan::check_guards(const Node& node) const {
  for (const Buffer& buffer : buffers_) {
    unsigned char bytes[kGuardBytes];
    backend_->copy_to_host(bytes, static_cast<char*>(buffer.memory.get()) + buffer.bytes, kGuardBytes);
    const bool intact = std::all_of(bytes, bytes + kGuardBytes, [](unsigned char b) { return b == kGuard; });
    SWIN_CHECK(Error, node.name, intact, "wrote past the end of buffer '", buffer.name, "' (stage ", node.stage,
               ", block ", node.block, ")");
  }
}

void Plan::run(const ExecContext& context, const std::vector<std::string>& skip, bool poison,
               const Observer& observe) const {
  const std::string backend = backend_->name();
  for (const Node& node : nodes_) {
    if (!skip.empty() && std::find(skip.begin(), skip.end(), node.name) != skip.end()) continue;
    if (poison && !updates_in_place(node.args)) {
      for (const TensorView& out : op_outputs(node.args)) backend_->fill(out.data, kPoison, out.nbytes());
    }
    run_op(backend_->ops(), backend.c_str(), node.args, context);
    if (poison) check_guards(node);
    if (observe) observe(node);
  }
}

std::vector<double> Plan::time_nodes(const ExecContext& context, int runs) const {
  using Clock = std::chrono::steady_clock;
  std::vector<std::vector<double>> samples(nodes_.size());
  const std::string backend = backend_->name();
  for (int run = -1; run < runs; ++run) {
    for (std::size_t i = 0; i < nodes_.size(); ++i) {
      const auto start = Clock::now();
      run_op(backend_->ops(), backend.c_str(), nodes_[i].args, context);
      const std::chrono::duration<double, std::milli> spent = Clock::now() - start;
      if (run >= 0) samples[i].push_back(spent.count());
    }
  }
  std::vector<double> medians;
  for (std::vector<double>& s : samples) {
    std::nth_element(s.begin(), s.begin() + s.size() / 2, s.end());
    medians.push_back(s[s.size() / 2]);
  }
  return medians;
}

}  // namespace swin
