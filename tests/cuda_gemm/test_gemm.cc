// The plain GEMM on the host shim against a loop, and the tuner with everything behind it but a GPU: providers whose
// kernels are wrong in one way each must be refused, for the right reason, and the fastest right one must be chosen.
// Outputs that have channels: test_channels.cc.
// Plain checks, no framework; every failure is printed and the program's status says whether there was one.
#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <sstream>
#include <thread>

#include "fakes.h"

namespace swin::cuda {
const GemmProvider& cublaslt_provider() { return gemm_test::cublaslt(); }
const GemmProvider& cutlass_provider() { return gemm_test::cutlass(); }
const GemmProvider& tiles_provider() { return gemm_test::tiles(); }
}  // namespace swin::cuda

namespace {

using namespace gemm_test;

// 17 x 48 x 32: a tile that is not full in any direction.
const GemmShape kShape{17, 48, 32, GemmOutput::kS8};

std::string read(const std::string& path) {
  std::ostringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

void the_plain_kernel_is_exact() {
  std::int64_t values = 0;
  for (const GemmShape& size : std::vector<GemmShape>{{1, 1, 1}, {3, 5, 7}, {64, 64, 64}, {65, 63, 66}, {49, 96, 96},
                                                      {7, 130, 257}, {128, 31, 12}, {2, 3, 1025}, {130, 16, 48}}) {
    for (const GemmPattern pattern : {GemmPattern::kFull, GemmPattern::kSmall, GemmPattern::kExtremes}) {
      for (const int misaligned : {0, 1}) {
        std::vector<std::int8_t> x(size.m * size.k + misaligned), w(size.n * size.k + misaligned);
        swin::cuda::fill_random(x.data(), x.size(), 1, pattern, nullptr);
        swin::cuda::fill_random(w.data(), w.size(), 2, pattern, nullptr);
        for (const GemmOutput output : {GemmOutput::kS8, GemmOutput::kS8Relu, GemmOutput::kS32}) {
          GemmShape shape = size;
          shape.output = output;
          const float factor = pattern == GemmPattern::kSmall ? 0.25f : 0.003f;
          const std::int64_t bytes = shape.m * shape.n * (output == GemmOutput::kS32 ? 4 : 1);
          std::vector<std::int8_t> out(bytes + 64, 77), expected(bytes + 64, 77);
          swin::cuda::plain_gemm(shape, {x.data() + misaligned, w.data() + misaligned, out.data(), factor}, nullptr);
          FakeKernel(shape, {"", Defect::kNone, 0})
              .run({x.data() + misaligned, w.data() + misaligned, expected.data(), factor}, nullptr);
          EXPECT(out == expected);
          values += shape.m * shape.n;
        }
      }
    }
  }
  std::printf("plain kernel: %lld values equal\n", static_cast<long long>(values));
}

void random_bytes_cover_their_range() {
  for (const GemmPattern pattern : {GemmPattern::kFull, GemmPattern::kSmall, GemmPattern::kExtremes}) {
    std::vector<std::int8_t> bytes(50000);
    swin::cuda::fill_random(bytes.data(), bytes.size(), 3, pattern, nullptr);
    std::vector<int> counts(256);
    for (const std::int8_t byte : bytes) ++counts[byte + 128];
    const int lowest = pattern == GemmPattern::kSmall ? -8 : -128, highest = pattern == GemmPattern::kSmall ? 8 : 127;
    const int kinds = pattern == GemmPattern::kFull ? 256 : pattern == GemmPattern::kSmall ? 17 : 2;
    EXPECT(kinds == std::count_if(counts.begin(), counts.end(), [](int n) { return n > 0; }));
    EXPECT(counts[lowest + 128] > 0 && counts[highest + 128] > 0);
    for (const int count : counts) EXPECT(count == 0 || std::abs(count - 50000 / kinds) < 50000 / kinds / 2);
    std::vector<std::int8_t> others(50000);
    swin::cuda::fill_random(others.data(), others.size(), 4, pattern, nullptr);
    EXPECT(others != bytes);
  }
}

void differences_are_counted() {
  std::vector<std::uint8_t> a(100001, 5), b = a;
  swin::cuda::ByteDifferences found{};
  swin::cuda::count_differences(a.data(), b.data(), a.size(), &found, nullptr);
  EXPECT(found.count == 0);
  b[99] = b[100000] = 6;
  swin::cuda::count_differences(a.data(), b.data(), a.size(), &found, nullptr);
  EXPECT(found.count == 2 && (found.somewhere == 99 || found.somewhere == 100000));
}

void the_fastest_proven_candidate_runs() {
  Setup setup("fastest");
  setup.tuner->kernel(kShape, nullptr);
  EXPECT(has(setup.tuner->choices(), R"("provider": "cublaslt", "candidate": "quicker", "us": 10)"));
  // Kept: another process measures nothing.
  const double before = fake::clock_us;
  setup.again();
  const GemmKernel& kernel = setup.tuner->kernel(kShape, nullptr);
  EXPECT(fake::clock_us == before && &kernel == &setup.tuner->kernel(kShape, nullptr));
  EXPECT(has(setup.tuner->choices(), R"("candidate": "quicker")"));
  // The plain kernel is right too, but not timed where a library can.
  EXPECT(has(read(setup.path), R"("proven": {"cublaslt": 2, "cutlass": 1, "swin_tiles": 0, "swin_plain": 1})"));
  EXPECT(read(setup.path).find(R"("provider": "swin_plain")") == std::string::npos);
}

void wrong_candidates_are_refused() {
  const struct {
    Defect defect;
    GemmOutput output;
    const char* why;
  } cases[] = {
      {Defect::kTruncates, GemmOutput::kS8, "differ on"},
      {Defect::kTiesAway, GemmOutput::kS8, "differ on rounding ties"},
      {Defect::kTiesUp, GemmOutput::kS8, "differ on rounding ties"},
      {Defect::kTiesAway, GemmOutput::kS8Relu, "differ on rounding ties"},
      {Defect::kLastRow, GemmOutput::kS8, "one at row 16, column "},
      {Defect::kLastRow, GemmOutput::kS32, "one at row 16, column "},
      {Defect::kBehind, GemmOutput::kS8, "wrote behind the end of the output"},
      {Defect::kBehind, GemmOutput::kS32, "wrote behind the end of the output"},
      {Defect::kNoRelu, GemmOutput::kS8Relu, "found -"},
      {Defect::kWraps, GemmOutput::kS8, "differ on"},
      {Defect::kFails, GemmOutput::kS8, "a status that says no"},
  };
  int number = 0;
  for (const auto& c : cases) {
    Setup setup(("wrong" + std::to_string(number++)).c_str());
    cublaslt().fakes = {{"fast and wrong", c.defect, 1}};
    cutlass().fakes = {{"slow and right", Defect::kNone, 100}};
    GemmShape shape = kShape;
    shape.output = c.output;
    const std::string answer = setup.tuner->tune({shape}, false);
    EXPECT(has(answer, R"("chosen": "cutlass", "candidate": "slow and right")"));
    EXPECT(has(answer, R"({"provider": "cublaslt", "candidate": "fast and wrong", "why": )"));
    EXPECT(has(answer, c.why));
    // Asked for by name, the wrong one is an error and not a fallback.
    Setup::want("cublaslt");
    const std::string error = error_of<swin::UnsupportedError>([&] { setup.tuner->kernel(shape, nullptr); });
    EXPECT(has(error, "nothing runs M=17 N=48 K=32 to ") && has(error, "SWIN_GEMM=cublaslt") && has(error, c.why));
  }
}

void the_plain_kernel_is_the_last_resort() {
  Setup setup("last");
  cublaslt().fakes = {};
  cutlass().fakes = {{"wrong", Defect::kTruncates, 1}};
  setup.tuner->kernel(kShape, nullptr);
  EXPECT(has(setup.tuner->choices(), R"("provider": "swin_plain")"));
  EXPECT(has(read(setup.path), R"({"provider": "cublaslt", "candidate": "", "why": "it has none"})"));
}

void a_provider_can_be_forced() {
  Setup setup("forced", "cutlass");
  setup.tuner->kernel(kShape, nullptr);
  EXPECT(has(setup.tuner->choices(), R"("candidate": "tile")"));
  Setup::want("swin_plain");
  fake::capturing = true;  // needs no measurement
  setup.tuner->kernel(kShape, nullptr);
  EXPECT(has(setup.tuner->choices(), R"("candidate": "dp4a_64x64x64", "us": null)"));
  fake::capturing = false;
  Setup::want("tensorrt");
  const std::string error = error_of<swin::UnsupportedError>([&] { setup.tuner->kernel(kShape, nullptr); });
  EXPECT(has(error, "SWIN_GEMM=tensorrt names no provider; "
                    "this build knows: auto, cublaslt, cutlass, swin_tiles, swin_plain"));
}

// What is forced is all that is tried; what was measured of all is known of each, but not the other way round.
void a_forced_provider_is_tried_alone() {
  Setup setup("alone", "cutlass");
  cublaslt().fakes = {{"quick and broken", Defect::kBreaks, 1}};
  setup.tuner->kernel(kShape, nullptr);
  EXPECT(!fake::broken);
  EXPECT(has(read(setup.path), R"("versions": "cutlass 1.0, swin_plain 1")"));
  EXPECT(has(read(setup.path), R"("proven": {"cutlass": 1, "swin_plain": 1})"));
  const double before = fake::clock_us;
  setup.again();
  setup.tuner->kernel(kShape, nullptr);
  EXPECT(fake::clock_us == before);
  cublaslt().fakes = {{"quick", Defect::kNone, 1}};
  Setup::want(nullptr);
  setup.tuner->kernel(kShape, nullptr);
  EXPECT(fake::clock_us > before && has(setup.tuner->choices(), R"("candidate": "quick", "us": 1)"));
  const double measured = fake::clock_us;
  Setup::want("cublaslt");
  setup.again();
  setup.tuner->kernel(kShape, nullptr);
  EXPECT(fake::clock_us == measured);
}

void candidates_can_be_left_out() {
  Setup setup("skipped");
  setenv("SWIN_GEMM_SKIP", "swin_tiles:,cublaslt:quicker", 1);
  const std::string answer = setup.tuner->tune({kShape}, false);
  EXPECT(has(answer, R"("chosen": "cutlass", "candidate": "tile")"));
  EXPECT(has(answer, R"({"provider": "cublaslt", "candidate": "quicker", "why": "left out by SWIN_GEMM_SKIP"})"));
  EXPECT(has(read(setup.path), R"("proven": {"cublaslt": 1, )"));
  // Also what a file from before names.
  unsetenv("SWIN_GEMM_SKIP");
  EXPECT(has(setup.tuner->tune({kShape}, true), R"("candidate": "quicker")"));
  setenv("SWIN_GEMM_SKIP", "cublaslt:", 1);
  setup.again();
  EXPECT(has(setup.tuner->tune({kShape}, false), R"("tuned": false)"));
  setup.tuner->kernel(kShape, nullptr);
  EXPECT(has(setup.tuner->choices(), R"("candidate": "tile")"));
  unsetenv("SWIN_GEMM_SKIP");
}

void what_breaks_the_device_is_named() {
  Setup setup("breaks");
  cutlass().fakes = {{"tile", Defect::kNone, 15}, {"wild", Defect::kBreaks, 1}};
  const std::string error = error_of<swin::Error>([&] { setup.tuner->kernel(kShape, nullptr); });
  EXPECT(has(error, "while cutlass:wild ran: ") && has(error, "SWIN_GEMM_SKIP=cutlass:wild"));
  EXPECT(read(setup.path).empty());  // nothing is kept of it
  fake::broken = false;
  setenv("SWIN_GEMM_SKIP", "cutlass:wild", 1);
  setup.tuner->kernel(kShape, nullptr);
  EXPECT(has(setup.tuner->choices(), R"("candidate": "quicker")"));
  unsetenv("SWIN_GEMM_SKIP");
}

// What a graph does not take is refused like what is wrong, and the plain kernel is still the last resort.
void what_no_graph_takes_is_refused() {
  Setup setup("ungraphed");
  cutlass().fakes = {{"tile", Defect::kNone, 15}, {"wild", Defect::kFailsInGraph, 1}};
  const std::string answer = setup.tuner->tune({kShape}, false);
  EXPECT(has(answer, R"("candidate": "quicker")") && has(answer, R"("candidate": "wild", "why": "not in a capture")"));
  cublaslt().fakes = {};
  cutlass().fakes = {{"wild", Defect::kFailsInGraph, 1}};
  EXPECT(has(setup.tuner->tune({kShape}, true), R"("chosen": "swin_plain")"));
}

// The last line on stderr is what ran last.
void what_runs_is_traced() {
  Setup setup("traced", "cutlass");
  cutlass().fakes = {{"tile", Defect::kNone, 15}, {"wild", Defect::kBreaks, 1}};
  const std::string path = g_folder + "/stderr";
  std::fflush(stderr);
  const int kept = dup(2);
  if (std::freopen(path.c_str(), "w", stderr) == nullptr) std::abort();
  setenv("SWIN_GEMM_TRACE", "1", 1);
  error_of<swin::Error>([&] { setup.tuner->kernel(kShape, nullptr); });
  setenv("SWIN_GEMM_TRACE", "0", 1);
  error_of<swin::Error>([&] { setup.tuner->kernel(kShape, nullptr); });
  unsetenv("SWIN_GEMM_TRACE");
  dup2(kept, 2);
  close(kept);
  fake::broken = false;
  EXPECT(read(path) ==
         "swin_int8 gemm: cutlass:tile M=17 N=48 K=32 to s8\n"
         "swin_int8 gemm: cutlass:wild M=17 N=48 K=32 to s8\n");
}

// A launch of a graph is all that is timed, behind another one.
void graphs_are_timed() {
  Setup setup("graphs");
  const FakeKernel kernel(kShape, {"", Defect::kNone, 3});
  const auto bench = swin::cuda::gemm_lab().bench(kShape);
  bench->prove({{"fake:kernel", &kernel}});
  const double before = fake::clock_us;
  const int launches = fake::graph_launches;
  EXPECT(std::abs(bench->time_us({"fake:kernel", &kernel}, 7) - 3) < 1e-3);
  EXPECT(fake::clock_us == before + 2 * 7 * 3 && fake::graph_launches == launches + 2);
}

void nothing_is_measured_inside_a_capture() {
  Setup setup("capture");
  fake::capturing = true;
  const std::string error = error_of<swin::Error>([&] { setup.tuner->kernel(kShape, nullptr); });
  EXPECT(has(error, "inside a CUDA graph capture nothing can be measured. Run one forward pass"));
  fake::capturing = false;
  setup.tuner->kernel(kShape, nullptr);
  fake::capturing = true;
  setup.tuner->kernel(kShape, nullptr);  // known to the process
  setup.again();
  setup.tuner->kernel(kShape, nullptr);  // known to the file
}

void what_changed_is_measured_again() {
  Setup setup("changed");
  setup.tuner->kernel(kShape, nullptr);
  const double before = fake::clock_us;
  cublaslt().installed = "2.0";
  cublaslt().fakes = {{"newer", Defect::kNone, 5}};
  setup.again();
  setup.tuner->kernel(kShape, nullptr);
  EXPECT(fake::clock_us > before && has(setup.tuner->choices(), R"("candidate": "newer")"));
  EXPECT(has(read(setup.path), "cublaslt 1.0, ") && has(read(setup.path), "cublaslt 2.0, "));  // both are kept
  fake::device = 1;
  setup.tuner->kernel(kShape, nullptr);
  EXPECT(has(setup.tuner->choices(), R"("device": "Fake GPU \"A\"", "sm": 90)"));
  EXPECT(has(setup.tuner->choices(), R"("device": "Fake GPU B", "sm": 91)"));
  // A candidate that the library does not know any more, though its version is the same.
  fake::device = 0;
  cublaslt().fakes = {{"renamed", Defect::kNone, 4}};
  cutlass().fakes = {};
  setup.again();
  setup.tuner->kernel(kShape, nullptr);
  EXPECT(has(setup.tuner->choices(), R"("candidate": "renamed")"));
}

void tuning_again_replaces() {
  Setup setup("again");
  const std::string first = setup.tuner->tune({kShape, {2, 16, 16, GemmOutput::kS32}}, false);
  EXPECT(has(first, R"("saved": "")") && has(first, R"("output": "s32")") && has(first, R"({"tuned": true, )"));
  const GemmKernel& old = setup.tuner->kernel(kShape, nullptr);
  EXPECT(has(setup.tuner->tune({kShape}, false), R"({"tuned": false, )"));
  cutlass().fakes = {{"tile", Defect::kNone, 2}};
  EXPECT(has(setup.tuner->tune({kShape}, true), R"("chosen": "cutlass")"));
  EXPECT(&setup.tuner->kernel(kShape, nullptr) != &old);
  const std::string text = read(setup.path);
  EXPECT(std::count(text.begin(), text.end(), '\n') == 4);  // two entries, one a line
  EXPECT(has(error_of<swin::ShapeError>([&] { setup.tuner->tune({{0, 1, 1}}, false); }), "every size must be positive"));
}

void the_file_may_be_anywhere_or_broken() {
  {
    Setup setup("broken");
    setup.tuner->tune({kShape}, false);
    const std::string good = read(setup.path);
    for (std::size_t length = 0; length < good.size() - 2; length += 1 + length / 9) {  // cut off anywhere
      std::ofstream(setup.path) << good.substr(0, length);
      setup.again();
      const std::string error = error_of<swin::ValueError>([&] { setup.tuner->kernel(kShape, nullptr); });
      EXPECT(has(error, "is not one that this build reads") && has(error, setup.path) && has(error, "Remove it"));
    }
    std::ofstream(setup.path) << R"({"format": 9, "entries": []})";
    EXPECT(has(error_of<swin::ValueError>([&] { setup.tuner->kernel({1, 16, 16}, nullptr); setup.again();
                                                setup.tuner->kernel(kShape, nullptr); }), "format 9"));
  }
  {
    Setup setup("unwritable");
    setenv("SWIN_GEMM_CONFIG", "/proc/none/gemm.json", 1);
    EXPECT(has(setup.tuner->tune({kShape}, false), R"("saved": "the folder of /proc/none/gemm.json cannot be made)"));
    EXPECT(has(setup.tuner->tune({kShape}, false), R"({"tuned": false, )"));  // kept in memory all the same
  }
  unsetenv("SWIN_GEMM_CONFIG");
  setenv("XDG_CACHE_HOME", "/x", 1);
  EXPECT(swin::cuda::gemm_config_path() == "/x/swin_int8/gemm.json");
  unsetenv("XDG_CACHE_HOME");
  setenv("HOME", "/h", 1);
  EXPECT(swin::cuda::gemm_config_path() == "/h/.cache/swin_int8/gemm.json");
}

void two_processes_keep_each_others_results() {
  Setup setup("shared");
  auto other = std::make_unique<swin::cuda::GemmTuner>(swin::cuda::gemm_provider_list(), swin::cuda::gemm_lab());
  other->kernel({1, 16, 16}, nullptr);
  setup.tuner->kernel({2, 16, 16}, nullptr);
  other->kernel({3, 16, 16}, nullptr);
  EXPECT(swin::cuda::read_gemm_config(setup.path).size() == 3);
  struct stat status;
  EXPECT(stat(setup.path.c_str(), &status) == 0 && (status.st_mode & 0400) != 0);
}

void many_threads_measure_once() {
  Setup setup("threads");
  std::vector<std::thread> threads;
  std::vector<const GemmKernel*> kernels(8);
  const int before = cutlass().prepared;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&, i] { kernels[i] = &setup.tuner->kernel(kShape, nullptr); });
  }
  for (std::thread& thread : threads) thread.join();
  for (const GemmKernel* kernel : kernels) EXPECT(kernel == kernels[0]);
  EXPECT(cutlass().prepared == before + 1);
}

void too_little_memory_says_so() {
  Setup setup("memory");
  fake::out_of_memory = true;
  EXPECT(has(error_of<swin::Error>([&] { setup.tuner->kernel(kShape, nullptr); }), "use a smaller batch"));
}

void no_gpu_is_said() {
  Setup setup("none");
  fake::no_gpu = true;
  EXPECT(has(error_of<swin::Error>([&] { setup.tuner->tune({kShape}, false); }), "This machine has no GPU"));
  fake::no_gpu = false;
}

void a_library_that_does_not_start_leaves_the_others() {
  Setup setup("start");
  cublaslt().starts = false;
  setup.tuner->kernel(kShape, nullptr);
  EXPECT(has(setup.tuner->choices(), R"("provider": "cutlass")"));
  EXPECT(has(read(setup.path), R"({"provider": "cublaslt", "candidate": "", "why": "it does not start"})"));
  cublaslt().starts = true;
}

void providers_are_listed() {
  EXPECT(has(swin::gemm_providers(), R"({"provider": "cutlass", "version": "1.0", "built": true, "why": ""})"));
  EXPECT(swin::gemm_output_of("s8_relu") == GemmOutput::kS8Relu);
  EXPECT(has(error_of<swin::ValueError>([] { swin::gemm_output_of("fp8"); }), "there is no output 'fp8'"));
}

}  // namespace

int main() {
  char folder[] = "/tmp/swin_gemm_XXXXXX";
  g_folder = mkdtemp(folder);
  the_plain_kernel_is_exact();
  random_bytes_cover_their_range();
  differences_are_counted();
  the_fastest_proven_candidate_runs();
  wrong_candidates_are_refused();
  the_plain_kernel_is_the_last_resort();
  a_provider_can_be_forced();
  a_forced_provider_is_tried_alone();
  candidates_can_be_left_out();
  what_breaks_the_device_is_named();
  what_no_graph_takes_is_refused();
  what_runs_is_traced();
  graphs_are_timed();
  nothing_is_measured_inside_a_capture();
  what_changed_is_measured_again();
  tuning_again_replaces();
  two_processes_keep_each_others_results();
  many_threads_measure_once();
  too_little_memory_says_so();
  no_gpu_is_said();
  a_library_that_does_not_start_leaves_the_others();
  providers_are_listed();
  the_file_may_be_anywhere_or_broken();
  test_channels();
  std::system(("rm -r " + g_folder).c_str());
  std::printf(g_failures ? "%d failed\n" : "all passed\n", g_failures);
  return g_failures ? 1 : 0;
}
