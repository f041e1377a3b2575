// The CPU backend: which instruction set runs, memory, and parameters as float32.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>

#if defined(SWIN_HAVE_X86_VARIANTS)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(SWIN_HAVE_ARM_VARIANTS) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "kernels.h"
#include "memory.h"
#include "swin/cpu.h"
#include "swin/error.h"
#include "swin/half.h"
#include "thread_pool.h"

namespace swin {
namespace {

class CpuBackend : public Backend {
 public:
  CpuBackend(std::string variant, const cpu::Kernels& kernels) : variant_(std::move(variant)), kernels_(kernels) {}

  std::string name() const override { return "cpu"; }
  std::string variant() const override { return variant_; }
  const OpTable& ops() const override { return kernels_.ops; }
  const cpu::Kernels& kernels() const { return kernels_; }

  DeviceBuffer allocate(std::size_t bytes) const override {
    DeviceBuffer owner(cpu::allocate_memory(bytes), cpu::release_memory);
    std::memset(owner.get(), 0, bytes);
    return owner;
  }
  void fill(void* data, int byte, std::size_t bytes, const ExecContext&) const override {
    std::memset(data, byte, bytes);
  }
  void copy_to_host(void* host, const void* data, std::size_t bytes, const ExecContext&) const override {
    std::memcpy(host, data, bytes);
  }
  void copy(void* to, const void* from, std::size_t bytes, const ExecContext& context) const override {
    struct Job {
      char* to;
      const char* from;
      std::size_t bytes;
    } job{static_cast<char*>(to), static_cast<const char*>(from), bytes};
    cpu::run_tasks(
        context.threads, static_cast<std::int64_t>((bytes + kCopyPiece - 1) / kCopyPiece),
        [](void* closure, std::int64_t task) {
          const Job& j = *static_cast<const Job*>(closure);
          const std::size_t begin = task * kCopyPiece;
          std::memcpy(j.to + begin, j.from + begin, std::min(kCopyPiece, j.bytes - begin));
        },
        &job);
  }

  Parameter upload_parameter(const TensorView& host) const override {
    SWIN_CHECK(DTypeError, "upload_parameter", host.dtype == DType::kF16 || host.dtype == DType::kF32, "found ",
               host.describe(), "; float16 or float32 is needed");
    const std::int64_t n = host.numel();
    Parameter p{allocate(n * sizeof(float)), host};
    p.view.data = p.owner.get();
    p.view.dtype = DType::kF32;
    float* target = p.view.as<float>();
    for (std::int64_t i = 0; i < n; ++i) {
      target[i] =
          host.dtype == DType::kF16 ? float_of_half(host.as<const std::uint16_t>()[i]) : host.as<const float>()[i];
    }
    return p;
  }

  Parameter upload_float32(const TensorView& host) const override { return upload_parameter(host); }

  Parameter upload_int32(const TensorView& host) const override {
    SWIN_CHECK(DTypeError, "upload_int32", host.dtype == DType::kS32, "found ", host.describe(), "; int32 is needed");
    Parameter p{allocate(host.nbytes()), host};
    p.view.data = std::memcpy(p.owner.get(), host.data, host.nbytes());
    return p;
  }

  std::unique_ptr<PackedWeight> pack_weight(const TensorView& host, InputRange input) const override {
    SWIN_CHECK(DTypeError, "pack_weight", host.dtype == DType::kS8 && host.rank == 2, "found ", host.describe(),
               "; int8 [N, K] is needed");
    return kernels_.pack_weight(host.as<const std::int8_t>(), host.dim(0), host.dim(1), input);
  }

  // A whole number of 16-byte vectors, which for the windows of 7 and 8 is one cache line.
  std::int64_t score_pitch(std::int64_t window_area) const override { return (window_area + 15) / 16 * 16; }

  // Up to 8 x 8 a head's bias stays in the first-level cache as it is; beyond, it would come from the ones behind.
  bool takes_compact_bias(std::int64_t window_area) const override { return window_area > 64; }

  bool mlp_keeps_hidden(std::int64_t rows, std::int64_t dim, std::int64_t hidden) const override {
    return rows <= kFewRows || 2 * dim * hidden > kMlpWeightsInCache;
  }

 private:
  static constexpr std::size_t kCopyPiece = std::size_t{1} << 16;  // bytes that a thread copies at a time

  // Up to this many bytes of FC1 and FC2 weights stay in a core's cache while row after row passes them. With more, or with
  // few rows, each GEMM of an MLP runs over all rows before the next, but where threads are few (rows_for_each_thread).
  static constexpr std::int64_t kMlpWeightsInCache = 1536 << 10;
  static constexpr std::int64_t kFewRows = 256;

  const std::string variant_;
  const cpu::Kernels& kernels_;
};

#if defined(SWIN_HAVE_X86_VARIANTS)
[[maybe_unused]] bool has_avx512_vnni() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}

// What __builtin_cpu_supports does not know in every compiler that builds this.
[[maybe_unused]] bool has_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid_count(7, 1, &a, &b, &c, &d) &&
         (a >> 4 & 1) != 0;
}

// AMX's registers are large, so Linux lets a process use them only after it asked.
[[maybe_unused]] bool has_amx_int8() {
#if defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!has_avx512_vnni() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tiles = (d >> 24 & 1) != 0 && (d >> 25 & 1) != 0;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return tiles && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#elif defined(SWIN_HAVE_ARM_VARIANTS)
bool has_dotprod() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
  return false;
#endif
}

bool has_i8mm() {
#if defined(__linux__)
  constexpr unsigned long kI8mm = 1ul << 13;  // HWCAP2_I8MM, which older headers do not name
  return has_dotprod() && (getauxval(AT_HWCAP2) & kI8mm) != 0;
#else
  return false;
#endif
}
#endif

// Never destroyed: while the process ends threads may still compute.
const std::vector<CpuBackend>& backends() {
  static const auto& all = *new std::vector<CpuBackend>([] {
    std::vector<CpuBackend> found;
#if defined(SWIN_HAVE_X86_VARIANTS)
    __builtin_cpu_init();
#if defined(SWIN_HAVE_AMX_INT8)
    if (has_amx_int8()) found.emplace_back("amx_int8", cpu::amx_int8::kernels());
#endif
#if defined(SWIN_HAVE_AVX512_VNNI)
    if (has_avx512_vnni()) found.emplace_back("avx512_vnni", cpu::avx512_vnni::kernels());
#endif
#if defined(SWIN_HAVE_AVX_VNNI)
    if (has_avx_vnni()) found.emplace_back("avx_vnni", cpu::avx_vnni::kernels());
#endif
#if defined(SWIN_HAVE_AVX2)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      found.emplace_back("avx2", cpu::avx2::kernels());
    }
#endif
#elif defined(SWIN_HAVE_ARM_VARIANTS)
    if (has_i8mm()) found.emplace_back("neon_i8mm", cpu::neon_i8mm::kernels());
    if (has_dotprod()) found.emplace_back("neon_dotprod", cpu::neon_dotprod::kernels());
#endif
    found.emplace_back("portable", cpu::portable::kernels());
    return found;
  }());
  return all;
}

const CpuBackend& find_backend(std::string variant) {
  if (variant.empty()) {
    const char* forced = std::getenv("SWIN_CPU_ISA");
    if (forced != nullptr) variant = forced;
  }
  if (variant.empty()) return backends().front();
  std::string known;
  for (const CpuBackend& backend : backends()) {
    if (backend.variant() == variant) return backend;
    known += (known.empty() ? "" : ", ") + backend.variant();
  }
  throw UnsupportedError(detail::concat("cpu backend: instruction set '", variant,
                                        "' was asked for (SWIN_CPU_ISA); this build on this machine has: ", known));
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Best rate of `work` (returning an amount) on all threads at once, over a few rounds.
template <class Work>
double best_rate(int threads, Work&& work) {
  double best = 0;
  for (int round = 0; round < 4; ++round) {
    std::atomic<std::int64_t> amount{0};
    auto task = [&](std::int64_t index) { amount += work(index); };
    using Task = decltype(task);
    const auto start = std::chrono::steady_clock::now();
    cpu::run_tasks(threads, threads, [](void* t, std::int64_t index) { (*static_cast<Task*>(t))(index); }, &task);
    best = std::max(best, static_cast<double>(amount.load()) / seconds_since(start));
  }
  return best;
}

}  // namespace

void cpu::refuse_image(std::int64_t image) {
  throw ValueError(detail::concat("patch_embed: image ", image,
                                  " of the batch holds NaN or infinity; INT8 would turn it "
                                  "into plausible numbers. Look at how it was decoded and normalized"));
}

std::vector<std::string> cpu_variants() {
  std::vector<std::string> names;
  for (const CpuBackend& backend : backends()) names.push_back(backend.variant());
  return names;
}

const Backend& cpu_backend(const std::string& variant) { return find_backend(variant); }

Ceilings measure_cpu_ceilings(const std::string& variant, int threads) {
  SWIN_CHECK(ValueError, "measure_ceilings", threads > 0, "threads is ", threads, "; at least 1 is needed");
  const cpu::Kernels& kernels = find_backend(variant).kernels();
  Ceilings ceilings;
  ceilings.s8_gop_s = best_rate(threads, [&](std::int64_t) { return kernels.spin_s8(2'000'000); }) * 1e-9;
  ceilings.u8_gop_s = best_rate(threads, [&](std::int64_t) { return kernels.spin_u8(2'000'000); }) * 1e-9;
  ceilings.grouped_gop_s = best_rate(threads, [&](std::int64_t) { return kernels.spin_grouped(1'000'000); }) * 1e-9;
  ceilings.f32_gflop_s = best_rate(threads, [&](std::int64_t) { return kernels.spin_f32(2'000'000); }) * 1e-9;
  constexpr std::int64_t kBytes = 128 << 20;  // per thread, well beyond any cache
  std::vector<DeviceBuffer> source, target;
  for (int i = 0; i < threads; ++i) {
    source.push_back(cpu_backend(variant).allocate(kBytes));
    target.push_back(cpu_backend(variant).allocate(kBytes));
  }
  ceilings.copy_gb_s = best_rate(threads,
                                 [&](std::int64_t i) {
                                   std::memcpy(target[i].get(), source[i].get(), kBytes);
                                   return 2 * kBytes;
                                 }) *
                       1e-9;
  return ceilings;
}

}  // namespace swin
