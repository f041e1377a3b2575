// Whether a device can run this build's kernels: asked of one of them, since all are compiled for the same architectures.
#include "kernels_table.h"
#include "kernels.h"
#include "swin/error.h"

#include "device.cuh"

namespace swin::cuda {
namespace {

__global__ void probe_kernel() {}

}  // namespace

OpTable float16_table() { return make_table<__half>(); }
OpTable bfloat16_table() { return make_table<__nv_bfloat16>(); }

void require_kernels(int device, int sm) {
  cudaFuncAttributes attributes{};
  const cudaError_t status = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw UnsupportedError(detail::concat("cuda backend: this build has no kernels for cuda:", device, " (sm_", sm, "): ",
                                        cudaGetErrorString(status), ". Build it on that machine, or with bash "
                                        "scripts/build_ft.sh --cuda-arch ", sm));
}

}  // namespace swin::cuda
