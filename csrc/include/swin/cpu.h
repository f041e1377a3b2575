// The CPU backend.
#pragma once

#include <string>
#include <vector>

#include "swin/backend.h"

namespace swin {

// Instruction sets this build has kernels for and this machine can run, best first.
std::vector<std::string> cpu_variants();
// The backend of `variant`; of the best one, or of the environment's SWIN_CPU_ISA, where `variant` is empty.
// UnsupportedError where this build or this machine lacks it. The reference lives as long as the process.
const Backend& cpu_backend(const std::string& variant = "");

struct Ceilings {
  double copy_gb_s = 0;    // bytes read plus written by a large copy
  double s8_gop_s = 0;     // multiply-adds times two of the GEMM's own dot product, registers only
  double u8_gop_s = 0;     // the same of the dot product it uses where the input is known to be 0..127
  double grouped_gop_s = 0;  // of the one whose sums stay in int16 while the weights allow it; 0 where it has none
  double f32_gflop_s = 0;  // the same of float32 fused multiply-add
};
// Measured now, on `threads` threads, in about half a second.
Ceilings measure_cpu_ceilings(const std::string& variant, int threads);

}  // namespace swin
