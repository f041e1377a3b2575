// The CUTLASS provider: which of the compiled kernels suit a device and a shape. Host code; no CUDA headers.
#include "gemm_cutlass.h"

#include "cutlass/version.h"
#include "swin/error.h"

namespace swin {
namespace cuda {
namespace {

const std::vector<CutlassKernel>& kernels() {
  static const std::vector<CutlassKernel> all = [] {
    std::vector<CutlassKernel> list;
#if defined(SWIN_CUTLASS_SM90)
    add_sm90_kernels(list);
#endif
#if defined(SWIN_CUTLASS_SM80)
    add_sm80_kernels(list);
#endif
#if defined(SWIN_CUTLASS_SM75)
    add_sm75_kernels(list);
#endif
    return list;
  }();
  return all;
}

class Kernel : public GemmKernel {
 public:
  Kernel(const CutlassKernel& kernel, const GemmShape& shape) : kernel_(kernel), shape_(shape) {}
  void run(const GemmCall& call, void* stream) const override {
    const char* problem = kernel_.launch(shape_, call, stream);
    SWIN_CHECK(Error, "gemm_s8 (cutlass)", problem == nullptr, kernel_.name, " for M=", shape_.m, " N=", shape_.n, " K=",
               shape_.k, ": ", problem, ". Set SWIN_GEMM=cublaslt to do without it; see docs/troubleshooting.md");
  }

 private:
  const CutlassKernel& kernel_;
  const GemmShape shape_;
};

class CutlassProvider : public GemmProvider {
 public:
  const char* name() const override { return kCutlass; }
  // The list of kernels is part of it: a build for other architectures, or with other tiles, is measured again.
  std::string version() const override {
    std::uint64_t digest = 14695981039346656037ull;
    for (const CutlassKernel& kernel : kernels()) {
      for (const char* c = kernel.name; *c != '\0'; ++c) digest = (digest ^ static_cast<unsigned char>(*c)) * 1099511628211ull;
    }
    return detail::concat(CUTLASS_MAJOR, ".", CUTLASS_MINOR, ".", CUTLASS_PATCH, "+", std::hex, digest & 0xffffffu);
  }
  std::vector<GemmCandidate> candidates(const GemmShape& shape, int sm, std::string* why) const override {
    std::vector<GemmCandidate> found;
    std::string refused = detail::concat("no kernel of this build makes ", name_of(shape.output), " on sm_", sm);
    for (const CutlassKernel& kernel : kernels()) {
      if (sm < kernel.min_sm || sm > kernel.max_sm || !kernel.serves(shape.output)) continue;
      if (const char* reason = kernel.refuse(shape)) {
        refused = reason;
      } else {
        found.push_back({kernel.name, ""});
      }
    }
    if (found.empty() && why != nullptr) *why = refused;
    return found;
  }
  std::unique_ptr<GemmKernel> prepare(const GemmShape& shape, const GemmCandidate& candidate) const override {
    for (const CutlassKernel& kernel : kernels()) {
      if (candidate.name == kernel.name && kernel.serves(shape.output)) {
        return std::make_unique<Kernel>(kernel, shape);
      }
    }
    throw UnsupportedError(detail::concat("gemm_s8 (cutlass): this build has no kernel ", candidate.name));
  }
};

}  // namespace

const GemmProvider& cutlass_provider() {
  static const CutlassProvider provider;
  return provider;
}

}  // namespace cuda
}  // namespace swin
