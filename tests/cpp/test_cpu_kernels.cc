// Every operation of the CPU backend, on every instruction set this machine has: against the `portable` one, and most of
// them against plain loops in double precision too, so that `portable` is held to something as well.
//
// Integers are equal everywhere. An int8 behind floating point may differ from the exact value by half a step and 1e-3;
// where there is no exact value it may be one step from portable's in at most one place of 500 (a rounding tie). Shapes
// do not divide evenly, values saturate, outputs are poisoned before and guarded behind, and one thread and three give
// the same bytes. Inputs lie in memory of exactly their size, for the sanitizers. Seeds are fixed.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "swin/cpu.h"
#include "swin/error.h"

namespace {

using namespace swin;

int g_failures = 0, g_runs = 0;
std::int64_t g_values = 0, g_off_by_one = 0;
std::set<std::string> g_covered;

void fail(const std::string& text) {
  if (++g_failures <= 40) std::printf("failed: %s\n", text.c_str());
}

// splitmix64: the same numbers with every standard library.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t next() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  std::int64_t between(std::int64_t low, std::int64_t high) {
    return low + static_cast<std::int64_t>(next() % static_cast<std::uint64_t>(high - low + 1));
  }
  float uniform(float low, float high) {
    return low + (high - low) * (static_cast<float>(next() >> 40) * 0x1p-24f);
  }

 private:
  std::uint64_t state_;
};

// -128..127; 0..127; only -128, -127 and 127; as trained weights are, mostly small and a few as large as can be.
enum class Values { kAny, kNonNegative, kExtreme, kWeights };

// What an operation reads. Owns its memory, not a byte more.
class Tensor {
 public:
  Tensor(Random& random, std::initializer_list<std::int64_t> dims, Values values) : Tensor(DType::kS8, dims) {
    for (std::int64_t i = 0; i < view_.numel(); ++i) {
      static constexpr std::int8_t kExtremes[] = {-128, -127, 127};
      std::int64_t value = 0;
      if (values == Values::kWeights) {
        for (int part = 0; part < 4; ++part) value += random.between(-24, 24);
      }
      if (values == Values::kExtreme || (values == Values::kWeights && random.between(0, 63) == 0)) {
        value = kExtremes[random.between(0, 2)];
      } else if (values != Values::kWeights) {
        value = random.between(values == Values::kAny ? -128 : 0, 127);
      }
      view_.as<std::int8_t>()[i] = static_cast<std::int8_t>(value);
    }
  }
  Tensor(Random& random, std::initializer_list<std::int64_t> dims, float low, float high) : Tensor(DType::kF32, dims) {
    for (std::int64_t i = 0; i < view_.numel(); ++i) view_.as<float>()[i] = random.uniform(low, high);
  }
  const TensorView& view() const { return view_; }
  float* floats() const { return view_.as<float>(); }
  double f(std::int64_t i) const { return view_.as<float>()[i]; }
  int s8(std::int64_t i) const { return view_.as<std::int8_t>()[i]; }

 private:
  Tensor(DType dtype, std::initializer_list<std::int64_t> dims) : view_(nullptr, dtype, dims) {
    memory_ = std::shared_ptr<char>(new char[view_.numel() * size_of(dtype)], std::default_delete<char[]>());
    view_.data = memory_.get();
  }
  TensorView view_;
  std::shared_ptr<char> memory_;
};

// What an operation writes, and what is known of it.
struct Output {
  DType dtype;
  std::vector<std::int64_t> dims;
  bool equal = false;                // to portable's, bit by bit
  std::vector<double> exact = {};    // none: portable alone
  std::vector<double> slack = {};    // beside half a step of int8, or of a float; none: 1e-3, and 1e-5 of the largest float
  const Tensor* before = nullptr;    // contents that the operation updates

  std::int64_t numel() const {
    std::int64_t n = 1;
    for (std::int64_t dim : dims) n *= dim;
    return n;
  }
};

// One operation on one instruction set.
struct Run {
  const Backend& backend;
  std::vector<std::unique_ptr<PackedWeight>> weights = {};
  std::vector<TensorView> out = {};

  const PackedWeight* pack(const Tensor& w, InputRange input = InputRange::kSigned) {
    weights.push_back(backend.pack_weight(w.view(), input));
    return weights.back().get();
  }
};
using MakeArgs = std::function<OpArgs(Run&)>;

constexpr std::int64_t kGuard = 64;
using Memory = std::vector<unsigned char>;

template <class T>
std::vector<double> numbers(const unsigned char* data, std::int64_t n) {
  std::vector<T> values(n);
  std::memcpy(values.data(), data, n * sizeof(T));
  return {values.begin(), values.end()};
}

std::vector<double> numbers(const Output& o, const Memory& memory) {
  if (o.dtype == DType::kS8) return numbers<std::int8_t>(memory.data(), o.numel());
  if (o.dtype == DType::kS32) return numbers<std::int32_t>(memory.data(), o.numel());
  return numbers<float>(memory.data(), o.numel());
}

double largest(const std::vector<double>& x) {
  double most = 1;
  for (double v : x) most = std::isfinite(v) && std::fabs(v) > most ? std::fabs(v) : most;
  return most;
}

void compare(const std::string& name, const Output& o, const Memory& got, const Memory& portable) {
  const std::vector<double> a = numbers(o, got), b = numbers(o, portable);
  const std::string numbers_of = name + ": ";
  const double float_slack = 1e-5 * largest(b), exact_slack = 1e-5 * largest(o.exact);
  std::int64_t differ = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const auto report = [&](const char* than, double wanted) {
      char text[160];
      std::snprintf(text, sizeof text, "[%zu] is %.9g, %s %.9g", i, a[i], than, wanted);
      fail(numbers_of + text);
    };
    if (std::isnan(a[i]) != std::isnan(b[i])) return report("portable", b[i]);
    const double apart = std::fabs(a[i] - b[i]);
    if (o.dtype != DType::kF32 && apart != 0) ++differ;
    if (o.equal ? apart != 0 : o.dtype == DType::kF32 ? apart > float_slack : apart > 1) return report("portable", b[i]);
    if (o.exact.empty()) continue;
    double wanted = o.exact[i], room = o.slack.empty() ? 1e-3 : o.slack[i];
    if (o.dtype == DType::kS8) {
      wanted = std::fmin(std::fmax(wanted, -128), 127);
      room += 0.5;
    } else if (o.dtype == DType::kF32 && o.slack.empty()) {
      room = exact_slack;
    }
    if (!(std::fabs(a[i] - wanted) <= room)) return report("exactly", wanted);
  }
  g_values += static_cast<std::int64_t>(a.size());
  g_off_by_one += differ;
  // With an exact value each is held to that one instead.
  if (o.exact.empty() && differ > 2 + static_cast<std::int64_t>(a.size()) / 500) {
    fail(numbers_of + std::to_string(differ) + " of " + std::to_string(a.size()) + " are one step from portable's");
  }
}

void check(const std::string& name, const std::vector<Output>& outputs, const MakeArgs& make) {
  std::vector<Memory> portable;
  std::vector<std::string> variants = cpu_variants();
  for (auto variant = variants.rbegin(); variant != variants.rend(); ++variant) {  // portable is the last
    std::vector<Memory> one_thread;
    for (const int threads : {1, 3}) {
      const std::string where = name + " on " + *variant + ", " + std::to_string(threads) + " threads";
      std::vector<Memory> memory;
      Run run{cpu_backend(*variant)};
      for (const Output& o : outputs) {
        const std::int64_t bytes = o.numel() * size_of(o.dtype);
        memory.emplace_back(bytes + kGuard, 0xA5);
        if (o.before != nullptr) std::memcpy(memory.back().data(), o.before->view().data, bytes);
        TensorView view(memory.back().data(), o.dtype, {});
        for (std::int64_t dim : o.dims) view.shape[view.rank++] = dim;
        run.out.push_back(view);
      }
      try {
        const OpArgs args = make(run);
        g_covered.insert(op_name(args));
        run_op(run.backend.ops(), "cpu", args, {threads, nullptr});
        ++g_runs;
      } catch (const Error& e) {
        fail(where + ": " + e.what());
        return;
      }
      for (std::size_t i = 0; i < outputs.size(); ++i) {
        const std::int64_t bytes = outputs[i].numel() * size_of(outputs[i].dtype);
        for (std::int64_t g = 0; g < kGuard; ++g) {
          if (memory[i][bytes + g] == 0xA5) continue;
          fail(where + ": wrote behind output " + std::to_string(i));
          break;
        }
      }
      if (portable.empty()) portable = memory;
      if (threads == 1) {
        one_thread = memory;
        for (std::size_t i = 0; i < outputs.size(); ++i) {
          compare(where + ", output " + std::to_string(i), outputs[i], memory[i], portable[i]);
        }
      } else if (memory != one_thread) {
        fail(where + ": other bytes than with 1 thread");
      }
    }
  }
}

std::string shape_of(std::initializer_list<std::int64_t> dims) {
  std::string text;
  for (std::int64_t dim : dims) text.append(text.empty() ? " " : "x").append(std::to_string(dim));
  return text;
}

// sum_k x[m, k] * w[n, k], [M, N].
std::vector<std::int64_t> naive_gemm(const Tensor& x, const Tensor& w) {
  const std::int64_t m = x.view().dim(0), k = x.view().dim(1), n = w.view().dim(0);
  std::vector<std::int64_t> acc(m * n);
  for (std::int64_t i = 0; i < m; ++i) {
    for (std::int64_t j = 0; j < n; ++j) {
      const std::int8_t *row = x.view().as<std::int8_t>() + i * k, *column = w.view().as<std::int8_t>() + j * k;
      std::int32_t sum = 0;
      for (std::int64_t e = 0; e < k; ++e) sum += row[e] * column[e];
      acc[i * n + j] = sum;
    }
  }
  return acc;
}

// clamp(rne(float(acc) * factor), low, 127), as the contract has it: float32, one multiplication.
double requantized(std::int64_t acc, float factor, double low = -128) {
  const float y = static_cast<float>(acc) * factor;
  return std::fmin(std::fmax(std::nearbyint(static_cast<double>(y)), low), 127);
}

// Takes the accumulators of a K-long sum of random int8 to about a third of int8's range, so that some saturate.
float spread(std::int64_t k) { return 50.0f / (5500.0f * std::sqrt(static_cast<float>(k))); }

void gemm(std::int64_t m, std::int64_t n, std::int64_t k, Values values, Values weights, std::uint64_t seed) {
  Random random(seed);
  const bool non_negative = values == Values::kNonNegative;
  const Tensor x(random, {m, k}, values), w(random, {n, k}, weights);
  const std::vector<std::int64_t> acc = naive_gemm(x, w);
  const float factor = spread(k);
  const InputRange input = non_negative ? InputRange::kNonNegative : InputRange::kSigned;
  std::vector<double> s32(acc.begin(), acc.end()), s8, relu;
  for (std::int64_t a : acc) {
    s8.push_back(requantized(a, factor));
    relu.push_back(requantized(a, factor, 0));
  }
  const std::string name = "gemm_s8" + shape_of({m, n, k}) + " of values " + std::to_string(static_cast<int>(values)) +
                           " and weights " + std::to_string(static_cast<int>(weights));
  check(name, {{DType::kS32, {m, n}, true, s32}}, [&](Run& run) {
    return GemmS8Args{x.view(), run.pack(w, input), run.out[0], factor, Epilogue::kNone};
  });
  check(name, {{DType::kS8, {m, n}, true, s8}}, [&](Run& run) {
    return GemmS8Args{x.view(), run.pack(w, input), run.out[0], factor, Epilogue::kNone};
  });
  check(name + " with ReLU", {{DType::kS8, {m, n}, true, relu}}, [&](Run& run) {
    return GemmS8Args{x.view(), run.pack(w, input), run.out[0], factor, Epilogue::kRelu};
  });
}

void gemms() {
  using enum Values;
  constexpr std::pair<Values, Values> kKinds[] = {
      {kAny, kAny}, {kNonNegative, kAny}, {kExtreme, kExtreme}, {kExtreme, kWeights}, {kNonNegative, kWeights}};
  for (const auto& [values, weights] : kKinds) {
    // Every count of rows a micro-kernel has, and columns and steps that do and do not fill vectors.
    for (std::int64_t m = 1; m <= 17; ++m) gemm(m, 1 + m * 5 % 38, 3 + m * 7 % 41, values, weights, m);
    for (std::int64_t k : {1, 2, 3, 4, 5, 15, 16, 17, 31, 64, 65}) gemm(9, 33, k, values, weights, 100 + k);
    gemm(3, 5, 7, values, weights, 200);
    gemm(49, 96, 32, values, weights, 201);
    gemm(131, 67, 260, values, weights, 202);
  }
  gemm(98, 300, 256, kAny, kWeights, 203);           // columns split, for the threads
  gemm(130, 700, 768, kNonNegative, kWeights, 204);  // and for a cache
  gemm(300, 700, 768, kAny, kWeights, 205);          // of three threads each has rows enough of its own
}

void linear(std::int64_t m, std::int64_t n, std::int64_t k, bool with_bias, std::uint64_t seed) {
  Random random(seed);
  const Tensor x(random, {m, k}, Values::kAny), w(random, {n, k}, Values::kAny);
  const Tensor scale(random, {n}, 0.5f * spread(k), 1.5f * spread(k)), bias(random, {n}, -60, 60);
  const std::vector<std::int64_t> acc = naive_gemm(x, w);
  std::vector<double> exact;
  for (std::int64_t i = 0; i < m * n; ++i) {
    exact.push_back(static_cast<double>(acc[i]) * scale.f(i % n) + (with_bias ? bias.f(i % n) : 0));
  }
  for (const DType dtype : {DType::kS8, DType::kF32}) {
    check("linear_s8" + shape_of({m, n, k}), {{dtype, {m, n}, false, exact}}, [&](Run& run) {
      return LinearS8Args{x.view(), run.pack(w), scale.view(), with_bias ? bias.view() : TensorView{}, run.out[0]};
    });
  }
}

void cosine_qkv(std::int64_t m, std::int64_t heads, std::int64_t d, std::int64_t k, bool with_bias, std::uint64_t seed) {
  Random random(seed);
  const std::int64_t n = 3 * heads * d;
  const Tensor x(random, {m, k}, Values::kAny), w(random, {n, k}, Values::kAny);
  const Tensor scale(random, {n}, 0.5f * spread(k), 1.5f * spread(k)), bias(random, {n}, -60, 60);
  std::memset(x.view().as<std::int8_t>(), 0, k);  // without a bias, a row whose largest is 0
  const std::vector<std::int64_t> acc = naive_gemm(x, w);
  std::vector<double> exact;
  for (std::int64_t i = 0; i < m * n; ++i) {
    exact.push_back(static_cast<double>(acc[i]) * scale.f(i % n) + (with_bias ? bias.f(i % n) : 0));
  }
  for (std::int64_t i = 0; i < m * n; i += d) {  // one head of one row
    if (i % n >= 2 * heads * d) continue;
    double largest = kNormalizeEps;
    for (std::int64_t e = 0; e < d; ++e) largest = std::fmax(largest, std::fabs(exact[i + e]));
    for (std::int64_t e = 0; e < d; ++e) exact[i + e] *= 127 / largest;
  }
  check("linear_cosine_qkv" + shape_of({m, heads, d, k}), {{DType::kS8, {m, n}, false, exact}}, [&](Run& run) {
    return LinearCosineQkvArgs{x.view(),   run.pack(w), scale.view(), with_bias ? bias.view() : TensorView{},
                               run.out[0], heads};
  });
}

// Row of window order that holds token (b*H + y)*W + x.
std::int64_t window_row(const WindowGeometry& g, std::int64_t token) {
  const std::int64_t b = token / (g.height * g.width);
  const std::int64_t windows_y = (g.height + g.window_h - 1) / g.window_h;
  const std::int64_t windows_x = (g.width + g.window_w - 1) / g.window_w;
  const std::int64_t cycle_h = g.pad_first ? windows_y * g.window_h : g.height;
  const std::int64_t cycle_w = g.pad_first ? windows_x * g.window_w : g.width;
  const std::int64_t y = (token / g.width % g.height - g.shift_h + cycle_h) % cycle_h;
  const std::int64_t x = (token % g.width - g.shift_w + cycle_w) % cycle_w;
  const std::int64_t window = (b * windows_y + y / g.window_h) * windows_x + x / g.window_w;
  return window * g.window_area() + y % g.window_h * g.window_w + x % g.window_w;
}

// LayerNorm of c numbers, times quant.
void append_norm(std::vector<double>& out, const double* x, std::int64_t c, const Tensor& gamma, const Tensor& beta,
                 double quant) {
  double mean = 0, variance = 0;
  for (std::int64_t i = 0; i < c; ++i) mean += x[i] / static_cast<double>(c);
  for (std::int64_t i = 0; i < c; ++i) variance += (x[i] - mean) * (x[i] - mean) / static_cast<double>(c);
  for (std::int64_t i = 0; i < c; ++i) {
    out.push_back(((x[i] - mean) / std::sqrt(variance + kLayerNormEps) * gamma.f(i) + beta.f(i)) * quant);
  }
}

// LayerNorm of every row of x [M, C], times quant; row r of x to row `target(r)` of `rows`, by default M; others are 0.
template <class Target>
std::vector<double> norm_rows(const std::vector<double>& x, std::int64_t c, const Tensor& gamma, const Tensor& beta,
                              double quant, Target&& target, std::int64_t rows = 0) {
  std::vector<double> out(rows > 0 ? rows * c : x.size());
  for (std::int64_t r = 0; r < static_cast<std::int64_t>(x.size()) / c; ++r) {
    std::vector<double> row;
    append_norm(row, x.data() + r * c, c, gamma, beta, quant);
    std::copy(row.begin(), row.end(), out.begin() + target(r) * c);
  }
  return out;
}

std::vector<double> doubles(const Tensor& x) {
  const float* begin = x.view().as<const float>();
  return {begin, begin + x.view().numel()};
}

const WindowGeometry kPlain{1, 6, 9, 3, 3, 0, 0}, kShifted{2, 14, 7, 7, 7, 3, 0}, kOblong{3, 4, 10, 2, 5, 1, 2};
const WindowGeometry kManyRows{3, 10, 10, 5, 5, 2, 2};  // a block of rows for each of three threads, split as no other case is
// Padded: behind the shift and ahead of it; along one side; more than the shift, and less.
const WindowGeometry kPadded{2, 9, 13, 7, 7, 3, 3}, kPaddedFirst{2, 9, 13, 7, 7, 3, 3, true};
const WindowGeometry kPaddedSide{3, 6, 7, 3, 4, 1, 2, true}, kPaddedMore{1, 5, 11, 4, 5, 2, 2};

void norms_and_residuals(const WindowGeometry& g, std::int64_t c, std::int64_t k, std::uint64_t seed) {
  Random random(seed);
  const std::int64_t m = g.tokens(), p = g.window_rows();
  const Tensor residual(random, {m, c}, -3, 3), gamma(random, {c}, 0.5f, 1.5f), beta(random, {c}, -0.5f, 0.5f);
  const Tensor bias(random, {c}, -1, 1), x(random, {p, k}, Values::kAny), w(random, {c, k}, Values::kAny);
  const Tensor scale(random, {c}, 0.01f * spread(k), 0.03f * spread(k)), s8(random, {m, c}, Values::kAny);
  const Tensor windowed(random, {p, c}, Values::kAny);
  const float quant = 45, dequant = 0.02f;
  const std::string of = shape_of({m, c, k});
  const auto same = [](std::int64_t r) { return r; };

  check("norm_shift_partition" + of,
        {{DType::kS8, {p, c}, false, norm_rows(doubles(residual), c, gamma, beta, quant, [&](std::int64_t r) {
            return window_row(g, r);
          }, p)}},
        [&](Run& run) {
          return NormShiftPartitionArgs{residual.view(), gamma.view(), beta.view(), run.out[0], g, quant};
        });

  std::vector<double> sum = doubles(residual), biased = sum, linear_sum = sum, mlp_out;
  const std::vector<std::int64_t> acc = naive_gemm(x, w);
  for (std::int64_t i = 0; i < m * c; ++i) {
    const std::int64_t source = window_row(g, i / c) * c + i % c;
    sum[i] += windowed.s8(source) * static_cast<double>(dequant) + bias.f(i % c);
    linear_sum[i] += static_cast<double>(acc[source]) * scale.f(i % c) + bias.f(i % c);
    biased[i] += bias.f(i % c);
  }
  check("proj_bias_residual_norm" + of,
        {{DType::kF32, {m, c}, false, sum, {}, &residual},
         {DType::kS8, {m, c}, false, norm_rows(sum, c, gamma, beta, quant, same)}},
        [&](Run& run) {
          return ProjBiasResidualNormArgs{windowed.view(), bias.view(), run.out[0], gamma.view(), beta.view(),
                                          run.out[1],      g,           dequant,    quant};
        });
  check("linear_residual_norm" + of,
        {{DType::kF32, {m, c}, false, linear_sum, {}, &residual},
         {DType::kS8, {m, c}, false, norm_rows(linear_sum, c, gamma, beta, quant, same)}},
        [&](Run& run) {
          return LinearResidualNormArgs{x.view(),     run.pack(w),  scale.view(), bias.view(), run.out[0],
                                        gamma.view(), beta.view(), {},           run.out[1],  g,
                                        quant};
        });
  // Swin-V2's norm behind the branch.
  std::vector<double> projected(m * c), projected_out;
  for (std::int64_t i = 0; i < m * c; ++i) {
    projected[i] = static_cast<double>(acc[window_row(g, i / c) * c + i % c]) * scale.f(i % c) + bias.f(i % c);
  }
  projected = norm_rows(projected, c, gamma, beta, 1, same);
  for (std::int64_t i = 0; i < m * c; ++i) projected_out.push_back((projected[i] += residual.f(i)) * quant);
  std::vector<float> memory(p * c);
  check("linear_residual_norm, res-post-norm" + of,
        {{DType::kF32, {m, c}, false, projected, {}, &residual}, {DType::kS8, {m, c}, false, projected_out}}, [&](Run& run) {
          return LinearResidualNormArgs{x.view(),
                                        run.pack(w),
                                        scale.view(),
                                        bias.view(),
                                        run.out[0],
                                        gamma.view(),
                                        beta.view(),
                                        TensorView(memory.data(), DType::kF32, {p, c}),
                                        run.out[1],
                                        g,
                                        quant,
                                        NormPlace::kResPostNorm};
        });
  std::vector<double> shifted(p * c), branch(m * c), plain_branch(m * c), quantized_sum, unbiased(m * c);
  for (std::int64_t i = 0; i < m * c; ++i) {
    shifted[window_row(g, i / c) * c + i % c] = residual.f(i) * static_cast<double>(quant);
    branch[i] = windowed.s8(window_row(g, i / c) * c + i % c) * static_cast<double>(dequant) + bias.f(i % c);
    unbiased[i] = s8.s8(i) * static_cast<double>(dequant);
    plain_branch[i] = unbiased[i] + bias.f(i % c);
  }
  branch = norm_rows(branch, c, gamma, beta, 1, same);
  plain_branch = norm_rows(plain_branch, c, gamma, beta, 1, same);
  for (std::int64_t i = 0; i < m * c; ++i) {
    branch[i] += residual.f(i);
    plain_branch[i] += residual.f(i);
    quantized_sum.push_back(branch[i] * quant);
  }
  check("shift_partition" + of, {{DType::kS8, {p, c}, true, shifted}},
        [&](Run& run) { return ShiftPartitionArgs{residual.view(), run.out[0], g, quant}; });
  check("proj_bias_norm_residual" + of,
        {{DType::kF32, {m, c}, false, branch, {}, &residual}, {DType::kS8, {m, c}, false, quantized_sum}}, [&](Run& run) {
          return ProjBiasNormResidualArgs{windowed.view(), bias.view(), gamma.view(), beta.view(), run.out[0],
                                          run.out[1],      g,           dequant,      quant};
        });
  check("bias_norm_residual" + of, {{DType::kF32, {m, c}, false, plain_branch, {}, &residual}}, [&](Run& run) {
    return BiasNormResidualArgs{s8.view(), bias.view(), gamma.view(), beta.view(), run.out[0], dequant};
  });
  check("dequantize_norm" + of, {{DType::kF32, {m, c}, false, norm_rows(unbiased, c, gamma, beta, 1, same)}},
        [&](Run& run) { return DequantizeNormArgs{s8.view(), gamma.view(), beta.view(), run.out[0], dequant}; });
  check("patch_embed_norm" + of,
        {{DType::kF32, {m, c}, false, norm_rows(biased, c, gamma, beta, 1, same), {}, &residual}},
        [&](Run& run) { return PatchEmbedNormArgs{run.out[0], bias.view(), gamma.view(), beta.view()}; });
  check("patch_embed_norm, bias only" + of, {{DType::kF32, {m, c}, false, biased, {}, &residual}}, [&](Run& run) {
    return PatchEmbedNormArgs{run.out[0], bias.view(), {}, {}};
  });
  check("patch_embed_norm, norm only" + of,
        {{DType::kF32, {m, c}, false, norm_rows(doubles(residual), c, gamma, beta, 1, same), {}, &residual}},
        [&](Run& run) { return PatchEmbedNormArgs{run.out[0], {}, gamma.view(), beta.view()}; });

  std::vector<double> pooled(g.batch * c);
  const std::vector<double> normed = norm_rows(doubles(residual), c, gamma, beta, 1, same);
  const std::int64_t tokens = g.height * g.width;
  for (std::int64_t i = 0; i < m * c; ++i) pooled[i / c / tokens * c + i % c] += normed[i] / static_cast<double>(tokens);
  check("final_norm_pool" + of, {{DType::kF32, {g.batch, c}, false, pooled}}, [&](Run& run) {
    return FinalNormPoolArgs{residual.view(), gamma.view(), beta.view(), run.out[0]};
  });

  for (const DType dtype : {DType::kS8, DType::kS32}) {
    std::vector<std::int32_t> wide(s8.view().as<std::int8_t>(), s8.view().as<std::int8_t>() + m * c);
    for (std::int32_t& v : wide) v *= dtype == DType::kS32 ? 70001 : 1;
    const TensorView ints = dtype == DType::kS8 ? s8.view() : TensorView(wide.data(), DType::kS32, {m, c});
    std::vector<double> out, added = doubles(residual);
    for (std::int64_t i = 0; i < m * c; ++i) {
      out.push_back(static_cast<float>(wide[i]) * dequant);
      added[i] += wide[i] * static_cast<double>(dequant) + bias.f(i % c);
    }
    check("dequantize" + of, {{DType::kF32, {m, c}, true, out, std::vector<double>(m * c, 0.0)}},
          [&](Run& run) { return DequantizeArgs{ints, run.out[0], dequant}; });
    check("bias_residual" + of, {{DType::kF32, {m, c}, false, added, {}, &residual}},
          [&](Run& run) { return BiasResidualArgs{ints, bias.view(), run.out[0], dequant}; });
  }

  const Tensor gamma4(random, {4 * c}, 0.5f, 1.5f), beta4(random, {4 * c}, -0.5f, 0.5f);
  std::vector<double> gathered;
  std::int64_t merged = 0;
  for (std::int64_t b = 0; b < g.batch; ++b) {
    for (std::int64_t y = 0; y < g.height; y += 2) {
      for (std::int64_t left = 0; left < g.width; left += 2, ++merged) {
        for (const int part : {0, 1, 2, 3}) {  // row parity runs first
          const std::int64_t row = y + part % 2, column = left + part / 2;
          const bool inside = row < g.height && column < g.width;
          const std::int64_t token = (b * g.height + row) * g.width + column;
          for (std::int64_t i = 0; i < c; ++i) gathered.push_back(inside ? residual.f(token * c + i) : 0.0);
        }
      }
    }
  }
  check("patch_merge_norm" + of,
        {{DType::kS8, {merged, 4 * c}, false, norm_rows(gathered, 4 * c, gamma4, beta4, quant, same)}}, [&](Run& run) {
          return PatchMergeNormArgs{residual.view(), gamma4.view(), beta4.view(), run.out[0],
                                    g.batch,         g.height,      g.width,      quant};
        });
  for (double& v : gathered) v *= quant;
  check("patch_merge" + of, {{DType::kS8, {merged, 4 * c}, true, gathered}}, [&](Run& run) {
    return PatchMergeArgs{residual.view(), run.out[0], g.batch, g.height, g.width, quant};
  });
}

constexpr float kHiddenQuant = 40;

// What GELU gives lies within its InputRange, which is no wider than by a value or two.
void gelu_range() {
  for (const float quant :
       {0.01f, 0.5f, 1.0f, 2.94f, 5.8f, 5.9f, 12.7f, 30.0f, 40.0f, 127.0f, 640.0f, 740.0f, 760.0f, 1e6f}) {
    double lowest = 0;
    for (double x = -6; x < 0; x += 1e-4)
      lowest = std::fmin(lowest, x / 2 * (1 + std::erf(x / std::sqrt(2.0))) * quant);
    const int rounded = static_cast<int>(std::fmax(std::nearbyint(lowest - 4e-7 * quant), -128.0));
    const int known = InputRange::behind_gelu(quant).lowest;
    if (known > rounded || known < std::max(rounded - 2, -128)) {
      fail("GELU * " + std::to_string(quant) + " is " + std::to_string(rounded) +
           " or more, its InputRange begins at " + std::to_string(known));
    }
  }
  for (const float quant : {-3.0f, std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    if (!(InputRange::behind_gelu(quant) == InputRange::kSigned))
      fail("GELU * " + std::to_string(quant) + " has a range");
  }
}

void mlp(const WindowGeometry& g, std::int64_t c, std::int64_t f, Activation activation, std::uint64_t seed,
         Values weights = Values::kAny) {
  Random random(seed);
  const std::int64_t m = g.tokens();
  const bool relu = activation == Activation::kRelu;
  const Tensor x(random, {m, c}, Values::kAny), w1(random, {f, c}, weights), w2(random, {c, f}, weights);
  const float to_gelu = relu ? 1.0f : 0.03f;
  const Tensor scale1(random, {f}, 0.5f * to_gelu * spread(c), 1.5f * to_gelu * spread(c)), bias1(random, {f}, -1, 1);
  const Tensor scale2(random, {c}, 0.01f * spread(f), 0.03f * spread(f)), bias2(random, {c}, -1, 1);
  const Tensor residual(random, {m, c}, -3, 3), gamma(random, {c}, 0.5f, 1.5f), beta(random, {c}, -0.5f, 0.5f);
  const InputRange input = relu ? InputRange::kNonNegative : InputRange::behind_gelu(kHiddenQuant);
  std::vector<float> memory(m * c);
  for (const bool whole : {false, true}) {  // with memory for all hidden rows, or without
    for (const auto& [normed, place] : {std::pair(true, NormPlace::kPreNorm), {false, NormPlace::kPreNorm},
                                        {true, NormPlace::kResPostNorm}, {false, NormPlace::kResPostNorm}}) {
      const bool post = place == NormPlace::kResPostNorm;
      std::vector<Output> outputs = {{DType::kF32, {m, c}, false, {}, {}, &residual}};
      if (normed) outputs.push_back({DType::kS8, {g.window_rows(), c}});
      std::vector<std::int8_t> hidden(m * f);
      // A hidden value one step off at a tie is worth 127 * scale2 to a sum.
      check("mlp_residual_norm" + shape_of({m, c, f}) + (whole ? ", hidden" : "") + (relu ? ", ReLU" : ", GELU") +
                (post ? ", res-post-norm" : ""),
            outputs, [&, normed = normed, place = place](Run& run) {
              MlpResidualNormArgs args;
              args.x = x.view();
              args.w1 = run.pack(w1);
              args.w2 = run.pack(w2, input);
              args.scale1 = scale1.view();
              if (!relu) args.bias1 = bias1.view();
              args.scale2 = scale2.view();
              args.bias2 = bias2.view();
              args.residual = run.out[0];
              args.geometry = g;
              args.activation = activation;
              args.hidden_quant = kHiddenQuant;
              if (whole) args.hidden = TensorView(hidden.data(), DType::kS8, {m, f});
              args.norm = place;
              if (post) args.branch = TensorView(memory.data(), DType::kF32, {m, c});
              if (post || normed) {
                args.gamma = gamma.view();
                args.beta = beta.view();
              }
              if (normed) {
                args.out = run.out[1];
                args.quant = 45;
              }
              return args;
            });
    }
  }
}

// softmax of one row of x in double.
std::vector<double> softmax_of(std::vector<double> x) {
  double top = x[0], sum = 0;
  for (double v : x) top = std::fmax(top, v);
  for (double& v : x) sum += v = std::exp(v - top);
  for (double& v : x) v /= sum;
  return x;
}

void attention(std::int64_t windows, std::int64_t heads, std::int64_t n, std::int64_t d, std::int64_t masks,
               std::uint64_t seed, Values values = Values::kAny) {
  Random random(seed);
  const std::int64_t c = heads * d, pitch = (n + 15) / 16 * 16;
  const Tensor qkv(random, {windows * n, 3 * c}, values), bias(random, {heads, n, n}, -2, 2);
  const Tensor mask(random, {masks > 0 ? masks : 1, n, n}, -4, 0);
  for (std::int64_t i = 0; i < mask.view().numel(); ++i) mask.floats()[i] = mask.f(i) < -2 ? -100.0f : 0.0f;
  const float qk_factor = 0.04f * spread(d), pv_factor = 0.9f;
  const TensorView mask_view = masks > 0 ? mask.view() : TensorView{};
  const std::string of = shape_of({windows, heads, n, d, masks});
  // The fused operation has every second window share a mask, and the others none, where the shape has several.
  std::vector<std::int32_t> which;
  for (std::int64_t i = 0; i < masks; ++i) which.push_back(static_cast<std::int32_t>(i % 2 ? masks - 1 : -1));
  const bool shared = masks > 1;
  const TensorView which_view = shared ? TensorView(which.data(), DType::kS32, {masks}) : TensorView{};
  const auto mask_at = [&](std::int64_t window, std::int64_t i, std::int64_t j) {
    const std::int64_t number = shared ? which[window % masks] : masks - 1;
    return number < 0 ? 0.0 : mask.f((number * n + i) * n + j);
  };

  const Tensor cosine_scale(random, {heads}, 1, 20);
  for (const bool cosine : {false, true}) {
    std::vector<double> out(windows * n * c), slack(out.size());
    for (std::int64_t index = 0; index < windows * heads; ++index) {
      const std::int64_t window = index / heads, head = index % heads;
      const auto at = [&](std::int64_t third, std::int64_t token, std::int64_t e) {
        return qkv.s8((window * n + token) * 3 * c + third * c + head * d + e);
      };
      const auto length = [&](std::int64_t third, std::int64_t token) {
        double squares = 0;
        for (std::int64_t e = 0; e < d; ++e) squares += at(third, token, e) * at(third, token, e);
        return std::sqrt(std::fmax(1, squares));
      };
      for (std::int64_t i = 0; i < n; ++i) {
        std::vector<double> x;
        double top = -1e30, sum = 0, unsure = 0;
        for (std::int64_t j = 0; j < n; ++j) {
          std::int64_t acc = 0;
          for (std::int64_t e = 0; e < d; ++e) acc += at(0, i, e) * at(1, j, e);
          const double factor = cosine ? cosine_scale.f(head) / (length(0, i) * length(1, j)) : qk_factor;
          x.push_back(static_cast<double>(acc) * factor + bias.f((head * n + i) * n + j) +
                      mask_at(window, i, j));
          top = std::fmax(top, x.back());
        }
        for (double& p : x) {
          p = 127 * std::exp(p - top);
          unsure += std::fabs(p - std::floor(p) - 0.5) < 1e-3;  // either way of rounding is right
          sum += p = std::nearbyint(p);
        }
        for (std::int64_t e = 0; e < d; ++e) {
          double y = 0;
          for (std::int64_t j = 0; j < n; ++j) y += x[j] * at(2, j, e);
          out[(window * n + i) * c + head * d + e] = y * pv_factor / sum;
          slack[(window * n + i) * c + head * d + e] = 1e-3 + unsure * 256 * pv_factor / sum;
        }
      }
    }
    check("window_attention" + of + (cosine ? ", cosine" : ""), {{DType::kS8, {windows * n, c}, false, out, slack}},
          [&](Run& run) {
            return WindowAttentionArgs{.qkv = qkv.view(),
                                       .bias = bias.view(),
                                       .mask = mask_view,
                                       .mask_of = which_view,
                                       .head_scale = cosine ? cosine_scale.view() : TensorView{},
                                       .out = run.out[0],
                                       .qk_factor = qk_factor,
                                       .pv_factor = pv_factor};
          });
  }

  // The same in FasterTransformer's steps.
  const Tensor q(random, {windows, heads, n, d}, values), k(random, {windows, heads, n, d}, values);
  const Tensor p(random, {windows, heads, n, pitch}, Values::kNonNegative);
  const Tensor scores(random, {windows, heads, n, pitch}, values);
  std::vector<double> qk(windows * heads * n * pitch), soft(qk.size()), scaled(qk.size()), pv(windows * n * c);
  const Tensor head_scale(random, {heads}, 0.05f, 0.15f);
  for (std::int64_t row = 0; row < windows * heads * n; ++row) {
    const std::int64_t index = row / n, window = index / heads, head = index % heads, i = row % n;
    std::vector<double> x, x_scaled;
    for (std::int64_t j = 0; j < n; ++j) {
      std::int64_t acc = 0;
      for (std::int64_t e = 0; e < d; ++e) acc += q.s8(row * d + e) * k.s8((index * n + j) * d + e);
      qk[row * pitch + j] = requantized(acc, spread(d));
      const double added =
          bias.f((head * n + i) * n + j) + (masks > 0 ? mask.f((window % masks * n + i) * n + j) : 0.0);
      x.push_back(scores.s8(row * pitch + j) * 0.05 + added);
      x_scaled.push_back(scores.s8(row * pitch + j) * 0.5 * head_scale.f(head) + added);
    }
    x = softmax_of(x);
    x_scaled = softmax_of(x_scaled);
    for (std::int64_t j = 0; j < n; ++j) {
      soft[row * pitch + j] = x[j] * 300;
      scaled[row * pitch + j] = x_scaled[j] * 300;
    }
    for (std::int64_t e = 0; e < d; ++e) {
      std::int64_t acc = 0;
      for (std::int64_t j = 0; j < n; ++j) acc += p.s8(row * pitch + j) * q.s8((index * n + j) * d + e);
      pv[(window * n + i) * c + head * d + e] = requantized(acc, spread(n));
    }
  }
  check("qk_gemm" + of, {{DType::kS8, {windows, heads, n, pitch}, true, qk}}, [&](Run& run) {
    return QkGemmArgs{q.view(), k.view(), run.out[0], spread(d)};
  });
  check("softmax" + of, {{DType::kS8, {windows, heads, n, pitch}, false, soft}}, [&](Run& run) {
    return SoftmaxArgs{scores.view(), bias.view(), mask_view, run.out[0], 0.1f, 0.5f, 300};
  });
  check("head_scale_softmax" + of, {{DType::kS8, {windows, heads, n, pitch}, false, scaled}}, [&](Run& run) {
    return HeadScaleSoftmaxArgs{scores.view(), head_scale.view(), bias.view(), mask_view, run.out[0], 0.5f, 300};
  });
  check("pv_gemm" + of, {{DType::kS8, {windows * n, c}, true, pv}}, [&](Run& run) {
    return PvGemmArgs{p.view(), q.view(), run.out[0], spread(n)};
  });

  const Tensor channel_bias(random, {3 * c}, -1, 1);
  constexpr float kInf = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();
  const float special[] = {kNan, kInf, -kInf, 1e30f, -1e30f};
  for (std::int64_t i = 0; i < 5 && 2 * i < 3 * c; ++i) channel_bias.floats()[2 * i] = special[i];
  const double quants[] = {40, 55, 70};
  std::vector<double> split(3 * windows * n * c);
  for (std::int64_t i = 0; i < windows * n * 3 * c; ++i) {
    const std::int64_t column = i % (3 * c), token = i / (3 * c) % n, window = i / (3 * c) / n;
    const std::int64_t third = column / c, head = column % c / d;
    const double y = (qkv.s8(i) * static_cast<double>(0.02f) + channel_bias.f(column)) * quants[third];
    split[(((third * windows + window) * heads + head) * n + token) * d + column % d] = std::isnan(y) ? 0 : y;
  }
  check("qkv_bias" + of, {{DType::kS8, {3, windows, heads, n, d}, false, split}}, [&](Run& run) {
    return QkvBiasArgs{qkv.view(), channel_bias.view(), run.out[0], 0.02f, 40, 55, 70};
  });

  const Tensor small_bias(random, {3 * c}, -1, 1);
  for (std::int64_t i = 0; i < windows * n * 3 * heads; ++i) {  // one head of one token's q, k or v
    const std::int64_t token = i / (3 * heads) % n, window = i / (3 * heads) / n, head = i % heads;
    const std::int64_t third = i / heads % 3, column = third * c + head * d;
    std::vector<double> y;
    double squares = 0;
    for (std::int64_t e = 0; e < d; ++e) {
      y.push_back(qkv.s8(i * d + e) * static_cast<double>(0.02f) + small_bias.f(column + e));
      squares += y.back() * y.back();
    }
    for (std::int64_t e = 0; e < d; ++e) {
      split[(((third * windows + window) * heads + head) * n + token) * d + e] =
          y[e] * (third == 2 ? quants[2] : 3 * quants[third] / std::sqrt(squares));
    }
  }
  check("qkv_bias_normalize" + of, {{DType::kS8, {3, windows, heads, n, d}, false, split}}, [&](Run& run) {
    return QkvBiasNormalizeArgs{qkv.view(), small_bias.view(), run.out[0], 0.02f, 120, 165, 70};
  });

  std::vector<double> gelu;
  for (std::int64_t i = 0; i < windows * n * 3 * c; ++i) {
    const double y = qkv.s8(i) * static_cast<double>(0.04f) + channel_bias.f(i % (3 * c));
    gelu.push_back(std::isnan(y) || y < -1e9 ? 0 : y / 2 * (1 + std::erf(y / std::sqrt(2.0))) * 30);
  }
  check("bias_gelu" + of, {{DType::kS8, {windows * n, 3 * c}, false, gelu}}, [&](Run& run) {
    return BiasGeluArgs{qkv.view(), channel_bias.view(), run.out[0], 0.04f, 30};
  });
}

void ends(std::int64_t batch, std::int64_t chans, std::int64_t patch, std::int64_t h, std::int64_t w, std::int64_t c,
          std::uint64_t seed) {
  Random random(seed);
  const std::int64_t k = chans * patch * patch, classes = 2 * c + 1;
  const Tensor image(random, {batch, chans, h * patch, w * patch}, -2, 2), weight(random, {c, k}, -1, 1);
  std::vector<double> embedded, logits;
  for (std::int64_t row = 0; row < batch * h * w; ++row) {
    const std::int64_t b = row / (h * w), y = row / w % h, x = row % w;
    for (std::int64_t i = 0; i < c; ++i) {
      double sum = 0;
      for (std::int64_t j = 0; j < k; ++j) {
        const std::int64_t line = (b * chans + j / (patch * patch)) * h * patch + y * patch + j / patch % patch;
        sum += image.f(line * w * patch + x * patch + j % patch) * weight.f(i * k + j);
      }
      embedded.push_back(sum);
    }
  }
  const std::string of = shape_of({batch, chans, patch, h, w, c});
  check("patch_embed" + of, {{DType::kF32, {batch * h * w, c}, false, embedded}}, [&](Run& run) {
    return PatchEmbedArgs{image.view(), weight.view(), run.out[0], patch};
  });
  const Tensor features(random, {batch, c}, -2, 2), head(random, {classes, c}, -1, 1), bias(random, {classes}, -1, 1);
  for (std::int64_t i = 0; i < batch * classes; ++i) {
    double sum = bias.f(i % classes);
    for (std::int64_t j = 0; j < c; ++j) sum += features.f(i / classes * c + j) * head.f(i % classes * c + j);
    logits.push_back(sum);
  }
  check("head" + of, {{DType::kF32, {batch, classes}, false, logits}}, [&](Run& run) {
    return HeadArgs{features.view(), head.view(), bias.view(), run.out[0]};
  });

  for (const float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    image.floats()[image.view().numel() - 1] = bad;
    for (const std::string& variant : cpu_variants()) {
      std::vector<float> out(batch * h * w * c);
      const PatchEmbedArgs args{image.view(), weight.view(), {out.data(), DType::kF32, {batch * h * w, c}}, patch};
      try {
        run_op(cpu_backend(variant).ops(), "cpu", args, {});
        fail("patch_embed" + of + " on " + variant + " took an image that is not finite");
      } catch (const ValueError&) {
      }
    }
  }
}

void every_operation_was_tried() {
#define SWIN_CHECK_COVERED(name, Args) \
  if (g_covered.count(#name) == 0) fail(#name ": no case here runs it");
  SWIN_FOR_EACH_OP(SWIN_CHECK_COVERED)
#undef SWIN_CHECK_COVERED
}

}  // namespace

// With --variants: only says which instruction sets there are.
int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "--variants") == 0) {
    for (const std::string& variant : cpu_variants()) std::printf(variant == "portable" ? "%s\n" : "%s ", variant.c_str());
    return 0;
  }
  gemms();
  gelu_range();
  linear(1, 1, 1, true, 300);
  linear(7, 33, 19, false, 301);
  linear(50, 100, 96, true, 302);
  linear(129, 259, 384, true, 303);
  cosine_qkv(5, 2, 3, 7, false, 310);
  cosine_qkv(49, 3, 32, 96, true, 311);
  cosine_qkv(130, 6, 32, 192, false, 312);
  cosine_qkv(33, 5, 24, 120, true, 313);     // heads that end within a vector
  cosine_qkv(130, 24, 32, 768, true, 314);  // columns split
  norms_and_residuals(kPlain, 5, 11, 400);
  norms_and_residuals(kShifted, 32, 32, 401);
  norms_and_residuals(kOblong, 43, 66, 402);
  norms_and_residuals(kPadded, 32, 64, 403);
  norms_and_residuals(kPaddedFirst, 48, 96, 404);
  norms_and_residuals(kPaddedSide, 7, 33, 405);
  norms_and_residuals(kPaddedMore, 19, 16, 406);
  for (const Activation activation : {Activation::kRelu, Activation::kGelu}) {
    mlp(kPlain, 5, 13, activation, 500);
    mlp(kShifted, 48, 192, activation, 501);
    mlp(kOblong, 35, 70, activation, 502);
    mlp(kManyRows, 40, 72, activation, 503);
    mlp(kPaddedFirst, 48, 96, activation, 504);
    mlp(kPaddedMore, 5, 13, activation, 505);
    mlp(kShifted, 96, 384, activation, 507, Values::kWeights);
  }
  attention(2, 3, 49, 32, 2, 600);
  attention(1, 2, 64, 16, 0, 601);
  attention(2, 1, 144, 32, 1, 602);
  attention(3, 2, 9, 7, 3, 603);
  attention(2, 2, 1, 5, 0, 604);
  attention(2, 2, 49, 32, 0, 605, Values::kExtreme);
  attention(1, 1, 256, 32, 1, 606);
  attention(2, 2, 65, 12, 0, 607);
  attention(1, 2, 197, 40, 1, 608, Values::kExtreme);
  ends(2, 3, 4, 5, 7, 13, 700);
  ends(1, 1, 2, 3, 3, 96, 701);
  every_operation_was_tried();
  std::string names;
  for (const std::string& variant : cpu_variants()) names += (names.empty() ? "" : ", ") + variant;
  std::printf("%s: %d runs of %zu operations, %lld values compared, %lld int8 one step from portable's\n", names.c_str(),
              g_runs, g_covered.size(), static_cast<long long>(g_values), static_cast<long long>(g_off_by_one));
  std::printf(g_failures ? "%d failed\n" : "all passed\n", g_failures);
  return g_failures ? 1 : 0;
}
