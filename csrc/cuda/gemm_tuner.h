// Chooses what runs each GEMM: proves every candidate on random data, times the proven ones, keeps the fastest.
//
// The policy alone, in plain C++: the device is behind GemmLab, so that tests drive it where there is no GPU.
//
//   SWIN_GEMM=auto|cublaslt|cutlass|swin_tiles|swin_plain
//                           whose candidates may run (default auto: the fastest of all), and are proven beside the
//                           plain kernel; cublaslt says nothing of outputs with a scale for each channel, swin_tiles of
//                           those without
//   SWIN_GEMM_SKIP=PREFIX,..
//                           candidates that are left out: those whose "provider:name" begins with one of these
//   SWIN_GEMM_TRACE=1       says on stderr what is about to run: one that hangs is the last
//   SWIN_GEMM_CONFIG=FILE   where results are kept (gemm_config.h)
//
// The plain kernel is the last resort: under `auto` it runs what nobody else can, and is not timed where somebody can.
#pragma once

#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <vector>

#include "gemm_config.h"

namespace swin {
namespace cuda {

// A kernel and what errors call it: "cutlass:sm90_128x128x128".
struct GemmTrial {
  std::string name;
  const GemmKernel* kernel = nullptr;
};

// One shape's operands on the current device, for as long as it is being tuned.
class GemmBench {
 public:
  virtual ~GemmBench() = default;
  // For each trial "" if it reproduced our own kernel's result on every pattern of data, else what differed. Error,
  // naming the trial, where one breaks the device.
  virtual std::vector<std::string> prove(const std::vector<GemmTrial>& trials) = 0;
  // The device's microseconds of one launch, from `launches` in one CUDA graph. UnsupportedError where no graph takes
  // it, which is how the engine would run it; Error, naming it, where it breaks the device.
  virtual double time_us(const GemmTrial& trial, int launches) = 0;
};

struct GemmDevice {
  int index = 0;
  std::string name;
  int sm = 0;
};

class GemmLab {
 public:
  virtual ~GemmLab() = default;
  virtual GemmDevice current_device() = 0;
  // Whether work on `stream` is being captured into a CUDA graph, where nothing can be measured.
  virtual bool capturing(void* stream) = 0;
  virtual std::unique_ptr<GemmBench> bench(const GemmShape& shape) = 0;
};

class GemmTuner {
 public:
  // Both outlive the tuner.
  GemmTuner(std::vector<const GemmProvider*> providers, GemmLab& lab);

  // What runs `shape` on the current device; measured now where neither this process nor the config file knows. The
  // reference lives as long as the tuner. UnsupportedError where no candidate of SWIN_GEMM's provider gives the right
  // result; Error where it would have to be measured inside a CUDA graph capture.
  const GemmKernel& kernel(const GemmShape& shape, void* stream);

  std::string tune(const std::vector<GemmShape>& shapes, bool again);  // swin::tune_gemm
  std::string choices() const;                                         // swin::gemm_choices

 private:
  struct Chosen {
    int device;
    std::string provider_wanted;
    GemmShape shape;
    GemmDevice where;
    GemmTiming timing;
    std::unique_ptr<GemmKernel> kernel;
  };

  const GemmKernel* find(int device, const std::string& wanted, const GemmShape& shape) const;
  const GemmProvider* provider(const std::string& name) const;
  // Of the providers whose candidates may run; the key of what is measured with them.
  std::string versions(const std::string& wanted) const;
  void load_config();
  GemmEntry* known(const GemmDevice& device, const std::string& wanted, const GemmShape& shape);
  GemmEntry measure(const GemmDevice& device, const std::string& wanted, const GemmShape& shape);
  const GemmEntry& remember(GemmEntry entry);
  const GemmKernel& choose(const GemmDevice& device, const std::string& wanted, const GemmEntry& entry);

  const std::vector<const GemmProvider*> providers_;
  GemmLab& lab_;
  mutable std::shared_mutex chosen_mutex_;
  std::vector<std::unique_ptr<Chosen>> chosen_;  // some dozens; never shrinks while kernels may run

  std::mutex tuning_;  // one shape at a time, on one device at a time
  std::vector<GemmEntry> entries_;
  std::string loaded_from_;  // the config file that entries_ holds
  bool loaded_ = false;
  std::string saved_;  // what went wrong when it was last written
};

// The CUDA devices, and the process's tuner over them and this build's providers (gemm_lab.cc).
GemmLab& gemm_lab();
GemmTuner& gemm_tuner();

}  // namespace cuda
}  // namespace swin
