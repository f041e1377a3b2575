// The CUTLASS kernels of this build, one file per architecture family (gemm_cutlass_sm75.cu, _sm80.cu, _sm90.cu).
#pragma once

#include <vector>

#include "gemm_provider.h"

namespace swin {
namespace cuda {

struct CutlassKernel {
  const char* name;
  bool (*serves)(GemmOutput);
  int min_sm, max_sm;  // compute capabilities it is meant for, both included
  // nullptr, or why the kernel cannot run the shape.
  const char* (*refuse)(const GemmShape&);
  // nullptr, or what went wrong. `stream` is a cudaStream_t.
  const char* (*launch)(const GemmShape&, const GemmCall&, void* stream);
};

// FT's outputs: requantized, with the ReLU as a run-time lower bound, or the accumulators.
inline bool serves_s8(GemmOutput output) { return output == GemmOutput::kS8 || output == GemmOutput::kS8Relu; }
inline bool serves_s32(GemmOutput output) { return output == GemmOutput::kS32; }

// Each defined in its family's file, if an architecture of the family is built.
void add_sm75_kernels(std::vector<CutlassKernel>& kernels);
void add_sm80_kernels(std::vector<CutlassKernel>& kernels);
void add_sm90_kernels(std::vector<CutlassKernel>& kernels);  // these and the following ones
void add_sm90_pingpong_kernels(std::vector<CutlassKernel>& kernels);
void add_sm90_channels_s8_kernels(std::vector<CutlassKernel>& kernels);
void add_sm90_channels_gelu_kernels(std::vector<CutlassKernel>& kernels);
void add_sm90_channels_f32_kernels(std::vector<CutlassKernel>& kernels);
void add_sm90_channels_add_kernels(std::vector<CutlassKernel>& kernels);

}  // namespace cuda
}  // namespace swin
