// swin/cuda.h in a build without the CUDA backend.
#include "swin/cuda.h"
#include "swin/error.h"

namespace swin {

bool cuda_built() { return false; }
int cuda_device_count() { return 0; }

const Backend& cuda_backend(int device, DType) {
  throw UnsupportedError(
      detail::concat("cuda:", device,
                     ": this build has no CUDA backend; build it with nvcc on PATH "
                     "(bash scripts/build_ft.sh without --cpu-only), or move model and images to the CPU"));
}

CudaDeviceGuard::CudaDeviceGuard(int device) {
  if (device >= 0) cuda_backend(device);  // throws
  before_ = -1;
}
CudaDeviceGuard::~CudaDeviceGuard() = default;

}  // namespace swin
