// The CPU backend's threads. One pool a process; a caller that finds it busy runs its tasks alone.
#pragma once

#include <cstdint>

namespace swin::cpu {

using TaskFn = void (*)(void* closure, std::int64_t task);

// Calls fn(closure, 0) ... fn(closure, tasks - 1), each once, on up to `threads` threads, the caller's among them;
// returns when all are done. Each thread begins with a share of its own, of tasks next to each other, the same for the
// same `threads` and `tasks`; else the order is any. Where `fn` throws, as thread_scratch does, the other tasks are
// done all the same, and then the first exception is thrown. Where the machine gives fewer threads, those do all.
void run_tasks(int threads, std::int64_t tasks, TaskFn fn, void* closure);

// At least `bytes` of memory of the calling thread, aligned to 64 bytes, until its next call; std::bad_alloc where
// there is none.
void* thread_scratch(std::int64_t bytes);

}  // namespace swin::cpu
