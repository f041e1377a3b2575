// The CUDA backend. Declared in every build; a build without it has cuda_built() == false and throws from the rest.
#pragma once

#include <string>

#include "swin/backend.h"

namespace swin {

bool cuda_built();
// Devices this process can use; 0 without a GPU or a driver, never an error.
int cuda_device_count();
// The backend of `device` with `float_dtype` (float16 or bfloat16) for the residual stream and the parameters.
// UnsupportedError, saying what is missing, where there is no such device or this build has no kernels for it.
// The reference lives as long as the process. The caller makes `device` current before every call that uses it.
const Backend& cuda_backend(int device, DType float_dtype = DType::kF16);

// Makes `device` current on this thread, and what was current before again at the end; nothing where it is negative.
class CudaDeviceGuard {
 public:
  explicit CudaDeviceGuard(int device);
  ~CudaDeviceGuard();
  CudaDeviceGuard(const CudaDeviceGuard&) = delete;
  CudaDeviceGuard& operator=(const CudaDeviceGuard&) = delete;

 private:
  int before_ = -1;  // what was current; negative: nothing to come back to
};

}  // namespace swin
