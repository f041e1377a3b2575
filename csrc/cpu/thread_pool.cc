#include "thread_pool.h"

#include <pthread.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <new>
#include <thread>

namespace swin::cpu {
namespace {

// A worker waits this many turns (some tens of microseconds) for the next job before it sleeps: a forward pass is a
// few hundred jobs in close succession, and waking a sleeping thread costs more than most of them take.
constexpr int kSpins = 4000;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class ThreadPool {
 public:
  void run(int threads, std::int64_t tasks, TaskFn fn, void* closure) {
    std::unique_lock lock(busy_, std::try_to_lock);
    if (threads <= 1 || tasks <= 1 || !lock.owns_lock()) {
      for (std::int64_t i = 0; i < tasks; ++i) fn(closure, i);
      return;
    }
    grow(threads - 1);
    // The ticket holds the job's number above and the next task below. Closed while the fields change: a worker that
    // read half of them fails to take a task, since the ticket it read is gone by then. Release and acquire on the fields
    // make that true of a machine, as ARM's, that else shows a later store before an earlier one.
    const std::uint64_t job = (ticket_.load(std::memory_order_relaxed) >> kTaskBits) + 1;
    ticket_.store((job << kTaskBits) | kClosed, std::memory_order_seq_cst);
    fn_.store(fn, std::memory_order_release);
    closure_.store(closure, std::memory_order_release);
    tasks_.store(tasks, std::memory_order_release);
    helpers_.store(threads - 1, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    ticket_.store((job + 1) << kTaskBits, std::memory_order_seq_cst);
    wake_.fetch_add(1, std::memory_order_seq_cst);
    wake_.notify_all();
    work();
    while (done_.load(std::memory_order_acquire) != tasks) relax();
  }

 private:
  static constexpr int kTaskBits = 32;
  static constexpr std::uint64_t kClosed = (std::uint64_t{1} << kTaskBits) - 1;

  // Takes tasks of the current job until there are none.
  void work() {
    std::uint64_t ticket = ticket_.load(std::memory_order_acquire);
    for (;;) {
      const TaskFn fn = fn_.load(std::memory_order_acquire);
      void* closure = closure_.load(std::memory_order_acquire);
      const std::uint64_t tasks = tasks_.load(std::memory_order_acquire);
      const std::uint64_t task = ticket & kClosed;
      if (task >= tasks || task == kClosed) return;
      if (!ticket_.compare_exchange_strong(ticket, ticket + 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
        continue;
      }
      fn(closure, static_cast<std::int64_t>(task));
      done_.fetch_add(1, std::memory_order_acq_rel);
      ticket = ticket_.load(std::memory_order_acquire);
    }
  }

  void worker(int index, std::uint32_t seen) {
    for (;;) {
      for (int spin = 0; spin < kSpins && wake_.load(std::memory_order_acquire) == seen; ++spin) relax();
      wake_.wait(seen, std::memory_order_acquire);
      seen = wake_.load(std::memory_order_acquire);
      if (index < helpers_.load(std::memory_order_relaxed)) work();
    }
  }

  // Workers live as long as the process; detached, so that its end does not wait for them.
  void grow(int workers) {
    for (; size_ < workers; ++size_) {
      std::thread([this, index = size_, seen = wake_.load()] { worker(index, seen); }).detach();
    }
  }

  std::mutex busy_;
  int size_ = 0;
  std::atomic<std::uint64_t> ticket_{kClosed};
  std::atomic<std::uint32_t> wake_{0};
  std::atomic<TaskFn> fn_{nullptr};
  std::atomic<void*> closure_{nullptr};
  std::atomic<std::uint64_t> tasks_{0};
  std::atomic<int> helpers_{0};
  std::atomic<std::int64_t> done_{0};
};

std::atomic<ThreadPool*> g_pool{nullptr};

// A forked child (a data loader's worker) has no threads but its own: it starts with a new pool.
void forget_pool() { g_pool.store(nullptr); }

// Never destroyed: workers may still look at it while the process ends.
ThreadPool& pool() {
  if (ThreadPool* existing = g_pool.load(std::memory_order_acquire)) return *existing;
  static std::mutex making;
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
  (void)registered;
  std::lock_guard lock(making);
  if (g_pool.load() == nullptr) g_pool.store(new ThreadPool);
  return *g_pool.load();
}

}  // namespace

void run_tasks(int threads, std::int64_t tasks, TaskFn fn, void* closure) { pool().run(threads, tasks, fn, closure); }

void* thread_scratch(std::int64_t bytes) {
  struct Free {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local std::int64_t size = 0;
  if (bytes > size) {
    memory.reset();
    memory.reset(::operator new(bytes, std::align_val_t{64}));
    size = bytes;
  }
  return memory.get();
}

}  // namespace swin::cpu
