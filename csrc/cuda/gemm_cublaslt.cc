// The cuBLASLt provider: s8 GEMMs in regular order. Host code, compiled by the C++ compiler.
//
// x s8 [M, K], w s8 [N, K] and out s8 or s32 [M, N] are row-major; cuBLASLt counts columns first, so it sees
// out^T [N, M] = w [K, N]^T times x^T [K, M]: the "TN" form, the only one for s8 in regular order. K and N are multiples of
// 16, as leading dimensions must be.
//
// NVIDIA's documentation lists s8 output with other epilogues than the default for the COL32 orders only; whether the ReLU
// is offered here is asked of cublasLtMatmulAlgoGetHeuristic on the device, and what it offers is proven before it runs
// (gemm_tuner.h). The factor multiplies the int32 accumulator in float32 ("scale type" R_32F), ahead of the ReLU.
#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>

#include "gemm_provider.h"
#include "swin/error.h"

namespace swin {
namespace cuda {
namespace {

constexpr const char* kWhere = "gemm_s8 (cublaslt)";
constexpr int kMostCandidates = 24;

void check(cublasStatus_t status, const char* what) {
  SWIN_CHECK(Error, kWhere, status == CUBLAS_STATUS_SUCCESS, what, ": ", cublasLtGetStatusString(status), " (status ",
             static_cast<int>(status), "). Set SWIN_GEMM=cutlass to do without cuBLASLt; see docs/troubleshooting.md");
}
#define SWIN_CUBLASLT(call) check(call, #call)

// One handle a device, for the life of the process: destroying them after the driver has gone would be an error.
cublasLtHandle_t handle() {
  static std::mutex mutex;
  static auto& handles = *new std::map<int, cublasLtHandle_t>;
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  SWIN_CHECK(Error, kWhere, status == cudaSuccess, "cudaGetDevice: ", cudaGetErrorString(status));
  std::lock_guard lock(mutex);
  const auto found = handles.find(device);
  if (found != handles.end()) return found->second;
  cublasLtHandle_t made = nullptr;
  SWIN_CUBLASLT(cublasLtCreate(&made));
  handles.emplace(device, made);
  return made;
}

// cuBLASLt's descriptions of one shape.
class Problem {
 public:
  explicit Problem(const GemmShape& shape) : s32_(shape.output == GemmOutput::kS32) {
    const cudaDataType_t scale = s32_ ? CUDA_R_32I : CUDA_R_32F, result = s32_ ? CUDA_R_32I : CUDA_R_8I;
    const cublasOperation_t transposed = CUBLAS_OP_T, straight = CUBLAS_OP_N;
    const cublasLtEpilogue_t epilogue =
        shape.output == GemmOutput::kS8Relu ? CUBLASLT_EPILOGUE_RELU : CUBLASLT_EPILOGUE_DEFAULT;
    try {
      SWIN_CUBLASLT(cublasLtMatmulDescCreate(&product_, CUBLAS_COMPUTE_32I, scale));
      set(CUBLASLT_MATMUL_DESC_TRANSA, transposed);
      set(CUBLASLT_MATMUL_DESC_TRANSB, straight);
      set(CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue);
      SWIN_CUBLASLT(cublasLtMatrixLayoutCreate(&w_, CUDA_R_8I, shape.k, shape.n, shape.k));
      SWIN_CUBLASLT(cublasLtMatrixLayoutCreate(&x_, CUDA_R_8I, shape.k, shape.m, shape.k));
      SWIN_CUBLASLT(cublasLtMatrixLayoutCreate(&out_, result, shape.n, shape.m, shape.n));
    } catch (...) {
      destroy();
      throw;
    }
  }
  ~Problem() { destroy(); }
  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;

  std::vector<cublasLtMatmulHeuristicResult_t> ask(std::string* why) const {
    cublasLtMatmulPreference_t preference = nullptr;
    SWIN_CUBLASLT(cublasLtMatmulPreferenceCreate(&preference));
    const std::size_t no_workspace = 0;
    cublasStatus_t status = cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                                 &no_workspace, sizeof no_workspace);
    // What GemmCall promises of its pointers; the default is 256, and an operation may be called on a slice.
    const std::uint32_t alignment = 16;
    for (const auto attribute :
         {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
          CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
      if (status != CUBLAS_STATUS_SUCCESS) break;
      status = cublasLtMatmulPreferenceSetAttribute(preference, attribute, &alignment, sizeof alignment);
    }
    std::vector<cublasLtMatmulHeuristicResult_t> results(kMostCandidates);
    int count = 0;
    if (status == CUBLAS_STATUS_SUCCESS) {
      status = cublasLtMatmulAlgoGetHeuristic(handle(), product_, w_, x_, out_, out_, preference, kMostCandidates,
                                              results.data(), &count);
    }
    cublasLtMatmulPreferenceDestroy(preference);
    // "Not supported" is an answer, not a failure.
    results.resize(status == CUBLAS_STATUS_SUCCESS ? count : 0);
    if (results.empty() && why != nullptr) {
      *why = detail::concat("cublasLtMatmulAlgoGetHeuristic offers no algorithm (",
                            cublasLtGetStatusString(status), ")");
    }
    return results;
  }

  // The workspace `algo` asks for; Error where cuBLASLt does not take it for this problem.
  std::size_t workspace_of(const cublasLtMatmulAlgo_t& algo) const {
    cublasLtMatmulHeuristicResult_t result{};
    SWIN_CUBLASLT(cublasLtMatmulAlgoCheck(handle(), product_, w_, x_, out_, out_, &algo, &result));
    SWIN_CUBLASLT(result.state);
    return result.workspaceSize;
  }

  void run(const cublasLtMatmulAlgo_t& algo, const GemmCall& call, void* stream) const {
    const float factor = call.factor, no_float = 0;
    const std::int32_t one = 1, no_int = 0;
    const void* alpha = s32_ ? static_cast<const void*>(&one) : &factor;
    const void* beta = s32_ ? static_cast<const void*>(&no_int) : &no_float;
    SWIN_CUBLASLT(cublasLtMatmul(handle(), product_, alpha, call.w, w_, call.x, x_, beta, call.out, out_, call.out, out_,
                                 &algo, nullptr, 0, static_cast<cudaStream_t>(stream)));
  }

 private:
  template <class T>
  void set(cublasLtMatmulDescAttributes_t attribute, const T& value) {
    SWIN_CUBLASLT(cublasLtMatmulDescSetAttribute(product_, attribute, &value, sizeof value));
  }
  void destroy() {
    if (out_ != nullptr) cublasLtMatrixLayoutDestroy(out_);
    if (x_ != nullptr) cublasLtMatrixLayoutDestroy(x_);
    if (w_ != nullptr) cublasLtMatrixLayoutDestroy(w_);
    if (product_ != nullptr) cublasLtMatmulDescDestroy(product_);
  }

  const bool s32_;
  cublasLtMatmulDesc_t product_ = nullptr;
  cublasLtMatrixLayout_t w_ = nullptr, x_ = nullptr, out_ = nullptr;
};

class Kernel : public GemmKernel {
 public:
  Kernel(const GemmShape& shape, const cublasLtMatmulAlgo_t& algo) : problem_(shape), algo_(algo) {
    const std::size_t workspace = problem_.workspace_of(algo);
    SWIN_CHECK(Error, kWhere, workspace == 0, "the algorithm asks for a workspace of ", workspace, " bytes");
  }
  void run(const GemmCall& call, void* stream) const override { problem_.run(algo_, call, stream); }

 private:
  const Problem problem_;
  const cublasLtMatmulAlgo_t algo_;
};

std::string name_of_algo(const cublasLtMatmulAlgo_t& algo) {
  const auto get = [&](cublasLtMatmulAlgoConfigAttributes_t attribute, auto value) -> long {
    std::size_t written = 0;
    const cublasStatus_t status = cublasLtMatmulAlgoConfigGetAttribute(&algo, attribute, &value, sizeof value, &written);
    return status == CUBLAS_STATUS_SUCCESS ? static_cast<long>(value) : -1;
  };
  using U32 = std::uint32_t;
  using U16 = std::uint16_t;
  return detail::concat("algo", get(CUBLASLT_ALGO_CONFIG_ID, std::int32_t{0}), "_tile",
                        get(CUBLASLT_ALGO_CONFIG_TILE_ID, U32{0}), "_stages", get(CUBLASLT_ALGO_CONFIG_STAGES_ID, U32{0}),
                        "_swizzle", get(CUBLASLT_ALGO_CONFIG_CTA_SWIZZLING, U32{0}), "_custom",
                        get(CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION, U32{0}), "_inner",
                        get(CUBLASLT_ALGO_CONFIG_INNER_SHAPE_ID, U16{0}), "_cluster",
                        get(CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID, U16{0}));
}

// An algorithm's bytes in hexadecimal: NVIDIA lets them be kept and used again by the same version of the library.
std::string state_of(const cublasLtMatmulAlgo_t& algo) {
  unsigned char bytes[sizeof algo];
  std::memcpy(bytes, &algo, sizeof algo);
  std::string text;
  for (const unsigned char byte : bytes) {
    char digits[3];
    std::snprintf(digits, sizeof digits, "%02x", byte);
    text += digits;
  }
  return text;
}

cublasLtMatmulAlgo_t algo_of(const std::string& state) {
  cublasLtMatmulAlgo_t algo;
  unsigned char bytes[sizeof algo];
  SWIN_CHECK(Error, kWhere, state.size() == 2 * sizeof algo, "a kept algorithm has ", state.size(), " digits; ",
             2 * sizeof algo, " are needed");
  for (std::size_t i = 0; i < sizeof algo; ++i) {
    unsigned byte = 0;
    SWIN_CHECK(Error, kWhere, std::sscanf(state.c_str() + 2 * i, "%2x", &byte) == 1, "a kept algorithm is not hexadecimal");
    bytes[i] = static_cast<unsigned char>(byte);
  }
  std::memcpy(&algo, bytes, sizeof algo);
  return algo;
}

class CublasLtProvider : public GemmProvider {
 public:
  const char* name() const override { return kCublasLt; }
  std::string version() const override {
    const std::size_t v = cublasLtGetVersion();  // of the library that is loaded, e.g. 130400 for 13.4.0
    return v >= 100000 ? detail::concat(v / 10000, ".", v / 100 % 100, ".", v % 100) : std::to_string(v);
  }
  std::vector<GemmCandidate> candidates(const GemmShape& shape, int, std::string* why) const override {
    if (shape.k % 16 != 0 || shape.n % 16 != 0) {
      if (why != nullptr) *why = "K and N must be multiples of 16";
      return {};
    }
    std::vector<GemmCandidate> found;
    for (const cublasLtMatmulHeuristicResult_t& result : Problem(shape).ask(why)) {
      if (result.state != CUBLAS_STATUS_SUCCESS || result.workspaceSize != 0) continue;
      found.push_back({name_of_algo(result.algo), state_of(result.algo)});
    }
    if (found.empty() && why != nullptr && why->empty()) *why = "every algorithm offered needs a workspace";
    return found;
  }
  std::unique_ptr<GemmKernel> prepare(const GemmShape& shape, const GemmCandidate& candidate) const override {
    return std::make_unique<Kernel>(shape, algo_of(candidate.state));
  }
};

}  // namespace

const GemmProvider& cublaslt_provider() {
  static const CublasLtProvider provider;
  return provider;
}

}  // namespace cuda
}  // namespace swin
