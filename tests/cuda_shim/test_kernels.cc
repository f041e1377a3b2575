// The CUDA kernels of FT's graph, run on the host, against the CPU backend and against its formula in float64.
//
// Integer results are equal. An int8 result behind floating-point work may be off by one only where the exact value
// lies within 1e-3 of a rounding tie; how often that happened is printed. Values rounded to float16 or bfloat16 lie
// within half a step of the exact value. Outputs are poisoned before, guard bytes on both sides checked after each run,
// and each case runs with the fibers in several orders, which must not change a bit.
//
//   test_cuda_kernels [NAME]     only the tests whose name contains NAME
#include "kernel_test.h"
#include "window_rows.cuh"

namespace {

using namespace kernel_test;

template <class T>
void test_norm_shift_partition() {
  for (const NormCase& k : kNormCases) {
    const WindowGeometry& g = k.g;
    const std::int64_t m = g.tokens(), c = k.c;
    begin(name_of_case("norm_shift_partition", type_name<T>(), g, {c, k.shift}));
    Random random(g_case);
    Twin<T> residual({m, c}, k.shift), gamma({c}), beta({c});
    residual.normal(random, 3, 1);
    gamma.normal(random, 1, 1);
    beta.normal(random);
    if (m >= 4) {
      for (std::int64_t i = 0; i < c; ++i) residual.set(c + i, 512);  // a constant row is beta
      residual.set(2 * c + c / 2, std::nan(""));
      residual.set(3 * c + c - 1, std::numeric_limits<double>::infinity());
    }
    const float quant = float_of(127 / 2.5);
    const std::int64_t p = g.window_rows();
    Tensor<std::int8_t> out({p, c}), cpu_out({p, c});
    run(out, [&] {
      call<T>(
          swin::NormShiftPartitionArgs{residual.device.view, gamma.device.view, beta.device.view, out.view, g, quant});
    });
    call_cpu(swin::NormShiftPartitionArgs{residual.host.view, gamma.host.view, beta.host.view, cpu_out.view, g, quant});
    std::vector<double> exact;
    for (std::int64_t r = 0; r < p; ++r) {
      const std::int64_t from = image_row(g, r);
      std::vector<double> x(c, 0.0);
      if (from >= 0) {
        for (std::int64_t i = 0; i < c; ++i) x[i] = residual[from * c + i];
        layer_norm(x, [&](std::int64_t i) { return gamma[i]; }, [&](std::int64_t i) { return beta[i]; });
      }
      for (double v : x) exact.push_back(v * quant);
    }
    compare_s8(out, &cpu_out, exact);
  }
}

template <class T>
void test_proj_bias_residual_norm() {
  for (const NormCase& k : kNormCases) {
    const WindowGeometry& g = k.g;
    const std::int64_t m = g.tokens(), c = k.c;
    begin(name_of_case("proj_bias_residual_norm", type_name<T>(), g, {c, k.shift}));
    Random random(g_case);
    const std::int64_t p = g.window_rows();
    Tensor<std::int8_t> proj({p, c}, k.shift), out({m, c}), cpu_out({m, c});
    Twin<T> bias({c}), residual({m, c}), gamma({c}), beta({c});
    fill_s8(proj, random);
    bias.normal(random);
    residual.normal(random, 2);
    gamma.normal(random, 0.3, 1);
    beta.normal(random);
    if (m >= 4) residual.set(2 * c + c / 2, std::nan(""));
    const float dequant = float_of(1.7 / 127), quant = float_of(127 / 2.2);
    std::vector<double> sums(m * c);
    for (std::int64_t r = 0; r < p; ++r) {
      for (std::int64_t i = 0; i < c && image_row(g, r) >= 0; ++i) {
        const std::int64_t at = image_row(g, r) * c + i;
        sums[at] = residual[at] + (proj[r * c + i] * static_cast<double>(dequant) + bias[i]);
      }
    }
    const std::vector<unsigned char> start = residual.device.content();
    run_in_orders(
        true,
        [&] {
          call<T>(swin::ProjBiasResidualNormArgs{proj.view, bias.device.view, residual.device.view, gamma.device.view,
                                                 beta.device.view, out.view, g, dequant, quant});
        },
        [&](bool before) {
          if (before) {
            residual.device.restore(start);
            out.poison();
          } else {
            residual.device.check_guards();
            out.check_guards();
          }
        },
        [&] {
          std::vector<unsigned char> both = residual.device.content(), second = out.content();
          both.insert(both.end(), second.begin(), second.end());
          return both;
        });
    call_cpu(swin::ProjBiasResidualNormArgs{proj.view, bias.host.view, residual.host.view, gamma.host.view,
                                            beta.host.view, cpu_out.view, g, dequant, quant});
    compare_rounded(residual.device, sums, &residual.host, 2e-6);
    // The LayerNorm is of the residual as it is stored, rounded; the CPU's is of float32, so it is asked again.
    std::vector<double> exact;
    Twin<T> stored({m, c});
    for (std::int64_t i = 0; i < m * c; ++i) stored.set(i, swin::cuda::to_float(residual.device[i]));
    for (std::int64_t r = 0; r < m; ++r) {
      std::vector<double> x(c);
      for (std::int64_t i = 0; i < c; ++i) x[i] = stored[r * c + i];
      layer_norm(x, [&](std::int64_t i) { return gamma[i]; }, [&](std::int64_t i) { return beta[i]; });
      for (double v : x) exact.push_back(v * quant);
    }
    const WindowGeometry as_is{1, 1, m, 1, 1, 0, 0};
    call_cpu(
        swin::NormShiftPartitionArgs{stored.host.view, gamma.host.view, beta.host.view, cpu_out.view, as_is, quant});
    compare_s8(out, &cpu_out, exact);
  }
}

// The 2x2 neighbours of each merged token, in order; zeros beyond the image.
template <class T>
std::vector<std::vector<double>> merged_rows(const Twin<T>& residual, std::int64_t batch, std::int64_t height,
                                             std::int64_t width) {
  const std::int64_t c = residual.host.view.dim(1);
  std::vector<std::vector<double>> rows;
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t y = 0; y < height; y += 2) {
      for (std::int64_t x = 0; x < width; x += 2) {
        std::vector<double> row(4 * c, 0.0);
        for (std::int64_t which = 0; which < 4; ++which) {
          const std::int64_t at_y = y + which % 2, at_x = x + which / 2;
          if (at_y >= height || at_x >= width) continue;
          for (std::int64_t i = 0; i < c; ++i) {
            row[which * c + i] = residual[((b * height + at_y) * width + at_x) * c + i];
          }
        }
        rows.push_back(std::move(row));
      }
    }
  }
  return rows;
}

template <class T>
void test_patch_merge_norm() {
  struct Case {
    std::int64_t batch, height, width, c;
    int shift;
  };
  for (const Case& k : std::vector<Case>{{2, 14, 14, 32, 0},
                                         {1, 4, 6, 9, 0},
                                         {3, 2, 2, 1, 0},
                                         {1, 4, 4, 96, 0},
                                         {1, 2, 6, 192, 0},
                                         {1, 2, 4, 384, 0},
                                         {1, 2, 4, 768, 0},
                                         {1, 4, 2, 776, 0},
                                         {2, 4, 2, 8, 1},
                                         {2, 5, 6, 32, 0},  // odd sides
                                         {2, 6, 5, 96, 0},
                                         {2, 5, 7, 9, 0},
                                         {2, 3, 5, 384, 0},
                                         {2, 3, 3, 768, 0},
                                         {3, 1, 1, 16, 0},
                                         {2, 3, 1, 776, 0},
                                         {2, 7, 3, 8, 1}}) {
    begin(name_of_case("patch_merge_norm", type_name<T>(), {k.batch, k.height, k.width, k.c, k.shift}));
    Random random(g_case);
    const std::int64_t m = k.batch * k.height * k.width, c = k.c;
    Twin<T> residual({m, c}, k.shift), gamma({4 * c}), beta({4 * c});
    residual.normal(random, 1, 0.5);
    gamma.normal(random, 0.2, 1);
    beta.normal(random);
    if (m > 4) residual.set(0, std::nan(""));
    const float quant = float_of(127 / 2.8);
    const std::vector<std::vector<double>> merged = merged_rows(residual, k.batch, k.height, k.width);
    const std::int64_t rows = static_cast<std::int64_t>(merged.size());
    Tensor<std::int8_t> out({rows, 4 * c}), cpu_out({rows, 4 * c});
    run(out, [&] {
      call<T>(swin::PatchMergeNormArgs{residual.device.view, gamma.device.view, beta.device.view, out.view, k.batch,
                                       k.height, k.width, quant});
    });
    call_cpu(swin::PatchMergeNormArgs{residual.host.view, gamma.host.view, beta.host.view, cpu_out.view, k.batch,
                                      k.height, k.width, quant});
    std::vector<double> exact;
    for (std::vector<double> row : merged) {
      layer_norm(row, [&](std::int64_t i) { return gamma[i]; }, [&](std::int64_t i) { return beta[i]; });
      for (double v : row) exact.push_back(v * quant);
    }
    compare_s8(out, &cpu_out, exact);
  }
}

// Swin-V2: shift_partition, proj_bias_norm_residual, bias_norm_residual and dequantize_norm over the same rows.
template <class T>
void test_v2_norms() {
  for (const NormCase& k : kNormCases) {
    const WindowGeometry& g = k.g;
    const std::int64_t m = g.tokens(), c = k.c;
    const std::int64_t p = g.window_rows();
    begin(name_of_case("v2_norms", type_name<T>(), g, {c, k.shift}));
    Random random(g_case);
    Tensor<std::int8_t> x({p, c}, k.shift), out({m, c}), cpu_out({m, c}), shifted({p, c}), cpu_shifted({p, c});
    const TensorView first_rows(x.data(), DType::kS8, {m, c});  // for those whose rows are not in windows
    Twin<T> bias({c}), residual({m, c}, k.shift), image({m, c}), gamma({c}), beta({c}), normed({m, c});
    fill_s8(x, random);
    bias.normal(random);
    residual.normal(random, 2);
    gamma.normal(random, 0.3, 1);
    beta.normal(random);
    if (m >= 4) residual.set(2 * c + c / 2, std::nan(""));
    for (std::int64_t i = 0; i < m * c; ++i) image.set(i, residual[i]);
    const float dequant = float_of(1.7 / 127), quant = float_of(127 / 4.2);

    run(shifted, [&] { call<T>(swin::ShiftPartitionArgs{residual.device.view, shifted.view, g, quant}); });
    call_cpu(swin::ShiftPartitionArgs{residual.host.view, cpu_shifted.view, g, quant});
    std::vector<double> exact;
    for (std::int64_t r = 0; r < p; ++r) {
      const std::int64_t from = image_row(g, r);
      for (std::int64_t i = 0; i < c; ++i) exact.push_back(from >= 0 ? residual[from * c + i] * quant : 0);
    }
    compare_s8(shifted, &cpu_shifted, exact);

    // LayerNorm of the branch, row by row in the order of x: with its bias, and without.
    std::vector<double> with_bias, without;
    for (std::int64_t r = 0; r < p; ++r) {
      std::vector<double> biased(c), plain(c);
      for (std::int64_t i = 0; i < c; ++i) {
        plain[i] = x[r * c + i] * static_cast<double>(dequant);
        biased[i] = plain[i] + bias[i];
      }
      for (auto* row : {&biased, &plain}) {
        layer_norm(*row, [&](std::int64_t i) { return gamma[i]; }, [&](std::int64_t i) { return beta[i]; });
      }
      with_bias.insert(with_bias.end(), biased.begin(), biased.end());
      without.insert(without.end(), plain.begin(), plain.end());
    }
    without.resize(m * c);
    std::vector<double> windowed(m * c), in_order(m * c);
    for (std::int64_t i = 0; i < p * c; ++i) {
      const std::int64_t to = image_row(g, i / c);
      if (to >= 0) windowed[to * c + i % c] = residual[to * c + i % c] + with_bias[i];
      if (i < m * c) in_order[i] = residual[i] + with_bias[i];
    }
    const std::vector<unsigned char> start = residual.device.content();
    run_in_orders(
        true,
        [&] {
          call<T>(swin::ProjBiasNormResidualArgs{x.view, bias.device.view, gamma.device.view, beta.device.view,
                                                 residual.device.view, out.view, g, dequant, quant});
        },
        [&](bool before) {
          if (before) {
            residual.device.restore(start);
            out.poison();
          } else {
            residual.device.check_guards();
            out.check_guards();
          }
        },
        [&] {
          std::vector<unsigned char> both = residual.device.content(), second = out.content();
          both.insert(both.end(), second.begin(), second.end());
          return both;
        });
    call_cpu(swin::ProjBiasNormResidualArgs{x.view, bias.host.view, gamma.host.view, beta.host.view, residual.host.view,
                                            cpu_out.view, g, dequant, quant});
    compare_rounded(residual.device, windowed, &residual.host, 5e-6);
    std::vector<double> stored;  // what is quantized is the residual as it is stored, rounded
    for (std::int64_t i = 0; i < m * c; ++i) stored.push_back(swin::cuda::to_float(residual.device[i]) * quant);
    compare_s8(out, nullptr, stored);

    run_in_place(image.device, [&] {
      call<T>(swin::BiasNormResidualArgs{first_rows, bias.device.view, gamma.device.view, beta.device.view,
                                         image.device.view, dequant});
    });
    call_cpu(swin::BiasNormResidualArgs{first_rows, bias.host.view, gamma.host.view, beta.host.view, image.host.view,
                                        dequant});
    compare_rounded(image.device, in_order, &image.host, 5e-6);

    run(normed.device, [&] {
      call<T>(swin::DequantizeNormArgs{first_rows, gamma.device.view, beta.device.view, normed.device.view, dequant});
    });
    call_cpu(swin::DequantizeNormArgs{first_rows, gamma.host.view, beta.host.view, normed.host.view, dequant});
    compare_rounded(normed.device, without, &normed.host, 5e-6);
  }
}

template <class T>
void test_patch_merge() {
  struct Case {
    std::int64_t batch, height, width, c;
    int shift;
  };
  for (const Case& k :
       std::vector<Case>{{2, 14, 14, 32, 0}, {1, 4, 6, 9, 0}, {3, 2, 2, 1, 0}, {1, 256, 128, 96, 0}, {2, 4, 2, 8, 1},
                         // Odd sides; the last has enough rows for four a thread.
                         {2, 5, 6, 32, 0}, {2, 6, 5, 9, 0}, {2, 5, 7, 96, 0}, {3, 1, 1, 16, 0}, {2, 7, 3, 8, 1},
                         {2, 257, 85, 96, 0}}) {
    begin(name_of_case("patch_merge", type_name<T>(), {k.batch, k.height, k.width, k.c, k.shift}));
    Random random(g_case);
    const std::int64_t m = k.batch * k.height * k.width, c = k.c;
    Twin<T> residual({m, c}, k.shift);
    residual.normal(random, 1, 0.5);
    if (m > 4) residual.set(0, std::nan(""));
    const float quant = float_of(127 / 2.8);
    const std::vector<std::vector<double>> merged = merged_rows(residual, k.batch, k.height, k.width);
    const std::int64_t rows = static_cast<std::int64_t>(merged.size());
    Tensor<std::int8_t> out({rows, 4 * c}), cpu_out({rows, 4 * c});
    run(
        out, [&] { call<T>(swin::PatchMergeArgs{residual.device.view, out.view, k.batch, k.height, k.width, quant}); },
        m < 1000);
    call_cpu(swin::PatchMergeArgs{residual.host.view, cpu_out.view, k.batch, k.height, k.width, quant});
    std::vector<double> exact;
    for (const std::vector<double>& row : merged) {
      for (double v : row) exact.push_back(v * quant);
    }
    compare_s8(out, &cpu_out, exact);
  }
}

template <class T>
void test_patch_embed_norm() {
  struct Case {
    std::int64_t m, c;
    int shift;
  };
  for (const Case& k : std::vector<Case>{{50, 96, 0},
                                         {7, 37, 0},
                                         {3, 1, 0},
                                         {9, 128, 0},
                                         {5, 192, 0},
                                         {3, 520, 0},
                                         {2, 1536, 0},
                                         {2, 1544, 0},
                                         {5, 96, 1},
                                         {11001, 384, 0}}) {
    for (int which = 0; which < 4; ++which) {
      const bool affine = which % 2 == 0, biased = which < 2;
      if ((affine || !biased) && k.m > 1000) continue;
      begin(name_of_case("patch_embed_norm", type_name<T>(), {k.m, k.c, k.shift, affine, biased}));
      Random random(g_case);
      Twin<T> x({k.m, k.c}, k.shift), bias({k.c}), gamma({k.c}), beta({k.c});
      x.normal(random, 2);
      bias.normal(random);
      gamma.normal(random, 0.3, 1);
      beta.normal(random);
      std::vector<double> exact;
      for (std::int64_t r = 0; r < k.m; ++r) {
        std::vector<double> row(k.c);
        for (std::int64_t i = 0; i < k.c; ++i) row[i] = x[r * k.c + i] + (biased ? bias[i] : 0);
        if (affine) layer_norm(row, [&](std::int64_t i) { return gamma[i]; }, [&](std::int64_t i) { return beta[i]; });
        exact.insert(exact.end(), row.begin(), row.end());
      }
      const TensorView none;
      run_in_place(x.device, [&] {
        call<T>(swin::PatchEmbedNormArgs{x.device.view, biased ? bias.device.view : none,
                                         affine ? gamma.device.view : none, affine ? beta.device.view : none});
      });
      call_cpu(swin::PatchEmbedNormArgs{x.host.view, biased ? bias.host.view : none, affine ? gamma.host.view : none,
                                        affine ? beta.host.view : none});
      compare_rounded(x.device, exact, &x.host, 1e-5);
    }
  }
}

template <class T>
void test_bias_gelu() {
  struct Case {
    std::int64_t m, f;
    int shift;
  };
  for (const Case& k : std::vector<Case>{
           {5, 384, 0}, {3, 77, 0}, {1, 1, 0}, {130, 16, 0}, {3, 384, 1}, {11000, 48, 1}, {11003, 768, 0}}) {
    begin(name_of_case("bias_gelu", type_name<T>(), {k.m, k.f, k.shift}));
    Random random(g_case);
    Tensor<std::int8_t> x({k.m, k.f}, k.shift), out({k.m, k.f}), cpu_out({k.m, k.f});
    Twin<T> bias({k.f});
    fill_s8(x, random);
    bias.normal(random, 2);
    if (k.f > 5) bias.set(5, std::nan(""));
    const float dequant = float_of(8.0 / 127), quant = float_of(127 / 6.5);
    run(out, [&] { call<T>(swin::BiasGeluArgs{x.view, bias.device.view, out.view, dequant, quant}); }, k.m < 1000);
    call_cpu(swin::BiasGeluArgs{x.view, bias.host.view, cpu_out.view, dequant, quant});
    if (k.m > 1000) {
      std::int64_t off = 0;
      for (std::int64_t i = 0; i < out.size(); ++i) {
        if (std::abs(out[i] - cpu_out[i]) > 1) fail("element " + std::to_string(i) + " differs by more than 1");
        off += out[i] != cpu_out[i];
      }
      EXPECT(off <= out.size() / 1000);
      continue;
    }
    std::vector<double> exact;
    for (std::int64_t i = 0; i < k.m * k.f; ++i) {
      const double v = x[i] * static_cast<double>(dequant) + bias[i % k.f];
      exact.push_back(v / 2 * (1 + std::erf(v / std::sqrt(2.0))) * quant);
    }
    compare_s8(out, &cpu_out, exact);
  }
}

// A fine scale (127 steps per 0.02) shows the formula's own error: less than 4e-7 * max(1, |x|).
template <class T>
void test_gelu_range() {
  begin(name_of_case("gelu over its whole range", type_name<T>(), {}));
  double worst = 0;
  for (int step = -48; step <= 48; ++step) {
    Tensor<std::int8_t> x({1, 256}), out({1, 256});
    Twin<T> bias({256});
    const float dequant = float_of(0.06 / 128);
    std::vector<double> value(256);
    double largest = 0;
    for (int i = 0; i < 256; ++i) {
      x[i] = static_cast<std::int8_t>(i - 128);
      bias.set(i, step / 8.0);
      const double v = x[i] * static_cast<double>(dequant) + bias[i];
      value[i] = v / 2 * (1 + std::erf(v / std::sqrt(2.0)));
      largest = std::max(largest, std::fabs(value[i]));
    }
    const float quant = float_of(120 / largest);
    call<T>(swin::BiasGeluArgs{x.view, bias.device.view, out.view, dequant, quant});
    for (int i = 0; i < 256; ++i) {
      const double off = std::fabs(out[i] - value[i] * quant) - 0.5;
      worst = std::max(worst, off / quant / std::max(1.0, std::fabs(value[i])));
    }
  }
  EXPECT(worst < 4e-7);
}

template <class T, class X>
void test_bias_residual_and_dequantize(const char* type) {
  struct Case {
    std::int64_t m, c;
    int shift;
  };
  for (const Case& k :
       std::vector<Case>{{7, 96, 0}, {3, 13, 0}, {1, 1, 0}, {50, 8, 0}, {9, 96, 1}, {2, 20, 0}, {11001, 384, 0}}) {
    begin(name_of_case(type, type_name<T>(), {k.m, k.c, k.shift}));
    if (k.m > 1000 && sizeof(X) == 4) continue;
    Random random(g_case);
    Tensor<X> x({k.m, k.c}, k.shift);
    if constexpr (sizeof(X) == 1) {
      fill_s8(x, random);
    } else {
      fill_s32(x, random);
    }
    Twin<T> bias({k.c}), residual({k.m, k.c});
    bias.normal(random);
    residual.normal(random);
    if (k.c > 3) residual.set(3, std::numeric_limits<double>::infinity());
    const float dequant = float_of(3.0 / (sizeof(X) == 1 ? 128 : 1 << 30));
    std::vector<double> exact, plain;
    for (std::int64_t i = 0; i < k.m * k.c; ++i) {
      plain.push_back(static_cast<double>(x[i]) * dequant);
      exact.push_back(residual[i] + plain.back() + bias[i % k.c]);
    }
    if (k.c > 3) exact[3] = 0;
    run_in_place(residual.device,
                 [&] { call<T>(swin::BiasResidualArgs{x.view, bias.device.view, residual.device.view, dequant}); });
    call_cpu(swin::BiasResidualArgs{x.view, bias.host.view, residual.host.view, dequant});
    if (k.c > 3) {
      EXPECT(std::isinf(swin::cuda::to_float(residual.device[3])));
      residual.set(3, 0);
    }
    compare_rounded(residual.device, exact, &residual.host, 1e-6);
    Tensor<T> out({k.m, k.c});
    Tensor<float> cpu_out({k.m, k.c});
    run(out, [&] { call<T>(swin::DequantizeArgs{x.view, out.view, dequant}); });
    call_cpu(swin::DequantizeArgs{x.view, cpu_out.view, dequant});
    compare_rounded(out, plain, &cpu_out, 5e-7);
  }
}

struct AttentionCase {
  std::int64_t bw, heads, n, d, pitch;
  int shift;
};
const std::vector<AttentionCase> kAttentionCases = {
    {4, 3, 49, 32, 64, 0},  {1, 1, 64, 16, 64, 0},   {3, 2, 5, 7, 32, 0},     {2, 4, 144, 24, 144, 0},
    {1, 1, 1, 1, 16, 0},    {1, 2, 256, 32, 256, 0}, {1, 1, 576, 32, 576, 0}, {2, 1, 20, 64, 32, 0},
    {1, 3, 17, 40, 48, 0},  {2, 2, 50, 32, 50, 0},   {1, 2, 33, 32, 40, 0},   {1, 1, 35, 256, 48, 0},
    {1, 1, 30, 260, 32, 0}, {3, 1, 49, 32, 64, 1},   {1, 2, 12, 8, 96, 0},    {1, 1, 81, 33, 81, 0}};

template <class T>
void test_qkv_bias() {
  std::vector<AttentionCase> cases = kAttentionCases;
  cases.push_back({7283, 8, 3, 8, 16, 0});  // large enough for four rows a thread, and not a multiple of four
  for (const AttentionCase& k : cases) {
    const std::int64_t m = k.bw * k.n, c = k.heads * k.d;
    begin(name_of_case("qkv_bias", type_name<T>(), {k.bw, k.heads, k.n, k.d, k.shift}));
    Random random(g_case);
    Tensor<std::int8_t> qkv({m, 3 * c}, k.shift), out({3, k.bw, k.heads, k.n, k.d}),
        cpu_out({3, k.bw, k.heads, k.n, k.d});
    Twin<T> bias({3 * c});
    fill_s8(qkv, random);
    bias.normal(random);
    const float dequant = float_of(3.1 / 127),
                quant[3] = {float_of(127 / 3.0), float_of(127 / 2.6), float_of(127 / 4.2)};
    run(out, [&] {
      call<T>(swin::QkvBiasArgs{qkv.view, bias.device.view, out.view, dequant, quant[0], quant[1], quant[2]});
    });
    call_cpu(swin::QkvBiasArgs{qkv.view, bias.host.view, cpu_out.view, dequant, quant[0], quant[1], quant[2]});
    std::vector<double> exact;
    for (int t = 0; t < 3; ++t) {
      for (std::int64_t w = 0; w < k.bw; ++w) {
        for (std::int64_t h = 0; h < k.heads; ++h) {
          for (std::int64_t i = 0; i < k.n; ++i) {
            for (std::int64_t e = 0; e < k.d; ++e) {
              const std::int64_t column = t * c + h * k.d + e;
              exact.push_back((qkv[(w * k.n + i) * 3 * c + column] * static_cast<double>(dequant) + bias[column]) *
                              quant[t]);
            }
          }
        }
      }
    }
    compare_s8(out, &cpu_out, exact);
  }
}

template <class T>
void test_qkv_bias_normalize() {
  for (const AttentionCase& k : kAttentionCases) {
    const std::int64_t m = k.bw * k.n, c = k.heads * k.d;
    begin(name_of_case("qkv_bias_normalize", type_name<T>(), {k.bw, k.heads, k.n, k.d, k.shift}));
    Random random(g_case);
    Tensor<std::int8_t> qkv({m, 3 * c}, k.shift), out({3, k.bw, k.heads, k.n, k.d}),
        cpu_out({3, k.bw, k.heads, k.n, k.d});
    Twin<T> bias({3 * c});
    fill_s8(qkv, random);
    bias.normal(random);
    for (std::int64_t i = 0; i < k.d; ++i) {  // head 0 of the first token's k is all zeros, and stays so
      qkv[c + i] = 0;
      bias.set(c + i, 0);
    }
    if (c > 4) bias.set(c - 1, std::nan(""));  // the last head's q comes out as zeros
    const float dequant = float_of(3.1 / 127),
                quant[3] = {float_of(127 / 0.9), float_of(127 / 0.8), float_of(127 / 4.2)};
    run(
        out,
        [&] {
          call<T>(
              swin::QkvBiasNormalizeArgs{qkv.view, bias.device.view, out.view, dequant, quant[0], quant[1], quant[2]});
        },
        m * k.heads < 1000);
    call_cpu(swin::QkvBiasNormalizeArgs{qkv.view, bias.host.view, cpu_out.view, dequant, quant[0], quant[1], quant[2]});
    std::vector<double> exact;
    for (int t = 0; t < 3; ++t) {
      for (std::int64_t w = 0; w < k.bw; ++w) {
        for (std::int64_t h = 0; h < k.heads; ++h) {
          for (std::int64_t i = 0; i < k.n; ++i) {
            std::vector<double> x(k.d);
            double squares = 0;
            for (std::int64_t e = 0; e < k.d; ++e) {
              const std::int64_t column = t * c + h * k.d + e;
              x[e] = qkv[(w * k.n + i) * 3 * c + column] * static_cast<double>(dequant) + bias[column];
              squares += x[e] * x[e];
            }
            const double length = t < 2 ? (squares > 1e-24 || std::isnan(squares) ? std::sqrt(squares) : 1e-12) : 1;
            for (double v : x) exact.push_back(v / length * quant[t]);
          }
        }
      }
    }
    compare_s8(out, &cpu_out, exact);
  }
}

template <class T>
void test_head_scale_softmax() {
  struct Case {
    std::int64_t images, windows, heads, n, pitch;
    int shift;
  };
  for (const Case& k : std::vector<Case>{{3, 4, 2, 49, 64, 0},
                                         {1, 2, 1, 64, 64, 0},
                                         {2, 2, 2, 5, 32, 0},
                                         {1, 1, 2, 256, 256, 0},
                                         {1, 2, 1, 49, 50, 1},
                                         {2, 1, 3, 1, 16, 0}}) {
    for (bool masked : {false, true}) {
      begin(name_of_case("head_scale_softmax", type_name<T>(),
                         {k.images, k.windows, k.heads, k.n, k.pitch, k.shift, masked}));
      Random random(g_case);
      const std::int64_t bw = k.images * k.windows, n = k.n;
      Tensor<std::int8_t> scores({bw, k.heads, n, k.pitch}, k.shift), out({bw, k.heads, n, k.pitch}),
          cpu_out({bw, k.heads, n, k.pitch});
      Twin<T> head_scale({k.heads}), bias({k.heads, n, n}), mask({k.windows, n, n});
      fill_s8(scores, random);
      for (std::int64_t h = 0; h < k.heads; ++h) head_scale.set(h, 4 + 5 * h);
      bias.normal(random, 2, 8);
      for (std::int64_t i = 0; i < k.windows * n * n; ++i)
        mask.set(i, i % (n + 1) != 0 && random.uniform() < 0.3 ? -100 : 0);
      if (n > 20) bias.set(7 * n + 3, std::nan(""));  // row 7 of head 0 comes out as zeros
      const float dequant = float_of(0.9 / 127), quant = float_of(127 / 0.9);
      const TensorView none;
      run(out, [&] {
        call<T>(swin::HeadScaleSoftmaxArgs{scores.view, head_scale.device.view, bias.device.view,
                                           masked ? mask.device.view : none, out.view, dequant, quant});
      });
      call_cpu(swin::HeadScaleSoftmaxArgs{scores.view, head_scale.host.view, bias.host.view,
                                          masked ? mask.host.view : none, cpu_out.view, dequant, quant});
      std::vector<double> exact;
      for (std::int64_t w = 0; w < bw; ++w) {
        for (std::int64_t h = 0; h < k.heads; ++h) {
          for (std::int64_t i = 0; i < n; ++i) {
            std::vector<double> x(n);
            double top = -1e300, sum = 0;
            for (std::int64_t j = 0; j < n; ++j) {
              x[j] = scores[((w * k.heads + h) * n + i) * k.pitch + j] * static_cast<double>(dequant) * head_scale[h] +
                     bias[(h * n + i) * n + j] + (masked ? mask[(w % k.windows * n + i) * n + j] : 0.0);
              top = std::max(top, x[j]);
            }
            for (double& v : x) sum += v = std::exp(v - top);
            for (std::int64_t j = 0; j < k.pitch; ++j) exact.push_back(j < n ? x[j] / sum * quant : 0.0);
          }
        }
      }
      compare_s8(out, &cpu_out, exact);
    }
  }
}

template <class T>
void test_qk_and_pv() {
  for (const AttentionCase& k : kAttentionCases) {
    for (int saturate = 0; saturate < 3; ++saturate) {  // random; all -128; -128 against 127
      begin(name_of_case("qk_gemm, pv_gemm", type_name<T>(), {k.bw, k.heads, k.n, k.d, k.pitch, k.shift, saturate}));
      Random random(g_case);
      Tensor<std::int8_t> q({k.bw, k.heads, k.n, k.d}, k.shift), key({k.bw, k.heads, k.n, k.d}),
          v({k.bw, k.heads, k.n, k.d}, k.shift);
      Tensor<std::int8_t> scores({k.bw, k.heads, k.n, k.pitch}), cpu_scores({k.bw, k.heads, k.n, k.pitch});
      Tensor<std::int8_t> p({k.bw, k.heads, k.n, k.pitch}), out({k.bw * k.n, k.heads * k.d}),
          cpu_out({k.bw * k.n, k.heads * k.d});
      fill_s8(q, random);
      fill_s8(key, random);
      fill_s8(v, random);
      fill_s8(p, random);  // probabilities are never negative; padding may be anything and must not count
      for (std::int64_t i = 0; i < p.size(); ++i) {
        if (i % k.pitch < k.n) p.data()[i] &= 127;
      }
      if (saturate) {
        std::memset(q.data(), -128, q.size());
        std::memset(key.data(), saturate == 1 ? -128 : 127, key.size());
        std::memset(p.data(), 127, p.size());
        std::memset(v.data(), saturate == 1 ? -128 : 127, v.size());
      }
      const bool all_orders = k.bw * k.heads * k.n < 300 && saturate == 0;
      // For saturated inputs a factor that brings the sum back into range shows that it is exact.
      const float qk = saturate ? float_of(1.0 / (k.d * 200.0)) : float_of(1.5 / (74 * std::sqrt(k.d)));
      const float pv = saturate ? float_of(1.0 / (k.n * 200.0)) : float_of(1.2 / (74 * std::sqrt(k.n)));
      run(scores, [&] { call<T>(swin::QkGemmArgs{q.view, key.view, scores.view, qk}); }, all_orders);
      call_cpu(swin::QkGemmArgs{q.view, key.view, cpu_scores.view, qk});
      compare_equal(scores, cpu_scores);
      run(out, [&] { call<T>(swin::PvGemmArgs{p.view, v.view, out.view, pv}); }, all_orders);
      call_cpu(swin::PvGemmArgs{p.view, v.view, cpu_out.view, pv});
      compare_equal(out, cpu_out);
    }
  }
}

template <class T>
void test_softmax() {
  struct Case {
    std::int64_t images, windows, heads, n, pitch;
    int shift;
  };
  for (const Case& k : std::vector<Case>{{3, 4, 2, 49, 64, 0},
                                         {2, 1, 3, 49, 64, 0},
                                         {1, 2, 1, 64, 64, 0},
                                         {2, 2, 2, 5, 32, 0},
                                         {3, 4, 2, 9, 16, 0},
                                         {1, 1, 2, 144, 144, 0},
                                         {1, 2, 1, 100, 112, 0},
                                         {1, 1, 1, 256, 256, 0},
                                         {1, 1, 1, 300, 304, 0},
                                         {1, 1, 1, 576, 576, 0},
                                         {2, 2, 1, 50, 50, 0},
                                         {1, 1, 1, 12, 784, 0},
                                         {1, 1, 1, 30, 704, 0},
                                         {1, 2, 1, 49, 64, 1},
                                         {2, 1, 1, 1, 16, 0},
                                         {8200, 1, 1, 3, 16, 0},
                                         {1, 1, 1, 184, 192, 0}}) {
    for (bool masked : {false, true}) {
      begin(name_of_case("softmax", type_name<T>(), {k.images, k.windows, k.heads, k.n, k.pitch, k.shift, masked}));
      Random random(g_case);
      const std::int64_t bw = k.images * k.windows, n = k.n;
      Tensor<std::int8_t> scores({bw, k.heads, n, k.pitch}, k.shift), out({bw, k.heads, n, k.pitch}),
          cpu_out({bw, k.heads, n, k.pitch});
      Twin<T> bias({k.heads, n, n}), mask({k.windows, n, n});
      fill_s8(scores, random);
      bias.normal(random);
      for (std::int64_t i = 0; i < k.windows * n * n; ++i)
        mask.set(i, i % (n + 1) != 0 && random.uniform() < 0.3 ? -100 : 0);
      if (n > 20) bias.set(7 * n + 3, std::nan(""));  // row 7 of head 0 comes out as zeros
      const float dequant = float_of(20.0 / 127), scale = 0.3f, quant = float_of(127 / 0.9);
      const TensorView none;
      run(
          out,
          [&] {
            call<T>(swin::SoftmaxArgs{scores.view, bias.device.view, masked ? mask.device.view : none, out.view,
                                      dequant, scale, quant});
          },
          bw < 100);
      call_cpu(swin::SoftmaxArgs{scores.view, bias.host.view, masked ? mask.host.view : none, cpu_out.view, dequant,
                                 scale, quant});
      std::vector<double> exact;
      for (std::int64_t w = 0; w < bw; ++w) {
        for (std::int64_t h = 0; h < k.heads; ++h) {
          for (std::int64_t i = 0; i < n; ++i) {
            std::vector<double> x(n);
            double top = -1e300, sum = 0;
            for (std::int64_t j = 0; j < n; ++j) {
              x[j] = scores[((w * k.heads + h) * n + i) * k.pitch + j] * static_cast<double>(dequant) * scale +
                     bias[(h * n + i) * n + j] + (masked ? mask[(w % k.windows * n + i) * n + j] : 0.0);
              top = std::max(top, x[j]);
            }
            for (double& v : x) sum += v = std::exp(v - top);
            for (std::int64_t j = 0; j < k.pitch; ++j) exact.push_back(j < n ? x[j] / sum * quant : 0.0);
          }
        }
      }
      compare_s8(out, &cpu_out, exact);
    }
  }
}

template <class T>
void test_patch_embed() {
  struct Case {
    std::int64_t batch, chans, height, width, p, c;
    int shift;
  };
  for (const Case& k : std::vector<Case>{{2, 3, 16, 8, 4, 96, 0},
                                         {1, 1, 6, 10, 2, 37, 0},
                                         {3, 2, 3, 3, 1, 5, 0},
                                         {1, 3, 32, 48, 4, 33, 0},
                                         {2, 3, 64, 52, 4, 40, 0},
                                         {1, 5, 14, 21, 7, 16, 0},
                                         {1, 3, 16, 16, 4, 32, 1}}) {
    begin(name_of_case("patch_embed", type_name<T>(), {k.batch, k.chans, k.height, k.width, k.p, k.c, k.shift}));
    Random random(g_case);
    Tensor<float> image({k.batch, k.chans, k.height, k.width}, k.shift);
    for (std::int64_t i = 0; i < image.size(); ++i) image[i] = static_cast<float>(random.normal());
    const std::int64_t kk = k.chans * k.p * k.p, rows = k.batch * (k.height / k.p) * (k.width / k.p);
    Twin<T> weight({k.c, kk});
    weight.normal(random, 0.2);
    Tensor<T> out({rows, k.c});
    Tensor<float> cpu_out({rows, k.c});
    run(out, [&] { call<T>(swin::PatchEmbedArgs{image.view, weight.device.view, out.view, k.p}); });
    call_cpu(swin::PatchEmbedArgs{image.view, weight.host.view, cpu_out.view, k.p});
    std::vector<double> exact;
    const std::int64_t wp = k.width / k.p, per_image = k.height / k.p * wp;
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t i = 0; i < k.c; ++i) {
        double sum = 0;
        for (std::int64_t j = 0; j < kk; ++j) {
          const std::int64_t channel = j / (k.p * k.p), dy = j / k.p % k.p, dx = j % k.p;
          const std::int64_t y = r % per_image / wp * k.p + dy, x = r % wp * k.p + dx;
          sum += static_cast<double>(image[((r / per_image * k.chans + channel) * k.height + y) * k.width + x]) *
                 weight[i * kk + j];
        }
        exact.push_back(sum);
      }
    }
    compare_rounded(out, exact, &cpu_out, 1e-5);
  }
}

template <class T>
void test_final_norm_pool_and_head() {
  struct Case {
    std::int64_t batch, tokens, c, classes;
    int shift;
  };
  for (const Case& k : std::vector<Case>{{2, 49, 768, 100, 0},
                                         {3, 1, 9, 1, 0},
                                         {1, 7, 65, 10, 0},
                                         {1, 20, 1536, 9, 0},
                                         {5, 300, 40, 7, 0},
                                         {1, 300, 33, 5, 0},
                                         {1, 3, 1544, 3, 0},
                                         {2, 12, 64, 13, 1},
                                         {1, 144, 1024, 4, 0}}) {
    begin(name_of_case("final_norm_pool, head", type_name<T>(), {k.batch, k.tokens, k.c, k.classes, k.shift}));
    Random random(g_case);
    Twin<T> residual({k.batch * k.tokens, k.c}, k.shift), gamma({k.c}), beta({k.c}), weight({k.classes, k.c}, k.shift),
        bias({k.classes});
    residual.normal(random, 2, 0.5);
    gamma.normal(random, 0.5, 1);
    beta.normal(random);
    weight.normal(random, 1 / std::sqrt(k.c));
    bias.normal(random);
    if (k.batch > 2) residual.set(k.tokens * k.c, std::nan(""));  // image 1 only
    Tensor<float> features({k.batch, k.c}), cpu_features({k.batch, k.c}), logits({k.batch, k.classes}),
        cpu_logits({k.batch, k.classes});
    run(features, [&] {
      call<T>(swin::FinalNormPoolArgs{residual.device.view, gamma.device.view, beta.device.view, features.view});
    });
    call_cpu(swin::FinalNormPoolArgs{residual.host.view, gamma.host.view, beta.host.view, cpu_features.view});
    std::vector<double> exact(k.batch * k.c, 0.0), exact_logits;
    for (std::int64_t r = 0; r < k.batch * k.tokens; ++r) {
      std::vector<double> x(k.c);
      for (std::int64_t i = 0; i < k.c; ++i) x[i] = residual[r * k.c + i];
      layer_norm(x, [&](std::int64_t i) { return gamma[i]; }, [&](std::int64_t i) { return beta[i]; });
      for (std::int64_t i = 0; i < k.c; ++i) exact[r / k.tokens * k.c + i] += x[i] / static_cast<double>(k.tokens);
    }
    compare_f32(features, exact, cpu_features, 1e-5);
    run(logits, [&] { call<T>(swin::HeadArgs{features.view, weight.device.view, bias.device.view, logits.view}); });
    call_cpu(swin::HeadArgs{features.view, weight.host.view, bias.host.view, cpu_logits.view});
    for (std::int64_t b = 0; b < k.batch; ++b) {
      for (std::int64_t i = 0; i < k.classes; ++i) {
        double sum = bias[i];
        for (std::int64_t j = 0; j < k.c; ++j) sum += static_cast<double>(features[b * k.c + j]) * weight[i * k.c + j];
        exact_logits.push_back(sum);
      }
    }
    compare_f32(logits, exact_logits, cpu_logits, 1e-5);
  }
}

// ------------------------------------------------------------------------------------------- the parts, and the shim
// itself

void test_division() {
  begin("FastDiv");
  Random random(g_case);
  std::vector<std::uint32_t> divisors = {1,   2,   3,    5,     7,     12,    49,         56,         96,        255,
                                         256, 257, 3136, 65535, 65536, 65537, 0x3fffffff, 0x40000000, 0x7fffffff};
  for (int i = 0; i < 200; ++i)
    divisors.push_back(1 + static_cast<std::uint32_t>(random.next() % (1u << random.integer(1, 30))));
  for (std::uint32_t d : divisors) {
    const swin::cuda::FastDiv by(d);
    std::vector<std::uint32_t> numbers = {0, 1, d - 1, d, d + 1, 0x7fffffff, 0x7ffffffe};
    for (std::uint32_t k : {2u, 3u, 1000u}) {
      if (static_cast<std::uint64_t>(d) * k < 0x7fffffff) numbers.insert(numbers.end(), {d * k - 1, d * k, d * k + 1});
    }
    for (int i = 0; i < 200; ++i) numbers.push_back(static_cast<std::uint32_t>(random.next()) >> random.integer(1, 20));
    for (std::uint32_t n : numbers) {
      if (n > 0x7fffffff) continue;
      std::uint32_t rest = n;
      const std::uint32_t quotient = by.split(rest);
      if (quotient != n / d || rest != n % d)
        fail(std::to_string(n) + " / " + std::to_string(d) + " = " + std::to_string(quotient));
    }
  }
}

// Every geometry of small images: window order to image order and back, and how much of it is padding.
void test_window_rows() {
  const auto each = [](std::int64_t size, const std::function<void(std::int64_t, std::int64_t)>& body) {
    for (std::int64_t window = 1; window <= size; ++window) {
      for (std::int64_t shift = 0; shift < size; ++shift) body(window, shift);
    }
  };
  for (const bool pad_first : {false, true}) {
    for (const auto& [height, width] : {std::pair<std::int64_t, std::int64_t>{5, 7}, {6, 4}, {1, 9}, {8, 8}}) {
      each(height, [&, height = height, width = width](std::int64_t window_h, std::int64_t shift_h) {
        each(width, [&](std::int64_t window_w, std::int64_t shift_w) {
          const WindowGeometry g{2, height, width, window_h, window_w, shift_h, shift_w, pad_first};
          begin(name_of_case("WindowRows", "", g, {shift_h, shift_w}));
          const swin::cuda::WindowRows rows(g);
          std::int64_t padding = 0;
          for (std::int64_t r = 0; r < g.window_rows(); ++r) {
            const std::int64_t wanted = image_row(g, r);
            const std::uint32_t got = rows.image_row(static_cast<std::uint32_t>(r));
            if (wanted < 0) {
              ++padding;
              EXPECT(got == swin::cuda::kNoRow);
            } else {
              EXPECT(got == wanted);
              EXPECT(rows.window_row(static_cast<std::uint32_t>(wanted)) == r);
            }
          }
          EXPECT(padding == g.window_rows() - g.tokens());
          EXPECT(g.is_padded() == (padding > 0));
        });
      });
    }
  }
}

void test_rounding() {
  begin("rounding");
  const float nan = std::nanf(""), inf = std::numeric_limits<float>::infinity();
  const float in[12] = {0.5f, 1.5f, -0.5f, -1.5f, 126.5f, 127.5f, -128.5f, -129.0f, nan, inf, -inf, 3e9f};
  const int wanted[12] = {0, 2, 0, -2, 126, 127, -128, -128, 0, 127, -128, 127};
  for (int i = 0; i < 12; i += 4) {
    const std::uint32_t word = swin::cuda::quantize_x4(in + i);
    for (int j = 0; j < 4; ++j) EXPECT(static_cast<std::int8_t>(word >> (8 * j)) == wanted[i + j]);
  }
  for (int q = -128; q < 128; ++q) {
    float x[4];
    swin::cuda::float_of_s8x4(static_cast<std::uint32_t>(q & 255) * 0x01010101u, x);
    for (float v : x) EXPECT(v == static_cast<float>(q));
  }
  for (int value : {0, 1, -1, 12345, -54321, swin::cuda::kMagicRange, -swin::cuda::kMagicRange}) {
    EXPECT(swin::cuda::float_of_magic(swin::cuda::kMagicBits + value) == static_cast<float>(value));
  }
}

// Every float16 and bfloat16 survives the way to float32 and back, and what lies between two is rounded to even.
template <class T>
void test_conversions() {
  begin(name_of_case("conversions", type_name<T>(), {}));
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    T x;
    const std::uint16_t pattern = static_cast<std::uint16_t>(bits);
    std::memcpy(&x, &pattern, 2);
    const float value = swin::cuda::to_float(x);
    const T back = swin::cuda::from_float<T>(value);
    if (value == value) {
      EXPECT(std::memcmp(&x, &back, 2) == 0);
    } else {
      EXPECT(std::isnan(swin::cuda::to_float(back)));
    }
    const std::uint16_t above_pattern = static_cast<std::uint16_t>(bits + 1);
    T above;
    std::memcpy(&above, &above_pattern, 2);
    const float next = swin::cuda::to_float(above);
    if (!std::isfinite(value) || !std::isfinite(next) || bits == 0x7fff || bits == 0xffff) continue;
    const float middle = static_cast<float>((static_cast<double>(value) + next) / 2);
    const T rounded = swin::cuda::from_float<T>(middle);
    const T& even = bits % 2 == 0 ? x : above;
    EXPECT(std::memcmp(&rounded, &even, 2) == 0);
  }
}

void expect_text(const std::string& text, const char* wanted) {
  if (text.find(wanted) == std::string::npos) fail("wanted '" + std::string(wanted) + "' in: " + text);
}

void test_errors_are_named() {
  begin("errors");
  Tensor<std::int8_t> x({2, 8});
  Tensor<__half> out({2, 8});
  const swin::DequantizeArgs args{x.view, out.view, 1.0f};
  shim::fail_next_launch(cudaErrorNoKernelImageForDevice);
  try {
    call<__half>(args);
    fail("no error");
  } catch (const swin::Error& e) {
    expect_text(e.what(), "dequantize (");
    expect_text(e.what(), "no kernel image");
    expect_text(e.what(), "--cuda-arch native");
  }
  call<__half>(args);  // and the next one runs
  out.check_guards();
}

// What the shim must not let pass.
void test_shim_notices() {
  begin("the shim notices");
  const auto expect_stuck = [](auto&& body) {
    try {
      shim::launch(dim3(1), dim3(64), 0, nullptr, body);
      fail("no error");
    } catch (const std::logic_error&) {
    }
  };
  expect_stuck([] {
    if (threadIdx.x != 3) __shfl_xor_sync(0xffffffffu, 1.0f, 1);  // lane 3 does not come
  });
  expect_stuck([] {
    if (threadIdx.x < 32) {
      __syncthreads();
    } else if (threadIdx.x == 40) {
      __shfl_xor_sync(0xffffffffu, 1.0f, 1);
    } else {
      __syncwarp();
    }
  });
  // A missing barrier: the result depends on the order.
  static int shared[64];
  int first = 0, second = 0;
  for (auto [order, sum] : {std::pair{shim::Order::kForward, &first}, {shim::Order::kReverse, &second}}) {
    std::memset(shared, 0, sizeof shared);
    shim::set_order(order);
    shim::launch(dim3(1), dim3(64), 0, nullptr, [&, sum = sum] {
      shared[threadIdx.x] = 1;
      *sum += shared[(threadIdx.x + 1) % 64];
    });
  }
  shim::set_order(shim::Order::kForward);
  EXPECT(first != second);
}

template <class T>
void add_tests(std::vector<Test>& tests) {
  const std::string type = std::string(" ") + type_name<T>();
  tests.insert(tests.end(),
               {{"conversions" + type, test_conversions<T>},
                {"norm_shift_partition" + type, test_norm_shift_partition<T>},
                {"proj_bias_residual_norm" + type, test_proj_bias_residual_norm<T>},
                {"patch_merge_norm" + type, test_patch_merge_norm<T>},
                {"patch_embed_norm" + type, test_patch_embed_norm<T>},
                {"bias_gelu" + type, test_bias_gelu<T>},
                {"gelu range" + type, test_gelu_range<T>},
                {"bias_residual, dequantize s8" + type,
                 [] { test_bias_residual_and_dequantize<T, std::int8_t>("bias_residual, dequantize s8"); }},
                {"bias_residual, dequantize s32" + type,
                 [] { test_bias_residual_and_dequantize<T, std::int32_t>("bias_residual, dequantize s32"); }},
                {"qkv_bias" + type, test_qkv_bias<T>},
                {"qk_gemm, pv_gemm" + type, test_qk_and_pv<T>},
                {"softmax" + type, test_softmax<T>},
                {"v2 norms" + type, test_v2_norms<T>},
                {"patch_merge v2" + type, test_patch_merge<T>},
                {"qkv_bias_normalize" + type, test_qkv_bias_normalize<T>},
                {"head_scale_softmax" + type, test_head_scale_softmax<T>},
                {"patch_embed" + type, test_patch_embed<T>},
                {"final_norm_pool, head" + type, test_final_norm_pool_and_head<T>}});
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<Test> tests = {{"division", test_division},
                             {"window rows", test_window_rows},
                             {"rounding", test_rounding},
                             {"errors", test_errors_are_named},
                             {"shim", test_shim_notices}};
  add_tests<__half>(tests);
  add_tests<__nv_bfloat16>(tests);
  return run_tests(tests, argc, argv);
}
