// Fibers and their meetings; see shim.h.
#include "shim.h"

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define SHIM_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SHIM_ASAN 1
#endif
#endif
#if defined(SHIM_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace shim {
namespace {

constexpr std::size_t kStackBytes = 64 << 10;
constexpr int kMaxThreads = 1024;
constexpr int kWarp = 32;

// ------------------------------------------------------------------------------------------------------ context
// switches

#if defined(__x86_64__)
// Saves the callee's registers on the running stack, its top in *from, and continues at the stack `to`.
extern "C" void shim_switch(void** from, void* to);
asm(R"(
.text
.type shim_switch, @function
shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size shim_switch, . - shim_switch
)");
struct Context {
  void* top = nullptr;
  void start(void* stack, std::size_t bytes, void (*entry)()) {
    // As after a call: at `entry` the stack is 8 bytes off a multiple of 16.
    void** p = reinterpret_cast<void**>(reinterpret_cast<std::uintptr_t>(static_cast<char*>(stack) + bytes) &
                                        ~std::uintptr_t{15});
    *--p = nullptr;
    *--p = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--p = nullptr;
    top = p;
  }
  static void change(Context& from, Context& to) { shim_switch(&from.top, to.top); }
};
#else
struct Context {
  ucontext_t context;
  void start(void* stack, std::size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

// -----------------------------------------------------------------------------------------------------------------
// state

enum class State { kReady, kAtWarp, kAtBlock, kDone };

struct Copy {
  void* target;
  const void* source;
  bool exist;
};

struct Fiber {
  Context context;
  State state;
  void* fake_stack;  // AddressSanitizer's
  unsigned mask;     // of the collective it waits at
  const char* what;
  unsigned meetings;  // this lane has taken part in
  uint3 index;
  std::vector<Copy> copies;         // not waited for, in the order they were asked for
  std::vector<std::size_t> groups;  // how many of them each group has that was committed
};

// Threads of a block in the order of a round, in which each that is ready runs until it waits or is done.
struct Round {
  std::vector<int> turn;
  std::size_t next;
  bool warps_met[kMaxThreads / kWarp];  // in which a lane came to a collective
};

struct Machine {
  std::vector<char> stacks;
  std::vector<Fiber> fibers;
  Round round;
  Context scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_bytes = 0;
  const void* left_stack = nullptr;
  std::size_t left_bytes = 0;
  bool left_scheduler = false, left_in_the_middle = false;
  int running = -1, threads = 0, done = 0, at_block = 0;
  void (*body)(void*) = nullptr;
  void* closure = nullptr;
  Order order = Order::kForward;
  std::uint64_t shuffle = 1;
  struct Free {
    void operator()(std::int8_t* p) const { ::operator delete(p, std::align_val_t{16}); }
  };
  std::unique_ptr<std::int8_t, Free> dynamic;
  cudaError_t pending = cudaSuccess;
  bool fail_next = false;
  Counters counters{};
  // A warp's deposits by parity of the meeting, side by side as meet() returns them. A lane that comes to a meeting
  // overwrites those of the last but one, which others have read: all that were let go together have run since.
  Deposit shared[2][kMaxThreads];
};
Machine m;

char* stack_of(int i) { return m.stacks.data() + i * kStackBytes; }

// Of this round; nullptr where there is none left.
Fiber* next_ready() {
  while (m.round.next < m.round.turn.size()) {
    const int i = m.round.turn[m.round.next++];
    Fiber& f = m.fibers[i];
    if (f.state != State::kReady) continue;
    m.running = i;
    threadIdx = f.index;
    ++m.counters.switches;
    return &f;
  }
  m.running = -1;
  return nullptr;
}

// From one fiber straight to the next of the round, after the last to the scheduler.
void give_way(bool last) {
  Fiber& f = m.fibers[m.running];
  Fiber* const next = next_ready();
  (void)last;
#if defined(SHIM_ASAN)
  __sanitizer_start_switch_fiber(last ? nullptr : &f.fake_stack, next ? stack_of(m.running) : m.scheduler_stack,
                                 next ? kStackBytes : m.scheduler_bytes);
#endif
  Context::change(f.context, next ? next->context : m.scheduler);
#if defined(SHIM_ASAN)
  __sanitizer_finish_switch_fiber(f.fake_stack, nullptr, nullptr);
#endif
}

void fiber_main() {
#if defined(SHIM_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &m.left_stack, &m.left_bytes);
  if (m.left_scheduler) {
    m.scheduler_stack = m.left_stack;
    m.scheduler_bytes = m.left_bytes;
  }
#endif
  m.left_scheduler = false;
  m.body(m.closure);
  m.fibers[m.running].state = State::kDone;
  ++m.done;
  give_way(true);
  std::abort();  // nobody continues a finished fiber
}

// Runs who is ready; false where nobody is.
bool run_round() {
  m.round.next = 0;
  Fiber* const first = next_ready();
  if (first == nullptr) return false;
  m.left_scheduler = true;
#if defined(SHIM_ASAN)
  __sanitizer_start_switch_fiber(&m.scheduler_fake_stack, stack_of(m.running), kStackBytes);
#endif
  Context::change(m.scheduler, first->context);
#if defined(SHIM_ASAN)
  __sanitizer_finish_switch_fiber(m.scheduler_fake_stack, nullptr, nullptr);
#endif
  return true;
}

std::string where(int thread) { return "thread " + std::to_string(thread) + " of block " + std::to_string(blockIdx.x); }

// Lets go of the lanes of one warp that wait for a complete set; true if any did.
bool release_warp(int first) {
  Fiber* const lanes = m.fibers.data() + first;
  const int here = std::min(kWarp, m.threads - first);
  bool any = false;
  for (int lane = 0; lane < here; ++lane) {
    const Fiber& f = lanes[lane];
    if (f.state != State::kAtWarp) continue;
    bool complete = here == kWarp || f.mask >> here == 0;
    for (int other = 0; other < here && complete; ++other) {
      if (!(f.mask >> other & 1u)) continue;
      const Fiber& o = lanes[other];
      complete = o.state == State::kAtWarp && o.mask == f.mask && o.meetings == f.meetings;
    }
    if (!complete) continue;
    for (int other = 0; other < here; ++other) {
      if (!(f.mask >> other & 1u)) continue;
      Fiber& o = lanes[other];
      if (o.what != f.what && std::strcmp(o.what, f.what) != 0) {
        throw std::logic_error(std::string("lanes of one warp meet at ") + f.what + " and " + o.what + ", " +
                               where(first));
      }
      o.state = State::kReady;
    }
    any = true;
  }
  return any;
}

// Where threads wait at __syncthreads and no other is left to come: those that have returned do not count.
bool release_block() {
  if (m.at_block == 0 || m.at_block + m.done < m.threads) return false;
  for (int i = 0; i < m.threads; ++i) {
    if (m.fibers[i].state == State::kAtBlock) m.fibers[i].state = State::kReady;
  }
  m.at_block = 0;
  return true;
}

void start_fibers() {
  for (int i = 0; i < m.threads; ++i) {
    Fiber& f = m.fibers[i];
    f.state = State::kReady;
    f.fake_stack = nullptr;
    f.meetings = 0;
    f.copies.clear();
    f.groups.clear();
#if defined(SHIM_ASAN)
    // What ran here before has left its functions, and with them their guards, but for the outermost ones.
    const std::size_t stale = m.left_in_the_middle ? kStackBytes : 1024;
    __asan_unpoison_memory_region(stack_of(i) + kStackBytes - stale, stale);
#endif
    f.context.start(stack_of(i), kStackBytes, fiber_main);
  }
}

void run_block() {
  start_fibers();
  m.left_in_the_middle = true;  // until the end: what is thrown leaves the fibers where they are
  std::fill(std::begin(m.round.warps_met), std::end(m.round.warps_met), false);
  std::vector<int>& turn = m.round.turn;
  turn.resize(m.threads);
  for (int i = 0; i < m.threads; ++i) turn[i] = m.order == Order::kReverse ? m.threads - 1 - i : i;
  m.done = m.at_block = 0;
  while (m.done < m.threads) {
    if (m.order == Order::kShuffled) {
      for (int i = m.threads - 1; i > 0; --i) {
        m.shuffle = m.shuffle * 6364136223846793005ull + 1442695040888963407ull;
        std::swap(turn[i], turn[(m.shuffle >> 33) % (i + 1)]);
      }
    }
    bool progress = run_round();
    for (int warp = 0; warp * kWarp < m.threads; ++warp) {
      if (!m.round.warps_met[warp]) continue;
      m.round.warps_met[warp] = false;
      progress |= release_warp(warp * kWarp);
    }
    progress |= release_block();
    if (!progress) {
      for (int i = 0; i < m.threads; ++i) {
        const Fiber& f = m.fibers[i];
        if (f.state == State::kDone || f.state == State::kReady) continue;
        throw std::logic_error(where(i) + " waits for ever at " + f.what);
      }
    }
  }
  m.left_in_the_middle = false;
}

}  // namespace

void set_order(Order order) { m.order = order; }
void fail_next_launch(cudaError_t status) {
  m.pending = status;
  m.fail_next = true;
}
Counters counters() { return m.counters; }
int lane_index() { return m.running % kWarp; }

const Deposit* meet(unsigned mask, const char* what, const Deposit& mine) {
  const int thread = m.running, warp = thread / kWarp, first = warp * kWarp;
  Fiber& f = m.fibers[thread];
  if (!(mask >> (thread - first) & 1u)) {
    std::fprintf(stderr, "shim: %s calls %s with a mask that leaves it out\n", where(thread).c_str(), what);
    std::abort();
  }
  f.mask = mask;
  f.what = what;
  f.state = State::kAtWarp;
  Deposit* const all = m.shared[f.meetings & 1];
  all[thread] = mine;
  m.round.warps_met[warp] = true;
  give_way(false);
  ++f.meetings;
  return all + first;
}

std::int8_t* dynamic_shared() { return m.dynamic.get(); }

void launch_threads(dim3 grid, dim3 block, std::size_t shared, void*, void (*body)(void*), void* closure) {
  if (m.fail_next) {
    m.fail_next = false;
    return;
  }
  const std::int64_t threads = static_cast<std::int64_t>(block.x) * block.y * block.z;
  if (threads < 1 || threads > kMaxThreads || grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffffu ||
      grid.y > 65535 || grid.z > 65535) {
    m.pending = cudaErrorInvalidConfiguration;
    return;
  }
  if (m.fibers.empty()) {
    m.fibers.resize(kMaxThreads);
    m.stacks.resize(kMaxThreads * kStackBytes);
  }
  m.threads = static_cast<int>(threads);
  for (unsigned i = 0; i < threads; ++i) {
    m.fibers[i].index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
  }
  m.body = body;
  m.closure = closure;
  // Of just that size, for AddressSanitizer to see what lies beyond; filled, for nobody to count on zeros.
  m.dynamic.reset(static_cast<std::int8_t*>(::operator new(shared, std::align_val_t{16})));
  std::memset(m.dynamic.get(), 0x7D, shared);
  gridDim = grid;
  blockDim = block;
  ++m.counters.launches;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        m.counters.threads += threads;
        run_block();
      }
    }
  }
}

void copy16_async(void* shared, const void* global, bool exist) {
  if (reinterpret_cast<std::uintptr_t>(shared) % 16 != 0 || reinterpret_cast<std::uintptr_t>(global) % 16 != 0) {
    std::fprintf(stderr, "shim: %s copies 16 bytes that are not aligned\n", where(m.running).c_str());
    std::abort();
  }
  m.fibers[m.running].copies.push_back({shared, global, exist});
}
void commit_copies() {
  Fiber& f = m.fibers[m.running];
  std::size_t before = 0;
  for (std::size_t n : f.groups) before += n;
  f.groups.push_back(f.copies.size() - before);
}
void wait_for_copies(int pending) {
  Fiber& f = m.fibers[m.running];
  while (static_cast<int>(f.groups.size()) > pending) {
    const auto end = f.copies.begin() + static_cast<std::ptrdiff_t>(f.groups.front());
    for (auto copy = f.copies.begin(); copy != end; ++copy) {
      if (copy->exist) {
        std::memcpy(copy->target, copy->source, 16);
      } else {
        std::memset(copy->target, 0, 16);
      }
    }
    f.copies.erase(f.copies.begin(), end);
    f.groups.erase(f.groups.begin());
  }
}

void mma_s8_16832(int (&acc)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  multiply_lane(acc, meet(0xffffffffu, "mma_s8_16832", {{a[0], a[1], a[2], a[3], b[0], b[1]}}), lane_index());
}

}  // namespace shim

cudaError_t cudaGetLastError() {
  const cudaError_t status = shim::m.pending;
  shim::m.pending = cudaSuccess;
  return status;
}
const char* cudaGetErrorString(cudaError_t status) {
  switch (status) {
    case cudaSuccess:
      return "no error";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    default:
      return "invalid configuration argument";
  }
}

void __syncthreads() {
  using shim::m;
  shim::Fiber& f = m.fibers[m.running];
  f.what = "__syncthreads";
  f.state = shim::State::kAtBlock;
  ++m.at_block;
  shim::give_way(false);
}

float __half2float(__half h) {
  const unsigned sign = (h.bits & 0x8000u) << 16, exponent = (h.bits >> 10) & 31u, mantissa = h.bits & 1023u;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
  return __uint_as_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

__half __float2half_rn(float x) {
  const unsigned bits = __float_as_uint(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<std::uint16_t>(0x7fffu)};
  if (magnitude >= 0x477ff000u) return {static_cast<std::uint16_t>(sign | 0x7c00u)};  // 65520 and more
  if (magnitude < 0x38800000u) {                                                      // subnormal: multiples of 2^-24
    const float steps = std::nearbyintf(std::fabs(x) * 16777216.0f);
    return {static_cast<std::uint16_t>(sign | static_cast<unsigned>(steps))};
  }
  const unsigned rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

__nv_bfloat16 __float2bfloat16_rn(float x) {
  const unsigned bits = __float_as_uint(x);
  if (x != x) return {0x7fffu};
  return {static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
