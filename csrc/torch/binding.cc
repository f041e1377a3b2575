// The torch extension: schemas of the model op and of every op of the table, and what turns tensors into views.
// The only place that includes torch headers. It checks and converts; the engine computes.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>
#include <torch/version.h>

#include <atomic>

#define SWIN_TORCH_AT_LEAST(major, minor) \
  (TORCH_VERSION_MAJOR > (major) || (TORCH_VERSION_MAJOR == (major) && TORCH_VERSION_MINOR >= (minor)))
#if defined(SWIN_HAVE_CUDA) && !SWIN_TORCH_AT_LEAST(2, 11)
#define SWIN_STREAM_OF_C10_CUDA  // a stream's handle is PyTorch's CUDA library's to give: the one thing asked of it
#include <c10/cuda/CUDAStream.h>
#endif

#include "engine_cache.h"
#include "swin/cpu.h"
#include "swin/cuda.h"
#if defined(SWIN_HAVE_CUDA)
#include "swin/cuda_gemm.h"
#endif
#include "swin/default_floats.h"
#include "swin/engine.h"
#include "swin/error.h"
#include "swin/geometry.h"
#include "views.h"

namespace swin::binding {
namespace {

// Engine errors become the Python exceptions of the same meaning.
template <class F>
auto translate(F&& f) {
  const DefaultFloats floats;
  try {
    return f();
  } catch (const ShapeError& e) {
    C10_THROW_ERROR(ValueError, e.what());
  } catch (const ValueError& e) {
    C10_THROW_ERROR(ValueError, e.what());
  } catch (const DTypeError& e) {
    C10_THROW_ERROR(TypeError, e.what());
  } catch (const UnsupportedError& e) {
    C10_THROW_ERROR(NotImplementedError, e.what());
  } catch (const std::bad_alloc&) {
    C10_THROW_ERROR(OutOfMemoryError, "the engine could not allocate its workspace; use a smaller batch");
  } catch (const Error& e) {
    TORCH_CHECK(false, e.what());
  }
}

// torch's current stream of `device`; none on the CPU.
ExecContext context(const at::Device& device) {
  ExecContext c{.threads = at::get_num_threads(), .stream = nullptr};
  if (device.is_cpu()) return c;
  const c10::Stream stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
#if defined(SWIN_STREAM_OF_C10_CUDA)
  c.stream = c10::cuda::CUDAStream(c10::cuda::CUDAStream::UNCHECKED, stream).stream();
#elif SWIN_TORCH_AT_LEAST(2, 11)
  c.stream = stream.native_handle();
#else
  static_cast<void>(stream);  // a build without CUDA has no backend to run there
#endif
  return c;
}

// The backend of the CPU kernels that new engines and single ops use. At first that of SWIN_CPU_ISA, which is read
// once: another thread may be setting variables while this one computes.
std::atomic<const Backend*>& chosen_cpu() {
  static std::atomic<const Backend*> backend{&cpu_backend("")};
  return backend;
}

// The backend of `device` whose residual stream is of type `residual`; "" is the backend's own choice.
const Backend& backend_for(const at::Device& device, const std::string& residual = "") {
  if (device.is_cpu()) {
    SWIN_CHECK(UnsupportedError, "swin_int8", residual.empty() || residual == "float32", "residual is '", residual,
               "'; on the CPU it is float32");
    return *chosen_cpu().load();
  }
  SWIN_CHECK(UnsupportedError, "swin_int8", device.is_cuda(), "there is no backend for ", device.str(),
             "; CPU and CUDA are known");
  SWIN_CHECK(UnsupportedError, "swin_int8", residual.empty() || residual == "float16" || residual == "bfloat16",
             "residual is '", residual, "'; on CUDA it is float16 or bfloat16");
  return cuda_backend(device.index(), residual == "bfloat16" ? DType::kBF16 : DType::kF16);
}

#define CONFIG_SCHEMA                                                                                        \
  "str graph, int int8_mode, int[] img_size, int patch_size, int in_chans, int num_classes, int embed_dim, " \
  "int[] depths, int[] num_heads, int[] window_size, float mlp_ratio, bool qkv_bias, float? qk_scale, bool " \
  "patch_norm, "                                                                                             \
  "int version, bool pad_first, str residual"
#define CONFIG_ARGS                                                                                    \
  const std::string &graph, std::int64_t int8_mode, at::IntArrayRef img_size, std::int64_t patch_size, \
      std::int64_t in_chans, std::int64_t num_classes, std::int64_t embed_dim, at::IntArrayRef depths, \
      at::IntArrayRef num_heads, at::IntArrayRef window_size, double mlp_ratio, bool qkv_bias,         \
      std::optional<double> qk_scale, bool patch_norm, std::int64_t version, bool pad_first,      \
      const std::string &residual
#define CONFIG_VALUES                                                                                            \
  make_config(int8_mode, img_size, patch_size, in_chans, num_classes, embed_dim, depths, num_heads, window_size, \
              mlp_ratio, qkv_bias, qk_scale, patch_norm, version, pad_first)

ModelConfig make_config(std::int64_t int8_mode, at::IntArrayRef img_size, std::int64_t patch_size,
                        std::int64_t in_chans, std::int64_t num_classes, std::int64_t embed_dim, at::IntArrayRef depths,
                        at::IntArrayRef num_heads, at::IntArrayRef window_size, double mlp_ratio, bool qkv_bias,
                        std::optional<double> qk_scale, bool patch_norm, std::int64_t version, bool pad_first) {
  SWIN_CHECK(ShapeError, "swin_int8", img_size.size() == 2, "img_size has ", img_size.size(),
             " numbers; height and width are needed");
  ModelConfig c;
  c.int8_mode = static_cast<int>(int8_mode);
  c.img_h = img_size[0];
  c.img_w = img_size[1];
  c.patch_size = patch_size;
  c.in_chans = in_chans;
  c.num_classes = num_classes;
  c.embed_dim = embed_dim;
  c.depths = depths.vec();
  c.num_heads = num_heads.vec();
  c.window_size = window_size.vec();
  c.mlp_ratio = mlp_ratio;
  c.qkv_bias = qkv_bias;
  c.qk_scale = qk_scale;
  c.patch_norm = patch_norm;
  c.version = static_cast<int>(version);
  c.pad_first = pad_first;
  return c;
}

// Where the weights are: the device the model runs on.
at::Device device_of(at::TensorList weights) {
  return weights.empty() ? at::Device(at::kCPU) : weights.front().device();
}

// Images that a model of `c` on `device` takes, contiguous. Which sizes it takes the engine knows.
at::Tensor check_images(const at::Tensor& images, const ModelConfig& c, const at::Device& device) {
  const char* where = "swin_int8.forward";
  SWIN_CHECK(UnsupportedError, where, images.device() == device, "images are on ", images.device().str(),
             ", the model is on ", device.str(), "; move one of them with .to()");
  SWIN_CHECK(DTypeError, where, images.scalar_type() == at::kFloat, "images are ", images.scalar_type(),
             "; float32 is needed (images.float(), normalized as in training)");
  SWIN_CHECK(ShapeError, where, images.dim() == 4 && images.size(0) > 0 && images.size(1) == c.in_chans, "images are ",
             images.sizes(), "; [batch, ", c.in_chans, ", height, width], ", c.img_h, "x", c.img_w,
             " or another size, with a batch of at least 1 is needed");
  return images.contiguous();
}

InputShape shape_of(const at::Tensor& images) { return {images.size(0), images.size(2), images.size(3)}; }

// One call of the model: its engine, device and stream, and the checked images.
struct Call {
  ModelConfig config;
  at::Device device;
  c10::OptionalDeviceGuard guard;
  const Backend& backend;
  std::shared_ptr<Engine> engine;

  Call(const std::string& graph, ModelConfig c, at::TensorList weights, const std::string& residual)
      : config(std::move(c)),
        device(device_of(weights)),
        guard(device.is_cpu() ? std::optional<at::Device>() : device),
        backend(backend_for(device, residual)),
        engine(cached_engine(graph, config, weights, backend, context(device))) {}
};

at::Tensor forward(const at::Tensor& images, at::TensorList weights, CONFIG_ARGS, const std::vector<std::string>& skip,
                   bool features_only, bool poison) {
  return translate([&] {
    const Call call(graph, CONFIG_VALUES, weights, residual);
    const at::Tensor input = check_images(images, call.config, call.device);
    const bool classify = call.config.num_classes > 0 && !features_only;
    at::Tensor features = at::empty({input.size(0), call.config.num_features()}, input.options());
    at::Tensor logits = classify ? at::empty({input.size(0), call.config.num_classes}, input.options()) : at::Tensor();
    call.engine->forward(input.const_data_ptr(), shape_of(input), features.mutable_data_ptr(),
                         classify ? logits.mutable_data_ptr() : nullptr, RunOptions{skip, poison, nullptr},
                         context(call.device));
    return classify ? logits : features;
  });
}

// What each of `stages` gives, [B, H, W, C].
std::vector<at::Tensor> forward_stages(const at::Tensor& images, at::TensorList weights, CONFIG_ARGS,
                                       at::IntArrayRef stages) {
  return translate([&] {
    const Call call(graph, CONFIG_VALUES, weights, residual);
    const at::Tensor input = check_images(images, call.config, call.device);
    const std::vector<StageGeometry> all = stage_geometries(call.config, input.size(2), input.size(3));
    std::vector<void*> places(all.size(), nullptr);
    std::vector<at::Tensor> outputs;
    const at::TensorOptions options = input.options().dtype(scalar_type_of(call.backend.ops().float_dtype));
    for (const std::int64_t stage : stages) {
      SWIN_CHECK(ValueError, "swin_int8.forward_stages", stage >= 0 && stage < std::int64_t(all.size()) &&
                 places[stage] == nullptr, "stages holds ", stage, "; numbers from 0 to ", all.size() - 1,
                 ", each once, are needed");
      const StageGeometry& g = all[stage];
      outputs.push_back(at::empty({input.size(0), g.height, g.width, g.dim}, options));
      places[stage] = outputs.back().mutable_data_ptr();
    }
    call.engine->forward_stages(input.const_data_ptr(), shape_of(input), places, context(call.device));
    return outputs;
  });
}

// Copies of what every node wrote, in order; a node that writes two tensors gives both.
std::vector<at::Tensor> trace(const at::Tensor& images, at::TensorList weights, CONFIG_ARGS) {
  return translate([&] {
    const Call call(graph, CONFIG_VALUES, weights, residual);
    const at::Tensor input = check_images(images, call.config, call.device);
    at::Tensor features = at::empty({input.size(0), call.config.num_features()}, input.options());
    at::Tensor logits = at::empty({input.size(0), call.config.num_classes}, input.options());
    std::vector<at::Tensor> copies;
    RunOptions options;
    options.observe = [&](const Node& node) {
      for (const TensorView& out : op_outputs(node.args)) {
        at::Tensor copy = at::empty(at::IntArrayRef(out.shape.data(), out.rank), scalar_type_of(out.dtype));
        call.backend.copy_to_host(copy.mutable_data_ptr(), out.data, out.nbytes(), context(call.device));
        copies.push_back(copy);
      }
    };
    call.engine->forward(input.const_data_ptr(), shape_of(input), features.mutable_data_ptr(),
                         call.config.num_classes > 0 ? logits.mutable_data_ptr() : nullptr, options,
                         context(call.device));
    return copies;
  });
}

InputShape input_shape(std::int64_t batch, at::IntArrayRef size) {
  SWIN_CHECK(ShapeError, "swin_int8", size.size() == 2, "size has ", size.size(), " numbers; height and width are needed");
  return {batch, size[0], size[1]};
}

std::string describe(at::TensorList weights, CONFIG_ARGS, std::int64_t batch, at::IntArrayRef size) {
  return translate([&] {
    return Call(graph, CONFIG_VALUES, weights, residual).engine->describe(input_shape(batch, size));
  });
}

std::int64_t workspace_bytes(at::TensorList weights, CONFIG_ARGS, std::int64_t batch, at::IntArrayRef size) {
  return translate([&] {
    return Call(graph, CONFIG_VALUES, weights, residual).engine->workspace_bytes(input_shape(batch, size));
  });
}

std::vector<double> time_ops(const at::Tensor& images, at::TensorList weights, CONFIG_ARGS, std::int64_t runs) {
  return translate([&] {
    const Call call(graph, CONFIG_VALUES, weights, residual);
    const at::Tensor input = check_images(images, call.config, call.device);
    return call.engine->time_nodes(input.const_data_ptr(), shape_of(input), static_cast<int>(runs), context(call.device));
  });
}

std::vector<std::string> variants() { return cpu_variants(); }

std::string select_variant(const std::string& name) {
  return translate([&] {
    return chosen_cpu().exchange(&cpu_backend(name))->variant();  // throws where it cannot run
  });
}

std::vector<double> ceilings(std::int64_t threads) {
  return translate([&] {
    const Ceilings c = measure_cpu_ceilings(chosen_cpu().load()->variant(), static_cast<int>(threads));
    return std::vector<double>{c.copy_gb_s, c.s8_gop_s, c.u8_gop_s, c.grouped_gop_s, c.f32_gflop_s};
  });
}

// Tunes on the current CUDA device (swin/cuda_gemm.h).
std::string tune_gemm_json([[maybe_unused]] const std::vector<std::int64_t>& m,
                           [[maybe_unused]] const std::vector<std::int64_t>& n,
                           [[maybe_unused]] const std::vector<std::int64_t>& k,
                           [[maybe_unused]] const std::vector<std::string>& outputs, [[maybe_unused]] bool again) {
  return translate([&] {
#if defined(SWIN_HAVE_CUDA)
    SWIN_CHECK(ShapeError, "tune_gemm", m.size() == n.size() && m.size() == k.size() && m.size() == outputs.size(),
               "m, n, k and outputs have ", m.size(), ", ", n.size(), ", ", k.size(), " and ", outputs.size(),
               " entries; each shape needs one of each");
    cuda_backend(cuda_device_count() > 0 ? c10::impl::VirtualGuardImpl(at::kCUDA).getDevice().index() : 0);
    std::vector<GemmShape> shapes;
    for (std::size_t i = 0; i < m.size(); ++i) shapes.push_back({m[i], n[i], k[i], gemm_output_of(outputs[i])});
    return tune_gemm(shapes, again);
#else
    cuda_backend(0);  // throws: this build has none
    return std::string();
#endif
  });
}

// {"built": whether there is a CUDA backend, "devices": how many it can use, "providers": [...], "choices": [...]}.
std::string cuda_info() {
  return translate([&] {
    std::string text = "{\"built\": " + std::string(cuda_built() ? "true" : "false") +
                       ", \"devices\": " + std::to_string(cuda_device_count());
#if defined(SWIN_HAVE_CUDA)
    text += ", \"providers\": " + gemm_providers() + ", \"choices\": " + gemm_choices();
#else
    text += ", \"providers\": [], \"choices\": []";
#endif
    return text + "}";
  });
}

std::vector<std::string> build_info() {
  return {"cpu", chosen_cpu().load()->variant(), SWIN_VERSION, SWIN_COMPILER, TORCH_VERSION};
}

}  // namespace

TORCH_LIBRARY(swin_int8, m) {
  m.def("forward(Tensor images, Tensor[] weights, " CONFIG_SCHEMA
        ", str[] skip, bool features_only, bool poison) -> Tensor");
  m.def("forward_stages(Tensor images, Tensor[] weights, " CONFIG_SCHEMA ", int[] stages) -> Tensor[]");
  m.def("trace(Tensor images, Tensor[] weights, " CONFIG_SCHEMA ") -> Tensor[]");
  m.def("describe(Tensor[] weights, " CONFIG_SCHEMA ", int batch, int[] size) -> str", describe);
  m.def("workspace_bytes(Tensor[] weights, " CONFIG_SCHEMA ", int batch, int[] size) -> int", workspace_bytes);
  m.def("time_ops(Tensor images, Tensor[] weights, " CONFIG_SCHEMA ", int runs) -> float[]", time_ops);
  m.def("variants() -> str[]", variants);
  m.def("select_variant(str name) -> str", select_variant);
  m.def("ceilings(int threads) -> float[]", ceilings);
  m.def("build_info() -> str[]", build_info);
  m.def("cuda_info() -> str", cuda_info);
  m.def("tune_gemm(int[] m, int[] n, int[] k, str[] outputs, bool again) -> str", tune_gemm_json);
}

// The CUDA key in every build: without the CUDA backend, images on a GPU get the engine's own sentence.
TORCH_LIBRARY_IMPL(swin_int8, CPU, m) {
  m.impl("forward", forward);
  m.impl("forward_stages", forward_stages);
  m.impl("trace", trace);
}
TORCH_LIBRARY_IMPL(swin_int8, CUDA, m) {
  m.impl("forward", forward);
  m.impl("forward_stages", forward_stages);
  m.impl("trace", trace);
}

// One schema per op of the table, for the tests: outputs are the caller's, written in place.
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

template <class Args>
void run(const Views& views, const Args& args) {
  // On CUDA the tensors themselves say which residual type is meant.
  const bool bf16 = !views.device().is_cpu() && views.saw(at::kBFloat16);
  const Backend& backend = backend_for(views.device(), bf16 ? "bfloat16" : "");
  run_op(backend.ops(), backend.name().c_str(), args, context(views.device()));
}

WindowGeometry geometry(at::IntArrayRef g) {
  SWIN_CHECK(ShapeError, "geometry", g.size() == 7 || g.size() == 8, "found ", g.size(),
             " numbers; batch, height, width, window_h, window_w, shift_h, shift_w and perhaps pad_first are needed");
  return {g[0], g[1], g[2], g[3], g[4], g[5], g[6], g.size() == 8 && g[7] != 0};
}

void op_patch_embed(const Tensor& image, const Tensor& weight, std::int64_t patch_size, Tensor& out) {
  translate([&] {
    const Views view(image);
    run(view, PatchEmbedArgs{view(image), view(weight), view(out), patch_size});
  });
}
void op_patch_embed_norm(Tensor& x, const OptTensor& bias, const OptTensor& gamma, const OptTensor& beta) {
  translate([&] {
    const Views view(x);
    run(view, PatchEmbedNormArgs{view(x), view(bias), view(gamma), view(beta)});
  });
}
void op_norm_shift_partition(const Tensor& residual, const Tensor& gamma, const Tensor& beta, at::IntArrayRef g,
                             double quant, Tensor& out) {
  translate([&] {
    const Views view(residual);
    run(view, NormShiftPartitionArgs{view(residual), view(gamma), view(beta), view(out), geometry(g), float(quant)});
  });
}
std::unique_ptr<PackedWeight> packed_of(const Views& views, const Tensor& w, InputRange input) {
  const Tensor host = w.cpu();
  return backend_for(views.device()).pack_weight(view_of(host), input);
}
void op_gemm_s8(const Tensor& x, const Tensor& w, double factor, bool relu, Tensor& out, std::int64_t lowest_x) {
  translate([&] {
    const Views view(x);
    SWIN_CHECK(ValueError, "gemm_s8", lowest_x >= -128 && lowest_x <= 0, "lowest_x is ", lowest_x,
               "; -128 to 0 is needed");
    const auto packed = packed_of(view, w, InputRange{static_cast<std::int32_t>(lowest_x)});
    run(view, GemmS8Args{view(x), packed.get(), view(out), float(factor), relu ? Epilogue::kRelu : Epilogue::kNone});
  });
}
void op_qkv_bias(const Tensor& qkv, const Tensor& bias, double dequant, double quant_q, double quant_k, double quant_v,
                 Tensor& out) {
  translate([&] {
    const Views view(qkv);
    run(view,
        QkvBiasArgs{view(qkv), view(bias), view(out), float(dequant), float(quant_q), float(quant_k), float(quant_v)});
  });
}
void op_qk_gemm(const Tensor& q, const Tensor& k, double factor, Tensor& out) {
  translate([&] {
    const Views view(q);
    run(view, QkGemmArgs{view(q), view(k), view(out), float(factor)});
  });
}
void op_softmax(const Tensor& scores, const Tensor& bias, const OptTensor& mask, double dequant, double scale,
                double quant, Tensor& out) {
  translate([&] {
    const Views view(scores);
    run(view, SoftmaxArgs{view(scores), view(bias), view(mask), view(out), float(dequant), float(scale), float(quant)});
  });
}
void op_pv_gemm(const Tensor& p, const Tensor& v, double factor, Tensor& out) {
  translate([&] {
    const Views view(p);
    run(view, PvGemmArgs{view(p), view(v), view(out), float(factor)});
  });
}
void op_proj_bias_residual_norm(const Tensor& proj, const Tensor& bias, Tensor& residual, const Tensor& gamma,
                                const Tensor& beta, at::IntArrayRef g, double dequant, double quant, Tensor& out) {
  translate([&] {
    const Views view(proj);
    run(view, ProjBiasResidualNormArgs{view(proj), view(bias), view(residual), view(gamma), view(beta), view(out),
                                       geometry(g), float(dequant), float(quant)});
  });
}
void op_bias_gelu(const Tensor& x, const Tensor& bias, double dequant, double quant, Tensor& out) {
  translate([&] {
    const Views view(x);
    run(view, BiasGeluArgs{view(x), view(bias), view(out), float(dequant), float(quant)});
  });
}
void op_bias_residual(const Tensor& x, const Tensor& bias, Tensor& residual, double dequant) {
  translate([&] {
    const Views view(x);
    run(view, BiasResidualArgs{view(x), view(bias), view(residual), float(dequant)});
  });
}
void op_patch_merge_norm(const Tensor& residual, const Tensor& gamma, const Tensor& beta, at::IntArrayRef size,
                         double quant, Tensor& out) {
  translate([&] {
    const Views view(residual);
    SWIN_CHECK(ShapeError, "patch_merge_norm", size.size() == 3, "size needs batch, height and width");
    run(view, PatchMergeNormArgs{view(residual), view(gamma), view(beta), view(out), size[0], size[1], size[2],
                                 float(quant)});
  });
}
void op_dequantize(const Tensor& x, double dequant, Tensor& out) {
  translate([&] {
    const Views view(x);
    run(view, DequantizeArgs{view(x), view(out), float(dequant)});
  });
}
void op_final_norm_pool(const Tensor& residual, const Tensor& gamma, const Tensor& beta, Tensor& out) {
  translate([&] {
    const Views view(residual);
    run(view, FinalNormPoolArgs{view(residual), view(gamma), view(beta), view(out)});
  });
}
void op_head(const Tensor& features, const Tensor& weight, const Tensor& bias, Tensor& out) {
  translate([&] {
    const Views view(features);
    run(view, HeadArgs{view(features), view(weight), view(bias), view(out)});
  });
}

void op_shift_partition(const Tensor& residual, at::IntArrayRef g, double quant, Tensor& out) {
  translate([&] {
    const Views view(residual);
    run(view, ShiftPartitionArgs{view(residual), view(out), geometry(g), float(quant)});
  });
}
void op_qkv_bias_normalize(const Tensor& qkv, const Tensor& bias, double dequant, double quant_q, double quant_k,
                           double quant_v, Tensor& out) {
  translate([&] {
    const Views view(qkv);
    run(view, QkvBiasNormalizeArgs{view(qkv), view(bias), view(out), float(dequant), float(quant_q), float(quant_k),
                                   float(quant_v)});
  });
}
void op_head_scale_softmax(const Tensor& scores, const Tensor& head_scale, const Tensor& bias, const OptTensor& mask,
                           double dequant, double quant, Tensor& out) {
  translate([&] {
    const Views view(scores);
    run(view, HeadScaleSoftmaxArgs{view(scores), view(head_scale), view(bias), view(mask), view(out), float(dequant),
                                   float(quant)});
  });
}
void op_proj_bias_norm_residual(const Tensor& proj, const Tensor& bias, const Tensor& gamma, const Tensor& beta,
                                Tensor& residual, at::IntArrayRef g, double dequant, double quant, Tensor& out) {
  translate([&] {
    const Views view(proj);
    run(view, ProjBiasNormResidualArgs{view(proj), view(bias), view(gamma), view(beta), view(residual), view(out),
                                       geometry(g), float(dequant), float(quant)});
  });
}
void op_bias_norm_residual(const Tensor& x, const Tensor& bias, const Tensor& gamma, const Tensor& beta,
                           Tensor& residual, double dequant) {
  translate([&] {
    const Views view(x);
    run(view, BiasNormResidualArgs{view(x), view(bias), view(gamma), view(beta), view(residual), float(dequant)});
  });
}
void op_patch_merge(const Tensor& residual, at::IntArrayRef size, double quant, Tensor& out) {
  translate([&] {
    const Views view(residual);
    SWIN_CHECK(ShapeError, "patch_merge", size.size() == 3, "size needs batch, height and width");
    run(view, PatchMergeArgs{view(residual), view(out), size[0], size[1], size[2], float(quant)});
  });
}
void op_dequantize_norm(const Tensor& x, const Tensor& gamma, const Tensor& beta, double dequant, Tensor& out) {
  translate([&] {
    const Views view(x);
    run(view, DequantizeNormArgs{view(x), view(gamma), view(beta), view(out), float(dequant)});
  });
}
void op_linear_s8(const Tensor& x, const Tensor& w, const Tensor& scale, const OptTensor& bias, Tensor& out) {
  translate([&] {
    const Views view(x);
    const auto packed = packed_of(view, w, InputRange::kSigned);
    run(view, LinearS8Args{view(x), packed.get(), view(scale), view(bias), view(out)});
  });
}
void op_linear_cosine_qkv(const Tensor& x, const Tensor& w, const Tensor& scale, const OptTensor& bias,
                          std::int64_t heads, Tensor& out) {
  translate([&] {
    const Views view(x);
    const auto packed = packed_of(view, w, InputRange::kSigned);
    run(view, LinearCosineQkvArgs{view(x), packed.get(), view(scale), view(bias), view(out), heads});
  });
}
void op_window_attention(const Tensor& qkv, const Tensor& bias, const OptTensor& mask, double qk_factor,
                         double pv_factor, Tensor& out, const OptTensor& head_scale, const OptTensor& mask_of) {
  translate([&] {
    const Views view(qkv);
    if (mask_of.has_value() && mask.has_value() && mask_of->numel() > 0) {
      const std::int64_t low = mask_of->min().item<std::int64_t>(), high = mask_of->max().item<std::int64_t>();
      SWIN_CHECK(ValueError, "window_attention", low >= -1 && high < mask->size(0), "mask_of holds ", low, " to ", high,
                 "; -1 to ", mask->size(0) - 1, " is needed");
    }
    run(view, WindowAttentionArgs{view(qkv), view(bias), view(mask), view(mask_of), view(head_scale), view(out),
                                  float(qk_factor), float(pv_factor)});
  });
}
// Memory for the rows of x ahead of their LayerNorm, where that stands behind the branch.
OptTensor branch_of(const Tensor& x, const Tensor& residual, bool post_norm) {
  if (!post_norm || x.dim() != 2 || residual.dim() != 2) return std::nullopt;
  return at::empty({x.size(0), residual.size(1)}, residual.options().dtype(at::kFloat));
}
void op_linear_residual_norm(const Tensor& x, const Tensor& w, const Tensor& scale, const OptTensor& bias,
                             Tensor& residual, const Tensor& gamma, const Tensor& beta, at::IntArrayRef g, double quant,
                             Tensor& out, bool post_norm) {
  translate([&] {
    const Views view(x);
    const auto packed = packed_of(view, w, InputRange::kSigned);
    const OptTensor branch = branch_of(x, residual, post_norm);
    run(view, LinearResidualNormArgs{view(x), packed.get(), view(scale), view(bias), view(residual), view(gamma),
                                     view(beta), view(branch), view(out), geometry(g), float(quant),
                                     post_norm ? NormPlace::kResPostNorm : NormPlace::kPreNorm});
  });
}
// GELU where there is a bias1. No geometry and out: the residual alone, without `post_norm` no gamma and beta then.
void op_mlp_residual_norm(const Tensor& x, const Tensor& w1, const Tensor& scale1, const OptTensor& bias1,
                          double hidden_quant, const Tensor& w2, const Tensor& scale2, const OptTensor& bias2,
                          Tensor& residual, const OptTensor& gamma, const OptTensor& beta, at::IntArrayRef g,
                          double quant, const OptTensor& hidden, const OptTensor& out, bool post_norm) {
  translate([&] {
    const Views view(x);
    const bool relu = !bias1.has_value();
    const auto packed1 = packed_of(view, w1, InputRange::kSigned);
    const auto packed2 =
        packed_of(view, w2, relu ? InputRange::kNonNegative : InputRange::behind_gelu(float(hidden_quant)));
    const OptTensor branch = branch_of(x, residual, post_norm);
    run(view, MlpResidualNormArgs{view(x), packed1.get(), packed2.get(), view(scale1), view(bias1), view(scale2),
                                  view(bias2), view(residual), view(gamma), view(beta), view(hidden), view(branch),
                                  view(out), out.has_value() ? geometry(g) : WindowGeometry{},
                                  relu ? Activation::kRelu : Activation::kGelu, float(hidden_quant), float(quant),
                                  post_norm ? NormPlace::kResPostNorm : NormPlace::kPreNorm});
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(swin_int8, m) {
  m.def("patch_embed(Tensor image, Tensor weight, int patch_size, Tensor(a!) out) -> ()");
  m.def("patch_embed_norm(Tensor(a!) x, Tensor? bias, Tensor? gamma, Tensor? beta) -> ()");
  m.def(
      "norm_shift_partition(Tensor residual, Tensor gamma, Tensor beta, int[] geometry, float quant, Tensor(a!) out) "
      "-> ()");
  m.def("gemm_s8(Tensor x, Tensor w, float factor, bool relu, Tensor(a!) out, int lowest_x=-128) -> ()");
  m.def(
      "qkv_bias(Tensor qkv, Tensor bias, float dequant, float quant_q, float quant_k, float quant_v, Tensor(a!) out) "
      "-> ()");
  m.def("qk_gemm(Tensor q, Tensor k, float factor, Tensor(a!) out) -> ()");
  m.def(
      "softmax(Tensor scores, Tensor bias, Tensor? mask, float dequant, float scale, float quant, Tensor(a!) out) -> "
      "()");
  m.def("pv_gemm(Tensor p, Tensor v, float factor, Tensor(a!) out) -> ()");
  m.def(
      "proj_bias_residual_norm(Tensor proj, Tensor bias, Tensor(a!) residual, Tensor gamma, Tensor beta, "
      "int[] geometry, float dequant, float quant, Tensor(b!) out) -> ()");
  m.def("bias_gelu(Tensor x, Tensor bias, float dequant, float quant, Tensor(a!) out) -> ()");
  m.def("bias_residual(Tensor x, Tensor bias, Tensor(a!) residual, float dequant) -> ()");
  m.def("patch_merge_norm(Tensor residual, Tensor gamma, Tensor beta, int[] size, float quant, Tensor(a!) out) -> ()");
  m.def("dequantize(Tensor x, float dequant, Tensor(a!) out) -> ()");
  m.def("linear_s8(Tensor x, Tensor w, Tensor scale, Tensor? bias, Tensor(a!) out) -> ()");
  m.def("linear_cosine_qkv(Tensor x, Tensor w, Tensor scale, Tensor? bias, int heads, Tensor(a!) out) -> ()");
  m.def(
      "window_attention(Tensor qkv, Tensor bias, Tensor? mask, float qk_factor, float pv_factor, Tensor(a!) out, "
      "Tensor? head_scale=None, Tensor? mask_of=None) -> ()");
  m.def(
      "linear_residual_norm(Tensor x, Tensor w, Tensor scale, Tensor? bias, Tensor(a!) residual, Tensor gamma, "
      "Tensor beta, int[] geometry, float quant, Tensor(b!) out, bool post_norm=False) -> ()");
  m.def(
      "mlp_residual_norm(Tensor x, Tensor w1, Tensor scale1, Tensor? bias1, float hidden_quant, Tensor w2, "
      "Tensor scale2, Tensor? bias2, Tensor(a!) residual, Tensor? gamma, Tensor? beta, int[] geometry, float quant, "
      "Tensor(b!)? hidden, Tensor(c!)? out, bool post_norm=False) -> ()");
  m.def("final_norm_pool(Tensor residual, Tensor gamma, Tensor beta, Tensor(a!) out) -> ()");
  m.def("head(Tensor features, Tensor weight, Tensor bias, Tensor(a!) out) -> ()");
  m.def("shift_partition(Tensor residual, int[] geometry, float quant, Tensor(a!) out) -> ()");
  m.def(
      "qkv_bias_normalize(Tensor qkv, Tensor bias, float dequant, float quant_q, float quant_k, float quant_v, "
      "Tensor(a!) out) -> ()");
  m.def(
      "head_scale_softmax(Tensor scores, Tensor head_scale, Tensor bias, Tensor? mask, float dequant, float quant, "
      "Tensor(a!) out) -> ()");
  m.def(
      "proj_bias_norm_residual(Tensor proj, Tensor bias, Tensor gamma, Tensor beta, Tensor(a!) residual, "
      "int[] geometry, float dequant, float quant, Tensor(b!) out) -> ()");
  m.def(
      "bias_norm_residual(Tensor x, Tensor bias, Tensor gamma, Tensor beta, Tensor(a!) residual, float dequant) -> ()");
  m.def("patch_merge(Tensor residual, int[] size, float quant, Tensor(a!) out) -> ()");
  m.def("dequantize_norm(Tensor x, Tensor gamma, Tensor beta, float dequant, Tensor(a!) out) -> ()");
}

#define SWIN_BIND_OP(name, Args) m.impl(#name, op_##name);
TORCH_LIBRARY_IMPL(swin_int8, CPU, m){SWIN_FOR_EACH_OP(SWIN_BIND_OP)} TORCH_LIBRARY_IMPL(swin_int8, CUDA, m) {
  SWIN_FOR_EACH_OP(SWIN_BIND_OP)
}
#undef SWIN_BIND_OP

}  // namespace swin::binding
