// Host code that allocates, copies and waits where a stream may be under capture.
#pragma once

#include <cuda_runtime_api.h>

namespace swin::cuda {

// Lets this thread allocate, and wait for streams of its own, while it or another thread captures a graph: nothing of
// that is part of one.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // what to go back to, from the constructor on
};

}  // namespace swin::cuda
