// Fibers and their meetings; see shim.h.
#include "shim.h"

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "arithmetic.h"

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
  Deposit deposit;
  std::deque<std::vector<Copy>> groups;  // of copies not waited for, the open one last
};

struct Machine {
  std::vector<char> stacks;
  std::vector<Fiber> fibers;
  Context scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_bytes = 0;
  int running = -1, threads = 0;
  void (*body)(void*) = nullptr;
  void* closure = nullptr;
  std::string failure;
  Order order = Order::kForward;
  std::uint64_t shuffle = 1;
  struct Free {
    void operator()(std::int8_t* p) const { ::operator delete(p, std::align_val_t{16}); }
  };
  std::unique_ptr<std::int8_t, Free> dynamic;
  cudaError_t pending = cudaSuccess;
  bool fail_next = false;
  Counters counters{};
  // A warp's deposits by parity of the meeting, side by side as meet() returns them.
  Deposit shared[2][kMaxThreads];
};

Machine& machine() {
  static std::unique_ptr<Machine> m = std::make_unique<Machine>();
  return *m;
}

char* stack_of(int i) { return machine().stacks.data() + i * kStackBytes; }

void to_scheduler(bool last) {
  Machine& m = machine();
  Fiber& f = m.fibers[m.running];
  (void)last;
#if defined(SHIM_ASAN)
  __sanitizer_start_switch_fiber(last ? nullptr : &f.fake_stack, m.scheduler_stack, m.scheduler_bytes);
#endif
  Context::change(f.context, m.scheduler);
#if defined(SHIM_ASAN)
  __sanitizer_finish_switch_fiber(f.fake_stack, nullptr, nullptr);
#endif
}

void fiber_main() {
  Machine& m = machine();
#if defined(SHIM_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_stack, &m.scheduler_bytes);
#endif
  m.body(m.closure);
  m.fibers[m.running].state = State::kDone;
  to_scheduler(true);
  std::abort();  // nobody continues a finished fiber
}

void run_fiber(int i) {
  Machine& m = machine();
  Fiber& f = m.fibers[i];
  m.running = i;
  threadIdx = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
  ++m.counters.switches;
#if defined(SHIM_ASAN)
  __sanitizer_start_switch_fiber(&m.scheduler_fake_stack, stack_of(i), kStackBytes);
#endif
  Context::change(m.scheduler, f.context);
#if defined(SHIM_ASAN)
  __sanitizer_finish_switch_fiber(m.scheduler_fake_stack, nullptr, nullptr);
#endif
  m.running = -1;
}

std::string where(int thread) { return "thread " + std::to_string(thread) + " of block " + std::to_string(blockIdx.x); }

// Lets go of the lanes of one warp that wait for a complete set; true if any did.
bool release_warp(int first) {
  Machine& m = machine();
  bool any = false;
  for (int lane = 0; lane < kWarp && first + lane < m.threads; ++lane) {
    Fiber& f = m.fibers[first + lane];
    if (f.state != State::kAtWarp) continue;
    bool complete = true;
    for (int other = 0; other < kWarp; ++other) {
      if (!(f.mask >> other & 1u)) continue;
      if (first + other >= m.threads) {
        complete = false;
        break;
      }
      const Fiber& o = m.fibers[first + other];
      if (o.state != State::kAtWarp || o.mask != f.mask || o.meetings != f.meetings) complete = false;
    }
    if (!complete) continue;
    for (int other = 0; other < kWarp; ++other) {
      if (!(f.mask >> other & 1u)) continue;
      Fiber& o = m.fibers[first + other];
      if (std::strcmp(o.what, f.what) != 0) {
        throw std::logic_error(std::string("lanes of one warp meet at ") + f.what + " and " + o.what + ", " +
                               where(first));
      }
      m.shared[f.meetings & 1][first + other] = o.deposit;
    }
    for (int other = 0; other < kWarp; ++other) {
      if (f.mask >> other & 1u && other != lane) m.fibers[first + other].state = State::kReady;
    }
    f.state = State::kReady;
    any = true;
  }
  return any;
}

void run_block(int threads) {
  Machine& m = machine();
  for (int i = 0; i < threads; ++i) {
    Fiber& f = m.fibers[i];
    f.state = State::kReady;
    f.fake_stack = nullptr;
    f.meetings = 0;
    f.groups.assign(1, {});
#if defined(SHIM_ASAN)
    __asan_unpoison_memory_region(stack_of(i), kStackBytes);
#endif
    f.context.start(stack_of(i), kStackBytes, fiber_main);
  }
  std::vector<int> turn(threads);
  for (int i = 0; i < threads; ++i) turn[i] = m.order == Order::kReverse ? threads - 1 - i : i;
  int done = 0;
  while (done < threads) {
    if (m.order == Order::kShuffled) {
      for (int i = threads - 1; i > 0; --i) {
        m.shuffle = m.shuffle * 6364136223846793005ull + 1442695040888963407ull;
        std::swap(turn[i], turn[(m.shuffle >> 33) % (i + 1)]);
      }
    }
    bool progress = false;
    for (int i : turn) {
      if (m.fibers[i].state != State::kReady) continue;
      run_fiber(i);
      progress = true;
      if (m.fibers[i].state == State::kDone) ++done;
    }
    for (int first = 0; first < threads; first += kWarp) progress |= release_warp(first);
    int waiting = 0;
    for (int i = 0; i < threads; ++i) waiting += m.fibers[i].state == State::kAtBlock;
    if (waiting > 0 && waiting + done == threads) {  // threads that have returned do not count
      for (int i = 0; i < threads; ++i) {
        if (m.fibers[i].state == State::kAtBlock) m.fibers[i].state = State::kReady;
      }
      progress = true;
    }
    if (!progress) {
      for (int i = 0; i < threads; ++i) {
        const Fiber& f = m.fibers[i];
        if (f.state == State::kDone || f.state == State::kReady) continue;
        throw std::logic_error(where(i) + " waits for ever at " + f.what);
      }
    }
  }
}

}  // namespace

void set_order(Order order) { machine().order = order; }
void fail_next_launch(cudaError_t status) {
  machine().pending = status;
  machine().fail_next = true;
}
Counters counters() { return machine().counters; }
int lane_index() { return machine().running % kWarp; }

const Deposit* meet(unsigned mask, const char* what, const Deposit& mine) {
  Machine& m = machine();
  Fiber& f = m.fibers[m.running];
  const int thread = m.running, first = thread / kWarp * kWarp;
  if (!(mask >> (thread - first) & 1u)) {
    std::fprintf(stderr, "shim: %s calls %s with a mask that leaves it out\n", where(thread).c_str(), what);
    std::abort();
  }
  f.mask = mask;
  f.what = what;
  f.deposit = mine;
  f.state = State::kAtWarp;
  to_scheduler(false);
  return m.shared[f.meetings++ & 1] + first;
}

std::int8_t* dynamic_shared() { return machine().dynamic.get(); }

void launch_threads(dim3 grid, dim3 block, std::size_t shared, void*, void (*body)(void*), void* closure) {
  Machine& m = machine();
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
        run_block(m.threads);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------------
// intrinsics

float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;  // ftz
}
float reciprocal_approx(float x) { return 1.0f / x; }

std::uint32_t pack_saturated_s8(int a, int b, int c, int d) {
  std::uint32_t all = 0;
  const int values[4] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) {
    const int clamped = values[i] < -128 ? -128 : values[i] > 127 ? 127 : values[i];
    all |= (static_cast<std::uint32_t>(clamped) & 255u) << (8 * i);
  }
  return all;
}

void copy16_async(void* shared, const void* global, bool exist) {
  if (reinterpret_cast<std::uintptr_t>(shared) % 16 != 0 || reinterpret_cast<std::uintptr_t>(global) % 16 != 0) {
    std::fprintf(stderr, "shim: %s copies 16 bytes that are not aligned\n", where(machine().running).c_str());
    std::abort();
  }
  machine().fibers[machine().running].groups.back().push_back({shared, global, exist});
}
void commit_copies() { machine().fibers[machine().running].groups.emplace_back(); }
void wait_for_copies(int pending) {
  std::deque<std::vector<Copy>>& groups = machine().fibers[machine().running].groups;
  for (; static_cast<int>(groups.size()) > pending + 1; groups.pop_front()) {
    for (const Copy& copy : groups.front()) {
      if (copy.exist) {
        std::memcpy(copy.target, copy.source, 16);
      } else {
        std::memset(copy.target, 0, 16);
      }
    }
  }
}

void mma_s8_16832(int (&acc)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  const Deposit* lanes = meet(0xffffffffu, "mma_s8_16832", {{a[0], a[1], a[2], a[3], b[0], b[1]}});
  // This lane's rows g and g + 8 of the left matrix and columns 2t and 2t + 1 of the right one, four of k to a word.
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
  std::uint32_t rows[2][8], columns[2][8], sums[2][2];
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 8; ++j) {
      const int owner = j % 4, upper = j / 4;
      rows[i][j] = lanes[4 * g + owner].word[2 * upper + i];
      columns[i][j] = lanes[4 * (2 * t + i) + owner].word[4 + upper];
    }
  }
  std::memcpy(sums, acc, sizeof sums);
  multiply_s8_2x2x32(sums, rows, columns);
  std::memcpy(acc, sums, sizeof sums);
}

}  // namespace shim

cudaError_t cudaGetLastError() {
  const cudaError_t status = shim::machine().pending;
  shim::machine().pending = cudaSuccess;
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
  shim::Machine& m = shim::machine();
  shim::Fiber& f = m.fibers[m.running];
  f.what = "__syncthreads";
  f.state = shim::State::kAtBlock;
  shim::to_scheduler(false);
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
