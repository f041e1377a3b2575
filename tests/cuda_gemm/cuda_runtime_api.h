// As much of CUDA's runtime API as the tuner's bench uses (csrc/cuda/gemm_lab.cc), on the host: device memory is
// malloc's, streams do everything at once, and events read a clock that the test's kernels advance. A capture runs its
// kernels too, but in no time; its graph takes theirs at each launch, and what a graph's launch costs the host is on no
// event.
#pragma once

#include <cuda_runtime.h>  // of tests/cuda_shim

#include <cstdlib>
#include <cstring>

namespace fake {
inline double clock_us = 0;
inline bool capturing = false;
inline bool out_of_memory = false;
inline bool no_gpu = false;
inline bool broken = false;  // for good, by a kernel
inline int device = 0;
inline int allocations = 0;  // alive
inline int graphs = 0;       // alive, instantiated or not
inline int graph_launches = 0;
inline double capture_began_us = -1;
}  // namespace fake

inline constexpr cudaError_t cudaErrorMemoryAllocation = static_cast<cudaError_t>(2);
inline constexpr cudaError_t cudaErrorInsufficientDriver = static_cast<cudaError_t>(35);
inline constexpr cudaError_t cudaErrorNoDevice = static_cast<cudaError_t>(100);
inline constexpr cudaError_t cudaErrorIllegalAddress = static_cast<cudaError_t>(700);
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum { cudaStreamNonBlocking = 1 };
using cudaEvent_t = double*;
using cudaGraph_t = double*;  // microseconds
using cudaGraphExec_t = double*;
struct cudaDeviceProp {
  char name[256];
  int major, minor;
};

inline cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
  if (fake::out_of_memory) return cudaErrorMemoryAllocation;
  ++fake::allocations;
  *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* memory) {
  --fake::allocations;
  std::free(memory);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* target, int byte, std::size_t bytes, cudaStream_t) {
  std::memset(target, byte, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = nullptr;
  return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return fake::broken ? cudaErrorIllegalAddress : cudaSuccess; }
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = fake::capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  if (fake::capture_began_us >= 0) return cudaErrorInvalidValue;
  fake::capture_began_us = fake::clock_us;
  return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  *graph = new double(fake::clock_us - fake::capture_began_us);
  ++fake::graphs;
  fake::clock_us = fake::capture_began_us;
  fake::capture_began_us = -1;
  return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = new double(*graph);
  ++fake::graphs;
  return cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t) {
  ++fake::graph_launches;
  fake::clock_us += *executable;
  return cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  --fake::graphs;
  delete graph;
  return cudaSuccess;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  if (executable == nullptr) return cudaSuccess;
  --fake::graphs;
  delete executable;
  return cudaSuccess;
}
inline cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = new double(0);
  return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  *event = fake::clock_us;
  return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t stop) {
  *ms = static_cast<float>((*stop - *start) * 1e-3);
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  if (fake::no_gpu) return cudaErrorNoDevice;
  *device = fake::device;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  std::strcpy(properties->name, device == 0 ? "Fake GPU \"A\"" : "Fake GPU B");
  properties->major = 9;
  properties->minor = device;
  return cudaSuccess;
}
