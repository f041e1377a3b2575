// The CPU backend's memory: weights, buffers and the threads' scratch, side by side in pages of 2 MiB.
//
// A forward pass goes through tens of megabytes, which in pages of 4 KiB are more than the processor keeps translations of, and
// in a virtual machine a translation takes longer still. Many Linux systems give large pages only to those who ask, and a
// tensor by itself is often smaller than one. What it gains: docs/architecture.md.
#pragma once

#include <cstddef>

namespace swin::cpu {

// At least `bytes` of memory aligned to 64 bytes; std::bad_alloc where there is none.
void* allocate_memory(std::size_t bytes);
// Gives back what allocate_memory returned; nothing for a null pointer.
void release_memory(void* memory);

}  // namespace swin::cpu
