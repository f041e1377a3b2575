// As much of CUDA's runtime API as the CUDA backend's host code uses (csrc/cuda/backend.cc), on the host, with the
// rules that streams, captures and memory have: what they forbid fails here as it does on a device, and spoils what it
// spoils there.
//
// Work runs as soon as it is enqueued; what enqueuing to a stream under capture gives is a node of its graph. Kept to
// are, by the CUDA programming guide's "Prohibited and Unhandled Operations" and the runtime's reference:
// - the legacy default stream cannot be captured, and using it while a blocking stream is captured spoils that capture;
// - waiting for the device spoils every capture, whichever thread's it is, and fails; so does waiting for a captured
// stream;
// - allocating, and waiting for another stream, is forbidden to a thread that captures, and to all while one captures
// globally, unless they relaxed their mode;
// - a graph cannot be launched into a captured stream; a capture ends on the thread that began it.
// A launched kernel takes a millisecond of an event's time. Stricter than CUDA: a thread that captures cannot free
// memory even in relaxed mode, as that waits for the device.
#pragma once

#include <cstddef>
#include <functional>

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureInvalidated = 901,
  cudaErrorStreamCaptureImplicit = 906,
  cudaErrorStreamCaptureWrongThread = 908
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal,
  cudaStreamCaptureModeThreadLocal,
  cudaStreamCaptureModeRelaxed
};
enum cudaStreamCaptureStatus {
  cudaStreamCaptureStatusNone,
  cudaStreamCaptureStatusActive,
  cudaStreamCaptureStatusInvalidated
};
enum { cudaStreamNonBlocking = 1 };

struct CUstream_st;
struct CUgraph_st;
struct CUgraphExec_st;
struct CUevent_st;
using cudaStream_t = CUstream_st*;
using cudaGraph_t = CUgraph_st*;
using cudaGraphExec_t = CUgraphExec_st*;
using cudaEvent_t = CUevent_st*;
struct cudaDeviceProp {
  int major, minor;
};

cudaError_t cudaMalloc(void** memory, std::size_t bytes);
cudaError_t cudaFree(void* memory);
cudaError_t cudaMemsetAsync(void* target, int byte, std::size_t bytes, cudaStream_t stream);
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id);
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags);
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable);
cudaError_t cudaEventCreate(cudaEvent_t* event);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t stop);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t status);

namespace fake {

// A kernel that touches `bytes` of device memory at each of `places`.
struct Place {
  const void* memory;
  std::size_t bytes;
};
cudaError_t launch(cudaStream_t stream, std::function<void()> kernel, std::initializer_list<Place> places);

struct Counts {
  int kernels, graph_launches, allocations, frees,
      faults;  // kernels: of launches, not of graphs; faults: of memory that is gone
};
Counts counts();
cudaStream_t last_graph_stream();  // that a graph was launched into
// The next `count` allocations fail.
void out_of_memory(int count);

}  // namespace fake
