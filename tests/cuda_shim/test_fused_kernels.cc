// The CUDA kernels of the fused graph, run on the host, against the CPU backend and their formulas in float64; how they are
// compared: test_kernels.cc. Two operations round within themselves: the MLP its hidden rows, which are compared too and then
// taken as they are, and the attention its probabilities; where one of those lies next to a tie, a result may be off by what
// that can make of it.
//
//   test_cuda_fused_kernels [NAME]     only the tests whose name contains NAME
#include "kernel_test.h"
#include "packed_weight.h"

namespace {

using namespace kernel_test;
using swin::InputRange;
using swin::NormPlace;
using swin::PackedWeight;

// A weight as both backends have it; the GPU's lies where the tensor lies.
struct Weight {
  Tensor<std::int8_t> values;
  std::unique_ptr<PackedWeight> device, host;

  Weight(std::int64_t n, std::int64_t k, Random& random, int shift = 0, InputRange input = InputRange::kSigned)
      : values({n, k}, shift) {
    for (std::int64_t i = 0; i < n * k; ++i) values[i] = static_cast<std::int8_t>(random.integer(-127, 127));
    device = std::make_unique<swin::cuda::CudaPackedWeight>(n, k, input, swin::DeviceBuffer(values.view.data, [](void*) {}));
    host = swin::cpu_backend().pack_weight(values.view, input);
  }

  // x[row] . w[n], exactly.
  double product(const Tensor<std::int8_t>& x, std::int64_t row, std::int64_t n) const {
    const std::int64_t k = device->k;
    return static_cast<double>(shim::dot_s8(x.data() + row * k, values.data() + n * k, k));
  }
};

// Channel scales that bring sums of k products to a deviation of `target`, each its own.
void fill_scales(Tensor<float>& scales, std::int64_t k, double target, Random& random) {
  const double deviation = 74 * 74 * std::sqrt(static_cast<double>(k));
  for (std::int64_t i = 0; i < scales.size(); ++i) scales[i] = float_of(target / deviation * (0.5 + random.uniform()));
}
void fill_normal(Tensor<float>& t, double scale, Random& random) {
  for (std::int64_t i = 0; i < t.size(); ++i) t[i] = float_of(scale * random.normal());
}

struct LinearCase {
  std::int64_t m, n, k;
  int shift;
  bool bias;
};
// Both tiles, whole and cut off; K of a half, one and several steps, and not a multiple of 16; columns not of 8.
const std::vector<LinearCase> kLinearCases = {
    {64, 64, 64, 0, true},  {1, 8, 16, 0, true},    {130, 288, 96, 0, false}, {49, 33, 48, 0, true},  {65, 72, 100, 0, true},
    {33, 32, 32, 1, true},  {70, 96, 384, 0, true}, {5, 7, 3, 0, false},      {63, 40, 208, 0, true}, {3973, 864, 48, 0, true},
};

template <class T>
void test_linear_s8() {
  for (const LinearCase& k : kLinearCases) {
    if (k.m > 1000 && std::is_same_v<T, __nv_bfloat16>) continue;  // the tile is the same, and takes seconds
    begin(name_of_case("linear_s8", type_name<T>(), {k.m, k.n, k.k, k.shift, k.bias}));
    Random random(g_case);
    Tensor<std::int8_t> x({k.m, k.k}, k.shift), out({k.m, k.n}), cpu_out({k.m, k.n});
    Weight w(k.n, k.k, random, k.shift);
    Tensor<float> scale({k.n}), bias({k.n}), cpu_floats({k.m, k.n});
    Tensor<T> floats({k.m, k.n});
    fill_s8(x, random);
    fill_scales(scale, k.k, 50, random);
    fill_normal(bias, 20, random);
    const TensorView bias_view = k.bias ? bias.view : TensorView{};
    const bool all_orders = k.m < 1000;
    run(out, [&] { call<T>(swin::LinearS8Args{x.view, w.device.get(), scale.view, bias_view, out.view}); }, all_orders);
    call_cpu(swin::LinearS8Args{x.view, w.host.get(), scale.view, bias_view, cpu_out.view});
    run(floats, [&] { call<T>(swin::LinearS8Args{x.view, w.device.get(), scale.view, bias_view, floats.view}); }, all_orders);
    call_cpu(swin::LinearS8Args{x.view, w.host.get(), scale.view, bias_view, cpu_floats.view});
    std::vector<double> exact;
    for (std::int64_t r = 0; r < k.m; ++r) {
      for (std::int64_t n = 0; n < k.n; ++n) {
        exact.push_back(w.product(x, r, n) * static_cast<double>(scale[n]) + (k.bias ? bias[n] : 0));
      }
    }
    compare_s8(out, &cpu_out, exact);
    compare_rounded(floats, exact, &cpu_floats, 1e-4);
  }
}

// Accumulators at the ends of their range, on both tiles' ways through K.
template <class T>
void test_linear_is_exact() {
  for (std::int64_t k : {64, 1040, 3072}) {
    begin(name_of_case("linear_s8, extremes", type_name<T>(), {k}));
    Random random(g_case);
    Tensor<std::int8_t> x({3, k}), out({3, 16});
    Weight w(16, k, random);
    for (std::int64_t i = 0; i < x.size(); ++i) x[i] = i / k == 0 ? -128 : i / k == 1 ? 127 : static_cast<std::int8_t>(i % 2 ? 127 : -128);
    for (std::int64_t i = 0; i < w.values.size(); ++i) w.values[i] = i / k % 2 ? -127 : 127;
    Tensor<float> scale({16}), bias({16});
    std::vector<double> exact;
    for (std::int64_t i = 0; i < 16; ++i) {
      scale[i] = float_of(60.0 / (127 * 127 * static_cast<double>(k)));
      bias[i] = float_of(0.25 * static_cast<double>(i));
    }
    for (std::int64_t r = 0; r < 3; ++r) {
      for (std::int64_t n = 0; n < 16; ++n) exact.push_back(w.product(x, r, n) * static_cast<double>(scale[n]) + bias[n]);
    }
    run(out, [&] { call<T>(swin::LinearS8Args{x.view, w.device.get(), scale.view, bias.view, out.view}); });
    compare_s8(out, nullptr, exact);
  }
}

// q, k and v of a row by heads; of q and k, each head of a row is rounded by its own largest.
template <class T>
void test_linear_cosine_qkv() {
  struct Case {
    std::int64_t m, heads, d, k;
    int shift;
    bool bias;
  };
  // Heads of 32: both tiles, whole and cut off, K of a part of a step and of several. Then what no tile has whole.
  for (const Case& k : std::vector<Case>{{64, 2, 32, 64, 0, true},
                                         {1, 1, 32, 16, 0, false},
                                         {130, 3, 32, 96, 0, false},
                                         {49, 1, 32, 208, 0, true},
                                         {3973, 9, 32, 48, 0, true},
                                         {4111, 8, 32, 16, 0, false},
                                         {33, 2, 32, 48, 1, true},
                                         {20, 1, 32, 100, 0, false},
                                         {35, 2, 8, 32, 0, true},
                                         {9, 2, 16, 64, 0, false},
                                         {6, 1, 64, 96, 0, true},
                                         {7, 3, 5, 7, 0, false},
                                         {5, 1, 40, 48, 0, true},
                                         {3, 2, 1, 16, 0, false}}) {
    if (k.m > 1000 && std::is_same_v<T, __nv_bfloat16>) continue;  // nothing of it is of type T
    begin(name_of_case("linear_cosine_qkv", type_name<T>(), {k.m, k.heads, k.d, k.k, k.shift, k.bias}));
    Random random(g_case);
    const std::int64_t n = 3 * k.heads * k.d;
    Tensor<std::int8_t> x({k.m, k.k}, k.shift), out({k.m, n}, k.shift), cpu_out({k.m, n});
    Weight w(n, k.k, random, k.shift);
    Tensor<float> scale({n}), bias({n});
    fill_s8(x, random);
    fill_scales(scale, k.k, 50, random);
    fill_normal(bias, 20, random);
    if (!k.bias) {  // then a head may be all zeros, in one row or in all, or shorter than the least that is divided by
      std::fill_n(x.data(), k.k, 0);
      std::fill_n(scale.data() + k.heads * k.d, k.d, 0.0f);
      for (std::int64_t e = 0; e < k.d; ++e) scale[(k.heads - 1) * k.d + e] *= 4e-16f;
    }
    const TensorView bias_view = k.bias ? bias.view : TensorView{};
    run(
        out,
        [&] { call<T>(swin::LinearCosineQkvArgs{x.view, w.device.get(), scale.view, bias_view, out.view, k.heads}); },
        k.m < 1000);
    call_cpu(swin::LinearCosineQkvArgs{x.view, w.host.get(), scale.view, bias_view, cpu_out.view, k.heads});
    std::vector<double> exact;
    for (std::int64_t r = 0; r < k.m; ++r) {
      for (std::int64_t head = 0; head < 3 * k.heads; ++head) {
        double largest = swin::kNormalizeEps;
        for (std::int64_t i = head * k.d; i < (head + 1) * k.d; ++i) {
          exact.push_back(w.product(x, r, i) * static_cast<double>(scale[i]) + (k.bias ? bias[i] : 0));
          largest = std::fmax(largest, std::fabs(exact.back()));
        }
        for (auto y = exact.end() - k.d; head < 2 * k.heads && y != exact.end(); ++y) *y *= 127 / largest;
      }
    }
    compare_s8(out, &cpu_out, exact);
  }
}

// Checks `out` = quantize(residual) in the order of `g`, the residual as it is stored; rows of padding are 0.
template <class T>
void compare_quantized(const Tensor<std::int8_t>& out, const Tensor<T>& residual, const WindowGeometry& g,
                       float quant) {
  const std::int64_t c = residual.view.dim(1);
  std::vector<double> exact;
  for (std::int64_t r = 0; r < out.size() / c; ++r) {
    const std::int64_t from = image_row(g, r);
    for (std::int64_t i = 0; i < c; ++i) {
      exact.push_back(from >= 0 ? static_cast<double>(swin::cuda::to_float(residual[from * c + i])) * quant : 0);
    }
  }
  compare_s8(out, nullptr, exact);
}

// Checks `out` = quantize(LayerNorm(residual)) in the order of `g`, the residual as it is stored; rows of padding are
// 0.
template <class T>
void compare_norm(const Tensor<std::int8_t>& out, const Tensor<T>& residual, const Twin<T>& gamma, const Twin<T>& beta,
                  const WindowGeometry& g, float quant) {
  const std::int64_t m = residual.view.dim(0), c = residual.view.dim(1);
  Twin<T> stored({m, c});
  for (std::int64_t i = 0; i < m * c; ++i) stored.set(i, swin::cuda::to_float(residual[i]));
  std::vector<double> exact;
  for (std::int64_t r = 0; r < g.window_rows(); ++r) {
    const std::int64_t from = image_row(g, r);
    std::vector<double> x(c, 0.0);
    if (from >= 0) {
      for (std::int64_t i = 0; i < c; ++i) x[i] = stored[from * c + i];
      layer_norm(x, [&](std::int64_t i) { return gamma[i]; }, [&](std::int64_t i) { return beta[i]; });
    }
    for (double v : x) exact.push_back(v * quant);
  }
  Tensor<std::int8_t> cpu_out({g.window_rows(), c});
  call_cpu(swin::NormShiftPartitionArgs{stored.host.view, gamma.host.view, beta.host.view, cpu_out.view, g, quant});
  compare_s8(out, &cpu_out, exact);
}

// Runs `body` in all orders: the residual restored, outputs poisoned before; also the branch, which is scratch.
template <class T, class Body>
void run_on_residual(Tensor<T>& residual, Tensor<float>& branch, const std::vector<Tensor<std::int8_t>*>& outputs,
                     Body&& body, bool all_orders = true) {
  const std::vector<unsigned char> start = residual.content();
  run_in_orders(
      all_orders, body,
      [&](bool before) {
        before ? residual.restore(start) : residual.check_guards();
        before ? branch.poison() : branch.check_guards();
        for (Tensor<std::int8_t>* out : outputs) before ? out->poison() : out->check_guards();
      },
      [&] {
        std::vector<unsigned char> all = residual.content();
        for (Tensor<std::int8_t>* out : outputs) {
          const std::vector<unsigned char> more = out->content();
          all.insert(all.end(), more.begin(), more.end());
        }
        return all;
      });
}

bool is_poisoned(const Tensor<float>& t) {
  const std::vector<unsigned char> bytes = t.content();
  return std::all_of(bytes.begin(), bytes.end(), [](unsigned char byte) { return byte == 0x7D; });
}

// Of y's rows their LayerNorm, what is added with kResPostNorm; returns each row's largest gamma / deviation, by which
// an error of y becomes one of the result.
template <class T>
std::vector<double> normed_rows(std::vector<double>& y, const Twin<T>& gamma, const Twin<T>& beta) {
  const std::int64_t c = gamma.host.size();
  std::vector<double> gains;
  for (auto first = y.begin(); first != y.end(); first += c) {
    std::vector<double> row(first, first + c);
    double mean = 0, variance = 0, largest = 0;
    for (double v : row) mean += v / static_cast<double>(c);
    for (double v : row) variance += (v - mean) * (v - mean) / static_cast<double>(c);
    for (std::int64_t i = 0; i < c; ++i) largest = std::fmax(largest, std::fabs(gamma[i]));
    gains.push_back(largest / std::sqrt(variance + swin::kLayerNormEps));
    layer_norm(row, [&](std::int64_t i) { return gamma[i]; }, [&](std::int64_t i) { return beta[i]; });
    std::copy(row.begin(), row.end(), first);
  }
  return gains;
}

struct RowCase {
  WindowGeometry g;
  std::int64_t c, k;  // k: of the linear operation; hidden channels of the MLP
  int shift;
};
const std::vector<RowCase> kRowCases = {
    {{2, 14, 14, 7, 7, 3, 3}, 32, 64, 0}, {{1, 8, 12, 4, 6, 2, 3}, 33, 48, 0}, {{1, 7, 7, 7, 7, 0, 0}, 96, 384, 0},
    {{1, 5, 3, 1, 1, 0, 0}, 1, 5, 0},     {{1, 8, 8, 4, 4, 2, 2}, 40, 100, 0}, {{2, 4, 4, 2, 2, 1, 1}, 64, 112, 1},
    {{3, 8, 8, 8, 8, 0, 0}, 72, 80, 0},
    // Padded: both sides or one, shifted or not, and what comes first.
    {{2, 10, 13, 7, 7, 3, 3}, 32, 64, 0}, {{1, 10, 13, 7, 7, 3, 3, true}, 40, 64, 0},
    {{2, 5, 9, 4, 4, 2, 2}, 33, 48, 0},   {{2, 5, 9, 4, 4, 2, 2, true}, 33, 48, 0},
    {{2, 9, 8, 4, 4, 0, 0}, 96, 32, 0},   {{2, 5, 7, 5, 4, 0, 2, true}, 64, 112, 1},
};
// Whole rows in blocks: the last block full, and cut off within a warp's rows.
const std::vector<RowCase> kBlockCases = {
    {{1, 112, 112, 7, 7, 3, 3}, 96, 96, 0},   // 98 blocks, as many as it takes
    {{2, 98, 63, 7, 9, 4, 5}, 192, 80, 0},
    {{1, 96, 128, 8, 8, 0, 0}, 128, 64, 0},
    {{1, 108, 111, 7, 7, 3, 3, true}, 96, 32, 0},  // padded
    {{2, 97, 60, 7, 9, 4, 5}, 192, 16, 0},
    {{1, 89, 128, 8, 8, 4, 4, true}, 128, 16, 0},
};
// The MLP's, which takes any number of rows so.
const std::vector<RowCase> kMlpBlockCases = {
    {{2, 14, 14, 7, 7, 3, 3}, 96, 384, 0}, {{1, 6, 12, 3, 4, 1, 2}, 192, 128, 0}, {{1, 8, 16, 8, 8, 4, 0}, 128, 64, 0},
    {{1, 1, 7, 1, 7, 0, 0}, 96, 64, 0},
    {{2, 10, 13, 7, 7, 3, 3}, 96, 64, 0},  // padded
    {{1, 5, 11, 3, 4, 1, 2, true}, 192, 64, 0},
    {{2, 9, 15, 4, 8, 2, 4, true}, 128, 64, 0},
};

template <class T>
void test_linear_residual_norm(const std::vector<RowCase>& cases, NormPlace norm, bool in_blocks) {
  const bool post = norm == NormPlace::kResPostNorm;
  for (const RowCase& k : cases) {
    const WindowGeometry& g = k.g;
    const std::int64_t m = g.tokens(), p = g.window_rows(), c = k.c;
    begin(name_of_case("linear_residual_norm", type_name<T>(), g, {c, k.k, k.shift, post}));
    Random random(g_case);
    Tensor<std::int8_t> x({p, k.k}, k.shift), out({m, c}, k.shift), cpu_out({m, c});
    Weight w(c, k.k, random, k.shift);
    Tensor<float> scale({c}), bias({c}), branch({p, c}, k.shift), cpu_branch({p, c});
    Twin<T> residual({m, c}, k.shift), gamma({c}), beta({c});
    fill_s8(x, random);
    fill_scales(scale, k.k, 1, random);
    fill_normal(bias, 0.5, random);
    residual.normal(random, post ? 1 : 2);
    gamma.normal(random, 0.3, 1);
    beta.normal(random);
    const float quant = float_of(127 / 2.2);
    std::vector<double> y, sums(m * c);
    for (std::int64_t r = 0; r < p; ++r) {
      for (std::int64_t i = 0; i < c; ++i) {
        y.push_back(w.product(x, r, i) * static_cast<double>(scale[i]) + bias[i]);
      }
    }
    if (post) normed_rows(y, gamma, beta);
    for (std::int64_t r = 0; r < p; ++r) {
      const std::int64_t to = image_row(g, r);
      for (std::int64_t i = 0; i < c && to >= 0; ++i) sums[to * c + i] = residual[to * c + i] + y[r * c + i];
    }
    swin::LinearResidualNormArgs args{};
    args.x = x.view;
    args.w = w.device.get();
    args.scale = scale.view;
    args.bias = bias.view;
    args.residual = residual.device.view;
    args.gamma = gamma.device.view;
    args.beta = beta.device.view;
    if (post) args.branch = branch.view;
    args.out = out.view;
    args.geometry = g;
    args.quant = quant;
    args.norm = norm;
    run_on_residual(residual.device, branch, {&out}, [&] { call<T>(args); }, m < 1000);
    EXPECT(is_poisoned(branch) == (in_blocks || !post));
    args.w = w.host.get();
    args.residual = residual.host.view;
    args.gamma = gamma.host.view;
    args.beta = beta.host.view;
    if (post) args.branch = cpu_branch.view;
    args.out = cpu_out.view;
    call_cpu(args);
    compare_rounded(residual.device, sums, &residual.host, post ? 1e-5 : 5e-6);
    const WindowGeometry image_order{1, 1, m, 1, 1, 0, 0};
    if (post) {
      compare_quantized(out, residual.device, image_order, quant);
    } else {
      compare_norm(out, residual.device, gamma, beta, image_order, quant);
    }
  }
}

double gelu(double x) { return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0))); }

template <class T>
void test_mlp_residual_norm(const std::vector<RowCase>& cases, NormPlace norm, bool keeps_hidden) {
  const bool post = norm == NormPlace::kResPostNorm;
  for (const RowCase& k : cases) {
    for (const bool relu : {true, false}) {
      const WindowGeometry& g = k.g;
      const std::int64_t m = g.tokens(), c = k.c, f = k.k;
      const bool last = c == 72 || m == 7;  // the last block of a stage has no output, and with kPreNorm no LayerNorm
      begin(name_of_case("mlp_residual_norm", type_name<T>(), g, {c, f, k.shift, relu, post}));
      Random random(g_case);
      Tensor<std::int8_t> x({m, c}, k.shift), hidden({m, f}), out({g.window_rows(), c}, k.shift);
      const InputRange range = relu ? InputRange::kNonNegative : InputRange::kSigned;
      Weight w1(f, c, random, k.shift), w2(c, f, random, 0, range);
      Tensor<float> scale1({f}), bias1({f}), scale2({c}), bias2({c}), branch({m, c}, k.shift);
      Twin<T> residual({m, c}, k.shift), gamma({c}), beta({c});
      fill_s8(x, random);
      fill_scales(scale1, c, relu ? 60 : 1.5, random);
      fill_normal(bias1, 0.5, random);
      fill_scales(scale2, f, 1, random);
      fill_normal(bias2, 0.5, random);
      residual.normal(random, post ? 1 : 2);
      gamma.normal(random, 0.3, 1);
      beta.normal(random);
      const float hidden_quant = float_of(relu ? 1 : 127 / 3.5), quant = float_of(127 / 2.2);
      swin::MlpResidualNormArgs args{};
      args.x = x.view;
      args.w1 = w1.device.get();
      args.w2 = w2.device.get();
      args.scale1 = scale1.view;
      if (!relu) args.bias1 = bias1.view;
      args.scale2 = scale2.view;
      args.bias2 = bias2.view;
      args.residual = residual.device.view;
      if (keeps_hidden) args.hidden = hidden.view;
      if (post) args.branch = branch.view;
      args.activation = relu ? swin::Activation::kRelu : swin::Activation::kGelu;
      args.hidden_quant = hidden_quant;
      args.norm = norm;
      if (!last || post) {
        args.gamma = gamma.device.view;
        args.beta = beta.device.view;
      }
      if (!last) {
        args.out = out.view;
        args.geometry = g;
        args.quant = quant;
      }
      run_on_residual(residual.device, branch, {&hidden, &out}, [&] { call<T>(args); });
      EXPECT(is_poisoned(branch) == !(post && keeps_hidden));

      std::vector<double> exact_hidden;
      for (std::int64_t r = 0; r < m; ++r) {
        for (std::int64_t i = 0; i < f; ++i) {
          const double y = w1.product(x, r, i) * static_cast<double>(scale1[i]);
          exact_hidden.push_back(relu ? std::fmax(y, 0) : gelu(y + bias1[i]) * hidden_quant);
        }
      }
      if (keeps_hidden) {
        compare_s8(hidden, nullptr, exact_hidden);
      } else {
        for (std::int64_t i = 0; i < m * f; ++i) hidden[i] = static_cast<std::int8_t>(quantized(exact_hidden[i]));
      }
      std::vector<double> sums, gains(m, 1);
      for (std::int64_t i = 0; i < m * c; ++i) {
        sums.push_back(w2.product(hidden, i / c, i % c) * static_cast<double>(scale2[i % c]) + bias2[i % c]);
      }
      if (post) gains = normed_rows(sums, gamma, beta);
      for (std::int64_t i = 0; i < m * c; ++i) sums[i] += residual[i];
      const double slack = post ? 1e-5 : 5e-6;
      if (keeps_hidden) {
        compare_rounded(residual.device, sums, nullptr, slack);
      } else {
        // Hidden values, which nobody sees, may each have been rounded the other way where they lie next to a tie.
        const double step = 127 * *std::max_element(scale2.data(), scale2.data() + c);
        for (std::int64_t i = 0; i < m * c; ++i) {
          const auto row = exact_hidden.begin() + i / c * f;
          // A LayerNorm also moves by the mean's error, and by the deviation's: at most sqrt(c) deviations.
          const double spread = post ? gains[i / c] * (2 + std::sqrt(static_cast<double>(c))) : 1;
          const double unsure = spread * step * static_cast<double>(std::count_if(row, row + f, near_tie));
          const double apart = std::fabs(swin::cuda::to_float(residual.device[i]) - sums[i]);
          ++g_compared;
          if (!(apart <= half_step<T>(sums[i]) * 1.000001 + slack + unsure)) {
            fail("element " + std::to_string(i) + " is off by " + std::to_string(apart));
          }
        }
      }
      if (!last && post) compare_quantized(out, residual.device, g, quant);
      if (!last && !post) compare_norm(out, residual.device, gamma, beta, g, quant);
    }
  }
}

enum class Masks { kNone, kOneEach, kShared };

template <class T>
void test_window_attention(bool cosine) {
  struct Case {
    std::int64_t images, windows, heads, n, d;
    int shift, bias_shift = 0;
    float head_scale = 12;  // of the last head
  };
  for (const Case& k : std::vector<Case>{{2, 4, 2, 49, 32, 0},
                                         {2, 1, 3, 49, 32, 0},
                                         {1, 2, 1, 64, 32, 0},
                                         {3, 2, 2, 9, 8, 0},
                                         {1, 1, 2, 144, 32, 0},
                                         {1, 2, 1, 100, 24, 0},
                                         {1, 1, 1, 65, 64, 0},
                                         {1, 1, 1, 49, 40, 0},
                                         {1, 2, 1, 160, 16, 0},
                                         {1, 1, 1, 196, 32, 0},
                                         {1, 2, 2, 16, 5, 0},
                                         {2, 2, 1, 25, 16, 1},
                                         {1, 1, 2, 1, 16, 0},
                                         {2050, 1, 1, 4, 8, 0},
                                         {2, 1, 2, 64, 32, 0, 1, 100},
                                         {1, 1, 1, 256, 32, 0},
                                         {1, 2, 1, 72, 40, 0},
                                         {2, 2, 1, 144, 32, 0, 1, 100},
                                         {1, 1, 1, 72, 16, 1}}) {
    for (const Masks masks : {Masks::kNone, Masks::kOneEach, Masks::kShared}) {
      if (masks == Masks::kShared && k.windows == 1) continue;
      begin(name_of_case("window_attention", type_name<T>(),
                         {k.images, k.windows, k.heads, k.n, k.d, k.shift, k.bias_shift, static_cast<int>(masks), cosine}));
      Random random(g_case);
      const std::int64_t bw = k.images * k.windows, n = k.n, c = k.heads * k.d;
      Tensor<std::int8_t> qkv({bw * n, 3 * c}, k.shift), out({bw * n, c}), cpu_out({bw * n, c});
      const bool masked = masks != Masks::kNone, shared = masks == Masks::kShared;
      Twin<T> bias({k.heads, n, n}, k.bias_shift), mask({shared ? 2 : k.windows, n, n}, k.bias_shift);
      Tensor<std::int32_t> mask_of({k.windows});
      for (std::int64_t w = 0; w < k.windows; ++w) mask_of[w] = static_cast<std::int32_t>(shared ? w % 3 - 1 : w);
      Tensor<float> head_scale({k.heads});
      for (std::int64_t h = 0; h < k.heads; ++h) head_scale[h] = h + 1 == k.heads ? k.head_scale : float_of(2 + h);
      fill_s8(qkv, random);
      if (cosine) {  // a query and a key of length 0, and of length 1
        std::fill_n(qkv.data(), c, 0);
        std::fill_n(qkv.data() + (n - 1) * 3 * c + c, c, 0);
        std::fill_n(qkv.data() + n / 2 * 3 * c, 2 * c, 0);
        for (std::int64_t i = 0; i < 2 * c; i += k.d) qkv[n / 2 * 3 * c + i] = i % 2 ? 1 : -1;
      }
      bias.normal(random);
      for (std::int64_t i = 0; i < mask.host.size(); ++i) {
        mask.set(i, i / n % n != i % n && random.uniform() < 0.3 ? -100 : 0);
      }
      const float qk = float_of(1.5 / (74 * 74 * std::sqrt(k.d))), pv = 0.9f;
      const TensorView device_mask = masked ? mask.device.view : TensorView{};
      const TensorView host_mask = masked ? mask.host.view : TensorView{};
      const TensorView which = shared ? mask_of.view : TensorView{};
      const TensorView scales = cosine ? head_scale.view : TensorView{};
      run(
          out,
          [&] {
            call<T>(swin::WindowAttentionArgs{qkv.view, bias.device.view, device_mask, which, scales, out.view, qk, pv});
          },
          bw * k.heads * n < 600);
      call_cpu(swin::WindowAttentionArgs{qkv.view, bias.host.view, host_mask, which, scales, cpu_out.view, qk, pv});
      // The d numbers of one token and head: of q, k or v.
      const auto vector_of = [&](std::int64_t window, std::int64_t third, std::int64_t token, std::int64_t head) {
        return qkv.data() + (window * n + token) * 3 * c + third * c + head * k.d;
      };
      const auto length = [&](std::int64_t window, std::int64_t third, std::int64_t token, std::int64_t head) {
        const std::int8_t* x = vector_of(window, third, token, head);
        return std::sqrt(std::fmax(1, static_cast<double>(shim::dot_s8(x, x, k.d))));
      };
      for (std::int64_t item = 0; item < bw * k.heads * n; ++item) {
        const std::int64_t window = item / n / k.heads, head = item / n % k.heads, i = item % n;
        // A logit's rounding in float32 moves p; 1e-3 is enough where logits are small.
        const double close = cosine ? std::fmax(1e-3, 1e-4 * head_scale[head]) : 1e-3;
        const double row_scale = cosine ? head_scale[head] / length(window, 0, i, head) : qk;
        std::vector<double> p(n);
        double top = -1e30, sum = 0, unsure = 0;
        for (std::int64_t j = 0; j < n; ++j) {
          const std::int64_t acc = shim::dot_s8(vector_of(window, 0, i, head), vector_of(window, 1, j, head), k.d);
          p[j] = static_cast<double>(acc) * (cosine ? row_scale / length(window, 1, j, head) : row_scale) +
                 bias[(head * n + i) * n + j];
          if (masked && mask_of[window % k.windows] >= 0) p[j] += mask[(mask_of[window % k.windows] * n + i) * n + j];
          top = std::fmax(top, p[j]);
        }
        for (double& x : p) {
          x = 127 * std::exp(x - top);
          unsure += std::fabs(x - std::floor(x) - 0.5) < close;  // either way of rounding is right
          sum += x = std::nearbyint(x);
        }
        const std::int8_t* values = vector_of(window, 2, 0, head);
        for (std::int64_t e = 0; e < k.d; ++e) {
          double y = 0;
          for (std::int64_t j = 0; j < n; ++j) y += p[j] * values[j * 3 * c + e];
          y *= pv / sum;
          const double slack = 1e-3 + unsure * 256 * pv / sum;
          const std::int64_t index = (window * n + i) * c + head * k.d + e;
          ++g_compared;
          for (const int got : {out[index], cpu_out[index]}) {
            if (std::fabs(got - std::clamp(y, -128.0, 127.0)) > 0.5 + slack) {
              fail("element " + std::to_string(index) + " is " + std::to_string(got) + ", exactly " + std::to_string(y));
            }
          }
        }
      }
    }
  }
}

void test_errors_are_named() {
  begin("errors");
  Random random(g_case);
  Tensor<std::int8_t> x({2, 16}), out({2, 16});
  Weight w1(16, 16, random), w2(16, 16, random, 0, InputRange::kNonNegative);
  Tensor<float> scale({16});
  Tensor<__half> half_scale({16}), residual({2, 16});
  const auto expect_error = [](const char* wanted, auto&& body) {
    try {
      body();
      fail("no error");
    } catch (const swin::Error& error) {
      if (std::string(error.what()).find(wanted) == std::string::npos) fail(error.what());
    }
  };
  expect_error("scale is float16 [16]; float32 is needed", [&] {
    call<__half>(swin::LinearS8Args{x.view, w1.device.get(), half_scale.view, {}, out.view});
  });
  expect_error("memory for the hidden rows, s8 [2, 16], is needed", [&] {
    swin::MlpResidualNormArgs args{};
    args.x = x.view;
    args.w1 = w1.device.get();
    args.w2 = w2.device.get();
    args.scale1 = args.scale2 = scale.view;
    args.residual = residual.view;
    call<__half>(args);
  });
  expect_error("windows have 1025 tokens; a GPU takes at most 1024", [&] {
    Tensor<std::int8_t> qkv({1025, 3}), rows({1025, 1});
    Tensor<__half> bias({1, 1025, 1025});
    call<__half>(swin::WindowAttentionArgs{qkv.view, bias.view, {}, {}, {}, rows.view, 1, 1});
  });
}

template <class T>
void add_tests(std::vector<Test>& tests) {
  const std::string type = std::string(" ") + type_name<T>();
  tests.insert(tests.end(), {{"linear_s8" + type, test_linear_s8<T>},
                             {"linear_s8, extremes" + type, test_linear_is_exact<T>},
                             {"linear_cosine_qkv" + type, test_linear_cosine_qkv<T>},
                             {"window_attention" + type, [] { test_window_attention<T>(false); }},
                             {"window_attention, cosine" + type, [] { test_window_attention<T>(true); }}});
  const auto add = [&](const std::string& name, void (*test)()) { tests.push_back({name + type, test}); };
  add("linear_residual_norm", [] { test_linear_residual_norm<T>(kRowCases, NormPlace::kPreNorm, false); });
  add("linear_residual_norm, row blocks", [] { test_linear_residual_norm<T>(kBlockCases, NormPlace::kPreNorm, true); });
  add("linear_residual_norm, post", [] { test_linear_residual_norm<T>(kRowCases, NormPlace::kResPostNorm, false); });
  add("linear_residual_norm, post, row blocks",
      [] { test_linear_residual_norm<T>(kBlockCases, NormPlace::kResPostNorm, true); });
  add("mlp_residual_norm", [] { test_mlp_residual_norm<T>(kRowCases, NormPlace::kPreNorm, true); });
  add("mlp_residual_norm, row blocks", [] { test_mlp_residual_norm<T>(kMlpBlockCases, NormPlace::kPreNorm, false); });
  add("mlp_residual_norm, post", [] { test_mlp_residual_norm<T>(kRowCases, NormPlace::kResPostNorm, true); });
  add("mlp_residual_norm, post, row blocks",
      [] { test_mlp_residual_norm<T>(kMlpBlockCases, NormPlace::kResPostNorm, false); });
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<Test> tests = {{"errors", test_errors_are_named}};
  add_tests<__half>(tests);
  add_tests<__nv_bfloat16>(tests);
  return run_tests(tests, argc, argv);
}
