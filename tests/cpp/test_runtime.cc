// Tests of what the Python tests cannot reach: the thread pool, plans and their guards, and the op table's refusals.
// Plain checks, no framework; every failure is printed and the program's status says whether there was one.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <iterator>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "checks.h"
#include "memory.h"
#include "swin/cpu.h"
#include "swin/default_floats.h"
#include "swin/engine.h"
#include "swin/error.h"
#include "swin/shift_mask.h"
#include "thread_pool.h"

namespace {

void run(int threads, std::int64_t tasks, const std::function<void(std::int64_t)>& f) {
  swin::cpu::run_tasks(
      threads, tasks,
      [](void* g, std::int64_t task) { (*static_cast<const std::function<void(std::int64_t)>*>(g))(task); },
      const_cast<std::function<void(std::int64_t)>*>(&f));
}

void pool_runs_every_task_once() {
  for (int threads : {1, 2, 3, 7}) {
    for (std::int64_t tasks : {0, 1, 2, 5, 64, 1001}) {
      std::vector<std::atomic<int>> count(tasks);
      run(threads, tasks, [&](std::int64_t i) { ++count[i]; });
      for (auto& c : count) EXPECT(c == 1);
    }
  }
}

// Pieces that come and go in any order keep what was written to them, the small ones and those larger than a chunk.
void memory_pieces_stay_apart() {
  struct Piece {
    unsigned char* data;
    std::size_t bytes;
    unsigned char value;
  };
  std::vector<Piece> pieces;
  const auto drop = [&](std::size_t i) {
    const Piece piece = pieces[i];
    bool intact = true;
    for (std::size_t b = 0; b < piece.bytes; ++b) intact &= piece.data[b] == piece.value;
    EXPECT(intact);
    swin::cpu::release_memory(piece.data);
    pieces[i] = pieces.back();
    pieces.pop_back();
  };
  std::uint32_t random = 1;
  for (int turn = 0; turn < 2000; ++turn) {
    random = random * 1664525u + 1013904223u;
    const std::size_t sizes[] = {0, 1, 63, 64, 65, 4096, 100'000, (random >> 8) % 300'000};
    const std::size_t bytes = turn % 100 == 7 ? 9'000'000 : sizes[(random >> 24) % std::size(sizes)];
    pieces.push_back({static_cast<unsigned char*>(swin::cpu::allocate_memory(bytes)), bytes, static_cast<unsigned char>(turn)});
    EXPECT(reinterpret_cast<std::uintptr_t>(pieces.back().data) % 64 == 0);
    std::memset(pieces.back().data, turn, bytes);
    if (pieces.size() > 60) drop((random >> 4) % pieces.size());
  }
  while (!pieces.empty()) drop(pieces.size() / 2);
  swin::cpu::release_memory(nullptr);
}

#if !defined(SWIN_SANITIZED)  // which keeps what is given back, and ends the process where memory is refused
// Kilobytes of this process that are in memory; 0 where the system does not say.
long resident_kb() {
  long kb = 0;
  if (std::FILE* file = std::fopen("/proc/self/status", "r")) {
    char line[256];
    while (std::fgets(line, sizeof line, file) != nullptr) std::sscanf(line, "VmRSS: %ld", &kb);
    std::fclose(file);
  }
  return kb;
}

// What is given back is used again, or goes back to the system: 200 times 24 MB leave less than 64 MB behind.
void memory_given_back_is_gone() {
  long before = 0;
  for (int turn = 0; turn < 200; ++turn) {
    std::vector<void*> pieces;
    for (int i = 0; i < 24; ++i) {
      pieces.push_back(swin::cpu::allocate_memory(1 << 20));
      std::memset(pieces.back(), turn, 1 << 20);
    }
    for (void* piece : pieces) swin::cpu::release_memory(piece);
    if (turn == 0) before = resident_kb();
  }
  EXPECT(resident_kb() < before + (64 << 10));
}

void memory_that_is_not_there_is_refused() {
  for (const std::size_t bytes : {std::size_t{1} << 62, ~std::size_t{0}}) {
    bool refused = false;
    try {
      swin::cpu::allocate_memory(bytes);
    } catch (const std::bad_alloc&) {
      refused = true;
    }
    EXPECT(refused);
  }
}
#endif

void memory_serves_several_threads() {
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 3000; ++i) {
        const std::size_t bytes = 1000 * (1 + i % 700);
        auto* data = static_cast<unsigned char*>(swin::cpu::allocate_memory(bytes));
        data[0] = data[bytes - 1] = static_cast<unsigned char>(t);
        if (i % 16 == 0) std::this_thread::yield();
        wrong += data[0] != t || data[bytes - 1] != t;
        swin::cpu::release_memory(data);
      }
    });
  }
  for (std::thread& t : threads) t.join();
  EXPECT(wrong == 0);
}

// Many short jobs in a row: a worker late for one job must not take tasks, or fields, of the next.
void pool_survives_many_jobs() {
  std::int64_t total = 0;
  for (int job = 0; job < 20000; ++job) {
    std::atomic<std::int64_t> sum{0};
    const int tasks = 1 + job % 9;
    run(2 + job % 3, tasks, [&, job](std::int64_t i) { sum += job + i; });
    EXPECT(sum == static_cast<std::int64_t>(tasks) * job + tasks * (tasks - 1) / 2);
    total += sum;
  }
  EXPECT(total > 0);
}

// Task 0 waits for task 4, so that there are two threads for sure: the caller begins with the first half, a worker with
// the second.
void pool_gives_each_thread_a_half_of_its_own() {
  for (int job = 0; job < 100; ++job) {
    std::atomic<int> begun{0};
    std::atomic<bool> met{false}, second_half_first{false};
    const std::thread::id caller = std::this_thread::get_id();
    run(2, 8, [&](std::int64_t task) {
      if (std::this_thread::get_id() != caller && begun.fetch_add(1) == 0) {
        second_half_first = task == 4;
        met = true;
      }
      const auto start = std::chrono::steady_clock::now();
      while (task == 0 && !met && std::chrono::steady_clock::now() - start < std::chrono::seconds(10)) {
        std::this_thread::yield();
      }
    });
    EXPECT(met && second_half_first);
  }
}

// More tasks than a ticket counts are run all the same.
void pool_takes_any_number_of_tasks() {
  const std::int64_t tasks = (std::int64_t{1} << 20) + 5;
  std::atomic<std::int64_t> sum{0};
  run(2, tasks, [&](std::int64_t i) { sum += i; });
  EXPECT(sum == tasks * (tasks - 1) / 2);
}

void pool_serves_concurrent_and_nested_callers() {
  std::atomic<std::int64_t> sum{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; ++c) {
    callers.emplace_back([&] {
      for (int job = 0; job < 500; ++job) {
        run(3, 8, [&](std::int64_t) { run(2, 3, [&](std::int64_t) { ++sum; }); });
      }
    });
  }
  for (std::thread& t : callers) t.join();
  EXPECT(sum == 4 * 500 * 8 * 3);
}

// Until `done`, or ten seconds are over: then it returns false.
bool wait_for(const std::atomic<bool>& done) {
  const auto start = std::chrono::steady_clock::now();
  while (!done && std::chrono::steady_clock::now() - start < std::chrono::seconds(10)) std::this_thread::yield();
  return done;
}

// Whether `threads` threads do a job of as many tasks at the same time.
bool all_at_once(int threads) {
  std::atomic<int> begun{0};
  std::atomic<bool> all{false};
  run(threads, threads, [&](std::int64_t) {
    if (++begun == threads) all = true;
    wait_for(all);
  });
  return all;
}

void who_does_without_the_pool_does_not_hold_it() {
  for (const int threads : {1, 2}) {
    std::atomic<bool> within{false}, over{false};
    std::thread other([&, threads] {
      run(threads, 1, [&](std::int64_t) {
        within = true;
        wait_for(over);
      });
    });
    EXPECT(wait_for(within) && all_at_once(2));
    over = true;
    other.join();
  }
}

// Workers that many jobs had no task for listen no more, and are there again for a job that has.
void workers_that_rest_come_again() {
  for (int turn = 0; turn < 3; ++turn) {
    EXPECT(all_at_once(4));
    for (int job = 0; job < 1000; ++job) run(2, 4, [](std::int64_t) {});
    EXPECT(all_at_once(3) && all_at_once(2));
  }
}

// The caller sleeps by then, and is woken.
void a_caller_waits_for_a_long_last_task() {
  for (const bool workers : {false, true}) {
    const std::thread::id caller = std::this_thread::get_id();
    std::atomic<bool> begun{false};
    std::atomic<int> done{0};
    run(2, 2, [&](std::int64_t) {
      const bool own = std::this_thread::get_id() == caller;
      if (!own) begun = true;
      if (own) wait_for(begun);  // so that each has a task
      if (own != workers) std::this_thread::sleep_for(std::chrono::milliseconds(50));
      ++done;
    });
    EXPECT(done == 2);
  }
}

#if !defined(SWIN_SANITIZED) && defined(__x86_64__)  // whose allocators, or an emulator, may not be forked like that

// What a process answers that was forked here: status 0 in time.
template <class F>
bool child_does(F&& f) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    _exit(f() ? 0 : 1);
  }
  int status = 0;
  return child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

// Other threads are in the allocator most of the time.
void a_child_forked_meanwhile_has_memory_and_threads() {
  std::atomic<bool> over{false};
  std::vector<std::thread> busy;
  for (int t = 0; t < 2; ++t) {
    busy.emplace_back([&] {
      while (!over) swin::cpu::release_memory(swin::cpu::allocate_memory(9'000'000));
    });
  }
  for (int i = 0; i < 60; ++i) {
    EXPECT(child_does([] {
      swin::cpu::release_memory(swin::cpu::allocate_memory(9'000'000));
      std::atomic<int> count{0};
      run(2, 10, [&](std::int64_t) { ++count; });
      return count == 10;
    }));
  }
  over = true;
  for (std::thread& t : busy) t.join();
}

#endif

// A worker must not be given a signal that the program's own threads have blocked, to wait for it.
void workers_take_no_signals_of_the_process() {
  const std::thread::id caller = std::this_thread::get_id();
  std::atomic<bool> begun{false}, wrong{false};
  run(2, 2, [&](std::int64_t) {
    if (std::this_thread::get_id() == caller) {
      wait_for(begun);
    } else {
      sigset_t blocked;
      pthread_sigmask(SIG_BLOCK, nullptr, &blocked);
      wrong = sigismember(&blocked, SIGTERM) == 0 || sigismember(&blocked, SIGSEGV) == 1;
      begun = true;
    }
  });
  sigset_t blocked;
  pthread_sigmask(SIG_BLOCK, nullptr, &blocked);
  EXPECT(begun && !wrong && sigismember(&blocked, SIGTERM) == 0);
}

// Of arithmetic: what fegetround reads is another register on x86. A third times three is less, or more, in the others.
bool rounds_to_nearest() {
  volatile float one = 1, third = one / 3;
  return third * 3 == 1;
}

// Begins the tests, since the pool's first worker has to be made here, by a thread that rounds up. (A child has a new pool
// too, but emulators of other processors end one that starts threads.)
void workers_do_not_round_as_their_maker_does() {
  std::fesetround(FE_UPWARD);
  std::atomic<int> begun{0}, nearest{0};
  std::atomic<bool> all{false};
  run(2, 2, [&](std::int64_t) {
    nearest += rounds_to_nearest();
    if (++begun == 2) all = true;
    wait_for(all);
  });
  EXPECT(all && nearest == 1 && !rounds_to_nearest());
  std::fesetround(FE_TONEAREST);
}

void floats_are_the_callers_again() {
  std::fesetround(FE_DOWNWARD);
  std::feclearexcept(FE_ALL_EXCEPT);
  {
    const swin::DefaultFloats floats;
    EXPECT(rounds_to_nearest());
    volatile float zero = 0, infinity = 1 / zero;
    static_cast<void>(infinity);
  }
  EXPECT(!rounds_to_nearest() && std::fegetround() == FE_DOWNWARD);
#if defined(__x86_64__)
  EXPECT(std::fetestexcept(FE_DIVBYZERO) == 0);
#endif
  std::fesetround(FE_TONEAREST);
}

void scratch_is_aligned_and_each_threads_own() {
  void* here = swin::cpu::thread_scratch(100);
  EXPECT(reinterpret_cast<std::uintptr_t>(here) % 64 == 0);
  EXPECT(swin::cpu::thread_scratch(50) == here);
  void* there = nullptr;
  std::thread([&] { there = swin::cpu::thread_scratch(100); }).join();
  EXPECT(there != nullptr && there != here);
}

#if !defined(SWIN_SANITIZED)  // which ends the process where so much is asked for
void scratch_comes_again_after_memory_ended() {
  std::thread([] {
    EXPECT(swin::cpu::thread_scratch(1000) != nullptr);
    bool thrown = false;
    try {
      swin::cpu::thread_scratch(std::int64_t{1} << 62);
    } catch (const std::bad_alloc&) {
      thrown = true;
    }
    EXPECT(thrown);
    void* small = swin::cpu::thread_scratch(500);
    EXPECT(small != nullptr);
    if (small != nullptr) std::memset(small, 1, 500);
  }).join();
}
#endif

void what_a_task_throws_comes_to_the_caller() {
  for (const int threads : {1, 4}) {
    std::atomic<int> done{0};
    auto task = [&](std::int64_t i) {
      if (i % 10 == 3) throw std::bad_alloc();
      ++done;
    };
    using Task = decltype(task);
    const auto call = [](void* t, std::int64_t i) { (*static_cast<Task*>(t))(i); };
    for (int round = 0; round < 50; ++round) {
      bool thrown = false;
      done = 0;
      try {
        swin::cpu::run_tasks(threads, 40, call, &task);
      } catch (const std::bad_alloc&) {
        thrown = true;
      }
      EXPECT(thrown && (threads == 1 || done == 36));
    }
    auto quiet = [&](std::int64_t) { ++done; };
    using Quiet = decltype(quiet);
    done = 0;
    swin::cpu::run_tasks(threads, 40, [](void* t, std::int64_t i) { (*static_cast<Quiet*>(t))(i); }, &quiet);
    EXPECT(done == 40);
  }
}

#if !defined(SWIN_SANITIZED) && defined(__x86_64__)  // shadow memory, or an emulator, has no room within such a limit
void a_machine_that_gives_no_threads_is_worked_on_with_fewer() {
  const pid_t child = fork();  // starts with a new pool
  if (child == 0) {
    rlimit none{};
    none.rlim_cur = none.rlim_max = 1 << 20;  // no stack of a thread fits
    setrlimit(RLIMIT_AS, &none);
    std::atomic<int> done{0};
    const auto call = [](void* count, std::int64_t) { ++*static_cast<std::atomic<int>*>(count); };
    for (int i = 0; i < 3; ++i) swin::cpu::run_tasks(8, 100, call, &done);
    _exit(done == 300 ? 0 : 1);
  }
  int status = 0;
  EXPECT(child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}
#endif

// A backend that lacks an op, and one whose op writes too far.
class TestBackend : public swin::Backend {
 public:
  explicit TestBackend(swin::OpTable table) : table_(table) {}
  std::string name() const override { return "test"; }
  std::string variant() const override { return "test"; }
  const swin::OpTable& ops() const override { return table_; }
  swin::DeviceBuffer allocate(std::size_t n) const override { return swin::cpu_backend().allocate(n); }
  void fill(void* d, int byte, std::size_t n, const swin::ExecContext&) const override { std::memset(d, byte, n); }
  void copy_to_host(void* h, const void* d, std::size_t n, const swin::ExecContext&) const override {
    std::memcpy(h, d, n);
  }
  void copy(void* to, const void* from, std::size_t n, const swin::ExecContext&) const override { std::memcpy(to, from, n); }
  swin::Parameter upload_parameter(const swin::TensorView& t) const override {
    return swin::cpu_backend().upload_parameter(t);
  }
  swin::Parameter upload_float32(const swin::TensorView& t) const override { return upload_parameter(t); }
  swin::Parameter upload_int32(const swin::TensorView& t) const override { return swin::cpu_backend().upload_int32(t); }
  std::unique_ptr<swin::PackedWeight> pack_weight(const swin::TensorView& t, swin::InputRange input) const override {
    return swin::cpu_backend().pack_weight(t, input);
  }
  std::int64_t score_pitch(std::int64_t n) const override { return n; }
  bool mlp_keeps_hidden(std::int64_t, std::int64_t, std::int64_t) const override { return true; }

 private:
  swin::OpTable table_;
};

void a_missing_op_is_an_error_that_names_it() {
  const TestBackend backend{swin::OpTable{}};
  float x[4] = {};
  std::int8_t q[4] = {};
  const swin::DequantizeArgs args{{q, swin::DType::kS8, {2, 2}}, {x, swin::DType::kF32, {2, 2}}, 1.0f};
  expect_error<swin::UnsupportedError>("dequantize", [&] { swin::run_op(backend.ops(), "test", args, {}); }, __LINE__);
  expect_error<swin::ValueError>("no operation", [] { swin::op_cost(swin::OpArgs{}); }, __LINE__);
}

void a_linear_operation_refuses_a_weight_for_other_inputs() {
  swin::OpTable table;
  table.linear_s8 = [](const swin::LinearS8Args&, const swin::ExecContext&) {};
  const TestBackend backend{table};
  std::int8_t x[8] = {}, w[12] = {}, out[6] = {};
  float scale[3] = {};
  const auto run = [&](swin::InputRange input) {
    const auto packed = backend.pack_weight({w, swin::DType::kS8, {3, 4}}, input);
    swin::LinearS8Args args;
    args.x = {x, swin::DType::kS8, {2, 4}};
    args.w = packed.get();
    args.scale = {scale, swin::DType::kF32, {3}};
    args.out = {out, swin::DType::kS8, {2, 3}};
    swin::run_op(backend.ops(), "test", args, {});
  };
  run(swin::InputRange::kSigned);
  expect_error<swin::ValueError>("packed for inputs of 0..127", [&] { run(swin::InputRange::kNonNegative); }, __LINE__);
}

void a_plan_notices_writes_behind_a_buffer() {
  swin::OpTable table;
  table.dequantize = [](const swin::DequantizeArgs& a, const swin::ExecContext&) {
    std::memset(a.out.data, 0, a.out.nbytes() + 1);
  };
  const TestBackend backend{table};
  swin::Plan plan(backend, {1, 8, 8});
  void* in = plan.buffer("in", swin::DType::kS8, 64);
  void* out = plan.buffer("out", swin::DType::kF32, 64);
  plan.add("overrun", swin::OpKind::kFused, 2, 1,
           swin::DequantizeArgs{{in, swin::DType::kS8, {1, 64}}, {out, swin::DType::kF32, {1, 64}}, 1.0f});
  plan.run({}, {}, false, nullptr);
  expect_error<swin::Error>(
      "wrote past the end of buffer 'out' (stage 2, block 1)", [&] { plan.run({}, {}, true, nullptr); }, __LINE__);
}

void a_plan_takes_over_the_memory_of_another() {
  swin::OpTable table;
  table.dequantize = [](const swin::DequantizeArgs& a, const swin::ExecContext&) {
    std::memset(a.out.data, 0, a.out.nbytes() + 1);
  };
  const TestBackend backend{table};
  auto first = std::make_unique<swin::Plan>(backend, swin::InputShape{1, 8, 8});
  void* small = first->buffer("small", swin::DType::kS8, 100);
  void* large = first->buffer("large", swin::DType::kS8, 5000);
  void* middle = first->buffer("middle", swin::DType::kS8, 1000);
  swin::Plan second(backend, {2, 8, 8}, {}, std::move(first));
  EXPECT(second.buffer("as large", swin::DType::kS8, 900) == middle);  // the smallest that does
  void* fresh = second.buffer("larger than all", swin::DType::kS8, 6000);
  EXPECT(fresh != small && fresh != large && fresh != middle);
  void* out = second.buffer("out", swin::DType::kF32, 20);
  EXPECT(out == small);
  EXPECT(second.buffer("the last", swin::DType::kS8, 4) == large);
  EXPECT(second.workspace_bytes() == 900 + 6000 + 80 + 4 + 4 * 64);
  second.release_spare();
  // Guards lie behind what the new buffers hold, not where the old ones ended.
  second.add("overrun", swin::OpKind::kFused, 0, 0,
             swin::DequantizeArgs{{large, swin::DType::kS8, {1, 20}}, {out, swin::DType::kF32, {1, 20}}, 1.0f});
  expect_error<swin::Error>("past the end of buffer 'out'", [&] { second.run({}, {}, true, nullptr); }, __LINE__);
}

void a_plan_that_counts_has_no_memory() {
  const TestBackend backend{swin::OpTable{}};
  swin::Plan plan(backend, {1, 8, 8}, {}, swin::Plan::counter(backend));
  EXPECT(plan.buffer("more than there is", swin::DType::kF32, std::int64_t{1} << 50) == nullptr);
  EXPECT(plan.buffer("small", swin::DType::kS8, 100) == nullptr);
  EXPECT(plan.workspace_bytes() == (std::int64_t{1} << 52) + 100 + 2 * 64);
  const auto make = []() -> swin::Parameter { throw std::bad_alloc(); };
  EXPECT(plan.keep({nullptr, swin::DType::kF16, {std::int64_t{1} << 40, 3}}, make).dim(1) == 3);
  EXPECT(plan.workspace_bytes() == (std::int64_t{1} << 52) + (std::int64_t{6} << 40) + 100 + 2 * 64);
}

void what_a_plan_keeps_is_of_its_workspace() {
  const TestBackend backend{swin::OpTable{}};
  swin::Plan plan(backend, {1, 8, 8});
  float values[6] = {1, 2, 3, 4, 5, 6};
  const auto make = [&] { return backend.upload_parameter({values, swin::DType::kF32, {2, 3}}); };
  EXPECT(plan.keep({nullptr, swin::DType::kF32, {2, 3}}, make).as<float>()[5] == 6);
  EXPECT(plan.workspace_bytes() == 6 * 4);
  plan.buffer("small", swin::DType::kS8, 100);
  EXPECT(plan.workspace_bytes() == 6 * 4 + 100 + 64);
}

// Of images of any size in windows of 2 x 3, shifted along both sides, one, or none.
void masks_are_counted_as_they_are_made() {
  for (std::int64_t height = 2; height <= 6; height += 2) {
    for (std::int64_t width = 3; width <= 9; width += 3) {
      for (int shifted = 0; shifted < 4; ++shifted) {
        swin::StageGeometry g{};
        g.height = height, g.width = width, g.window_h = 2, g.window_w = 3, g.shifts = true;
        g.shift_h = shifted % 2, g.shift_w = shifted / 2;
        EXPECT(swin::shift_mask_count(g) == swin::shift_masks(g).count());
      }
    }
  }
}

void masks_of_shifted_windows() {
  // 4 x 6 tokens in windows of 2 x 3 shifted by (1, 1); by (0, 1) there is no edge between rows.
  swin::StageGeometry g{};
  g.height = 4, g.width = 6, g.window_h = 2, g.window_w = 3, g.shift_h = 1, g.shift_w = 1, g.shifts = true;
  swin::DistinctMasks m = swin::shift_masks(g);
  EXPECT((m.of_window == std::vector<std::int32_t>{-1, 0, 1, 2}) && m.count() == 3);
  const auto open = [&](std::int64_t kind, std::int64_t i, std::int64_t j) { return m.masks[(kind * 6 + i) * 6 + j] == 0; };
  EXPECT(open(0, 0, 1) && open(0, 0, 4) && !open(0, 1, 2) && open(0, 2, 5));  // the third column came around
  EXPECT(open(1, 0, 2) && !open(1, 0, 3) && open(1, 3, 5));                   // the second row did
  EXPECT(open(2, 0, 1) && !open(2, 1, 2) && !open(2, 1, 4) && !open(2, 2, 4) && open(2, 3, 4));
  std::vector<float> all = m.expanded();
  EXPECT(all.size() == 4 * 36 && std::all_of(all.begin(), all.begin() + 36, [](float x) { return x == 0; }));
  const swin::DistinctMasks again = swin::distinct_masks({all.data(), swin::DType::kF32, {4, 6, 6}});
  EXPECT(again.of_window == m.of_window && again.masks == m.masks && again.expanded() == all);
  const swin::WindowMasks up = swin::upload_masks(m, swin::cpu_backend());
  EXPECT(up.masks.view.dim(0) == 3 && up.of_window.view.as<std::int32_t>()[3] == 2);
  g.shift_h = 0;
  m = swin::shift_masks(g);
  EXPECT((m.of_window == std::vector<std::int32_t>{-1, 0, -1, 0}) && m.count() == 1);
  // Masks that are none at all, and ones that differ in a last bit.
  std::vector<float> none(2 * 36, 0.0f);
  none[5] = -0.0f;
  const swin::DistinctMasks nothing = swin::distinct_masks({none.data(), swin::DType::kF32, {2, 6, 6}});
  EXPECT((nothing.of_window == std::vector<std::int32_t>{-1, -1}) && nothing.count() == 0);
  EXPECT(!swin::upload_masks(nothing, swin::cpu_backend()).masks.view);
  none[35] = 1, none[71] = 1.0000001f;
  none[5] = 0;
  EXPECT(swin::distinct_masks({none.data(), swin::DType::kF32, {2, 6, 6}}).count() == 2);
}

void half_precision_parameters_are_exact() {
  // 1.0, smallest subnormal, largest, -0.5, a subnormal, infinity
  std::uint16_t half[] = {0x3c00, 0x0001, 0x7bff, 0xb800, 0x03ff, 0x7c00};
  const float wanted[] = {1.0f, 5.9604644775390625e-8f, 65504.0f, -0.5f, 6.097555160522461e-5f, __builtin_inff()};
  const swin::Parameter p = swin::cpu_backend().upload_parameter({half, swin::DType::kF16, {6}});
  for (int i = 0; i < 6; ++i) EXPECT(p.view.as<float>()[i] == wanted[i]);
}

void configurations_that_are_no_swin_are_refused() {
  swin::ModelConfig c;
  c.img_h = c.img_w = 29;
  c.patch_size = 2;
  c.in_chans = 1;
  c.embed_dim = 8;
  c.depths = {1, 1};
  c.num_heads = {1, 1};
  c.window_size = {5, 5};
  const auto make = [&](const char* name) { swin::make_graph(name, c, {}, swin::cpu_backend()); };
  expect_error<swin::ShapeError>("29x29 does not divide into patches of 2", [&] { make("ft_int8"); }, __LINE__);
  c.img_h = c.img_w = 30;  // 15x15 tokens, then 8x8: padded to windows of 5, and to be merged
  c.num_heads = {3, 1};
  expect_error<swin::ShapeError>("8 channels do not divide into 3 heads", [&] { make("ft_int8"); }, __LINE__);
  c.num_heads = {1, 1};
  expect_error<swin::ShapeError>("found 0 tensors; 48 are needed", [&] { make("geluless_int8"); }, __LINE__);
  expect_error<swin::ValueError>("no graph 'other'", [&] { make("other"); }, __LINE__);
}

}  // namespace

int main() {
  workers_do_not_round_as_their_maker_does();
  memory_pieces_stay_apart();
#if !defined(SWIN_SANITIZED)
  memory_given_back_is_gone();
  memory_that_is_not_there_is_refused();
#endif
  memory_serves_several_threads();
  pool_runs_every_task_once();
  pool_survives_many_jobs();
  pool_gives_each_thread_a_half_of_its_own();
  pool_takes_any_number_of_tasks();
  pool_serves_concurrent_and_nested_callers();
  who_does_without_the_pool_does_not_hold_it();
  workers_that_rest_come_again();
  a_caller_waits_for_a_long_last_task();
  workers_take_no_signals_of_the_process();
  floats_are_the_callers_again();
  scratch_is_aligned_and_each_threads_own();
  what_a_task_throws_comes_to_the_caller();
#if !defined(SWIN_SANITIZED)
  scratch_comes_again_after_memory_ended();
#if defined(__x86_64__)
  a_child_forked_meanwhile_has_memory_and_threads();
  a_machine_that_gives_no_threads_is_worked_on_with_fewer();
#endif
#endif
  a_missing_op_is_an_error_that_names_it();
  a_linear_operation_refuses_a_weight_for_other_inputs();
  a_plan_notices_writes_behind_a_buffer();
  a_plan_takes_over_the_memory_of_another();
  a_plan_that_counts_has_no_memory();
  what_a_plan_keeps_is_of_its_workspace();
  masks_are_counted_as_they_are_made();
  masks_of_shifted_windows();
  half_precision_parameters_are_exact();
  configurations_that_are_no_swin_are_refused();
  std::printf(g_failures ? "%d failed\n" : "all passed\n", g_failures);
  return g_failures ? 1 : 0;
}
