#include "swin/fork_mutex.h"

#include <pthread.h>

#include <utility>

namespace swin {
namespace {

// Made while a library loads, which the loader does one at a time.
ForkMutex* g_first = nullptr;

}  // namespace

ForkMutex::ForkMutex() : next_(std::exchange(g_first, this)) {
  if (next_ == nullptr) pthread_atfork(lock_all, unlock_all, unlock_all);
}

void ForkMutex::lock_all() {
  for (ForkMutex* mutex = g_first; mutex != nullptr; mutex = mutex->next_) mutex->lock();
}

void ForkMutex::unlock_all() {
  for (ForkMutex* mutex = g_first; mutex != nullptr; mutex = mutex->next_) mutex->unlock();
}

}  // namespace swin
