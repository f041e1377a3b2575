// Where candidates are proven and timed: the CUDA device behind the tuner. Host code, compiled by the C++ compiler.
//
// A proof: operands of random bytes made on the device, our plain kernel's result beside the candidate's, every byte
// compared, guard bytes behind the output included. Three patterns: all values; small ones with a factor that is a
// power of two, so that many products lie exactly on a rounding tie; and -128 / 127 alone, for the largest sums and
// saturation. The output is poisoned before each run, with another byte each time, so that nothing left over passes for
// a result.
//
// Outputs with channels are made in float32, where another order of the same operations may round another way. On the
// small values everything is dyadic and no operation before the last rounding errs: there every value must be equal,
// ties included (but not behind GELU, which ends in no tie). On the others a value may be the expected one's neighbour,
// if few are: a multiplication and an addition in place of one fused, or another erf, move one value in 10^4 across a
// tie at most, and a kernel that errs moves more than one in 256. The extreme values have no bias.
//
// A timing: a CUDA graph of launches, as the engine replays them, between two events on a stream of its own, and behind
// an untimed one. What a launch costs the host, several times the kernel for few rows, is in neither. The L2 is not
// flushed: in a forward pass too the operation before has just written the activations.
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>

#include "gemm_reference.h"
#include "gemm_tuner.h"
#include "own_stream.h"
#include "swin/error.h"

namespace swin {
namespace cuda {
namespace {

constexpr const char* kWhere = "gemm tuner";
constexpr std::int64_t kGuardBytes = 4096;
constexpr std::int64_t kOffByOne = 256;  // of so many values one may be
// Of a float32, relative to |y| + |bias|: multiplied and added one after the other it errs by 3 * 2^-24 at most.
constexpr float kTolerance = 5e-7f;
// What GELU(y) is quantized with: up to 3.2; and, for the extreme values, its negative part alone over the range, down
// to -0.17, where the formula with tanh moves 3 of 100 values.
constexpr float kGeluFactor = 40, kGeluFactorOfNegatives = 500;

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

// What `work` puts on `stream`, to be launched again. Error where it cannot be captured: the engine could not run it.
class Graph {
 public:
  template <class Work>
  Graph(cudaStream_t stream, const Work& work) {
    SWIN_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
    cudaGraph_t graph = nullptr;
    try {
      work();
    } catch (...) {
      cudaStreamEndCapture(stream, &graph);
      if (graph != nullptr) cudaGraphDestroy(graph);
      cudaGetLastError();
      throw;
    }
    SWIN_CUDA(cudaStreamEndCapture(stream, &graph));
    const cudaError_t status = cudaGraphInstantiate(&executable_, graph, 0);
    cudaGraphDestroy(graph);
    check(status, "cudaGraphInstantiate");
  }
  ~Graph() { cudaGraphExecDestroy(executable_); }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  void launch(cudaStream_t stream) const { SWIN_CUDA(cudaGraphLaunch(executable_, stream)); }

 private:
  cudaGraphExec_t executable_ = nullptr;
};

// SWIN_GEMM_TRACE: where a process hangs or is killed, its last line says what ran.
void trace(const GemmTrial& trial, const GemmShape& shape) {
  const char* wanted = std::getenv("SWIN_GEMM_TRACE");
  if (wanted == nullptr || *wanted == '\0' || std::string(wanted) == "0") return;
  const std::string line = detail::concat("swin_int8 gemm: ", trial.name, " M=", shape.m, " N=", shape.n,
                                          " K=", shape.k, " to ", name_of(shape.output), "\n");
  std::fputs(line.c_str(), stderr);
  std::fflush(stderr);
}

// The error of a device that `trial` has broken, for all of this process.
[[noreturn]] void blame(const GemmTrial& trial, const Error& error) {
  throw Error(
      detail::concat("while ", trial.name, " ran: ", error.what(), " Or leave it out: SWIN_GEMM_SKIP=", trial.name));
}

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
        out_bytes_(shape.m * shape.n * output_bytes(shape.output)),
        x_(allocate(shape.m * shape.k)),
        w_(allocate(shape.n * shape.k)),
        out_(allocate(out_bytes_ + kGuardBytes)),
        expected_(allocate(out_bytes_ + kGuardBytes)),
        scale_(has_channels(shape.output) ? allocate(4 * shape.n) : Memory()),
        bias_(has_channels(shape.output) ? allocate(4 * shape.n) : Memory()),
        counts_(allocate(sizeof(Counts))) {}

  std::vector<std::string> prove(const std::vector<GemmTrial>& trials) override {
    std::vector<std::string> verdicts(trials.size());
    int seed = 0;
    for (const GemmPattern pattern : {GemmPattern::kExtremes, GemmPattern::kSmall, GemmPattern::kFull}) {
      fill(pattern, ++seed);
      for (std::size_t i = 0; i < trials.size(); ++i) {
        if (!verdicts[i].empty()) continue;
        trace(trials[i], shape_);
        try {
          verdicts[i] = compare(*trials[i].kernel, pattern, 0x40 + static_cast<int>((7 * i + seed) % 60));
        } catch (const Error& error) {
          verdicts[i] = error.what();
          cudaGetLastError();
          // A kernel that cannot be launched is refused; one that has broken the device ends the attempt.
          if (cudaStreamSynchronize(queue_.handle) != cudaSuccess) blame(trials[i], error);
        }
      }
    }
    return verdicts;  // what is left in the operands is kFull: timings are on random values
  }

  // An output that adds goes on adding to its own result. It stays finite: |y| is below 16, less than half the last
  // place of a float16 that has come to 2^15.
  double time_us(const GemmTrial& trial, int launches) override {
    trace(trial, shape_);
    try {
      if (adds()) fill_residual(out_.get());
      const Graph graph(queue_.handle, [&] {
        for (int i = 0; i < launches; ++i) trial.kernel->run(call_, queue_.handle);
      });
      graph.launch(queue_.handle);  // the device has work while the host enqueues what is timed
      SWIN_CUDA(cudaEventRecord(start_.event, queue_.handle));
      graph.launch(queue_.handle);
      SWIN_CUDA(cudaEventRecord(stop_.event, queue_.handle));
      SWIN_CUDA(cudaEventSynchronize(stop_.event));
      float ms = 0;
      SWIN_CUDA(cudaEventElapsedTime(&ms, start_.event, stop_.event));
      return 1e3 * static_cast<double>(ms) / launches;
    } catch (const Error& error) {
      if (cudaStreamSynchronize(queue_.handle) != cudaSuccess) blame(trial, error);
      throw UnsupportedError(error.what());
    }
  }

 private:
  struct Counts {
    ByteDifferences bytes;
    GemmErrors errors;
  };

  bool adds() const {
    return shape_.output == GemmOutput::kChannelsAddF16 || shape_.output == GemmOutput::kChannelsAddBF16;
  }

  // Operands of `pattern`, and a factor, or scales, that spread their products over the output's range.
  void fill(GemmPattern pattern, int seed) {
    fill_random(static_cast<std::int8_t*>(x_.get()), shape_.m * shape_.k, 2 * seed, pattern, queue_.handle);
    fill_random(static_cast<std::int8_t*>(w_.get()), shape_.n * shape_.k, 2 * seed + 1, pattern, queue_.handle);
    const double root = std::sqrt(static_cast<double>(shape_.k));
    const double one = pattern == GemmPattern::kSmall ? 24.0 : pattern == GemmPattern::kFull ? 5461.0 : 16256.0;
    call_ = {static_cast<const std::int8_t*>(x_.get()), static_cast<const std::int8_t*>(w_.get()), expected_.get()};
    if (has_channels(shape_.output)) {
      fill_channels(pattern, seed, one * root);
    } else {
      double factor = 60 / (one * root);  // the standard deviation of a result is then 60
      // A power of two: a half is exact, and for the small values every sum that is an odd multiple of it is a tie.
      if (pattern == GemmPattern::kSmall) factor = std::fmin(0.5, std::exp2(std::round(std::log2(factor))));
      call_.factor = static_cast<float>(factor);
    }
    plain_gemm(shape_, call_, queue_.handle);
    call_.out = out_.get();
  }

  // Scales, biases and what an output that adds finds, for accumulators of this standard deviation.
  void fill_channels(GemmPattern pattern, int seed, double deviation) {
    const bool gelu = shape_.output == GemmOutput::kChannelsGelu;
    const double wanted = adds() ? 1 : gelu ? 2 : 64;  // the standard deviation of y
    RandomFloats scale, bias;
    if (pattern != GemmPattern::kSmall) {
      // Scales of half to twice what gives that. Residuals of 16 to 32, larger than any y: their sums do not cancel, so
      // that a rounding of y, 2^-24 of it, is nowhere a step of the sum, 2^-11 of it or more.
      scale = {static_cast<float>(1.5 / 65536 * wanted / deviation), 21846, 65536, false};
      bias = {static_cast<float>(0.5 / 65536 * wanted), 0, 65536, true};
      residual_ = {0.125f, 128, 128, true};
    } else if (adds()) {
      // In units of 2^-6: y any number, and residuals of 7 bits, which bfloat16 has too, so large that most sums have a
      // bit or two more than the output, and many are ties.
      const int bits = shape_.output == GemmOutput::kChannelsAddF16 ? 11 : 8;
      const float unit = 1.0f / 64;
      scale = {unit, 1, 2, false};
      bias = {unit, 0, 1 << (bits - 1), true};
      residual_ = {unit * static_cast<float>(1 << (bits - 5)), 0, 128, true};
    } else {
      // Two powers of two, the larger one a half at most: every y is then a multiple of a quarter or less.
      const double power = std::fmin(0.5, std::exp2(std::round(std::log2(wanted / deviation))));
      scale = {static_cast<float>(power / 2), 1, 2, false};
      bias = {static_cast<float>(wanted / 128), 0, 64, true};
    }
    const auto scales = static_cast<float*>(scale_.get()), biases = static_cast<float*>(bias_.get());
    fill_random(scales, shape_.n, 100 + seed, scale, queue_.handle);
    fill_random(biases, shape_.n, 200 + seed, bias, queue_.handle);
    residual_seed_ = 300 + seed;
    if (gelu) call_.factor = pattern == GemmPattern::kExtremes ? kGeluFactorOfNegatives : kGeluFactor;
    call_.scale = scales;
    call_.bias = pattern == GemmPattern::kExtremes ? nullptr : biases;  // the ReLU model's FC1 has none
    if (adds()) fill_residual(expected_.get());
  }

  void fill_residual(void* out) {
    cuda::fill_residual(shape_.output, out, shape_.m * shape_.n, residual_seed_, residual_, queue_.handle);
  }

  std::string compare(const GemmKernel& kernel, GemmPattern pattern, int poison) {
    const auto counts = static_cast<Counts*>(counts_.get());
    const auto found_end = static_cast<char*>(out_.get()) + out_bytes_;
    const auto expected_end = static_cast<char*>(expected_.get()) + out_bytes_;
    SWIN_CUDA(cudaMemsetAsync(out_.get(), poison, static_cast<std::size_t>(out_bytes_ + kGuardBytes), queue_.handle));
    SWIN_CUDA(cudaMemsetAsync(expected_end, poison, kGuardBytes, queue_.handle));
    SWIN_CUDA(cudaMemsetAsync(counts, 0, sizeof(Counts), queue_.handle));
    if (adds()) fill_residual(out_.get());
    kernel.run(call_, queue_.handle);
    const bool channels = has_channels(shape_.output);
    const bool exact = !channels || (pattern == GemmPattern::kSmall && shape_.output != GemmOutput::kChannelsGelu);
    if (channels) {
      count_differences(found_end, expected_end, kGuardBytes, &counts->bytes, queue_.handle);
      count_errors(shape_, out_.get(), expected_.get(), call_.bias, exact ? 0 : kTolerance, &counts->errors,
                   queue_.handle);
    } else {
      count_differences(out_.get(), expected_.get(), out_bytes_ + kGuardBytes, &counts->bytes, queue_.handle);
    }
    Counts found{};
    SWIN_CUDA(cudaMemcpyAsync(&found, counts, sizeof found, cudaMemcpyDeviceToHost, queue_.handle));
    SWIN_CUDA(cudaStreamSynchronize(queue_.handle));
    const char* name = pattern == GemmPattern::kFull ? "random values" : pattern == GemmPattern::kSmall ? "rounding ties"
                                                                                                        : "extreme values";
    if (channels) return verdict(found, exact, name);
    if (found.bytes.count == 0) return "";
    const auto at = static_cast<std::int64_t>(found.bytes.somewhere);
    if (at >= out_bytes_) return "it wrote behind the end of the output";
    const std::int64_t size = output_bytes(shape_.output), element = at / size;
    return detail::concat(found.bytes.count, " of ", out_bytes_, " bytes differ on ", name, ", one at row ",
                          element / shape_.n, ", column ", element % shape_.n, difference(element, size));
  }

  // On an output with channels.
  std::string verdict(const Counts& found, bool exact, const char* pattern) const {
    if (found.bytes.count != 0) return "it wrote behind the end of the output";
    const std::int64_t values = shape_.m * shape_.n;
    const std::int64_t tolerated = exact ? 0 : (values + kOffByOne - 1) / kOffByOne;
    const bool wrong = found.errors.wrong.count != 0;
    const GemmErrors::Kind& kind = wrong ? found.errors.wrong : found.errors.off_by_one;
    if (!wrong && static_cast<std::int64_t>(kind.count) <= tolerated) return "";
    const auto element = static_cast<std::int64_t>(kind.somewhere);
    char difference[64];
    std::snprintf(difference, sizeof difference, ": found %.9g, expected %.9g", static_cast<double>(kind.found),
                  static_cast<double>(kind.expected));
    return detail::concat(kind.count, " of ", values, " values are ", wrong ? "wrong" : "off by one step", " on ",
                          pattern, ", one at row ", element / shape_.n, ", column ", element % shape_.n, difference);
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
  const Memory x_, w_, out_, expected_, scale_, bias_, counts_;
  OwnStream queue_;
  Event start_, stop_;
  GemmCall call_;
  RandomFloats residual_;
  std::uint64_t residual_seed_ = 0;
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
  infos.push_back({kTiles, tiles_provider().version(), ""});
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
      &tiles_provider(),
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
