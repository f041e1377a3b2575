// The products of the fused graph, whose output channels each have a scale: on tiles of our own (gemm_tiles.cu), or by
// what the tuner found to be fastest (gemm_channels.cu).
#pragma once

#include <cuda_bf16.h>

#include "gemm_provider.h"
#include "packed_weight.h"
#include "swin/tensor.h"

namespace swin::cuda {

// The tiles alone, chosen by the size of the product; any shape and alignment. `shape` has one of the outputs with
// channels; `op`: who asks, for errors. Launches on `stream` and neither allocates nor synchronizes.
void tile_gemm(const char* op, const GemmShape& shape, const GemmCall& call, void* stream);

// out [M, N] of x s8 [M, K] and w, as `output` says, with scale f32 [N] and bias f32 [N] or none; `factor`: what
// kChannelsGelu quantizes with. Errors: of GemmTuner::kernel.
void channels_gemm(const char* op, const TensorView& x, const PackedWeight& w, GemmOutput output, const float* scale,
                   const float* bias, void* out, void* stream, float factor = 0);

// The output that adds to a residual stream of T.
template <class T>
inline constexpr GemmOutput kChannelsAdd = GemmOutput::kChannelsAddF16;
template <>
inline constexpr GemmOutput kChannelsAdd<__nv_bfloat16> = GemmOutput::kChannelsAddBF16;

}  // namespace swin::cuda
