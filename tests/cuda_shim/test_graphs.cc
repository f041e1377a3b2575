// Whole models on the host: the graphs (FT baseline, GELU-less, and the fused one with either activation) run on the CUDA
// kernels through the shim, with random weights, beside the CPU backend. What single kernels cannot show is here: that geometry, score pitch, buffers,
// alignment and in-place updates fit together. Outputs are poisoned before each operation and guard bytes checked after
// it.
//
// The residual stream is float16 or bfloat16 on one side and float32 on the other, so logits agree to that rounding and
// to the int8 ties it turns over: 35 dB and more for float16, 31 for bfloat16. Masks moved by one window, a small
// mistake for these shallow models, cost at least 10 dB, and each case checks that they cost 6.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "device.cuh"
#include "kernels.h"
#include "packed_weight.h"
#include "row_blocks.h"
#include "swin/cpu.h"
#include "swin/ft_format.h"
#include "swin/geometry.h"
#include "swin/graph.h"

namespace {

using swin::DType;
using swin::TensorView;

// The CUDA backend's tables and layouts over host memory.
template <class T>
class ShimBackend : public swin::Backend {
 public:
  std::string name() const override { return "cuda"; }
  std::string variant() const override { return "host shim"; }
  const swin::OpTable& ops() const override { return table_; }
  swin::DeviceBuffer allocate(std::size_t bytes) const override { return swin::cpu_backend().allocate(bytes); }
  void fill(void* data, int byte, std::size_t bytes, const swin::ExecContext&) const override {
    std::memset(data, byte, bytes);
  }
  void copy_to_host(void* host, const void* data, std::size_t bytes, const swin::ExecContext&) const override {
    std::memcpy(host, data, bytes);
  }
  void copy(void* to, const void* from, std::size_t bytes, const swin::ExecContext&) const override {
    std::memcpy(to, from, bytes);
  }
  swin::Parameter upload_parameter(const TensorView& host) const override {
    swin::Parameter p{allocate(host.numel() * sizeof(T)), host};
    p.view.data = p.owner.get();
    p.view.dtype = table_.float_dtype;
    for (std::int64_t i = 0; i < host.numel(); ++i) {
      const float x = host.dtype == DType::kF16 ? __half2float(host.as<const __half>()[i]) : host.as<const float>()[i];
      p.view.template as<T>()[i] = swin::cuda::from_float<T>(x);
    }
    return p;
  }
  std::unique_ptr<swin::PackedWeight> pack_weight(const TensorView& host, swin::InputRange input) const override {
    swin::DeviceBuffer memory = allocate(host.nbytes());
    std::memcpy(memory.get(), host.data, host.nbytes());
    return std::make_unique<swin::cuda::CudaPackedWeight>(host.dim(0), host.dim(1), input, std::move(memory));
  }
  swin::Parameter upload_float32(const TensorView& host) const override { return swin::cpu_backend().upload_parameter(host); }
  swin::Parameter upload_int32(const TensorView& host) const override { return swin::cpu_backend().upload_int32(host); }
  std::int64_t score_pitch(std::int64_t area) const override { return (area + 15) / 16 * 16; }
  bool mlp_keeps_hidden(std::int64_t rows, std::int64_t dim, std::int64_t hidden) const override {
    return !swin::cuda::mlp_in_blocks(rows, dim, hidden);
  }

 private:
  const swin::OpTable table_ = swin::cuda::make_table<T>();
};

// Numbers that follow from a seed.
struct Random {
  std::uint64_t state;
  double uniform() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    std::uint64_t z = state ^ (state >> 33);
    z *= 0xff51afd7ed558ccdull;
    return ((z ^ (z >> 33)) >> 11) * 0x1p-53;
  }
  double normal() { return std::sqrt(-2 * std::log(uniform() + 1e-300)) * std::cos(6.283185307179586 * uniform()); }
};

// Tensors of a random weight list.
class WeightList {
 public:
  virtual ~WeightList() = default;
  std::vector<TensorView> views;

 protected:
  WeightList(std::uint64_t seed, DType float_type) : random_{seed}, float_type_(float_type) {}

  void* memory(std::size_t bytes) {
    owners_.push_back(std::make_unique<std::uint64_t[]>(bytes / 8 + 1));
    return owners_.back().get();
  }
  void add(DType dtype, std::initializer_list<std::int64_t> dims) {
    views.emplace_back(nullptr, dtype, dims);
    views.back().data = memory(views.back().numel() * swin::size_of(dtype));
  }
  void set(std::int64_t i, double x) {
    const TensorView& t = views.back();
    if (t.dtype == DType::kF16) {
      t.as<__half>()[i] = __float2half_rn(static_cast<float>(x));
    } else {
      t.as<float>()[i] = static_cast<float>(x);
    }
  }
  void floats(std::initializer_list<std::int64_t> dims, double deviation, double mean = 0) {
    add(float_type_, dims);
    for (std::int64_t i = 0; i < views.back().numel(); ++i) set(i, mean + deviation * random_.normal());
  }
  void norm(std::int64_t c) {
    floats({c}, 0.1, 1);
    floats({c}, 0.1);
  }
  // Deviation 127/4 of the int8 range: 1/sqrt(k) with an amax of 4/sqrt(k).
  void weight(std::int64_t n, std::int64_t k) {
    add(DType::kS8, {n, k});
    for (std::int64_t i = 0; i < n * k; ++i) {
      views.back().as<std::int8_t>()[i] =
          static_cast<std::int8_t>(std::lrint(std::clamp(random_.normal() * 127 / 4, -127.0, 127.0)));
    }
  }
  void empty() { views.emplace_back(nullptr, float_type_, std::initializer_list<std::int64_t>{0}); }
  void masks(std::int64_t windows, std::int64_t area) {
    add(float_type_, {windows, area, area});
    for (std::int64_t i = 0; i < views.back().numel(); ++i) {
      const bool diagonal = i / area % area == i % area;
      set(i, !diagonal && random_.uniform() < 0.7 ? -100.0 : 0.0);
    }
  }
  // The residual stream's amax in a Swin-V2, where it grows from block to block.
  static double grown(std::int64_t block) { return 4 * std::sqrt(2 + 2 * block); }
  // Logarithms around log 10.
  void logit_scales(std::int64_t heads) {
    add(DType::kF32, {heads});
    for (std::int64_t h = 0; h < heads; ++h) {
      views.back().as<float>()[h] = static_cast<float>(2.3 + 0.3 * random_.normal());
    }
  }
  void patch_embed_and_classifier(const swin::ModelConfig& c) {
    floats({c.embed_dim, c.in_chans * c.patch_size * c.patch_size},
           1 / std::sqrt(c.in_chans * c.patch_size * c.patch_size));
    floats({c.embed_dim}, 0.1);
    if (c.patch_norm) {
      norm(c.embed_dim);
    } else {
      empty();
      empty();
    }
    norm(c.num_features());
    floats({c.num_classes, c.num_features()}, 1 / std::sqrt(c.num_features()));
    floats({c.num_classes}, 0.1);
  }

  Random random_;

 private:
  const DType float_type_;
  std::vector<std::unique_ptr<std::uint64_t[]>> owners_;
};

// The fused graph's (docs/fused.md), activations in range.
class FusedList : public WeightList {
 public:
  FusedList(const swin::ModelConfig& c, bool with_fc1_bias, std::uint64_t seed) : WeightList(seed, DType::kF32) {
    for (const swin::StageGeometry& g : swin::stage_geometries(c)) {
      const std::int64_t dim = g.dim;
      for (std::int64_t block = 0; block < c.depths[stage_]; ++block) {
        linear(3 * dim, dim);
        c.qkv_bias ? floats({3 * dim}, 0.3) : empty();
        linear(dim, dim);
        floats({dim}, 0.1);
        linear(g.hidden, dim);
        with_fc1_bias ? floats({g.hidden}, 0.3) : empty();
        linear(dim, g.hidden);
        floats({dim}, 0.1);
        norm(dim);
        norm(dim);
        amaxes(c.version, block);
        floats({g.heads, g.window_area(), g.window_area()}, 2, c.version == 2 ? 8 : 0);
        if (c.version == 2) logit_scales(g.heads);
      }
      if (g.has_downsample) {
        norm((c.version == 2 ? 2 : 4) * dim);
        linear(2 * dim, 4 * dim);
        add(DType::kF32, {1});
        set(0, c.version == 2 ? grown(c.depths[stage_]) : 4);
      } else {
        for (int i = 0; i < 5; ++i) empty();
      }
      if (g.shifts) {
        masks(g.windows(), g.window_area());
      } else {
        empty();
      }
      ++stage_;
    }
    patch_embed_and_classifier(c);
  }

 private:
  // Inputs of QKV, q, k, v, projection, FC1, FC2; in a Swin-V2 there are none of q and k.
  void amaxes(int version, std::int64_t block) {
    const std::vector<double> values = version == 2 ? std::vector<double>{grown(block), 4, 4, grown(block), 3}
                                                    : std::vector<double>{4, 4, 4, 4, 4, 4, 3};
    add(DType::kF32, {static_cast<std::int64_t>(values.size())});
    for (std::size_t i = 0; i < values.size(); ++i) set(static_cast<std::int64_t>(i), values[i]);
  }
  // Each channel a step of its own.
  void linear(std::int64_t n, std::int64_t k) {
    weight(n, k);
    add(DType::kF32, {n});
    for (std::int64_t i = 0; i < n; ++i) set(i, 4 / std::sqrt(k) / 127 * (0.7 + 0.6 * random_.uniform()));
  }

  std::size_t stage_ = 0;
};

// FT's (docs/weight_format.md), activations in range.
class FtList : public WeightList {
 public:
  FtList(const swin::ModelConfig& c, bool with_fc1_bias, std::uint64_t seed) : WeightList(seed, DType::kF16) {
    const std::vector<swin::StageGeometry> stages = swin::stage_geometries(c);
    for (std::size_t i = 0; i < stages.size(); ++i) {
      const swin::StageGeometry& g = stages[i];
      const std::int64_t dim = g.dim, hidden = g.hidden, area = g.window_area();
      for (std::int64_t block = 0; block < c.depths[i]; ++block) {
        weight(3 * dim, dim);
        c.qkv_bias ? floats({3 * dim}, 0.3) : empty();
        weight(dim, dim);
        floats({dim}, 0.1);
        weight(hidden, dim);
        with_fc1_bias ? floats({hidden}, 0.3) : empty();
        weight(dim, hidden);
        floats({dim}, 0.1);
        norm(dim);
        norm(dim);
        for (int copy = 0; copy < 2; ++copy) scales(dim, dim / g.heads, hidden, c.version, block);
        floats({g.heads, area, area}, 2, c.version == 2 ? 8 : 0);
        empty();
        if (c.version == 2) logit_scales(g.heads);
      }
      if (g.has_downsample) {
        norm((c.version == 2 ? 2 : 4) * dim);
        weight(2 * dim, 4 * dim);
      } else {
        for (int j = 0; j < 3; ++j) empty();
      }
      if (g.shifts) {
        masks(g.windows(), area);
      } else {
        empty();
      }
      empty();
    }
    patch_embed_and_classifier(c);
  }

 private:
  // The 96 numbers of docs/weight_format.md: quadruples from 0, weight amaxes from 72, GEMM factors from 77.
  // Swin-V2: q and k have length 1, and what enters the GEMMs is the residual stream, which grows from block to block.
  void scales(std::int64_t dim, std::int64_t d, std::int64_t hidden, int version, std::int64_t block) {
    add(DType::kF32, {swin::kScaleListLength});
    float* list = views.back().as<float>();
    double kAmax[] = {4, 4, 4, 4, 4, 4, 4, 1, 4 * std::sqrt(d), 4, 4, 4, 3, 0, 0, 4, 4};
    if (version == 2) {
      for (int i : {0, 1, 2, 3, 6, 9, 10, 11, 12, 15, 16}) kAmax[i] = grown(block);
      for (int i : {4, 5, 8}) kAmax[i] = 1;
    }
    for (int i = 0; i < 17; ++i) {
      if (kAmax[i] == 0) continue;
      const double quad[] = {kAmax[i], kAmax[i] / 127, kAmax[i] / 127 / 127, 127 / kAmax[i]};
      for (int j = 0; j < 4; ++j) list[4 * i + j] = static_cast<float>(quad[j]);
    }
    const double w[] = {4 / std::sqrt(dim), 4 / std::sqrt(dim), 4 / std::sqrt(dim), 4 / std::sqrt(hidden),
                        4 / std::sqrt(4 * dim)};
    for (int i = 0; i < 5; ++i) list[72 + i] = static_cast<float>(w[i]);
    const double factors[] = {kAmax[0] * w[0] / kAmax[1],     kAmax[2] * w[1] / kAmax[3],
                              kAmax[9] * w[2] / kAmax[10],    kAmax[11] * w[3] / kAmax[12],
                              kAmax[4] * kAmax[5] / kAmax[8], kAmax[7] * kAmax[6] / kAmax[2],
                              kAmax[15] * w[4] / kAmax[16]};
    for (int i = 0; i < 7; ++i) list[77 + i] = static_cast<float>(factors[i] / 127);
  }

};

std::unique_ptr<WeightList> random_weights(const std::string& graph, bool gelu, const swin::ModelConfig& config) {
  if (graph == "fused_int8") return std::make_unique<FusedList>(config, gelu, 99);
  return std::make_unique<FtList>(config, gelu, 99);
}

struct Outputs {
  std::vector<float> features, logits;
};

Outputs run(swin::Plan& plan, const swin::ModelConfig& config, const std::vector<float>& images) {
  const std::int64_t batch = plan.batch();
  Outputs out{std::vector<float>(batch * config.num_features()), std::vector<float>(batch * config.num_classes)};
  plan.bind(images.data(), out.features.data(), out.logits.data());
  plan.run({}, {}, true, nullptr);
  return out;
}

Outputs forward(const std::string& graph_name, const swin::ModelConfig& config, const WeightList& weights,
                const swin::Backend& backend, const std::vector<float>& images, std::int64_t batch) {
  const std::unique_ptr<swin::Graph> graph = swin::make_graph(graph_name, config, weights.views, backend);
  return run(*graph->make_plan({batch, config.img_h, config.img_w}), config, images);
}

// What the plan gives of images of another size, in the memory of one of the configured size.
Outputs forward_at(const swin::InputShape& input, const std::string& graph_name, const swin::ModelConfig& config,
                   const WeightList& weights, const swin::Backend& backend, const std::vector<float>& images) {
  const std::unique_ptr<swin::Graph> graph = swin::make_graph(graph_name, config, weights.views, backend);
  std::unique_ptr<swin::Plan> before = graph->make_plan({input.batch, config.img_h, config.img_w});
  run(*before, config, images);
  return run(*graph->make_plan(input, {}, std::move(before)), config, images);
}

// Signal to quantization noise, in dB; NaN counts as nothing right.
double sqnr(const std::vector<float>& wanted, const std::vector<float>& got) {
  double signal = 0, noise = 0;
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    signal += static_cast<double>(wanted[i]) * wanted[i];
    noise += (static_cast<double>(wanted[i]) - got[i]) * (static_cast<double>(wanted[i]) - got[i]);
  }
  return std::isfinite(noise) ? 10 * std::log10(signal / (noise + 1e-30)) : -std::numeric_limits<double>::infinity();
}

struct Case {
  const char* name;
  swin::ModelConfig config;
  std::int64_t batch;
  std::int64_t other_h = 0, other_w = 0;  // another image size
};

swin::ModelConfig model(int mode, std::int64_t h, std::int64_t w, std::int64_t patch, std::int64_t dim,
                        std::vector<std::int64_t> depths, std::vector<std::int64_t> heads,
                        std::vector<std::int64_t> windows) {
  swin::ModelConfig c;
  c.int8_mode = mode;
  c.img_h = h;
  c.img_w = w;
  c.patch_size = patch;
  c.in_chans = 3;
  c.embed_dim = dim;
  c.num_classes = 10;
  c.depths = std::move(depths);
  c.num_heads = std::move(heads);
  c.window_size = std::move(windows);
  return c;
}

swin::ModelConfig v2(swin::ModelConfig c) {
  c.version = 2;
  return c;
}

swin::ModelConfig pad_first(swin::ModelConfig c) {
  c.pad_first = true;
  return c;
}

int g_failures = 0;

void test_size(const Case& c, const char* graph, const char* type, double bound, const WeightList& weights,
               const swin::Backend& backend) {
  Random random{321};
  std::vector<float> images(c.batch * c.config.in_chans * std::max(c.other_h * c.other_w, c.config.img_h * c.config.img_w));
  for (float& x : images) x = static_cast<float>(random.normal());
  const swin::InputShape input{c.batch, c.other_h, c.other_w};
  const Outputs wanted = forward_at(input, graph, c.config, weights, swin::cpu_backend(), images);
  const double logits = sqnr(wanted.logits, forward_at(input, graph, c.config, weights, backend, images).logits);
  const bool ok = logits > bound;
  g_failures += !ok;
  std::printf("%-6s %-14s %-13s %-28s at %lldx%lld: logits %5.1f dB (bound %.0f)\n", ok ? "ok" : "FAILED", graph, type, c.name,
              static_cast<long long>(c.other_h), static_cast<long long>(c.other_w), logits, bound);
}

template <class T>
void test(const Case& c, const char* type, double bound) {
  const ShimBackend<T> backend;
  Random random{12345};
  std::vector<float> images(c.batch * c.config.in_chans * c.config.img_h * c.config.img_w);
  for (float& x : images) x = static_cast<float>(random.normal());
  const struct {
    const char* graph;
    bool gelu;
  } kGraphs[] = {{"ft_int8", true}, {"geluless_int8", false}, {"fused_int8", true}, {"fused_int8", false}};
  for (const auto& [graph, gelu] : kGraphs) {
    const std::unique_ptr<WeightList> list = random_weights(graph, gelu, c.config);
    const WeightList& weights = *list;
    const Outputs wanted = forward(graph, c.config, weights, swin::cpu_backend(), images, c.batch);
    const Outputs got = forward(graph, c.config, weights, backend, images, c.batch);
    const double features = sqnr(wanted.features, got.features), logits = sqnr(wanted.logits, got.logits);
    // The same weights but for a mask shifted by one window must be told apart.
    bool masked = false;
    const std::unique_ptr<WeightList> damaged = random_weights(graph, gelu, c.config);
    for (TensorView& t : damaged->views) {
      if (t.rank == 3 && t.dim(0) > 1 && t.dim(0) != c.config.num_heads[0] &&
          t.dim(0) != c.config.num_heads[1]) {
        const std::size_t one = t.nbytes() / t.dim(0);
        std::vector<char> first(one);
        std::memcpy(first.data(), t.data, one);
        std::memmove(t.data, static_cast<char*>(t.data) + one, t.nbytes() - one);
        std::memcpy(static_cast<char*>(t.data) + t.nbytes() - one, first.data(), one);
        masked = true;
      }
    }
    const double broken = sqnr(wanted.logits, forward(graph, c.config, *damaged, backend, images, c.batch).logits);
    const bool ok = features > bound && logits > bound && masked && broken < logits - 6;
    g_failures += !ok;
    std::printf("%-6s %-14s %-4s %-8s %-28s features %5.1f dB, logits %5.1f dB (bound %.0f", ok ? "ok" : "FAILED", graph,
                gelu ? "gelu" : "", type, c.name, features, logits, bound);
    std::printf(", masks moved %.1f)\n", broken);
    if (c.other_h > 0) test_size(c, graph, type, bound, weights, backend);
  }
}

}  // namespace

int main() {
  const std::vector<Case> cases = {
      {"window 7, heads of 32", model(1, 56, 56, 4, 32, {2, 2}, {1, 2}, {7, 7}), 2, 84, 60},
      {"window 4, not square", model(1, 16, 32, 2, 24, {2, 2}, {3, 3}, {4, 4}), 3},
      {"window 8, int8_mode 2", model(2, 64, 64, 4, 32, {2, 1}, {2, 2}, {8, 8}), 1},
      {"window 3, odd channels", model(2, 24, 24, 2, 10, {2, 2}, {2, 2}, {3, 3}), 2},
      {"window 12", model(1, 48, 48, 2, 16, {2, 1}, {1, 1}, {12, 12}), 1},
      {"Swin-V2, window 8", v2(model(1, 64, 64, 4, 32, {2, 2}, {1, 2}, {8, 8})), 2, 64, 76},
      {"Swin-V2, window 16", v2(model(1, 64, 64, 2, 32, {2, 1}, {1, 2}, {16, 16})), 1},
      {"Swin-V2, odd channels", v2(model(1, 24, 48, 2, 10, {2, 2}, {2, 2}, {3, 3})), 2},
      // Padded windows, and odd sides to merge: 15x13 tokens, then 8x7; 9x11 and 5x6; 15x17 and 8x9; 11x13 and 6x7.
      {"window 7, padded", model(1, 60, 52, 4, 32, {2, 2}, {1, 2}, {7, 7}), 2},
      {"window 4, padded first", pad_first(model(1, 18, 22, 2, 24, {2, 2}, {3, 3}, {4, 4})), 3, 16, 26},
      {"Swin-V2, padded", v2(model(1, 60, 68, 4, 32, {2, 2}, {1, 2}, {8, 8})), 2},
      {"Swin-V2, padded first", v2(pad_first(model(1, 22, 26, 2, 10, {2, 2}, {2, 2}, {3, 3}))), 2},
  };
  for (const Case& c : cases) {
    test<__half>(c, "half", 31);
    test<__nv_bfloat16>(c, "bfloat16", 27);
  }
  std::printf(g_failures ? "%d failed\n" : "all passed\n", g_failures);
  return g_failures ? 1 : 0;
}
