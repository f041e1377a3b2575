// The entry of the fused graph's products: acc[m, n] = sum_k x[m, k] * w[n, k], then acc * scale[n] + bias[n] and what the
// output is made of it (swin/cuda_gemm.h). x s8 [M, K], w s8 [N, K], out [M, N].
//
// What runs a shape is the tuner's choice among the providers (gemm_tuner.h): our own tiles, and on Hopper CUTLASS's wgmma
// kernels. On the host shim, and where an operand is not aligned, it is the tiles.
#include "device.cuh"
#include "gemm_tiles.h"
#if !defined(SWIN_HOST_SHIM)
#include "gemm_tuner.h"
#endif

namespace swin::cuda {

void channels_gemm(const char* op, const TensorView& x, const PackedWeight& w, GemmOutput output, const float* scale,
                   const float* bias, void* out, void* stream, float factor) {
  const GemmShape shape{x.dim(0), w.n, w.k, output};
  const GemmCall call{x.as<const std::int8_t>(), static_cast<const CudaPackedWeight&>(w).data, out, factor, scale, bias};
#if !defined(SWIN_HOST_SHIM)
  const bool aligned = is_aligned(call.x, 16) && is_aligned(call.w, 16) && is_aligned(out, 16) && is_aligned(scale, 16) &&
                       (bias == nullptr || is_aligned(bias, 16));
  if (aligned && shape.k % 16 == 0 && shape.n % 8 == 0) {
    gemm_tuner().kernel(shape, stream).run(call, stream);
    return;
  }
#endif
  tile_gemm(op, shape, call, stream);
}

}  // namespace swin::cuda
