#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "memory.h"
#include "swin/default_floats.h"
#include "swin/fork_mutex.h"

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

// A caller waits longer for the last tasks of its job. Then it sleeps: whoever has them may need its processor.
constexpr int kCallersSpins = 16 * kSpins;

// Behind so many jobs in succession that had no task for it, several forward passes, a worker no longer listens.
constexpr int kJobsUnheeded = 256;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The processors for workers of a caller that has fewer than the `threads` it asks for; else none, and workers have the
// caller's, as threads do. A server may have bound the thread that calls, and OpenMP, told to bind its threads
// (OMP_PROC_BIND, KMP_AFFINITY), begins with the one that loads it: all workers would share that one's processor. They
// get those of the process's first thread and those that OpenMP would use as well.
std::optional<cpu_set_t> processors_beside_callers(int threads) {
  cpu_set_t callers, first;
  if (pthread_getaffinity_np(pthread_self(), sizeof callers, &callers) != 0 || CPU_COUNT(&callers) >= threads) {
    return std::nullopt;
  }
  cpu_set_t all = callers;
  if (sched_getaffinity(getpid(), sizeof first, &first) == 0) CPU_OR(&all, &all, &first);
  if (omp_get_num_places == nullptr || omp_get_place_num_procs == nullptr || omp_get_place_proc_ids == nullptr) {
    return all;
  }
  for (int place = 0; place < omp_get_num_places(); ++place) {
    std::vector<int> ids(static_cast<std::size_t>(omp_get_place_num_procs(place)));
    omp_get_place_proc_ids(place, ids.data());
    for (const int id : ids) {
      if (id >= 0 && id < CPU_SETSIZE) CPU_SET(static_cast<std::size_t>(id), &all);
    }
  }
  return all;
}

// While it lives, the calling thread takes no signal that is sent to the process, and threads it starts never do: a
// program that blocks one in its own threads, to wait for it there, does not know of this library's. What a thread's
// own instructions raise stays, and what profilers send.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    for (const int own : {SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGPROF, SIGSEGV, SIGSYS, SIGTRAP}) sigdelset(&all, own);
    blocked_ = pthread_sigmask(SIG_SETMASK, &all, &before_) == 0;
  }
  ~SignalsBlocked() {
    if (blocked_) pthread_sigmask(SIG_SETMASK, &before_, nullptr);
  }
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;

 private:
  sigset_t before_;
  bool blocked_;
};

// Each thread of a job has a share of its tasks, in their order, and takes of the other shares when its own is done. So
// a core meets the rows that it wrote in the operation before, and finds them in its own cache.
class ThreadPool {
 public:
  void run(int threads, std::int64_t tasks, TaskFn fn, void* closure) {
    if (threads > kMostThreads) threads = kMostThreads;
    if (threads > 1 && tasks > 1 && tasks <= kMostTasks) {
      std::unique_lock lock(busy_, std::try_to_lock);
      if (lock.owns_lock() && (threads = grow(threads - 1) + 1) > 1) {
        run_job(threads, tasks, fn, closure);
        return;
      }
    }  // nobody waits for the pool behind a caller that does without it
    for (std::int64_t i = 0; i < tasks; ++i) fn(closure, i);
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

  // Of the one caller that holds the pool.
  void run_job(int threads, std::int64_t tasks, TaskFn fn, void* closure) {
    have_listen(threads);
    fn_.store(fn, std::memory_order_relaxed);
    closure_.store(closure, std::memory_order_relaxed);
    threads_.store(threads, std::memory_order_relaxed);
    told_.done.store(0, std::memory_order_relaxed);
    ++job_;
    for (std::int64_t i = 0; i < threads; ++i) {
      const std::uint64_t next = i * tasks / threads, end = (i + 1) * tasks / threads;
      shares_[i].ticket.store(job_ << (2 * kTaskBits) | end << kTaskBits | next, std::memory_order_release);
    }
    wake_.fetch_add(1, std::memory_order_seq_cst);
    wake_.notify_all();
    work(0, threads, job_);
    wait_until_done(static_cast<std::int32_t>(tasks));
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  }

  // Workers beyond those that jobs have had tasks for of late sleep through further ones, however many there are.
  void have_listen(int threads) {
    const int listening = listening_.load(std::memory_order_relaxed);
    most_of_late_ = std::max(most_of_late_, threads);
    if (threads > listening) {
      listening_.store(threads, std::memory_order_release);
      listening_.notify_all();
      jobs_of_late_ = 0;
    } else if (++jobs_of_late_ >= kJobsUnheeded) {
      listening_.store(most_of_late_, std::memory_order_relaxed);
      most_of_late_ = jobs_of_late_ = 0;
    }
  }

  void wait_until_done(std::int32_t tasks) {
    std::int32_t done = told_.done.load(std::memory_order_acquire);
    for (int spin = 0; done != tasks; done = told_.done.load(std::memory_order_acquire)) {
      if (spin < kCallersSpins) {
        ++spin;
        relax();
      } else {
        told_.done.wait(done, std::memory_order_acquire);
      }
    }
  }

  // Takes tasks of job `job`, of one's own share first, until there are none. Of the next job a late worker takes none: it
  // begins that one with its own share too.
  void work(int own, int threads, std::uint64_t job) {
    std::int32_t done = 0;  // told at the end: each telling takes the counter's cache line from the other cores
    for (int i = 0; i < threads; ++i) done += work_on(shares_[(own + i) % threads].ticket, job);
    if (done == 0) return;
    told_.done.fetch_add(done, std::memory_order_acq_rel);
    if (own != 0) told_.done.notify_one();  // the caller, should it sleep
  }

  // Returns how many tasks it did.
  std::int32_t work_on(std::atomic<std::uint64_t>& shared, std::uint64_t job) {
    std::uint64_t ticket = shared.load(std::memory_order_acquire);
    std::int32_t done = 0;
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
    const DefaultFloats floats;  // a thread begins with its maker's
    for (;;) {
      for (int listening; (listening = listening_.load(std::memory_order_acquire)) <= index;) {
        listening_.wait(listening, std::memory_order_acquire);
      }
      for (int spin = 0; spin < kSpins && wake_.load(std::memory_order_acquire) == seen; ++spin) relax();
      wake_.wait(seen, std::memory_order_acquire);
      seen = wake_.load(std::memory_order_acquire);
      const int threads = threads_.load(std::memory_order_relaxed);
      if (index < threads) work(index, threads, seen);  // wake_ counts jobs
    }
  }

  // The first of a job; seen by the caller once the count is told of the task that threw it.
  void keep_failure() {
    std::lock_guard lock(failing_);
    if (!failure_) failure_ = std::current_exception();
  }

  // Returns how many of `workers` there are: fewer where the machine gave no more threads, which is not tried again.
  // Workers live as long as the process; detached, so that its end does not wait for them.
  int grow(int workers) {
    try {
      for (; size_ < workers && !refused_; ++size_) {
        const std::optional<cpu_set_t> processors = processors_beside_callers(workers + 1);
        const SignalsBlocked blocked;
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
  int most_of_late_ = 0, jobs_of_late_ = 0;  // the most threads that a job had, of how many jobs
  // What is written while others read what lies beside it has a cache line of its own. And of what is waited for, no
  // two have the same place in their lines: libstdc++ counts those who wait by it, and tells them by a system call if
  // any do.
  alignas(64) std::atomic<std::uint32_t> wake_{0};
  std::atomic<std::int32_t> listening_{0};       // threads that wake_ is for: read with it, written seldom
  alignas(64) std::atomic<TaskFn> fn_{nullptr};  // the job: read for each task
  std::atomic<void*> closure_{nullptr};
  std::atomic<int> threads_{0};
  struct alignas(64) {
    std::int32_t unused[2];
    std::atomic<std::int32_t> done{0};
  } told_;
  Share shares_[kMostThreads];
};

std::atomic<ThreadPool*> g_pool{nullptr};
ForkMutex g_making;

// A forked child (a data loader's worker) has no threads but its own: it starts with a new pool.
void forget_pool() { g_pool.store(nullptr); }

// Never destroyed: workers may still look at it while the process ends.
ThreadPool& pool() {
  if (ThreadPool* existing = g_pool.load(std::memory_order_acquire)) return *existing;
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
  (void)registered;
  std::lock_guard lock(g_making);
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
