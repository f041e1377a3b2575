#include "swin/plan.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "swin/error.h"

namespace swin {

double Backend::time_ms(const ExecContext&, const std::function<void()>& work) const {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

namespace {

// Whether the node reads or writes memory of the caller's (see Plan::bind).
bool is_bound(const Node& node) {
  return std::holds_alternative<PatchEmbedArgs>(node.args) || std::holds_alternative<FinalNormPoolArgs>(node.args) ||
         std::holds_alternative<HeadArgs>(node.args);
}

// What a stage gives, where the node is the one that reads it: of a stage the patch merging, of the last the final norm.
const TensorView* stage_output(const Node& node) {
  if (const auto* a = std::get_if<PatchMergeNormArgs>(&node.args)) return &a->residual;
  if (const auto* a = std::get_if<PatchMergeArgs>(&node.args)) return &a->residual;
  if (const auto* a = std::get_if<FinalNormPoolArgs>(&node.args)) return &a->residual;
  return nullptr;
}

constexpr std::int64_t kGuardBytes = 64;
constexpr unsigned char kGuard = 0xA5;
constexpr unsigned char kPoison = 0x7D;  // 125 as int8, 2.1e37 as float32: visible wherever it leaks into a result
}  // namespace

Plan::Plan(const Backend& backend, const InputShape& input, const Queue& queue, std::unique_ptr<Plan> retired)
    : backend_(&backend), input_(input), queue_(queue) {
  if (retired == nullptr) return;
  spare_ = std::move(retired->buffers_);
  counts_ = retired->counts_;
}

std::unique_ptr<Plan> Plan::counter(const Backend& backend) {
  auto plan = std::make_unique<Plan>(backend, InputShape{});
  plan->counts_ = true;
  return plan;
}

void* Plan::buffer(std::string name, DType dtype, std::int64_t elements) {
  Buffer buffer{std::move(name), nullptr, elements * size_of(dtype), 0};
  if (counts_) {
    buffers_.push_back(std::move(buffer));
    return nullptr;
  }
  // Of the memory that is left, the smallest piece that does.
  auto best = spare_.end();
  for (auto it = spare_.begin(); it != spare_.end(); ++it) {
    if (it->capacity < buffer.bytes + kGuardBytes) continue;
    if (best == spare_.end() || it->capacity < best->capacity) best = it;
  }
  if (best != spare_.end()) {
    buffer.memory = std::move(best->memory);
    buffer.capacity = best->capacity;
    spare_.erase(best);
  } else {
    buffer.capacity = buffer.bytes + kGuardBytes;
    buffer.memory = backend_->allocate(buffer.capacity);
  }
  void* data = buffer.memory.get();
  buffers_.push_back(std::move(buffer));
  return data;
}

TensorView Plan::keep(Parameter parameter) {
  kept_bytes_ += parameter.view.nbytes();
  kept_.push_back(std::move(parameter));
  return kept_.back().view;
}

void Plan::add(std::string name, OpKind kind, int stage, int block, OpArgs args) {
  nodes_.push_back({std::move(name), kind, stage, block, std::move(args)});
}

std::int64_t Plan::workspace_bytes() const {
  std::int64_t total = kept_bytes_;
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

void Plan::set_guards(const ExecContext& context) const {
  for (const Buffer& buffer : buffers_) backend_->fill(buffer.guard(), kGuard, kGuardBytes, context);
}

void Plan::check_guards(const Node& node, const ExecContext& context) const {
  for (const Buffer& buffer : buffers_) {
    unsigned char bytes[kGuardBytes];
    backend_->copy_to_host(bytes, buffer.guard(), kGuardBytes, context);
    const bool intact = std::all_of(bytes, bytes + kGuardBytes, [](unsigned char b) { return b == kGuard; });
    SWIN_CHECK(Error, node.name, intact, "wrote past the end of buffer '", buffer.name, "' (stage ", node.stage,
               ", block ", node.block, ")");
  }
}

void Plan::run(const ExecContext& context, const std::vector<std::string>& skip, bool poison,
               const Observer& observe) const {
  const std::string backend = backend_->name();
  if (poison) set_guards(context);
  for (const Node& node : nodes_) {
    if (!skip.empty() && std::find(skip.begin(), skip.end(), node.name) != skip.end()) continue;
    if (poison && !updates_in_place(node.args)) {
      for (const TensorView& out : op_outputs(node.args)) backend_->fill(out.data, kPoison, out.nbytes(), context);
    }
    run_op(backend_->ops(), backend.c_str(), node.args, context);
    if (poison) check_guards(node, context);
    if (observe) observe(node);
  }
}

void Plan::run_range(const ExecContext& context, std::size_t first, std::size_t last) const {
  const std::string backend = backend_->name();
  for (std::size_t i = first; i < last; ++i) run_op(backend_->ops(), backend.c_str(), nodes_[i].args, context);
}

void Plan::run_stages(const ExecContext& context, const std::vector<void*>& out) const {
  const std::string backend = backend_->name();
  const auto wanted = [](void* place) { return place != nullptr; };
  auto left = std::count_if(out.begin(), out.end(), wanted);
  std::size_t stage = 0;
  for (auto node = nodes_.begin(); left > 0 && node != nodes_.end(); ++node) {
    if (const TensorView* output = stage_output(*node)) {
      if (out[stage] != nullptr) {
        backend_->copy(out[stage], output->data, output->nbytes(), context);
        --left;
      }
      ++stage;
    }
    if (left > 0) run_op(backend_->ops(), backend.c_str(), node->args, context);
  }
}

void Plan::run_recorded(const ExecContext& context) {
  if (queue_.recording != 0) {
    run_range(context, 0, nodes_.size());
    return;
  }
  std::size_t first = 0, last = nodes_.size();
  while (first < last && is_bound(nodes_[first])) ++first;
  while (last > first && is_bound(nodes_[last - 1])) --last;
  // The first call runs as it is: GEMMs may still have to be chosen, which allocates and waits.
  if (warm_ && !recording_ && recordings_left_ > 0) {
    --recordings_left_;
    recording_ = backend_->record(context, [&](const ExecContext& c) { run_range(c, first, last); });
  }
  run_range(context, 0, first);
  if (recording_) {
    recording_->replay(context);
  } else {
    run_range(context, first, last);
  }
  run_range(context, last, nodes_.size());
  warm_ = true;
}

std::vector<double> Plan::time_nodes(const ExecContext& context, int runs) const {
  std::vector<std::vector<double>> samples(nodes_.size());
  const std::string backend = backend_->name();
  for (int run = -1; run < runs; ++run) {
    for (std::size_t i = 0; i < nodes_.size(); ++i) {
      const double ms =
          backend_->time_ms(context, [&] { run_op(backend_->ops(), backend.c_str(), nodes_[i].args, context); });
      if (run >= 0) samples[i].push_back(ms);
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
