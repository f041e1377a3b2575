#include "engine_cache.h"

#include <algorithm>
#include <mutex>
#include <vector>

#include "swin/error.h"
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

struct Entry {
  std::string graph;
  ModelConfig config;
  const Backend* backend;
  std::vector<WeightKey> weights;
  std::shared_ptr<Engine> engine;

  bool expired() const {
    return std::any_of(weights.begin(), weights.end(), [](const WeightKey& k) { return k.storage.expired(); });
  }
};

std::mutex g_mutex;

// Never destroyed: at the end of the process the tensors' memory may go before or after static objects.
std::vector<Entry>& entries() {
  static auto* all = new std::vector<Entry>;
  return *all;
}

std::shared_ptr<Engine> find(const std::string& graph, const ModelConfig& config, at::TensorList weights,
                             const Backend& backend) {
  for (const Entry& e : entries()) {
    if (e.graph == graph && e.backend == &backend && e.config == config &&
        std::equal(e.weights.begin(), e.weights.end(), weights.begin(), weights.end(),
                   [](const WeightKey& key, const at::Tensor& t) { return key.matches(t); })) {
      return e.engine;
    }
  }
  return nullptr;
}

}  // namespace

std::shared_ptr<Engine> cached_engine(const std::string& graph, const ModelConfig& config, at::TensorList weights,
                                      const Backend& backend, const ExecContext& context) {
  std::lock_guard lock(g_mutex);
  // Not inside a capture, which freeing their memory would break.
  if (entries().size() > 1 && backend.callers_recording(context) == 0) {
    std::erase_if(entries(), [](const Entry& e) { return e.expired(); });
  }
  if (auto engine = find(graph, config, weights, backend)) return engine;
  SWIN_CHECK(Error, "swin_int8", backend.callers_recording(context) == 0,
             "the stream is being recorded into a CUDA graph, and these weights are not packed "
             "yet, which cannot be part of it; run one forward pass before the capture");
  std::erase_if(entries(), [](const Entry& e) { return e.expired(); });

  std::vector<at::Tensor> host;  // keeps copies alive until the engine has packed them
  std::vector<TensorView> views;
  for (const at::Tensor& t : weights) {
    host.push_back(t.cpu().contiguous());
    views.push_back(view_of(host.back()));
  }
  Entry entry{graph, config, &backend, {}, std::make_shared<Engine>(make_graph(graph, config, views, backend))};
  for (const at::Tensor& t : weights) entry.weights.emplace_back(t);
  // The same tensors under another version are the engine's old state.
  std::erase_if(entries(), [&](const Entry& e) {
    return e.backend == &backend && e.graph == graph && e.config == config &&
           std::equal(e.weights.begin(), e.weights.end(), weights.begin(), weights.end(),
                      [](const WeightKey& key, const at::Tensor& t) { return key.is(t); });
  });
  entries().push_back(std::move(entry));
  return entries().back().engine;
}

}  // namespace swin::binding
