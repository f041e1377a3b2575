#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "cuda_runtime_api.h"

struct Node {
  std::function<void()> work;
  std::vector<fake::Place> places;
};
struct CUgraph_st {
  std::vector<Node> nodes;
};
struct CUgraphExec_st {
  std::vector<Node> nodes;
};
struct CUevent_st {
  int kernels = 0;
};

namespace {

struct Capture {
  unsigned long long id;
  cudaStreamCaptureMode mode;
  std::thread::id thread;
  bool spoilt = false;
  std::vector<Node> nodes;
};

}  // namespace

struct CUstream_st {
  bool blocking;
  std::unique_ptr<Capture> capture;
};

namespace {

// Of the one device there is.
struct Machine {
  std::recursive_mutex mutex;  // a node may enqueue work, as the tests' kernels do
  std::set<cudaStream_t> streams;
  std::map<const char*, std::size_t> memory;
  unsigned long long captures = 0;
  int failing_allocations = 0;
  fake::Counts counts{};
  cudaStream_t graph_stream = nullptr;
  cudaError_t last = cudaSuccess;
};
Machine& machine() {
  static Machine m;
  return m;
}
thread_local cudaStreamCaptureMode g_mode = cudaStreamCaptureModeGlobal;

using Lock = std::lock_guard<std::recursive_mutex>;

cudaError_t failed(cudaError_t status) {
  machine().last = status;
  return status;
}

template <class Which>
bool spoil(Which&& which) {
  bool any = false;
  for (cudaStream_t s : machine().streams) {
    if (s->capture && which(*s)) any = s->capture->spoilt = true;
  }
  return any;
}

// What a call that is unsafe amid a capture gives on this thread.
cudaError_t unsafe_call() {
  if (g_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  const bool forbidden = spoil([](const CUstream_st& s) {
    const bool own = s.capture->thread == std::this_thread::get_id() && s.capture->mode != cudaStreamCaptureModeRelaxed;
    return own || (g_mode == cudaStreamCaptureModeGlobal && s.capture->mode == cudaStreamCaptureModeGlobal);
  });
  return forbidden ? failed(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

// What touching the legacy default stream gives.
cudaError_t legacy_call() {
  return spoil([](const CUstream_st& s) { return s.blocking; }) ? failed(cudaErrorStreamCaptureImplicit) : cudaSuccess;
}

bool there(const fake::Place& place) {
  const char* first = static_cast<const char*>(place.memory);
  auto it = machine().memory.upper_bound(first);
  if (it == machine().memory.begin()) return false;
  --it;
  return first + place.bytes <= it->first + it->second;
}

void run(const Node& node) {
  for (const fake::Place& place : node.places) {
    if (!there(place)) {
      ++machine().counts.faults;
      return;
    }
  }
  node.work();
}

cudaError_t enqueue(cudaStream_t stream, Node node) {
  if (stream == nullptr) {
    if (const cudaError_t status = legacy_call()) return status;
  } else if (stream->capture) {
    if (stream->capture->spoilt) return failed(cudaErrorStreamCaptureInvalidated);
    stream->capture->nodes.push_back(std::move(node));
    return cudaSuccess;
  }
  run(node);
  return cudaSuccess;
}

}  // namespace

cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
  Lock lock(machine().mutex);
  if (const cudaError_t status = unsafe_call()) return status;
  if (machine().failing_allocations > 0) {
    --machine().failing_allocations;
    return failed(cudaErrorMemoryAllocation);
  }
  *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  machine().memory[static_cast<const char*>(*memory)] = bytes;
  ++machine().counts.allocations;
  return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
  Lock lock(machine().mutex);
  if (const cudaError_t status = unsafe_call()) return status;
  if (spoil([](const CUstream_st& s) { return s.capture->thread == std::this_thread::get_id(); })) {
    return failed(cudaErrorStreamCaptureUnsupported);
  }
  if (machine().memory.erase(static_cast<const char*>(memory)) == 0) return failed(cudaErrorInvalidValue);
  ++machine().counts.frees;
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* target, int byte, std::size_t bytes, cudaStream_t stream) {
  Lock lock(machine().mutex);
  return enqueue(stream, {[=] { std::memset(target, byte, bytes); }, {{target, bytes}}});
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  Lock lock(machine().mutex);
  std::vector<fake::Place> places;
  if (kind != cudaMemcpyDeviceToHost) places.push_back({to, bytes});
  if (kind != cudaMemcpyHostToDevice) places.push_back({from, bytes});
  return enqueue(stream, {[=] { std::memcpy(to, from, bytes); }, places});
}
cudaError_t cudaDeviceSynchronize() {
  Lock lock(machine().mutex);
  return spoil([](const CUstream_st&) { return true; }) ? failed(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  Lock lock(machine().mutex);
  *stream = new CUstream_st{flags != cudaStreamNonBlocking, nullptr};
  machine().streams.insert(*stream);
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  Lock lock(machine().mutex);
  if (machine().streams.erase(stream) == 0) return failed(cudaErrorInvalidValue);
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  Lock lock(machine().mutex);
  if (stream == nullptr) return legacy_call();
  if (!stream->capture) return unsafe_call();
  stream->capture->spoilt = true;
  return failed(cudaErrorStreamCaptureUnsupported);
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  Lock lock(machine().mutex);
  if (stream == nullptr || stream->capture) return failed(cudaErrorStreamCaptureUnsupported);
  stream->capture =
      std::make_unique<Capture>(Capture{machine().captures++, mode, std::this_thread::get_id(), false, {}});
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  Lock lock(machine().mutex);
  *graph = nullptr;
  if (stream == nullptr || !stream->capture) return failed(cudaErrorInvalidValue);
  if (stream->capture->mode != cudaStreamCaptureModeRelaxed && stream->capture->thread != std::this_thread::get_id()) {
    return failed(cudaErrorStreamCaptureWrongThread);
  }
  const std::unique_ptr<Capture> ended = std::move(stream->capture);
  if (ended->spoilt) return failed(cudaErrorStreamCaptureInvalidated);
  *graph = new CUgraph_st{std::move(ended->nodes)};
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  return cudaStreamGetCaptureInfo(stream, status, nullptr);
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id) {
  Lock lock(machine().mutex);
  *status = cudaStreamCaptureStatusNone;
  if (stream == nullptr) return legacy_call();
  if (!stream->capture) return cudaSuccess;
  *status = stream->capture->spoilt ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
  if (id != nullptr) *id = stream->capture->id;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, g_mode);
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = new CUgraphExec_st{graph->nodes};
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  Lock lock(machine().mutex);
  if (stream == nullptr) {
    if (const cudaError_t status = legacy_call()) return status;
  } else if (stream->capture) {
    stream->capture->spoilt = true;
    return failed(cudaErrorStreamCaptureUnsupported);
  }
  ++machine().counts.graph_launches;
  machine().graph_stream = stream;
  for (const Node& node : executable->nodes) run(node);
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete executable;
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = new CUevent_st;
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  Lock lock(machine().mutex);
  event->kernels = machine().counts.kernels;
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t stop) {
  *ms = static_cast<float>(stop->kernels - start->kernels);
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {9, 0};
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  Lock lock(machine().mutex);
  return std::exchange(machine().last, cudaSuccess);
}
const char* cudaGetErrorString(cudaError_t status) {
  switch (status) {
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated:
      return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureImplicit:
      return "operation would make the legacy stream depend on a capturing blocking stream";
    default:
      return "an error";
  }
}

namespace fake {

cudaError_t launch(cudaStream_t stream, std::function<void()> kernel, std::initializer_list<Place> places) {
  Lock lock(machine().mutex);
  if (stream == nullptr || !stream->capture) ++machine().counts.kernels;
  return enqueue(stream, {std::move(kernel), places});
}
Counts counts() {
  Lock lock(machine().mutex);
  return machine().counts;
}
cudaStream_t last_graph_stream() {
  Lock lock(machine().mutex);
  return machine().graph_stream;
}
void out_of_memory(int count) {
  Lock lock(machine().mutex);
  machine().failing_allocations = count;
}

}  // namespace fake
