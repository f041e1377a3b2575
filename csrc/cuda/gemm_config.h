// The GEMM config file: for each device, set of library versions and shape, what was proven right and how fast it was.
//
// JSON, one entry a line, so that a person can read it and a tool can compare two. Written beside itself and renamed into
// place, so that no reader sees half a file; what another process added meanwhile is kept.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "gemm_provider.h"

namespace swin {
namespace cuda {

// A candidate that gave exactly the right result, and the median microseconds of one call.
struct GemmTiming {
  std::string provider;
  GemmCandidate candidate;
  double us = 0;
};

struct GemmRefusal {
  std::string provider, candidate, why;
};

struct GemmEntry {
  std::string device;    // "NVIDIA H200"
  int sm = 0;            // 90
  std::string versions;  // "cublaslt 13.1.0, cutlass 4.2.0, swin_tiles 1, swin_plain 1"
  GemmShape shape;
  std::vector<GemmTiming> best;                      // the fastest of each provider, the fastest first
  std::vector<std::pair<std::string, int>> offered;  // candidates by provider
  std::vector<std::pair<std::string, int>> proven;
  std::vector<GemmRefusal> refused;  // why candidates, or a whole provider (candidate empty), were not taken

  bool same_key(const GemmEntry& o) const {
    return device == o.device && sm == o.sm && versions == o.versions && shape == o.shape;
  }
};

// SWIN_GEMM_CONFIG, else swin_int8/gemm.json in XDG_CACHE_HOME or ~/.cache. Empty where none of the three is set.
std::string gemm_config_path();
// Of `path`; none where there is no such file. ValueError naming the file where it is not a GEMM config file.
std::vector<GemmEntry> read_gemm_config(const std::string& path);
// Adds `entries` to the file, in the place of those of the same key; makes its folder. "" or what went wrong: a config
// file that cannot be kept costs the next process its tuning, and nothing else.
std::string add_to_gemm_config(const std::string& path, const std::vector<GemmEntry>& entries);

// One entry as JSON, without braces: "device": ..., "best": [...].
std::string json_fields(const GemmEntry& entry);
std::string json_string(const std::string& text);
std::string json_number(double value);

}  // namespace cuda
}  // namespace swin
