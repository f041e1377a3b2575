// The CUDA backend: devices, memory, parameters, recordings. Host code; needs the CUDA runtime's headers and no nvcc.
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "kernels_table.h"
#include "own_stream.h"
#include "packed_weight.h"
#include "row_blocks.h"
#include "swin/cuda.h"
#include "swin/error.h"
#include "swin/half.h"

namespace swin {
namespace {

// Throws swin::Error where a runtime call failed; std::bad_alloc where memory is what is missing.
void check(const char* where, const char* call, cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // not sticky: the next call must not report this one again
  if (status == cudaErrorMemoryAllocation) throw std::bad_alloc();
  throw Error(detail::concat(where, ": ", call, " failed: ", cudaGetErrorString(status)));
}
#define SWIN_CUDA(where, call) check(where, #call, call)

// Whether the environment does not switch it off: with 0.
bool wanted_by(const char* variable) {
  const char* value = std::getenv(variable);
  return value == nullptr || std::strcmp(value, "0") != 0;
}

cudaStream_t stream_of(const ExecContext& context) { return static_cast<cudaStream_t>(context.stream); }

class GraphRecording : public Recording {
 public:
  explicit GraphRecording(cudaGraph_t graph) {
    const cudaError_t status = cudaGraphInstantiate(&executable_, graph, 0);
    cudaGraphDestroy(graph);
    check("record", "cudaGraphInstantiate", status);
  }
  ~GraphRecording() override { cudaGraphExecDestroy(executable_); }
  void replay(const ExecContext& context) const override {
    SWIN_CUDA("replay", cudaGraphLaunch(executable_, stream_of(context)));
  }

 private:
  cudaGraphExec_t executable_ = nullptr;
};

class CudaBackend : public Backend {
 public:
  CudaBackend(int device, DType float_dtype)
      : ops_(float_dtype == DType::kBF16 ? cuda::bfloat16_table() : cuda::float16_table()) {
    cudaDeviceProp properties{};
    SWIN_CUDA("cuda backend", cudaGetDeviceProperties(&properties, device));
    variant_ = detail::concat("sm_", properties.major, properties.minor, " ", name_of(float_dtype));
    const CudaDeviceGuard guard(device);
    cuda::require_kernels(device, properties.major * 10 + properties.minor);
    memory_ = std::make_unique<cuda::OwnStream>();
  }

  std::string name() const override { return "cuda"; }
  std::string variant() const override { return variant_; }
  const OpTable& ops() const override { return ops_; }

  // SWIN_CUDA_CLEAR=0 leaves out what nothing needs, for initcheck, which else takes all memory for written.
  // Memory is made ready on a stream of the backend's own, never by waiting for the device or on the legacy default
  // stream: either would break a recording that another thread, or the caller, has under way.
  DeviceBuffer allocate(std::size_t bytes) const override {
    const cuda::RelaxedCapture relaxed;
    void* memory = nullptr;
    SWIN_CUDA("allocate", cudaMalloc(&memory, bytes > 0 ? bytes : 1));
    DeviceBuffer owner(memory, [](void* p) { cudaFree(p); });
    if (wanted_by("SWIN_CUDA_CLEAR")) SWIN_CUDA("allocate", cudaMemsetAsync(memory, 0, bytes, memory_->handle));
    SWIN_CUDA("allocate", cudaStreamSynchronize(memory_->handle));
    return owner;
  }

  void fill(void* data, int byte, std::size_t bytes, const ExecContext& context) const override {
    SWIN_CUDA("fill", cudaMemsetAsync(data, byte, bytes, stream_of(context)));
  }
  void copy(void* to, const void* from, std::size_t bytes, const ExecContext& context) const override {
    SWIN_CUDA("copy", cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_of(context)));
  }
  void copy_to_host(void* host, const void* data, std::size_t bytes, const ExecContext& context) const override {
    SWIN_CUDA("copy_to_host", cudaMemcpyAsync(host, data, bytes, cudaMemcpyDeviceToHost, stream_of(context)));
    SWIN_CUDA("copy_to_host", cudaStreamSynchronize(stream_of(context)));
  }

  // On a stream of its own: the caller's may be the legacy default stream, which cannot be captured, and what other
  // threads put on it meanwhile would become part of the recording instead of running.
  std::unique_ptr<Recording> record(const ExecContext& context, const Work& work) const override {
    if (!wanted_by("SWIN_CUDA_GRAPHS")) return nullptr;
    const cuda::OwnStream own;
    // Thread-local: what other threads allocate and free meanwhile is none of this recording's business.
    SWIN_CUDA("record", cudaStreamBeginCapture(own.handle, cudaStreamCaptureModeThreadLocal));
    cudaGraph_t graph = nullptr;
    try {
      work({context.threads, own.handle});
    } catch (...) {
      const bool spoilt = is_spoilt(own.handle);
      cudaStreamEndCapture(own.handle, &graph);
      if (graph != nullptr) cudaGraphDestroy(graph);
      cudaGetLastError();
      if (spoilt) return nullptr;
      throw;
    }
    const bool spoilt = is_spoilt(own.handle);  // by a thread that waited for the device, say
    const cudaError_t status = cudaStreamEndCapture(own.handle, &graph);
    if (spoilt) {
      cudaGetLastError();
      return nullptr;
    }
    check("record", "cudaStreamEndCapture", status);
    return std::make_unique<GraphRecording>(graph);
  }

  std::uint64_t callers_recording(const ExecContext& context) const override {
    if (context.stream == nullptr) return 0;  // the legacy default stream is never captured
    cudaStreamCaptureStatus status{};
    unsigned long long number = 0;
    SWIN_CUDA("forward", cudaStreamGetCaptureInfo(stream_of(context), &status, &number));
    SWIN_CHECK(
        Error, "forward", status != cudaStreamCaptureStatusInvalidated,
        "the capture that the stream is in has failed before; its error was reported where it ends, or by the call "
        "that a capture does not allow");
    return status == cudaStreamCaptureStatusNone ? 0 : number + 1;
  }

  double time_ms(const ExecContext& context, const std::function<void()>& work) const override {
    const cudaStream_t stream = stream_of(context);
    const Event start, stop;
    work();  // the device is busy with it while the host enqueues what is timed, whose own cost is then in no figure
    SWIN_CUDA("time_ms", cudaEventRecord(start.handle, stream));
    work();
    SWIN_CUDA("time_ms", cudaEventRecord(stop.handle, stream));
    SWIN_CUDA("time_ms", cudaEventSynchronize(stop.handle));
    float ms = 0;
    SWIN_CUDA("time_ms", cudaEventElapsedTime(&ms, start.handle, stop.handle));
    return ms;
  }

  Parameter upload_parameter(const TensorView& host) const override {
    SWIN_CHECK(DTypeError, "upload_parameter", host.dtype == DType::kF16 || host.dtype == DType::kF32, "found ",
               host.describe(), "; float16 or float32 is needed");
    std::vector<std::uint16_t> values(host.numel());
    for (std::size_t i = 0; i < values.size(); ++i) {
      const bool half = host.dtype == DType::kF16;
      if (half && ops_.float_dtype == DType::kF16) {
        values[i] = host.as<const std::uint16_t>()[i];
        continue;
      }
      const float x = half ? float_of_half(host.as<const std::uint16_t>()[i]) : host.as<const float>()[i];
      values[i] = ops_.float_dtype == DType::kF16 ? half_of_float(x) : bfloat16_of_float(x);
    }
    Parameter p{allocate(values.size() * sizeof(std::uint16_t)), host};
    p.view.data = p.owner.get();
    p.view.dtype = ops_.float_dtype;
    upload("upload_parameter", p.view.data, values.data(), values.size() * sizeof(std::uint16_t));
    return p;
  }

  Parameter upload_float32(const TensorView& host) const override {
    SWIN_CHECK(DTypeError, "upload_float32", host.dtype == DType::kF32, "found ", host.describe(), "; float32 is needed");
    return upload_bytes("upload_float32", host);
  }
  Parameter upload_int32(const TensorView& host) const override {
    SWIN_CHECK(DTypeError, "upload_int32", host.dtype == DType::kS32, "found ", host.describe(), "; int32 is needed");
    return upload_bytes("upload_int32", host);
  }

  std::unique_ptr<PackedWeight> pack_weight(const TensorView& host, InputRange input) const override {
    SWIN_CHECK(DTypeError, "pack_weight", host.dtype == DType::kS8 && host.rank == 2, "found ", host.describe(),
               "; int8 [N, K] is needed");
    DeviceBuffer memory = allocate(host.nbytes());
    upload("pack_weight", memory.get(), host.data, host.nbytes());
    return std::make_unique<cuda::CudaPackedWeight>(host.dim(0), host.dim(1), input, std::move(memory));
  }

  // Whole 16-byte vectors, and for tensor cores a K of PV that is a multiple of 16.
  std::int64_t score_pitch(std::int64_t window_area) const override { return (window_area + 15) / 16 * 16; }
  bool mlp_keeps_hidden(std::int64_t rows, std::int64_t dim, std::int64_t hidden) const override {
    return !cuda::mlp_in_blocks(rows, dim, hidden);
  }

 private:
  static bool is_spoilt(cudaStream_t captured) {
    cudaStreamCaptureStatus status{};
    return cudaStreamIsCapturing(captured, &status) != cudaSuccess || status == cudaStreamCaptureStatusInvalidated;
  }

  // There when it returns, for every stream.
  void upload(const char* where, void* to, const void* host, std::size_t bytes) const {
    const cuda::RelaxedCapture relaxed;
    SWIN_CUDA(where, cudaMemcpyAsync(to, host, bytes, cudaMemcpyHostToDevice, memory_->handle));
    SWIN_CUDA(where, cudaStreamSynchronize(memory_->handle));
  }

  Parameter upload_bytes(const char* where, const TensorView& host) const {
    Parameter p{allocate(host.nbytes()), host};
    p.view.data = p.owner.get();
    upload(where, p.view.data, host.data, host.nbytes());
    return p;
  }

  struct Event {
    cudaEvent_t handle = nullptr;
    Event() { SWIN_CUDA("time_ms", cudaEventCreate(&handle)); }
    ~Event() { cudaEventDestroy(handle); }
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;
  };

  const OpTable ops_;
  std::string variant_;
  std::unique_ptr<cuda::OwnStream> memory_;  // where memory is cleared and filled
};

}  // namespace

bool cuda_built() { return true; }

int cuda_device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

CudaDeviceGuard::CudaDeviceGuard(int device) {
  if (device < 0) return;
  int before = 0;
  SWIN_CUDA("cuda device", cudaGetDevice(&before));
  SWIN_CUDA("cuda device", cudaSetDevice(device));
  before_ = before;
}

CudaDeviceGuard::~CudaDeviceGuard() {
  if (before_ >= 0) cudaSetDevice(before_);
}

const Backend& cuda_backend(int device, DType float_dtype) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  cudaGetLastError();
  SWIN_CHECK(UnsupportedError, "cuda backend", status == cudaSuccess, "there is no usable GPU: ",
             cudaGetErrorString(status), "; move model and images to the CPU");
  SWIN_CHECK(UnsupportedError, "cuda backend", device >= 0 && device < count, "there is no cuda:", device, "; this process sees ",
             count, " device(s)");
  SWIN_CHECK(DTypeError, "cuda backend", float_dtype == DType::kF16 || float_dtype == DType::kBF16,
             "the residual stream is float16 or bfloat16, not ", name_of(float_dtype));
  static std::mutex mutex;
  static auto* backends = new std::map<std::pair<int, DType>, std::unique_ptr<CudaBackend>>;  // never destroyed: the
  // driver may go first at the end of the process
  std::lock_guard lock(mutex);
  std::unique_ptr<CudaBackend>& backend = (*backends)[{device, float_dtype}];
  if (!backend) backend = std::make_unique<CudaBackend>(device, float_dtype);
  return *backend;
}

}  // namespace swin
