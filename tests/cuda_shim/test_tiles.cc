// The GEMM provider swin_tiles on the host: every tile and output against float64. The tuner's proofs on a device:
// tests/cuda_gemm.
//
//   test_cuda_tiles [NAME]     only the tests whose name contains NAME
#include <memory>

#include "gemm_tiles.h"
#include "kernel_test.h"

namespace {

using namespace kernel_test;
using swin::GemmOutput;
using swin::GemmShape;
using swin::cuda::GemmCall;
using swin::cuda::tiles_provider;

// Smaller than any tile and cut off in both directions by all of them; K of a part of a step, of one and of several;
// columns that end within a lane's sixteen, and between its warp's two eights of them.
const std::vector<GemmShape> kShapes = {{1, 8, 16}, {67, 72, 64}, {130, 136, 208}, {259, 264, 96}, {300, 192, 336}};

std::string names_for_the_newest() {
  std::string names;
  for (const auto& candidate : tiles_provider().candidates({1, 8, 16, GemmOutput::kChannelsS8}, 120, nullptr)) {
    names += candidate.name + " ";
  }
  return names;
}

struct Operands {
  Tensor<std::int8_t> x, w;
  Tensor<float> scale, bias;
  std::vector<double> y;  // acc * scale + bias

  Operands(const GemmShape& s, bool with_bias, Random& random) : x({s.m, s.k}), w({s.n, s.k}), scale({s.n}), bias({s.n}) {
    fill_s8(x, random);
    fill_s8(w, random);
    for (std::int64_t n = 0; n < s.n; ++n) {
      scale[n] = float_of(50 / (5476 * std::sqrt(static_cast<double>(s.k))) * (0.5 + random.uniform()));
      bias[n] = float_of(20 * random.normal());
    }
    for (std::int64_t m = 0; m < s.m; ++m) {
      for (std::int64_t n = 0; n < s.n; ++n) {
        const std::int64_t acc = shim::dot_s8(x.data() + m * s.k, w.data() + n * s.k, s.k);
        y.push_back(static_cast<double>(acc) * static_cast<double>(scale[n]) + (with_bias ? bias[n] : 0));
      }
    }
  }
  GemmCall call(void* out, bool with_bias) const {
    return {x.data(), w.data(), out, 0.75f, scale.data(), with_bias ? bias.data() : nullptr};
  }
};

template <class T>
void check_sum(const swin::cuda::GemmKernel& kernel, const GemmShape& shape, const Operands& operands, bool bias, Random& random) {
  Tensor<T> out({shape.m, shape.n});
  std::vector<double> sums = operands.y;
  for (std::int64_t i = 0; i < out.size(); ++i) {
    out[i] = swin::cuda::from_float<T>(float_of(30 * random.normal()));
    sums[i] += swin::cuda::to_float(out[i]);
  }
  run_in_place(out, [&] { kernel.run(operands.call(out.data(), bias), nullptr); });
  compare_rounded(out, sums, static_cast<const Tensor<float>*>(nullptr), 1e-4);
}

void check_s8(const swin::cuda::GemmKernel& kernel, const GemmShape& shape, const Operands& operands, bool bias) {
  Tensor<std::int8_t> out({shape.m, shape.n});
  std::vector<double> exact = operands.y;
  for (double& y : exact) {
    if (shape.output == GemmOutput::kChannelsRelu) y = std::fmax(y, 0);
    if (shape.output == GemmOutput::kChannelsGelu) y = 0.75 * 0.5 * y * (1 + std::erf(y / std::sqrt(2.0)));
  }
  run(out, [&] { kernel.run(operands.call(out.data(), bias), nullptr); });
  compare_s8(out, nullptr, exact);
}

template <GemmOutput kOutput>
void test_output() {
  for (GemmShape shape : kShapes) {
    shape.output = kOutput;
    for (const auto& candidate : tiles_provider().candidates(shape, 90, nullptr)) {
      for (const bool bias : {true, false}) {
        if (!bias && shape.k != 64) continue;
        begin(name_of_case((candidate.name + " " + swin::name_of(kOutput)).c_str(), bias ? "bias" : "no bias",
                           {shape.m, shape.n, shape.k}));
        Random random(g_case);
        const Operands operands(shape, bias, random);
        const auto kernel = tiles_provider().prepare(shape, candidate);
        if (kOutput == GemmOutput::kChannelsAddF16) {
          check_sum<__half>(*kernel, shape, operands, bias, random);
        } else if (kOutput == GemmOutput::kChannelsAddBF16) {
          check_sum<__nv_bfloat16>(*kernel, shape, operands, bias, random);
        } else if (kOutput == GemmOutput::kChannelsF32) {
          Tensor<float> out({shape.m, shape.n});
          run(out, [&] { kernel->run(operands.call(out.data(), bias), nullptr); });
          for (std::int64_t i = 0; i < out.size(); ++i) EXPECT(std::fabs(out[i] - operands.y[i]) < 1e-4);
          g_compared += out.size();
        } else {
          check_s8(*kernel, shape, operands, bias);
        }
      }
    }
  }
}

void test_what_is_offered() {
  begin("candidates");
  EXPECT(names_for_the_newest() == "mma_256x128 mma_128x128 mma_128x96 mma_64x128 mma_64x64 ");
  const GemmShape shape{64, 96, 96, GemmOutput::kChannelsS8};
  // A block of Turing has 64 KiB of shared memory.
  EXPECT(tiles_provider().candidates(shape, 75, nullptr).size() == 4);
  std::string why;
  EXPECT(tiles_provider().candidates({64, 96, 96, GemmOutput::kS8}, 90, &why).empty());
  EXPECT(why == "its kernels scale each channel");
  EXPECT(tiles_provider().candidates({64, 96, 100, GemmOutput::kChannelsS8}, 90, &why).empty());
  EXPECT(why == "K must be a multiple of 16, N of 8");
  EXPECT(tiles_provider().candidates({64, 100, 96, GemmOutput::kChannelsS8}, 90, nullptr).empty());
  try {
    tiles_provider().prepare(shape, {"mma_1x1", ""});
    fail("no error");
  } catch (const swin::UnsupportedError& error) {
    EXPECT(std::string(error.what()).find("no kernel mma_1x1") != std::string::npos);
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run_tests({{"candidates", test_what_is_offered},
                    {"channels_s8", test_output<GemmOutput::kChannelsS8>},
                    {"channels_relu", test_output<GemmOutput::kChannelsRelu>},
                    {"channels_gelu", test_output<GemmOutput::kChannelsGelu>},
                    {"channels_f32", test_output<GemmOutput::kChannelsF32>},
                    {"channels_add_f16", test_output<GemmOutput::kChannelsAddF16>},
                    {"channels_add_bf16", test_output<GemmOutput::kChannelsAddBF16>}},
                   argc, argv);
}
