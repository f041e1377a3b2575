// A mutex that a forked child finds free.
#pragma once

#include <mutex>

namespace swin {

// For what a child process goes on using: fork() waits until no thread is within the mutex, so that the child, which has
// but the thread that forked, does not wait for one that it lacks. Static objects only. What is done within must end soon
// and must take no other of these, since fork() takes all, in any order.
class ForkMutex {
 public:
  ForkMutex();
  ForkMutex(const ForkMutex&) = delete;
  ForkMutex& operator=(const ForkMutex&) = delete;

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  static void lock_all();
  static void unlock_all();

  std::mutex mutex_;
  ForkMutex* const next_;  // all of them, that made last first
};

}  // namespace swin
