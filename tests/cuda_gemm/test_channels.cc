// The fused graph's outputs, with a scale for each channel: the plain kernel against loops, what the bench's proof
// refuses and what it lets pass, and the tuner from the first measurement to another process.
#include <cuda_fp16.h>

#include <cstring>
#include <limits>
#include <random>

#include "fakes.h"

namespace swin::cuda {
const GemmProvider& real_tiles_provider();  // gemm_tiles.cu's
}

namespace gemm_test {
namespace {

constexpr GemmOutput kOutputs[] = {GemmOutput::kChannelsS8,  GemmOutput::kChannelsRelu,   GemmOutput::kChannelsGelu,
                                   GemmOutput::kChannelsF32, GemmOutput::kChannelsAddF16, GemmOutput::kChannelsAddBF16};

bool adds(GemmOutput output) { return output == GemmOutput::kChannelsAddF16 || output == GemmOutput::kChannelsAddBF16; }

float value(__half x) { return __half2float(x); }
float value(__nv_bfloat16 x) { return __bfloat162float(x); }
void round_to(__half& x, float y) { x = __float2half_rn(y); }
void round_to(__nv_bfloat16& x, float y) { x = __float2bfloat16_rn(y); }

// The value after x.
std::int8_t next(std::int8_t x) { return static_cast<std::int8_t>(x < 127 ? x + 1 : x - 1); }
float next(float x) { return std::nextafterf(x, std::numeric_limits<float>::infinity()); }
template <class T>
T next(T x) {
  ++x.bits;  // away from zero
  return x;
}

// What kernels were called with and found.
struct {
  bool bias = false, no_bias = false, one_scale = false;
  float largest_residual = 0;
} g_seen;

// The accumulator of value i.
std::int32_t product(const GemmShape& shape, const GemmCall& call, std::int64_t i) {
  const std::int8_t *x = call.x + i / shape.n * shape.k, *w = call.w + i % shape.n * shape.k;
  std::int32_t acc = 0;
  for (std::int64_t k = 0; k < shape.k; ++k) acc += x[k] * w[k];
  return acc;
}

float scaled(const GemmShape& shape, const GemmCall& call, std::int32_t acc, std::int64_t column, Defect defect) {
  const std::int64_t of = defect == Defect::kOneScale       ? 0
                          : defect == Defect::kShiftedScale ? (column + 1) % shape.n
                                                            : column;
  const float bias = call.bias == nullptr || defect == Defect::kNoBias ? 0 : call.bias[column];
  if (defect != Defect::kSeparate) return std::fmaf(static_cast<float>(acc), call.scale[of], bias);
  const volatile float product = static_cast<float>(acc) * call.scale[of];  // so that no compiler makes one of both
  return product + bias;
}

std::int8_t quantized(GemmOutput output, float y, float factor, Defect defect) {
  if (output == GemmOutput::kChannelsGelu) {
    if (defect == Defect::kSeparate) {
      y *= 0.5f * (1 + std::erf(y * 0.70710678f));
    } else if (defect == Defect::kTanhGelu) {
      y *= 0.5f * (1 + std::tanh(0.79788456f * (y + 0.044715f * y * y * y)));
    } else if (defect != Defect::kNoGelu) {
      y = static_cast<float>(0.5 * y * (1 + std::erf(y * std::sqrt(0.5))));
    }
    if (defect != Defect::kNoFactor) y *= factor;
  }
  if (output == GemmOutput::kChannelsRelu && defect != Defect::kNoRelu) y = std::fmax(0.0f, y);
  const float rounded = defect == Defect::kTiesAway    ? std::round(y)
                        : defect == Defect::kTruncates ? std::trunc(y)
                                                       : std::nearbyint(y);
  return static_cast<std::int8_t>(std::clamp(rounded, -128.0f, 127.0f));
}

template <class T>
T sum(T residual, float y, Defect defect) {
  T result;
  float before = value(residual);
  g_seen.largest_residual = std::fmax(g_seen.largest_residual, std::fabs(before));
  if (defect == Defect::kOverwrites) before = 0;
  if (defect == Defect::kAddsTwice) before *= 2;
  if (defect == Defect::kRoundsTwice) {
    round_to(result, y);
    y = value(result);
  }
  round_to(result, before + y);
  if (defect == Defect::kTiesAway) {
    const float there = before + y, away = value(next(result));
    if (std::fabs(away - there) == std::fabs(there - value(result))) result = next(result);
  }
  return result;
}

template <class T, class Make>
void run_as(const GemmShape& shape, const GemmCall& call, Defect defect, const Make& make) {
  const std::int64_t rows = defect == Defect::kLastRow ? shape.m - 1 : shape.m;
  T* const out = static_cast<T*>(call.out);
  for (std::int64_t i = 0; i < rows * shape.n; ++i) {
    out[i] = make(scaled(shape, call, product(shape, call, i), i % shape.n, defect), out[i]);
    if (defect == Defect::kOffByOne || (defect == Defect::kOneIn100OffByOne && i % 100 == 50) ||
        (defect == Defect::kOneIn400OffByOne && i % 400 == 200)) {
      out[i] = next(out[i]);
    }
  }
  if (defect == Defect::kBehind) reinterpret_cast<std::int8_t*>(out + shape.m * shape.n)[0] = 1;
}

}  // namespace

void run_channels(const GemmShape& shape, const GemmCall& call, Defect defect) {
  (call.bias != nullptr ? g_seen.bias : g_seen.no_bias) = true;
  g_seen.one_scale |= std::all_of(call.scale, call.scale + shape.n, [&](float s) { return s == call.scale[0]; });
  switch (shape.output) {
    case GemmOutput::kChannelsF32:
      return run_as<float>(shape, call, defect, [&](float y, float) {
        return defect == Defect::kThroughHalf ? __half2float(__float2half_rn(y)) : y;
      });
    case GemmOutput::kChannelsAddF16:
      return run_as<__half>(shape, call, defect, [&](float y, __half before) { return sum(before, y, defect); });
    case GemmOutput::kChannelsAddBF16:
      return run_as<__nv_bfloat16>(shape, call, defect,
                                   [&](float y, __nv_bfloat16 before) { return sum(before, y, defect); });
    default:
      return run_as<std::int8_t>(shape, call, defect, [&](float y, std::int8_t) {
        return quantized(shape.output, y, call.factor, defect);
      });
  }
}

namespace {

// 17 x 48 x 32: a tile that is not full in any direction, 816 values.
GemmShape shape_of(GemmOutput output) { return {17, 48, 32, output}; }

// What the proof says of a candidate with this defect; "" where it has passed.
std::string verdict_on(Defect defect, const GemmShape& shape) {
  FakeKernel kernel(shape, {"", defect, 1});
  const std::string verdict = swin::cuda::gemm_lab().bench(shape)->prove({{"fake:kernel", &kernel}})[0];
  EXPECT(fake::allocations == 0);
  return verdict;
}

void the_plain_kernel_is_exact() {
  std::mt19937 random(1);
  const auto uniform = [&](float low, float high) {
    return std::uniform_real_distribution<float>(low, high)(random);
  };
  std::int64_t values = 0, beside_gelu = 0;
  for (const GemmShape& size : std::vector<GemmShape>{{1, 1, 1}, {3, 5, 7}, {64, 64, 64}, {65, 63, 66}, {49, 96, 96},
                                                      {7, 130, 257}, {128, 31, 12}, {2, 3, 1025}, {130, 16, 48}}) {
    for (const GemmOutput output : kOutputs) {
      for (const int variant : {0, 1, 2, 3}) {
        const int misaligned = variant % 2;
        const bool no_bias = variant / 2 != 0;
        GemmShape shape = size;
        shape.output = output;
        const std::int64_t count = shape.m * shape.n, bytes = count * output_bytes(output);
        std::vector<std::int8_t> x(shape.m * shape.k + misaligned), w(shape.n * shape.k + misaligned);
        swin::cuda::fill_random(x.data(), x.size(), 1, GemmPattern::kFull, nullptr);
        swin::cuda::fill_random(w.data(), w.size(), 2, GemmPattern::kFull, nullptr);
        const float unit = (output == GemmOutput::kChannelsGelu ? 2.0f : 60.0f) / 5461 / std::sqrt(float(shape.k));
        std::vector<float> scale(shape.n), bias(shape.n);
        for (float& s : scale) s = unit * uniform(0.5f, 2);
        for (float& b : bias) b = unit * uniform(-3000, 3000);
        // What is read where it is added to, of y's size, so that some sums cancel.
        std::vector<std::int8_t> out(bytes + 64, 77), expected;
        if (output == GemmOutput::kChannelsAddF16) {
          for (std::int64_t i = 0; i < count; ++i) round_to(reinterpret_cast<__half*>(out.data())[i], uniform(-99, 99));
        } else if (output == GemmOutput::kChannelsAddBF16) {
          for (std::int64_t i = 0; i < count; ++i) {
            round_to(reinterpret_cast<__nv_bfloat16*>(out.data())[i], uniform(-99, 99));
          }
        }
        expected = out;
        GemmCall call{x.data() + misaligned, w.data() + misaligned, out.data(), 40, scale.data(),
                      no_bias ? nullptr : bias.data()};
        swin::cuda::plain_gemm(shape, call, nullptr);
        call.out = expected.data();
        run_channels(shape, call, Defect::kNone);
        values += count;
        if (output != GemmOutput::kChannelsGelu) {
          EXPECT(out == expected);
          continue;
        }
        // gelu.cuh is within 4e-7 * max(1, |x|) of GELU: beside the expected value only where that is as near to a tie.
        EXPECT(std::equal(out.begin() + count, out.end(), expected.begin() + count));
        for (std::int64_t i = 0; i < count; ++i) {
          if (out[i] == expected[i]) continue;
          ++beside_gelu;
          const double y = scaled(shape, call, product(shape, call, i), i % shape.n, Defect::kNone);
          EXPECT(std::fabs(20 * y * (1 + std::erf(y * std::sqrt(0.5))) - out[i]) < 0.5 + 1e-4);
        }
      }
    }
  }
  std::printf("plain kernel, outputs with channels: %lld values right, %lld of GELU beside a tie\n",
              static_cast<long long>(values), static_cast<long long>(beside_gelu));
}

void random_floats_are_those_asked_for() {
  std::vector<float> data(20000);
  swin::cuda::fill_random(data.data(), data.size(), 1, {0.25f, 3, 5, false}, nullptr);
  for (int i = 0; i < 5; ++i) {
    const auto count = std::count(data.begin(), data.end(), 0.75f + 0.25f * static_cast<float>(i));
    EXPECT(count > 3500 && count < 4500);
  }
  swin::cuda::fill_random(data.data(), data.size(), 1, {2, 1, 1, true}, nullptr);
  EXPECT(std::abs(std::count(data.begin(), data.end(), 2.0f) - 10000) < 500);
  EXPECT(std::count(data.begin(), data.end(), 2.0f) + std::count(data.begin(), data.end(), -2.0f) == 20000);
  std::vector<float> others(data.size());
  swin::cuda::fill_random(others.data(), others.size(), 2, {2, 1, 1, true}, nullptr);
  EXPECT(others != data);
  std::vector<__half> half(100);
  std::vector<__nv_bfloat16> brain(100);
  swin::cuda::fill_residual(GemmOutput::kChannelsAddF16, half.data(), 100, 1, {0.125f, 128, 1, false}, nullptr);
  swin::cuda::fill_residual(GemmOutput::kChannelsAddBF16, brain.data(), 100, 1, {0.125f, 128, 1, false}, nullptr);
  EXPECT(value(half[0]) == 16 && value(half[99]) == 16 && value(brain[0]) == 16 && value(brain[99]) == 16);
}

template <class T>
swin::cuda::GemmErrors errors_of(GemmOutput output, const std::vector<T>& found, const std::vector<T>& expected,
                                 float tolerance = 0, const float* bias = nullptr) {
  swin::cuda::GemmErrors errors{};
  const auto columns = static_cast<std::int64_t>(found.size());
  swin::cuda::count_errors({1, columns, 1, output}, found.data(), expected.data(), bias, tolerance, &errors, nullptr);
  return errors;
}

bool is(const swin::cuda::GemmErrors::Kind& kind, unsigned long long count, unsigned long long at, float found,
        float expected) {
  return kind.count == count && kind.somewhere == at && kind.found == found && kind.expected == expected;
}

template <class T>
void steps_are_counted(GemmOutput output, int mantissa_bits) {
  const auto of = [](unsigned bits) { return T{static_cast<std::uint16_t>(bits)}; };
  T one, minus;
  round_to(one, 1);
  round_to(minus, -1);
  const std::vector<T> expected(3000, one);
  EXPECT(errors_of(output, expected, expected).wrong.count == 0);
  std::vector<T> found = expected;
  found[2999] = of(one.bits - 1u);
  swin::cuda::GemmErrors errors = errors_of(output, found, expected);
  EXPECT(errors.wrong.count == 0 && is(errors.off_by_one, 1, 2999, value(found[2999]), 1));
  found[7] = of(one.bits + 2u);
  found[8] = of(0x7fffu);  // NaN
  errors = errors_of(output, found, expected);
  EXPECT(errors.off_by_one.count == 1 && is(errors.wrong, 2, 7, 1 + std::ldexp(2.0f, -mantissa_bits), 1));
  // Zeros are one value, and neighbours lie on both sides of it.
  errors = errors_of<T>(output, {of(0x8000u), of(1), of(0x8001u), of(0x8001u), minus, minus},
                        {of(0), of(0x8000u), of(0), of(1), one, minus});
  EXPECT(errors.off_by_one.count == 2 && errors.wrong.count == 2);
}

void errors_are_counted() {
  steps_are_counted<__half>(GemmOutput::kChannelsAddF16, 10);
  steps_are_counted<__nv_bfloat16>(GemmOutput::kChannelsAddBF16, 7);
  for (const GemmOutput output : {GemmOutput::kChannelsS8, GemmOutput::kChannelsRelu, GemmOutput::kChannelsGelu}) {
    const swin::cuda::GemmErrors errors =
        errors_of<std::int8_t>(output, {0, -1, 127, -128, 5}, {0, 0, 127, 127, 6});
    EXPECT(is(errors.wrong, 1, 3, -128, 127) && errors.off_by_one.count == 2);
  }
  const GemmOutput f32 = GemmOutput::kChannelsF32;
  const float bias[] = {0, 0, -3, 0, 0};
  const std::vector<float> found{1.25f, 1.26f, 5, std::nanf(""), -0.0f}, expected{1, 1, 4, 1, 0};
  EXPECT(is(errors_of(f32, found, expected, 0.25f).wrong, 2, 1, 1.26f, 1));  // 5 is within a quarter of 4
  EXPECT(errors_of(f32, found, expected, 0.15f).wrong.count == 4);
  EXPECT(errors_of(f32, found, expected, 0.15f, bias).wrong.count == 3);  // 5 is within 0.15 * (4 + 3)
  EXPECT(errors_of(f32, found, expected).wrong.count == 4 && errors_of(f32, found, expected).off_by_one.count == 0);
}

void right_candidates_pass() {
  for (const GemmOutput output : kOutputs) {
    g_seen = {};
    EXPECT(verdict_on(Defect::kNone, shape_of(output)) == "");
    EXPECT(g_seen.bias && g_seen.no_bias && !g_seen.one_scale);
    for (const GemmShape& shape : {shape_of(output), GemmShape{64, 96, 96, output}, GemmShape{9, 40, 3072, output},
                                   GemmShape{1, 8, 16, output}}) {
      const std::string verdict = verdict_on(Defect::kSeparate, shape);
      if (!verdict.empty()) std::printf("%s: %s\n", name_of(output), verdict.c_str());
      EXPECT(verdict.empty());
    }
  }
  // Few values near ties may go either way.
  EXPECT(verdict_on(Defect::kOneIn400OffByOne, shape_of(GemmOutput::kChannelsGelu)) == "");
}

void wrong_candidates_are_refused() {
  const auto s8 = {GemmOutput::kChannelsS8}, relu = {GemmOutput::kChannelsRelu}, gelu = {GemmOutput::kChannelsGelu},
             f32 = {GemmOutput::kChannelsF32}, sums = {GemmOutput::kChannelsAddF16, GemmOutput::kChannelsAddBF16},
             ties = {GemmOutput::kChannelsS8, GemmOutput::kChannelsRelu, GemmOutput::kChannelsAddF16,
                     GemmOutput::kChannelsAddBF16},
             steps = {GemmOutput::kChannelsS8, GemmOutput::kChannelsRelu, GemmOutput::kChannelsGelu,
                      GemmOutput::kChannelsAddF16, GemmOutput::kChannelsAddBF16};
  const std::vector<GemmOutput> all(std::begin(kOutputs), std::end(kOutputs));
  const struct {
    Defect defect;
    std::vector<GemmOutput> outputs;
    const char* why;
  } cases[] = {
      {Defect::kNoBias, all, " values are wrong on rounding ties, one at row "},  // the extreme values have none
      {Defect::kOneScale, all, " values are wrong on extreme values, one at row "},
      {Defect::kShiftedScale, all, " values are wrong on extreme values, one at row "},
      {Defect::kTiesAway, ties, " values are off by one step on rounding ties, one at row "},
      {Defect::kTruncates, s8, " values are off by one step on extreme values, one at row "},
      {Defect::kNoRelu, relu, " values are wrong on extreme values, one at row "},
      {Defect::kNoRelu, relu, ": found -"},
      {Defect::kNoGelu, gelu, " values are wrong on extreme values, one at row "},
      {Defect::kTanhGelu, gelu, " values are off by one step on extreme values, one at row "},
      {Defect::kNoFactor, gelu, " values are wrong on extreme values, one at row "},
      {Defect::kOverwrites, sums, "816 of 816 values are wrong on extreme values, one at row "},
      {Defect::kAddsTwice, sums, "816 of 816 values are wrong on extreme values, one at row "},
      {Defect::kRoundsTwice, sums, " values are off by one step on "},
      {Defect::kThroughHalf, f32, " values are wrong on extreme values, one at row "},
      {Defect::kLastRow, all, " values are wrong on extreme values, one at row 16, column "},
      {Defect::kBehind, all, "it wrote behind the end of the output"},
      {Defect::kOffByOne, steps, "816 of 816 values are off by one step on extreme values, one at row "},
      {Defect::kOffByOne, f32, "816 of 816 values are wrong on rounding ties, one at row "},
      {Defect::kOneIn100OffByOne, steps, "8 of 816 values are off by one step on extreme values, one at row "},
      {Defect::kOneIn100OffByOne, f32, "8 of 816 values are wrong on rounding ties, one at row "},
      {Defect::kOneIn400OffByOne, ties, "2 of 816 values are off by one step on rounding ties, one at row "},
      {Defect::kFails, all, "a status that says no"},
  };
  for (const auto& c : cases) {
    for (const GemmOutput output : c.outputs) {
      const std::string verdict = verdict_on(c.defect, shape_of(output));
      if (!has(verdict, c.why)) {
        std::printf("%s, defect %d\n", name_of(output), static_cast<int>(c.defect));
        EXPECT(!"refused for the right reason");
      }
    }
  }
}

void our_tiles_pass() {
  const swin::cuda::GemmProvider& provider = swin::cuda::real_tiles_provider();
  std::string why;
  EXPECT(provider.candidates(shape_of(GemmOutput::kS8), 90, &why).empty() && !why.empty());
  for (const GemmOutput output : kOutputs) {
    for (const GemmShape& shape : {shape_of(output), GemmShape{140, 136, 80, output}}) {
      std::vector<std::unique_ptr<GemmKernel>> kernels;
      std::vector<swin::cuda::GemmTrial> trials;
      for (const GemmCandidate& candidate : provider.candidates(shape, 90, &why)) {
        kernels.push_back(provider.prepare(shape, candidate));
        trials.push_back({candidate.name, kernels.back().get()});
      }
      EXPECT(!kernels.empty());
      for (const std::string& verdict : swin::cuda::gemm_lab().bench(shape)->prove(trials)) {
        if (!verdict.empty()) std::printf("%s: %s\n", name_of(output), verdict.c_str());
        EXPECT(verdict.empty());
      }
    }
  }
}

// Many small values lie on ties, whatever the shape: a kernel that rounds them away from zero shows it in each.
void shapes_have_ties() {
  for (const std::int64_t k : {16, 96, 384, 768, 1536, 3072}) {
    for (const GemmOutput output : kOutputs) {
      if (output != GemmOutput::kChannelsS8 && !adds(output)) continue;
      for (const Defect defect : {Defect::kTiesAway, Defect::kRoundsTwice}) {
        if (defect == Defect::kRoundsTwice && !adds(output)) continue;
        const std::string verdict = verdict_on(defect, {16, 64, k, output});
        EXPECT(has(verdict, " values are off by one step on "));
        EXPECT(defect == Defect::kRoundsTwice || (has(verdict, " on rounding ties") && std::atoi(verdict.c_str()) > 8));
      }
    }
  }
}

// As the config file and the answers name it.
std::string json_of(GemmOutput output) { return std::string("\"output\": \"") + name_of(output) + "\""; }

void tuned_and_kept() {
  for (const GemmOutput output : {GemmOutput::kChannelsGelu, GemmOutput::kChannelsAddF16}) {
    Setup setup(name_of(output));
    cublaslt().fakes = {{"slow and right", Defect::kNone, 100}};
    cutlass().fakes = {{"fast and wrong", Defect::kNoBias, 1}};
    tiles().fakes = {{"quick", Defect::kNone, 20}, {"quicker", Defect::kSeparate, 10}};
    const GemmShape shape = shape_of(output);
    g_seen = {};
    const std::string answer = setup.tuner->tune({shape}, false);
    EXPECT(has(answer, json_of(output)) && has(answer, R"("chosen": "swin_tiles", "candidate": "quicker")"));
    EXPECT(has(answer, R"("proven": {"cublaslt": 1, "cutlass": 0, "swin_tiles": 2, "swin_plain": 1})"));
    EXPECT(has(answer, R"({"provider": "cutlass", "candidate": "fast and wrong", "why": )"));
    EXPECT(has(answer, " values are wrong on rounding ties"));
    EXPECT(!adds(output) || (g_seen.largest_residual > 31 && g_seen.largest_residual < 1000));
    // Another process measures nothing.
    const double before = fake::clock_us;
    setup.again();
    setup.tuner->kernel(shape, nullptr);
    EXPECT(fake::clock_us == before);
    EXPECT(has(setup.tuner->choices(), json_of(output)));
    EXPECT(has(setup.tuner->choices(), R"("provider": "swin_tiles", "candidate": "quicker", "us": 10)"));
    // Asked for by name, the wrong one is an error and not a fallback; the plain one runs this too.
    Setup::want("cutlass");
    const std::string error = error_of<swin::UnsupportedError>([&] { setup.tuner->kernel(shape, nullptr); });
    EXPECT(has(error, "nothing runs M=17 N=48 K=32 to channels_") && has(error, " values are wrong on rounding ties"));
    Setup::want("swin_plain");
    setup.tuner->kernel(shape, nullptr);
    EXPECT(has(setup.tuner->choices(), R"("candidate": "dp4a_64x64x64", "us": null)"));
  }
}

// cuBLASLt has nothing with channels and the tiles nothing without: naming one leaves the other's outputs as they are.
void names_of_what_has_no_such_output_are_passed_over() {
  Setup setup("passed_over");
  tiles().fakes = {{"tile of ours", Defect::kNone, 5}};
  const GemmShape channels = shape_of(GemmOutput::kChannelsS8), plain = shape_of(GemmOutput::kS8);
  const GemmKernel *const fastest = &setup.tuner->kernel(channels, nullptr), *const of_ft = &setup.tuner->kernel(plain, nullptr);
  Setup::want("cublaslt");
  EXPECT(&setup.tuner->kernel(channels, nullptr) == fastest);
  EXPECT(&setup.tuner->kernel(plain, nullptr) != of_ft);
  Setup::want("swin_tiles");
  EXPECT(&setup.tuner->kernel(plain, nullptr) == of_ft);
  EXPECT(&setup.tuner->kernel(channels, nullptr) != fastest);
}

}  // namespace

void test_channels() {
  the_plain_kernel_is_exact();
  random_floats_are_those_asked_for();
  errors_are_counted();
  right_candidates_pass();
  our_tiles_pass();
  wrong_candidates_are_refused();
  shapes_have_ties();
  tuned_and_kept();
  names_of_what_has_no_such_output_are_passed_over();
}

}  // namespace gemm_test
