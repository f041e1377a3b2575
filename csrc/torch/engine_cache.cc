#include "engine_cache.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <future>
#include <mutex>
#include <utility>
#include <vector>

#include "swin/error.h"
#include "swin/fork_mutex.h"
#include "views.h"

namespace swin::binding {
namespace {

// A tensor's memory, layout and state of change. Storage, not tensor: tracing hands over aliases of the module's
// buffers.
struct WeightKey {
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  const void* data;
  at::ScalarType type;
  std::vector<std::int64_t> sizes, strides;
  std::int64_t version;

  explicit WeightKey(const at::Tensor& t)
      : storage(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(t.storage().unsafeGetStorageImpl())),
        data(t.const_data_ptr()),
        type(t.scalar_type()),
        sizes(t.sizes().vec()),
        strides(t.strides().vec()),
        version(version_of(t)) {}

  static std::int64_t version_of(const at::Tensor& t) { return t.is_inference() ? 0 : t._version(); }

  // The same tensor, in whatever state.
  bool is(const at::Tensor& t) const {
    return storage._unsafe_get_target() == t.storage().unsafeGetStorageImpl() && !storage.expired() &&
           data == t.const_data_ptr() && type == t.scalar_type() && t.sizes() == sizes && t.strides() == strides;
  }
  bool matches(const at::Tensor& t) const { return version == version_of(t) && is(t); }
};

using FutureEngine = std::shared_future<std::shared_ptr<Engine>>;

// `engine` is there when the thread of `process` that met these weights first has packed them.
struct Entry {
  std::string graph;
  ModelConfig config;
  const Backend* backend;
  std::vector<WeightKey> weights;
  std::uint64_t number;
  pid_t process;
  FutureEngine engine;

  bool expired() const {
    return std::any_of(weights.begin(), weights.end(), [](const WeightKey& k) { return k.storage.expired(); });
  }
  // A child that was forked meanwhile has not that thread.
  bool abandoned() const {
    return process != getpid() && engine.wait_for(std::chrono::seconds(0)) != std::future_status::ready;
  }
  bool is_of(const std::string& its_graph, const ModelConfig& its_config, at::TensorList its_weights,
             const Backend& its_backend, bool (WeightKey::*same)(const at::Tensor&) const) const {
    return graph == its_graph && backend == &its_backend && config == its_config &&
           std::equal(weights.begin(), weights.end(), its_weights.begin(), its_weights.end(),
                      [same](const WeightKey& key, const at::Tensor& t) { return (key.*same)(t); });
  }
};

// Held to look and to note, not while weights are packed: calls of other models go on meanwhile.
ForkMutex g_mutex;

// Never destroyed: at the end of the process the tensors' memory may go before or after static objects.
std::vector<Entry>& entries() {
  static auto* all = new std::vector<Entry>;
  return *all;
}

std::uint64_t g_made = 0;

// Moves what is `such` from the entries to `gone`, which the caller destroys behind the lock.
template <class Such>
void take_out(std::vector<Entry>& gone, Such&& such) {
  std::vector<Entry>& all = entries();
  const auto first = std::stable_partition(all.begin(), all.end(), [&](const Entry& e) { return !such(e); });
  std::move(first, all.end(), std::back_inserter(gone));
  all.erase(first, all.end());
}

std::shared_ptr<Engine> packed(const std::string& graph, const ModelConfig& config, at::TensorList weights,
                               const Backend& backend) {
  std::vector<at::Tensor> host;  // keeps copies alive until the engine has packed them
  std::vector<TensorView> views;
  for (const at::Tensor& t : weights) {
    host.push_back(t.cpu().contiguous());
    views.push_back(view_of(host.back()));
  }
  return std::make_shared<Engine>(make_graph(graph, config, views, backend));
}

}  // namespace

std::shared_ptr<Engine> cached_engine(const std::string& graph, const ModelConfig& config, at::TensorList weights,
                                      const Backend& backend, const ExecContext& context) {
  std::promise<std::shared_ptr<Engine>> promise;
  std::uint64_t number = 0;
  std::vector<Entry> gone;
  {
    std::unique_lock lock(g_mutex);
    // Not inside a capture, which freeing their memory would break.
    const bool recording = backend.callers_recording(context) != 0;
    if (entries().size() > 1 && !recording) take_out(gone, [](const Entry& e) { return e.expired(); });
    for (const Entry& e : entries()) {
      if (!e.is_of(graph, config, weights, backend, &WeightKey::matches) || e.abandoned()) continue;
      const FutureEngine engine = e.engine;
      lock.unlock();
      return engine.get();
    }
    SWIN_CHECK(Error, "swin_int8", !recording,
               "the stream is being recorded into a CUDA graph, and these weights are not packed "
               "yet, which cannot be part of it; run one forward pass before the capture");
    // The same tensors under another version are the engine's old state.
    take_out(gone, [&](const Entry& e) {
      return e.expired() || e.abandoned() || e.is_of(graph, config, weights, backend, &WeightKey::is);
    });
    Entry entry{graph, config, &backend, {}, ++g_made, getpid(), promise.get_future().share()};
    for (const at::Tensor& t : weights) entry.weights.emplace_back(t);
    number = entry.number;
    entries().push_back(std::move(entry));
  }
  gone.clear();
  try {
    std::shared_ptr<Engine> engine = packed(graph, config, weights, backend);
    promise.set_value(engine);
    return engine;
  } catch (...) {  // those who wait for it get the same; the next call tries again
    {
      std::lock_guard lock(g_mutex);
      take_out(gone, [&](const Entry& e) { return e.number == number; });
    }
    promise.set_exception(std::current_exception());
    throw;
  }
}

}  // namespace swin::binding
