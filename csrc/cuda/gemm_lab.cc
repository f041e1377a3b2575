// Where candidates are proven and timed: the CUDA device behind the tuner. Host code, compiled by the C++ compiler.
//
// A proof: operands of random bytes made on the device, our plain kernel's result beside the candidate's, every byte
// compared, guard bytes behind the output included. Three patterns: all values; small ones with a factor that is a power of
// two, so that many products lie exactly on a rounding tie; and -128 / 127 alone, for the largest sums and saturation. The
// output is poisoned before each run, with another byte each time, so that nothing left over passes for a result.
//
// A timing: launches back to back between two events on a stream of its own. The L2 is not flushed: in a forward pass too
// the operation before has just written the activations.
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdlib>
#include <map>
#include <memory>

#include "gemm_reference.h"
#include "gemm_tuner.h"
#include "swin/error.h"

namespace swin {
namespace cuda {
namespace {

constexpr const char* kWhere = "gemm tuner";
constexpr std::int64_t kGuardBytes = 4096;

const char* advice_on(cudaError_t status) {
  if (status == cudaErrorMemoryAllocation) {
    return "Proving a GEMM needs its operands and its output twice: use a smaller batch";
  }
  if (status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver) {
    return "This machine has no GPU, or a driver older than the CUDA that PyTorch was built with: look at nvidia-smi";
  }
  return "If an earlier operation failed, this only reports it: run once with CUDA_LAUNCH_BLOCKING=1; see "
         "docs/troubleshooting.md";
}

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // it is reported here; the next call starts clean
  throw Error(detail::concat(kWhere, ": ", what, ": ", cudaGetErrorString(status), ". ", advice_on(status)));
}
#define SWIN_CUDA(call) check(call, #call)

struct Free {
  void operator()(void* memory) const { cudaFree(memory); }
};
using Memory = std::unique_ptr<void, Free>;

Memory allocate(std::int64_t bytes) {
  void* memory = nullptr;
  SWIN_CUDA(cudaMalloc(&memory, static_cast<std::size_t>(bytes)));
  return Memory(memory);
}

// Lets this thread allocate and synchronize while another captures a graph: nothing here is part of one.
class RelaxedCapture {
 public:
  RelaxedCapture() { SWIN_CUDA(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

struct Queue {
  Queue() { SWIN_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)); }
  ~Queue() { cudaStreamDestroy(stream); }
  Queue(const Queue&) = delete;
  Queue& operator=(const Queue&) = delete;
  cudaStream_t stream = nullptr;
};

struct Event {
  Event() { SWIN_CUDA(cudaEventCreate(&event)); }
  ~Event() { cudaEventDestroy(event); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  cudaEvent_t event = nullptr;
};

class CudaBench : public GemmBench {
 public:
  explicit CudaBench(const GemmShape& shape)
      : shape_(shape),
        out_bytes_(shape.m * shape.n * (shape.output == GemmOutput::kS32 ? 4 : 1)),
        x_(allocate(shape.m * shape.k)),
        w_(allocate(shape.n * shape.k)),
        out_(allocate(out_bytes_ + kGuardBytes)),
        expected_(allocate(out_bytes_ + kGuardBytes)),
        differences_(allocate(sizeof(ByteDifferences))) {}

  std::vector<std::string> prove(const std::vector<const GemmKernel*>& kernels) override {
    std::vector<std::string> verdicts(kernels.size());
    int seed = 0;
    for (const GemmPattern pattern : {GemmPattern::kExtremes, GemmPattern::kSmall, GemmPattern::kFull}) {
      fill(pattern, ++seed);
      for (std::size_t i = 0; i < kernels.size(); ++i) {
        if (kernels[i] == nullptr || !verdicts[i].empty()) continue;
        try {
          verdicts[i] = compare(*kernels[i], pattern, 0x40 + static_cast<int>((7 * i + seed) % 60));
        } catch (const Error& error) {
          verdicts[i] = error.what();
          cudaGetLastError();
          // A kernel that cannot be launched is refused; one that has broken the device ends the attempt.
          if (cudaStreamSynchronize(queue_.stream) != cudaSuccess) throw;
        }
      }
    }
    return verdicts;  // what is left in the operands is kFull: timings are on random values
  }

  double time_us(const GemmKernel& kernel, int launches) override {
    SWIN_CUDA(cudaEventRecord(start_.event, queue_.stream));
    for (int i = 0; i < launches; ++i) kernel.run(call_, queue_.stream);
    SWIN_CUDA(cudaEventRecord(stop_.event, queue_.stream));
    SWIN_CUDA(cudaEventSynchronize(stop_.event));
    float ms = 0;
    SWIN_CUDA(cudaEventElapsedTime(&ms, start_.event, stop_.event));
    return 1e3 * static_cast<double>(ms) / launches;
  }

 private:
  // Operands of `pattern`, and a factor that spreads their products over the output's range.
  void fill(GemmPattern pattern, int seed) {
    fill_random(static_cast<std::int8_t*>(x_.get()), shape_.m * shape_.k, 2 * seed, pattern, queue_.stream);
    fill_random(static_cast<std::int8_t*>(w_.get()), shape_.n * shape_.k, 2 * seed + 1, pattern, queue_.stream);
    const double root = std::sqrt(static_cast<double>(shape_.k));
    const double one = pattern == GemmPattern::kSmall ? 24.0 : pattern == GemmPattern::kFull ? 5461.0 : 16256.0;
    double factor = 60 / (one * root);  // the standard deviation of a result is then 60
    // A power of two: a half is exact, and for the small values every sum that is an odd multiple of it is a tie.
    if (pattern == GemmPattern::kSmall) factor = std::fmin(0.5, std::exp2(std::round(std::log2(factor))));
    call_ = {static_cast<const std::int8_t*>(x_.get()), static_cast<const std::int8_t*>(w_.get()), expected_.get(),
             static_cast<float>(factor)};
    plain_gemm(shape_, call_, queue_.stream);
    call_.out = out_.get();
  }

  std::string compare(const GemmKernel& kernel, GemmPattern pattern, int poison) {
    SWIN_CUDA(cudaMemsetAsync(out_.get(), poison, static_cast<std::size_t>(out_bytes_ + kGuardBytes), queue_.stream));
    SWIN_CUDA(cudaMemsetAsync(static_cast<char*>(expected_.get()) + out_bytes_, poison, kGuardBytes, queue_.stream));
    SWIN_CUDA(cudaMemsetAsync(differences_.get(), 0, sizeof(ByteDifferences), queue_.stream));
    kernel.run(call_, queue_.stream);
    count_differences(out_.get(), expected_.get(), out_bytes_ + kGuardBytes,
                      static_cast<ByteDifferences*>(differences_.get()), queue_.stream);
    ByteDifferences found{};
    SWIN_CUDA(cudaMemcpyAsync(&found, differences_.get(), sizeof found, cudaMemcpyDeviceToHost, queue_.stream));
    SWIN_CUDA(cudaStreamSynchronize(queue_.stream));
    if (found.count == 0) return "";
    const auto at = static_cast<std::int64_t>(found.somewhere);
    if (at >= out_bytes_) return "it wrote behind the end of the output";
    const std::int64_t size = out_bytes_ / (shape_.m * shape_.n), element = at / size;
    const char* name = pattern == GemmPattern::kFull ? "random values" : pattern == GemmPattern::kSmall ? "rounding ties"
                                                                                                        : "extreme values";
    return detail::concat(found.count, " of ", out_bytes_, " bytes differ on ", name, ", one at row ", element / shape_.n,
                          ", column ", element % shape_.n, difference(element, size));
  }

  // ": found 3, expected 4"
  std::string difference(std::int64_t element, std::int64_t size) {
    std::int32_t value[2] = {};
    const void* from[2] = {out_.get(), expected_.get()};
    for (int i = 0; i < 2; ++i) {
      std::int8_t byte = 0;
      SWIN_CUDA(cudaMemcpy(size == 1 ? static_cast<void*>(&byte) : &value[i],
                           static_cast<const char*>(from[i]) + element * size, static_cast<std::size_t>(size),
                           cudaMemcpyDeviceToHost));
      if (size == 1) value[i] = byte;
    }
    return detail::concat(": found ", value[0], ", expected ", value[1]);
  }

  RelaxedCapture relaxed_;
  const GemmShape shape_;
  const std::int64_t out_bytes_;
  const Memory x_, w_, out_, expected_, differences_;
  Queue queue_;
  Event start_, stop_;
  GemmCall call_;
};

class CudaLab : public GemmLab {
 public:
  GemmDevice current_device() override {
    GemmDevice device;
    SWIN_CUDA(cudaGetDevice(&device.index));
    std::lock_guard lock(mutex_);
    const auto found = devices_.find(device.index);
    if (found != devices_.end()) return found->second;
    cudaDeviceProp properties;
    SWIN_CUDA(cudaGetDeviceProperties(&properties, device.index));
    device.name = properties.name;
    device.sm = 10 * properties.major + properties.minor;
    devices_.emplace(device.index, device);
    return device;
  }

  bool capturing(void* stream) override {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    SWIN_CUDA(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status));
    return status != cudaStreamCaptureStatusNone;
  }

  std::unique_ptr<GemmBench> bench(const GemmShape& shape) override { return std::make_unique<CudaBench>(shape); }

 private:
  std::mutex mutex_;
  std::map<int, GemmDevice> devices_;
};

}  // namespace

std::vector<GemmProviderInfo> gemm_provider_infos() {
  std::vector<GemmProviderInfo> infos;
#if defined(SWIN_HAVE_CUBLASLT)
  infos.push_back({kCublasLt, cublaslt_provider().version(), ""});
#else
  infos.push_back({kCublasLt, "", "cublasLt.h or libcublasLt was not found when this build was configured"});
#endif
#if defined(SWIN_HAVE_CUTLASS)
  infos.push_back({kCutlass, cutlass_provider().version(), ""});
#else
  infos.push_back({kCutlass, "", "CUTLASS's headers were not found when this build was configured"});
#endif
  infos.push_back({kPlain, plain_provider().version(), ""});
  return infos;
}

const std::vector<const GemmProvider*>& gemm_provider_list() {
  static const std::vector<const GemmProvider*> list = {
#if defined(SWIN_HAVE_CUBLASLT)
      &cublaslt_provider(),
#endif
#if defined(SWIN_HAVE_CUTLASS)
      &cutlass_provider(),
#endif
      &plain_provider(),
  };
  return list;
}

GemmLab& gemm_lab() {
  static CudaLab lab;
  return lab;
}

GemmTuner& gemm_tuner() {
  // Never destroyed: kernels may run until the process ends, and the driver may be gone by then.
  static GemmTuner& tuner = *new GemmTuner(gemm_provider_list(), gemm_lab());
  return tuner;
}

}  // namespace cuda

std::string tune_gemm(const std::vector<GemmShape>& shapes, bool again) { return cuda::gemm_tuner().tune(shapes, again); }

std::string gemm_choices() { return cuda::gemm_tuner().choices(); }

std::string gemm_providers() {
  std::string list;
  for (const cuda::GemmProviderInfo& info : cuda::gemm_provider_infos()) {
    list += (list.empty() ? "" : ", ") +
            detail::concat("{\"provider\": ", cuda::json_string(info.name), ", \"version\": ",
                           cuda::json_string(info.version), ", \"built\": ", info.why.empty() ? "true" : "false",
                           ", \"why\": ", cuda::json_string(info.why), "}");
  }
  return "[" + list + "]";
}

}  // namespace swin
