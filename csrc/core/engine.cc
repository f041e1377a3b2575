#include "swin/engine.h"

#include <algorithm>
#include <mutex>
#include <sstream>

#include "swin/error.h"
#include "swin/fork_mutex.h"
#include "swin/geometry.h"

namespace swin {
namespace {

// Plans of one stream that are kept while idle, for a few input shapes, and streams whose plans are; their workspaces
// are the engine's largest memory. Where more calls than that were at work at once, as many as they were.
constexpr std::size_t kIdlePlans = 4, kIdleStreams = 4;

// Of every engine's idle plans, held for a few moves of pointers. One for all, so that a fork can wait for it.
ForkMutex g_plans;

const char* kind_name(OpKind kind) {
  switch (kind) {
    case OpKind::kGemm:
      return "gemm";
    case OpKind::kFused:
      return "fused";
    default:
      return "float";
  }
}

std::string linear_shape(const TensorView& x, const PackedWeight& w) {
  return detail::concat("M=", x.dim(0), " N=", w.n, " K=", w.k);
}

std::string shape_of(const Node& node) {
  if (const auto* a = std::get_if<GemmS8Args>(&node.args)) return linear_shape(a->x, *a->w);
  if (const auto* a = std::get_if<LinearS8Args>(&node.args)) return linear_shape(a->x, *a->w);
  if (const auto* a = std::get_if<LinearCosineQkvArgs>(&node.args)) return linear_shape(a->x, *a->w);
  if (const auto* a = std::get_if<LinearResidualNormArgs>(&node.args)) return linear_shape(a->x, *a->w);
  if (const auto* a = std::get_if<MlpResidualNormArgs>(&node.args)) {
    return linear_shape(a->x, *a->w1) + detail::concat(", N=", a->w2->n, " K=", a->w2->k);
  }
  std::ostringstream text;
  if (const auto* a = std::get_if<QkGemmArgs>(&node.args)) {
    text << "batch=" << a->q.dim(0) * a->q.dim(1) << " M=" << a->q.dim(2) << " N=" << a->q.dim(2)
         << " K=" << a->q.dim(3);
  } else if (const auto* a = std::get_if<PvGemmArgs>(&node.args)) {
    text << "batch=" << a->v.dim(0) * a->v.dim(1) << " M=" << a->v.dim(2) << " N=" << a->v.dim(3)
         << " K=" << a->v.dim(2);
  } else {
    const TensorView out = op_outputs(node.args).front();
    for (int i = 0; i < out.rank; ++i) text << (i ? "x" : "") << out.dim(i);
  }
  return text.str();
}

}  // namespace

class Engine::Lease {
 public:
  Lease(Engine& engine, const InputShape& input, const ExecContext& context)
      : engine_(engine), queue_{context.stream, engine.graph_->backend().callers_recording(context)} {
    SWIN_CHECK(ShapeError, "forward", input.batch > 0, "batch is ", input.batch, "; at least 1 image is needed");
    if (!take(input)) {
      stage_geometries(engine_.config(), input.height, input.width);  // throws before another shape's plan is given up
      make(input);
    }
    std::lock_guard lock(g_plans);
    engine_.idle_.reserve(engine_.idle_.size() + engine_.at_work_ + 1);  // all that come back, which cannot fail
    engine_.most_at_once_ = std::max(engine_.most_at_once_, ++engine_.at_work_);
  }
  ~Lease() {
    std::vector<std::unique_ptr<Plan>> given_up;  // freed behind the lock, as a GPU waits for its work then
    std::lock_guard lock(g_plans);
    --engine_.at_work_;
    engine_.idle_.push_back(std::move(plan_));
    if (of_recording(*engine_.idle_.back())) return;
    try {
      give_up_old(given_up);
    } catch (const std::bad_alloc&) {  // for the list of them: they stay until the next call
    }
  }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
  Plan* operator->() { return plan_.get(); }

 private:
  void give_up_old(std::vector<std::unique_ptr<Plan>>& given_up) {
    const std::size_t kept = std::max(kIdlePlans, engine_.most_at_once_);
    keep(kept, [&](const Plan& p) { return p.queue() == queue_; }, given_up);
    keep(kIdleStreams * kept, [](const Plan& p) { return !of_recording(p); }, given_up);
  }

  // Such a plan stays as long as the engine: replays of the caller's graph go on using its memory, and nothing else
  // may.
  static bool of_recording(const Plan& plan) { return plan.queue().recording != 0; }

  // Takes the idle plan of that shape, if there is one. Another queue's may still have work under way in its buffers.
  bool take(const InputShape& input) {
    std::lock_guard lock(g_plans);
    auto& idle = engine_.idle_;
    for (auto it = idle.rbegin(); it != idle.rend(); ++it) {
      if ((*it)->input() != input || (*it)->queue() != queue_) continue;
      plan_ = std::move(*it);
      idle.erase(std::next(it).base());
      return true;
    }
    return false;
  }

  void make(const InputShape& input) {
    const Graph& graph = *engine_.graph_;
    if (queue_.recording != 0) {  // memory of its own
      plan_ = graph.make_plan(input, queue_);
      return;
    }
    try {
      plan_ = graph.make_plan(input, queue_, retire());
    } catch (const std::bad_alloc&) {
      if (!give_up_idle()) throw;
      plan_ = graph.make_plan(input, queue_);
    }
  }

  // Where as many plans are idle as are kept, the one of this queue that was used longest ago: images of ever other
  // sizes are then computed in the same memory.
  std::unique_ptr<Plan> retire() {
    std::lock_guard lock(g_plans);
    auto& idle = engine_.idle_;
    const auto of_queue = [&](const auto& p) { return p->queue() == queue_; };
    const auto count = static_cast<std::size_t>(std::count_if(idle.begin(), idle.end(), of_queue));
    if (count < std::max(kIdlePlans, engine_.most_at_once_)) return nullptr;
    const auto oldest = std::find_if(idle.begin(), idle.end(), of_queue);
    std::unique_ptr<Plan> plan = std::move(*oldest);
    idle.erase(oldest);
    return plan;
  }

  // Gives up all idle plans but those of recordings; whether there were any.
  bool give_up_idle() {
    std::vector<std::unique_ptr<Plan>> given_up;
    std::lock_guard lock(g_plans);
    keep(0, [](const Plan& p) { return !of_recording(p); }, given_up);
    return !given_up.empty();
  }

  // Moves to `given_up` what is more than `count` of the idle plans that are `such`, those used longest ago.
  template <class Such>
  void keep(std::size_t count, Such&& such, std::vector<std::unique_ptr<Plan>>& given_up) {
    auto& idle = engine_.idle_;
    auto found =
        static_cast<std::size_t>(std::count_if(idle.begin(), idle.end(), [&](const auto& p) { return such(*p); }));
    for (auto it = idle.begin(); found > count;) {
      if (!such(**it)) {
        ++it;
        continue;
      }
      given_up.push_back(std::move(*it));
      it = idle.erase(it);
      --found;
    }
  }

  Engine& engine_;
  const Queue queue_;
  std::unique_ptr<Plan> plan_;
};

void Engine::forward(const void* image, const InputShape& input, void* features, void* logits, const RunOptions& options,
                     const ExecContext& context) {
  Lease plan(*this, input, context);
  for (const std::string& name : options.skip) {
    const auto& nodes = plan->nodes();
    const bool known = std::any_of(nodes.begin(), nodes.end(), [&](const Node& n) { return n.name == name; });
    SWIN_CHECK(ValueError, "forward", known, "there is no operation '", name, "' to leave out; ops() lists the names");
  }
  plan->bind(image, features, logits);
  if (options.skip.empty() && !options.poison && !options.observe && (logits != nullptr || config().num_classes == 0)) {
    plan->run_recorded(context);
    return;
  }
  std::vector<std::string> skip = options.skip;
  if (logits == nullptr) skip.push_back("head");
  plan->run(context, skip, options.poison, options.observe);
}

void Engine::forward_stages(const void* image, const InputShape& input, const std::vector<void*>& out,
                            const ExecContext& context) {
  SWIN_CHECK(ShapeError, "forward_stages", out.size() == config().depths.size(), "there are ", out.size(),
             " places; one for each of the ", config().depths.size(), " stages is needed");
  Lease plan(*this, input, context);
  plan->bind(image, nullptr, nullptr);
  plan->run_stages(context, out);
}

std::string Engine::describe(const InputShape& input) {
  Lease plan(*this, input, {});  // not one that counts: what a view without memory stands for is left out of the costs
  // Costs are read off the views, which need not be bound to memory of the caller's for that.
  int placeholder = 0;
  plan->bind(&placeholder, &placeholder, &placeholder);
  std::ostringstream json;
  json << "[";
  const char* separator = "";
  for (const Node& node : plan->nodes()) {
    const OpCost cost = op_cost(node.args);
    json << separator << "{\"name\": \"" << node.name << "\", \"kind\": \"" << kind_name(node.kind)
         << "\", \"stage\": " << node.stage << ", \"block\": " << node.block << ", \"shape\": \"" << shape_of(node)
         << "\", \"bytes_read\": " << cost.bytes_read << ", \"bytes_written\": " << cost.bytes_written
         << ", \"operations\": " << cost.operations << "}";
    separator = ",\n ";
  }
  json << "]";
  return json.str();
}

std::int64_t Engine::workspace_bytes(const InputShape& input) {
  const std::int64_t height = std::max<std::int64_t>(1, input.height), width = std::max<std::int64_t>(1, input.width);
  const std::int64_t most = kMostPixels / height / width;
  SWIN_CHECK(ShapeError, "workspace_bytes", input.batch > 0 && input.batch <= most, "batch is ", input.batch, "; 1 to ",
             most, " images of ", input.height, "x", input.width, " are needed");
  return graph_->make_plan(input, {}, Plan::counter(graph_->backend()))->workspace_bytes();
}

std::vector<double> Engine::time_nodes(const void* image, const InputShape& input, int runs,
                                       const ExecContext& context) {
  SWIN_CHECK(ValueError, "time_ops", runs > 0, "runs is ", runs, "; at least 1 is needed");
  Lease plan(*this, input, context);
  const Backend& backend = graph_->backend();
  const DeviceBuffer features = backend.allocate(input.batch * config().num_features() * sizeof(float));
  const std::int64_t outputs = std::max<std::int64_t>(1, config().num_classes);
  const DeviceBuffer logits = backend.allocate(input.batch * outputs * sizeof(float));
  plan->bind(image, features.get(), logits.get());
  return plan->time_nodes(context, runs);
}

}  // namespace swin
