// Host code that allocates, copies and waits where a stream may be under capture.
#pragma once

#include <cuda_runtime_api.h>

#include "swin/error.h"

namespace swin::cuda {

// A stream that neither waits for the legacy default stream nor is waited for by it. swin::Error where there is none to
// be had.
struct OwnStream {
  cudaStream_t handle = nullptr;
  OwnStream() {
    const cudaError_t status = cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking);
    if (status == cudaSuccess) return;
    cudaGetLastError();  // it is reported here; the next call starts clean
    throw Error(detail::concat("cuda stream: ", cudaGetErrorString(status)));
  }
  ~OwnStream() { cudaStreamDestroy(handle); }
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;
};

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
