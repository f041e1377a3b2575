#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "memory.h"

extern "C" {  // OpenMP 4.5's, where the process has one when this library comes; PyTorch brings it
__attribute__((weak)) int omp_get_num_places(void);
__attribute__((weak)) int omp_get_place_num_procs(int place);
__attribute__((weak)) void omp_get_place_proc_ids(int place, int* ids);
}

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

// The processors for workers of a caller that has fewer than the `threads` it asks for; else none, and workers have the
// caller's, as threads do. OpenMP, told to bind its threads (OMP_PROC_BIND, KMP_AFFINITY), begins with the one that
// loads it, mostly the caller: all workers would share that one's processor. They get those that OpenMP would use.
std::optional<cpu_set_t> processors_of_openmp(int threads) {
  cpu_set_t callers;
  if (pthread_getaffinity_np(pthread_self(), sizeof callers, &callers) != 0 || CPU_COUNT(&callers) >= threads ||
      omp_get_num_places == nullptr || omp_get_place_num_procs == nullptr || omp_get_place_proc_ids == nullptr) {
    return std::nullopt;
  }
  cpu_set_t all = callers;
  for (int place = 0; place < omp_get_num_places(); ++place) {
    std::vector<int> ids(static_cast<std::size_t>(omp_get_place_num_procs(place)));
    omp_get_place_proc_ids(place, ids.data());
    for (const int id : ids) {
      if (id >= 0 && id < CPU_SETSIZE) CPU_SET(static_cast<std::size_t>(id), &all);
    }
  }
  return all;
}

// Each thread of a job has a share of its tasks, in their order, and takes of the other shares when its own is done. So
// a core meets the rows that it wrote in the operation before, and finds them in its own cache.
class ThreadPool {
 public:
  void run(int threads, std::int64_t tasks, TaskFn fn, void* closure) {
    std::unique_lock lock(busy_, std::try_to_lock);
    if (threads > kMostThreads) threads = kMostThreads;
    if (threads > 1 && tasks > 1 && lock.owns_lock()) threads = grow(threads - 1) + 1;
    if (threads <= 1 || tasks <= 1 || tasks > kMostTasks || !lock.owns_lock()) {
      for (std::int64_t i = 0; i < tasks; ++i) fn(closure, i);
      return;
    }
    fn_.store(fn, std::memory_order_relaxed);
    closure_.store(closure, std::memory_order_relaxed);
    threads_.store(threads, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    ++job_;
    for (std::int64_t i = 0; i < threads; ++i) {
      const std::uint64_t next = i * tasks / threads, end = (i + 1) * tasks / threads;
      shares_[i].ticket.store(job_ << (2 * kTaskBits) | end << kTaskBits | next, std::memory_order_release);
    }
    wake_.fetch_add(1, std::memory_order_seq_cst);
    wake_.notify_all();
    work(0, threads, job_);
    while (done_.load(std::memory_order_acquire) != tasks) relax();
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  }

 private:
  static constexpr int kTaskBits = 20, kMostThreads = 1024;
  static constexpr std::int64_t kMostTasks = (std::int64_t{1} << kTaskBits) - 1;

  // The job's number (24 bits of it), the end of the share, and its next task. A worker that was held up cannot take a
  // task of a job that is over, since the ticket it read is gone by then, unless it slept through exactly 2^24 jobs.
  // And as long as a ticket has a task, the job's fields stay.
  struct alignas(64) Share {
    std::atomic<std::uint64_t> ticket{0};
  };

  // Takes tasks of job `job`, of one's own share first, until there are none. Of the next job a late worker takes none: it
  // begins that one with its own share too.
  void work(int own, int threads, std::uint64_t job) {
    std::int64_t done = 0;  // told at the end: each telling takes the counter's cache line from the other cores
    for (int i = 0; i < threads; ++i) done += work_on(shares_[(own + i) % threads].ticket, job);
    if (done != 0) done_.fetch_add(done, std::memory_order_acq_rel);
  }

  // Returns how many tasks it did.
  std::int64_t work_on(std::atomic<std::uint64_t>& shared, std::uint64_t job) {
    std::uint64_t ticket = shared.load(std::memory_order_acquire);
    std::int64_t done = 0;
    for (;;) {
      const TaskFn fn = fn_.load(std::memory_order_relaxed);
      void* closure = closure_.load(std::memory_order_relaxed);
      const std::uint64_t task = ticket & kMostTasks, end = ticket >> kTaskBits & kMostTasks;
      if (task == end || (ticket >> (2 * kTaskBits) ^ job) << (2 * kTaskBits) != 0) return done;
      if (!shared.compare_exchange_strong(ticket, ticket + 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
        continue;
      }
      try {
        fn(closure, static_cast<std::int64_t>(task));
      } catch (...) {
        keep_failure();
      }
      ++done;
      ticket = shared.load(std::memory_order_acquire);
    }
  }

  void worker(int index, std::uint32_t seen) {
    for (;;) {
      for (int spin = 0; spin < kSpins && wake_.load(std::memory_order_acquire) == seen; ++spin) relax();
      wake_.wait(seen, std::memory_order_acquire);
      seen = wake_.load(std::memory_order_acquire);
      const int threads = threads_.load(std::memory_order_relaxed);
      if (index < threads) work(index, threads, seen);  // wake_ counts jobs
    }
  }

  // The first of a job; seen by the caller once done_ counts the task that threw it.
  void keep_failure() {
    std::lock_guard lock(failing_);
    if (!failure_) failure_ = std::current_exception();
  }

  // Returns how many of `workers` there are: fewer where the machine gave no more threads, which is not tried again.
  // Workers live as long as the process; detached, so that its end does not wait for them.
  int grow(int workers) {
    try {
      for (; size_ < workers && !refused_; ++size_) {
        const std::optional<cpu_set_t> processors = processors_of_openmp(workers + 1);
        std::thread thread([this, index = size_ + 1, seen = wake_.load()] { worker(index, seen); });
        // From here: the thread itself might not get to it before this one, on the only processor of both, is done.
        pthread_setname_np(thread.native_handle(), "swin_int8");
        if (processors) pthread_setaffinity_np(thread.native_handle(), sizeof *processors, &*processors);
        thread.detach();
      }
    } catch (...) {
      refused_ = true;
    }
    return size_ < workers ? size_ : workers;
  }

  std::mutex busy_, failing_;
  std::exception_ptr failure_;
  int size_ = 0;
  bool refused_ = false;
  std::uint64_t job_ = 0;
  // What is written while others read what lies beside it has a cache line of its own.
  alignas(64) std::atomic<std::uint32_t> wake_{0};
  alignas(64) std::atomic<TaskFn> fn_{nullptr};  // the job: read for each task
  std::atomic<void*> closure_{nullptr};
  std::atomic<int> threads_{0};
  alignas(64) std::atomic<std::int64_t> done_{0};
  Share shares_[kMostThreads];
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
    void operator()(void* p) const { release_memory(p); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local std::int64_t size = 0;
  if (bytes > size) {
    memory.reset();
    size = 0;  // and stays so where there is no memory
    memory.reset(allocate_memory(bytes));
    size = bytes;
  }
  return memory.get();
}

}  // namespace swin::cpu
