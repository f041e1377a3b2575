// What runs an integer GEMM on a GPU. Providers: cuBLASLt, CUTLASS, and this project's own tiles and plain kernel.
//
// A provider offers candidates for a shape; the tuner (gemm_tuner.h) proves each on random data, times those that gave
// exactly the right result, and keeps the fastest. Nobody is trusted for being a library.
//
// No candidate gets a workspace: a forward pass never allocates, and memory that streams or captured graphs shared
// would be a race. Algorithms that need one (split K) are not offered; for few rows there are small tiles instead.
//
// Plain C++17 without CUDA's headers, so that the tuner's policy is tested where there is no GPU. `stream` is a
// cudaStream_t.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "swin/cuda_gemm.h"

namespace swin {
namespace cuda {

// One call: x s8 [m, k], w s8 [n, k] and out [m, n] of the shape's output, row-major. `factor`: as in GemmS8Args; what
// kChannelsGelu quantizes with. scale, bias: float32 [n], of outputs that have channels; no bias: 0. Every pointer is
// aligned to 16 bytes, but for the plain kernel's.
struct GemmCall {
  const std::int8_t* x = nullptr;
  const std::int8_t* w = nullptr;
  void* out = nullptr;
  float factor = 0;
  const float* scale = nullptr;
  const float* bias = nullptr;
};

// The kernel of one candidate for one shape on one device. Immutable: any number of threads and streams may run it.
class GemmKernel {
 public:
  virtual ~GemmKernel() = default;
  // Launches on `stream`; neither allocates nor synchronizes. Error where a status says that it failed.
  virtual void run(const GemmCall& call, void* stream) const = 0;
};

struct GemmCandidate {
  std::string name;   // for people: "sm80_128x128x64_s4", "algo66_tile20_stages11"
  std::string state;  // what `prepare` needs beside the name to make it again in another process
};

class GemmProvider {
 public:
  virtual ~GemmProvider() = default;
  virtual const char* name() const = 0;     // "cublaslt", "cutlass", "swin_tiles", "swin_plain"
  virtual std::string version() const = 0;  // results of another version are measured again
  // What could run `shape` on the current device, whose compute capability is `sm` (90 for 9.0), likeliest first.
  // Empty where it cannot run it; `why` then says why.
  virtual std::vector<GemmCandidate> candidates(const GemmShape& shape, int sm, std::string* why) const = 0;
  // Error where this device, this build or this library version has no such candidate.
  virtual std::unique_ptr<GemmKernel> prepare(const GemmShape& shape, const GemmCandidate& candidate) const = 0;
};

inline constexpr const char* kCublasLt = "cublaslt";
inline constexpr const char* kCutlass = "cutlass";
inline constexpr const char* kTiles = "swin_tiles";
inline constexpr const char* kPlain = "swin_plain";

// The lower bound that an epilogue clamps to: ReLU is a 0 in the place of -128 (docs/epilogues.md).
inline float floor_of(GemmOutput output) {
  return output == GemmOutput::kS8Relu || output == GemmOutput::kChannelsRelu ? 0.0f : -128.0f;
}

// Of this build, the last resort last. They live as long as the process.
const std::vector<const GemmProvider*>& gemm_provider_list();
// The same by name, with why each that is missing was left out of this build.
struct GemmProviderInfo {
  std::string name, version, why;
};
std::vector<GemmProviderInfo> gemm_provider_infos();

// Defined where the provider was built (cmake/cuda.cmake).
const GemmProvider& cublaslt_provider();
const GemmProvider& cutlass_provider();
const GemmProvider& tiles_provider();
const GemmProvider& plain_provider();

}  // namespace cuda
}  // namespace swin
