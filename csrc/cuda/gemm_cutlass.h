// The CUTLASS kernels of this build, one file per architecture family (gemm_cutlass_sm75.cu, _sm80.cu, _sm90.cu).
#pragma once

#include <vector>

#include "gemm_provider.h"

namespace swin {
namespace cuda {

struct CutlassKernel {
  const char* name;
  bool s32;            // leaves the accumulators; otherwise s8, with the ReLU as a run-time lower bound
  int min_sm, max_sm;  // compute capabilities it is meant for, both included
  // nullptr, or why the kernel cannot run the shape.
  const char* (*refuse)(const GemmShape&);
  // nullptr, or what went wrong. `stream` is a cudaStream_t.
  const char* (*launch)(const GemmShape&, const GemmCall&, void* stream);
};

// Each defined in its family's file, if an architecture of the family is built.
void add_sm75_kernels(std::vector<CutlassKernel>& kernels);
void add_sm80_kernels(std::vector<CutlassKernel>& kernels);
void add_sm90_kernels(std::vector<CutlassKernel>& kernels);  // these and the ping-pong ones
void add_sm90_pingpong_kernels(std::vector<CutlassKernel>& kernels);

}  // namespace cuda
}  // namespace swin
