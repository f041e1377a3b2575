// What the tests of the GEMM tuner share: checks, providers whose kernels are wrong in one way each, a tuner over them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cuda_runtime_api.h"
#include "gemm_reference.h"
#include "gemm_tuner.h"
#include "swin/error.h"

namespace gemm_test {

using swin::GemmOutput;
using swin::GemmShape;
using swin::cuda::GemmCall;
using swin::cuda::GemmCandidate;
using swin::cuda::GemmKernel;
using swin::cuda::GemmPattern;

inline int g_failures = 0;

#define EXPECT(condition)                                                            \
  do {                                                                               \
    if (!(condition)) {                                                              \
      std::printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);            \
      ++g_failures;                                                                  \
    }                                                                                \
  } while (0)

inline bool has(const std::string& text, const std::string& part) {
  if (text.find(part) != std::string::npos) return true;
  std::printf("'%s' is not in: %s\n", part.c_str(), text.c_str());
  return false;
}

template <class Error>
std::string error_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

// --- Providers that go wrong ------------------------------------------------------------------------------------------

enum class Defect {
  kNone,
  kTruncates,
  kTiesAway,
  kTiesUp,
  kLastRow,
  kBehind,
  kNoRelu,
  kFails,
  kBreaks,        // the device
  kFailsInGraph,  // not when it is proven, but in a capture
  kWraps,
  // Of outputs that have channels alone.
  kSeparate,  // no defect: multiplied, then added; GELU by another erf
  kNoBias,
  kOneScale,      // channel 0's for all
  kShiftedScale,  // the next channel's
  kNoGelu,
  kTanhGelu,
  kNoFactor,
  kOverwrites,
  kAddsTwice,
  kRoundsTwice,  // y to the output's type before it is added
  kThroughHalf,
  kOffByOne,
  kOneIn100OffByOne,
  kOneIn400OffByOne
};

struct Fake {
  std::string name;
  Defect defect;
  double us;
};

// A result of an output that has channels, computed by loops, then spoilt (test_channels.cc).
void run_channels(const GemmShape& shape, const GemmCall& call, Defect defect);

// A right result, computed by loops, then spoilt.
class FakeKernel : public GemmKernel {
 public:
  FakeKernel(const GemmShape& shape, Fake fake) : shape_(shape), fake_(std::move(fake)) {}
  void run(const GemmCall& call, void*) const override {
    if (fake_.defect == Defect::kFails) throw swin::Error("a status that says no");
    if (fake_.defect == Defect::kBreaks) fake::broken = true;
    if (fake_.defect == Defect::kFailsInGraph && fake::capture_began_us >= 0) throw swin::Error("not in a capture");
    fake::clock_us += fake_.us;
    if (has_channels(shape_.output)) return run_channels(shape_, call, fake_.defect);
    const std::int64_t rows = fake_.defect == Defect::kLastRow ? shape_.m - 1 : shape_.m;
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t j = 0; j < shape_.n; ++j) {
        std::int32_t acc = 0;
        for (std::int64_t k = 0; k < shape_.k; ++k) acc += call.x[i * shape_.k + k] * call.w[j * shape_.k + k];
        if (shape_.output == GemmOutput::kS32) {
          static_cast<std::int32_t*>(call.out)[i * shape_.n + j] = acc;
        } else {
          static_cast<std::int8_t*>(call.out)[i * shape_.n + j] = requantized(static_cast<float>(acc) * call.factor);
        }
      }
    }
    if (fake_.defect == Defect::kBehind) {
      static_cast<std::int8_t*>(call.out)[shape_.m * shape_.n * (shape_.output == GemmOutput::kS32 ? 4 : 1)] = 1;
    }
  }

 private:
  std::int8_t requantized(float y) const {
    float floor = swin::cuda::floor_of(shape_.output);
    if (fake_.defect == Defect::kNoRelu) floor = -128;
    float rounded = std::nearbyint(y);
    if (fake_.defect == Defect::kTruncates) rounded = std::trunc(y);
    if (fake_.defect == Defect::kTiesAway) rounded = std::round(y);
    if (fake_.defect == Defect::kTiesUp) rounded = std::floor(y + 0.5f);
    if (fake_.defect == Defect::kWraps) return static_cast<std::int8_t>(static_cast<int>(std::max(rounded, floor)));
    return static_cast<std::int8_t>(std::clamp(rounded, floor, 127.0f));
  }

  const GemmShape shape_;
  const Fake fake_;
};

class FakeProvider : public swin::cuda::GemmProvider {
 public:
  explicit FakeProvider(const char* name) : name_(name) {}
  const char* name() const override { return name_; }
  std::string version() const override { return installed; }
  std::vector<GemmCandidate> candidates(const GemmShape&, int, std::string* why) const override {
    if (!starts) throw swin::Error("it does not start");
    std::vector<GemmCandidate> found;
    for (const Fake& fake : fakes) found.push_back({fake.name, "state of " + fake.name});
    if (found.empty()) *why = "it has none";
    return found;
  }
  std::unique_ptr<GemmKernel> prepare(const GemmShape& shape, const GemmCandidate& candidate) const override {
    ++prepared;
    for (const Fake& fake : fakes) {
      if (fake.name == candidate.name && candidate.state == "state of " + fake.name) {
        return std::make_unique<FakeKernel>(shape, fake);
      }
    }
    throw swin::UnsupportedError("there is no " + candidate.name);
  }

  std::vector<Fake> fakes;
  std::string installed = "1.0";
  bool starts = true;
  mutable int prepared = 0;

 private:
  const char* name_;
};

inline FakeProvider& cublaslt() {
  static FakeProvider provider(swin::cuda::kCublasLt);
  return provider;
}
inline FakeProvider& cutlass() {
  static FakeProvider provider(swin::cuda::kCutlass);
  return provider;
}
inline FakeProvider& tiles() {
  static FakeProvider provider(swin::cuda::kTiles);
  return provider;
}

inline std::string g_folder;

// A tuner of its own over the process's providers and the bench of gemm_lab.cc, and an empty config file.
class Setup {
 public:
  explicit Setup(const char* name, const char* wanted = nullptr) : path(g_folder + "/" + name + "/deep/gemm.json") {
    setenv("SWIN_GEMM_CONFIG", path.c_str(), 1);
    want(wanted);
    fake::capturing = fake::out_of_memory = false;
    fake::device = 0;
    cublaslt().installed = cutlass().installed = tiles().installed = "1.0";
    cublaslt().fakes = {{"quick", Defect::kNone, 20}, {"quicker", Defect::kNone, 10}};
    cutlass().fakes = {{"tile", Defect::kNone, 15}};
    tiles().fakes = {};
    again();
  }
  ~Setup() { EXPECT(fake::allocations == 0 && fake::graphs == 0); }

  // As another process would start.
  void again() { tuner = std::make_unique<swin::cuda::GemmTuner>(swin::cuda::gemm_provider_list(), swin::cuda::gemm_lab()); }
  static void want(const char* provider) {
    if (provider != nullptr) {
      setenv("SWIN_GEMM", provider, 1);
    } else {
      unsetenv("SWIN_GEMM");
    }
  }

  const std::string path;
  std::unique_ptr<swin::cuda::GemmTuner> tuner;
};

void test_channels();  // test_channels.cc

}  // namespace gemm_test
