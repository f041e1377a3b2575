// swin_int8.h: what it promises in C, by the engine in C++. Exceptions end here.
#include "swin_int8.h"

#include <pthread.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <string_view>
#include <vector>

#include "engine_file.h"
#include "normalize.h"
#include "prepare.h"
#include "processors.h"
#include "swin/cpu.h"
#include "swin/cuda.h"
#include "swin/default_floats.h"
#include "swin/engine.h"
#include "swin/error.h"
#include "swin/fork_mutex.h"
#include "swin/geometry.h"

namespace {

using swin::DeviceBuffer;
using swin::UnsupportedError;
using swin::ValueError;
using swin::runtime::EngineFile;
using swin::runtime::FileError;

constexpr int kMostThreads = 1024;  // as the pool of the CPU backend

thread_local std::string t_error;

swin_status failed(swin_status status, const char* message) noexcept {
  try {
    t_error = message;
  } catch (...) {
    t_error.clear();  // no memory for the message; the status says it
  }
  return status;
}

// A thread that is cancelled within a call, which reads files, would unwind through functions that may not throw.
class NotCancelled {
 public:
  NotCancelled(const NotCancelled&) = delete;
  NotCancelled& operator=(const NotCancelled&) = delete;
#if defined(__GLIBC__)
  NotCancelled() { pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &before_); }
  ~NotCancelled() { pthread_setcancelstate(before_, nullptr); }

 private:
  int before_ = PTHREAD_CANCEL_ENABLE;
#else
  NotCancelled() {}
  ~NotCancelled() {}
#endif
};

// What `f` throws, as a status.
template <class F>
swin_status guarded(F&& f) noexcept {
  const NotCancelled not_cancelled;
  const swin::DefaultFloats floats;
  try {
    f();
    return SWIN_OK;
  } catch (const FileError& e) {
    return failed(SWIN_ERROR_FILE, e.what());
  } catch (const UnsupportedError& e) {
    return failed(SWIN_ERROR_UNSUPPORTED, e.what());
  } catch (const swin::ShapeError& e) {
    return failed(SWIN_ERROR_ARGUMENT, e.what());
  } catch (const swin::DTypeError& e) {
    return failed(SWIN_ERROR_ARGUMENT, e.what());
  } catch (const ValueError& e) {
    return failed(SWIN_ERROR_ARGUMENT, e.what());
  } catch (const std::bad_alloc&) {
    return failed(SWIN_ERROR_MEMORY, "there is not enough memory for the model or its buffers; use a smaller batch");
  } catch (const std::exception& e) {
    return failed(SWIN_ERROR_INTERNAL, e.what());
  } catch (...) {
    return failed(SWIN_ERROR_INTERNAL, "an unknown error");
  }
}

#define NEED(where, pointer) SWIN_CHECK(ValueError, where, (pointer) != nullptr, #pointer " is NULL")

// What a struct of a newer header may be larger by.
constexpr std::size_t kMostOfNewer = 4096;

void check_size(const char* where, std::size_t size, std::size_t own) {
  SWIN_CHECK(ValueError, where, size > sizeof(std::size_t) && size <= own + kMostOfNewer, "struct_size is ", size,
             "; set it to sizeof the struct, ", own, " in this version of the library");
}

// The caller's options may be of an older header, and shorter: what they lack is zero. Of a newer one, what this
// library does not know has to be zero.
swin_options options_of(const char* where, const swin_options* given) {
  swin_options all{};
  if (given != nullptr) {
    const std::size_t size = given->struct_size, known = std::min(size, sizeof all);
    check_size(where, size, sizeof all);
    std::memcpy(&all, given, known);
    const unsigned char* bytes = reinterpret_cast<const unsigned char*>(given);
    const bool zero = std::all_of(bytes + known, bytes + size, [](unsigned char byte) { return byte == 0; });
    SWIN_CHECK(ValueError, where, zero, "the options set something that this version of the library, ", SWIN_VERSION,
               ", does not know; a newer one is needed, or zeros behind the first ", sizeof all, " bytes");
  }
  all.struct_size = sizeof all;
  return all;
}

// As much of `all` as the caller's struct holds, and zeros for what a newer header has behind it.
void give_info(swin_info all, swin_info* info) {
  const std::size_t size = info->struct_size, known = std::min(size, sizeof all);
  check_size("swin_get_info", size, sizeof all);
  all.struct_size = size;
  std::memcpy(info, &all, known);
  std::memset(reinterpret_cast<char*>(info) + known, 0, size - known);
}

// The graph of `file`; what is wrong with its weights is an error of the file.
std::unique_ptr<swin::Graph> make_graph(const EngineFile& file, const std::string& origin,
                                        const swin::Backend& backend) {
  try {
    return swin::make_graph(file.graph, file.config, file.tensors, backend);
  } catch (const UnsupportedError&) {
    throw;
  } catch (const swin::Error& e) {
    throw FileError(origin + ": " + e.what());
  }
}

// -1 for "cpu" and null, else the number of the GPU.
int device_of(const char* name) {
  const std::string_view text = name == nullptr ? "cpu" : name;
  if (text == "cpu") return -1;
  if (text == "cuda") return 0;
  int device = -1;
  const std::string_view number = text.substr(0, 5) == "cuda:" ? text.substr(5) : "";
  const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), device);
  SWIN_CHECK(ValueError, "swin_load", error == std::errc() && end == number.data() + number.size() && device >= 0,
             "device is '", text, "'; \"cpu\", \"cuda\" or \"cuda:0\" is needed");
  return device;
}

}  // namespace

namespace {

// Of every model's idle memory, held for a few moves of pointers. One for all, so that a fork can wait for it.
swin::ForkMutex g_features;

// What the models of one file share, whatever the size of their images.
struct Loaded {
  std::string name, graph, device_name, isa;
  std::vector<float> mean, std;
  std::vector<double> exact_mean;
  swin::runtime::Preparation preparation;
  std::vector<std::string> classes;
  std::vector<const char*> class_names;  // of `classes`
  int device, threads;
  const swin::Backend& backend;
  std::unique_ptr<swin::Engine> engine;

  Loaded(const EngineFile& file, const std::string& origin, const swin_options& options)
      : name(file.name),
        graph(file.graph),
        mean(file.mean.begin(), file.mean.end()),
        std(file.std.begin(), file.std.end()),
        exact_mean(file.mean),
        preparation(file.preparation),
        classes(file.classes),
        device(device_of(options.device)),
        threads(options.threads > 0 ? options.threads : std::min(swin::runtime::processors(), kMostThreads)),
        backend(backend_for(device, options)) {
    SWIN_CHECK(ValueError, "swin_load", options.threads >= 0 && options.threads <= kMostThreads, "threads is ",
               options.threads, "; 0 to ", kMostThreads, " is needed");
    for (const std::string& text : classes) class_names.push_back(text.c_str());
    device_name = device < 0 ? "cpu" : "cuda:" + std::to_string(device);
    isa = backend.variant();
    const swin::CudaDeviceGuard guard(device);
    engine = std::make_unique<swin::Engine>(make_graph(file, origin, backend));
  }

  const swin::ModelConfig& config() const { return engine->config(); }

  // Memory for the pooled features of a call that wants the logits alone. One of another queue may still be in use, and
  // that of a recording is as long as the model lives.
  struct Features {
    DeviceBuffer memory{};
    std::int64_t batch = 0;
    swin::Queue queue{};
  };
  Features take(std::int64_t batch, void* stream) {
    const swin::Queue queue{stream, backend.callers_recording({.threads = threads, .stream = stream})};
    {
      std::lock_guard lock(g_features);
      for (auto it = idle_.begin(); it != idle_.end(); ++it) {
        if (it->queue != queue || it->batch < batch) continue;
        Features found = std::move(*it);
        idle_.erase(it);
        return found;
      }
    }
    return {backend.allocate(batch * config().num_features() * sizeof(float)), batch, queue};
  }
  void give_back(Features features) {
    Features given_up;  // freed behind the lock
    std::lock_guard lock(g_features);
    try {
      idle_.push_back(std::move(features));
    } catch (const std::bad_alloc&) {  // for the list of them
      return;
    }
    const auto recorded = [](const Features& f) { return f.queue.recording != 0; };
    if (idle_.size() - std::count_if(idle_.begin(), idle_.end(), recorded) <= kMostIdle) return;
    const auto oldest = std::find_if_not(idle_.begin(), idle_.end(), recorded);
    given_up = std::move(*oldest);
    idle_.erase(oldest);
  }

 private:
  static constexpr std::size_t kMostIdle = 4;

  static const swin::Backend& backend_for(int device, const swin_options& options) {
    const std::string_view residual = options.residual == nullptr ? "" : options.residual;
    if (device < 0) {
      SWIN_CHECK(ValueError, "swin_load", residual.empty(), "residual is '", residual,
                 "'; on the CPU it is float32, and NULL is needed");
      return swin::cpu_backend(options.isa == nullptr ? "" : options.isa);
    }
    SWIN_CHECK(ValueError, "swin_load", options.isa == nullptr, "isa is '", options.isa,
               "', and the model is on a GPU; NULL is needed");
    SWIN_CHECK(ValueError, "swin_load", residual.empty() || residual == "float16" || residual == "bfloat16",
               "residual is '", residual, "'; \"float16\" or \"bfloat16\" is needed");
    return swin::cuda_backend(device, residual == "bfloat16" ? swin::DType::kBF16 : swin::DType::kF16);
  }

  std::vector<Features> idle_;
};

}  // namespace

struct swin_model {
  std::shared_ptr<Loaded> loaded;
  std::int64_t height, width;

  const swin::ModelConfig& config() const { return loaded->config(); }
  std::int64_t outputs() const { return config().num_classes > 0 ? config().num_classes : config().num_features(); }
  std::vector<swin::StageGeometry> stages() const { return swin::stage_geometries(config(), height, width); }
  swin::InputShape input(std::int64_t batch) const { return {batch, height, width}; }

  void check_stream(const char* where, void* stream) const {
    SWIN_CHECK(ValueError, where, stream == nullptr || loaded->device >= 0,
               "there is a stream, and the model is on the CPU; NULL is needed");
  }
  void run(const float* images, std::int64_t batch, float* features, float* logits, void* stream) {
    check_stream("swin_forward", stream);
    loaded->engine->forward(images, input(batch), features, logits, {}, {.threads = loaded->threads, .stream = stream});
  }
};

namespace {

// Of as many images no size can be more than 64 bits hold: reading a file bounds what else they are multiplied with.
void check_batch(const char* where, const swin_model& model, std::int64_t batch) {
  const std::int64_t most = swin::kMostPixels / (model.height * model.width);
  SWIN_CHECK(ValueError, where, batch > 0 && batch <= most, "batch is ", batch, "; 1 to ", most, " images are needed");
}

swin_model* new_model(const EngineFile& file, const std::string& origin, const swin_options& options) {
  auto loaded = std::make_shared<Loaded>(file, origin, options);
  return new swin_model{std::move(loaded), file.config.img_h, file.config.img_w};
}

}  // namespace

swin_status swin_load(const char* path, const swin_options* options, swin_model** model) {
  return guarded([&] {
    NEED("swin_load", model);
    *model = nullptr;
    NEED("swin_load", path);
    const swin_options all = options_of("swin_load", options);
    *model = new_model(swin::runtime::read_engine_file(path), path, all);
  });
}

swin_status swin_load_memory(const void* bytes, size_t size, const swin_options* options, swin_model** model) {
  return guarded([&] {
    NEED("swin_load_memory", model);
    *model = nullptr;
    NEED("swin_load_memory", bytes);
    const char* origin = "engine file in memory";
    const swin_options all = options_of("swin_load_memory", options);
    *model = new_model(swin::runtime::parse_engine_file(origin, bytes, size), origin, all);
  });
}

swin_status swin_at_size(const swin_model* model, int64_t height, int64_t width, swin_model** other) {
  return guarded([&] {
    NEED("swin_at_size", other);
    *other = nullptr;
    NEED("swin_at_size", model);
    swin::stage_geometries(model->config(), height, width);  // throws where the model cannot
    *other = new swin_model{model->loaded, height, width};
  });
}

void swin_free(swin_model* model) {
  if (model == nullptr) return;
  guarded([&] {
    const swin::CudaDeviceGuard guard(model->loaded->device);
    delete model;
  });
}

swin_status swin_get_info(const swin_model* model, swin_info* info) {
  return guarded([&] {
    NEED("swin_get_info", model);
    NEED("swin_get_info", info);
    swin_info all{};
    const swin::ModelConfig& c = model->config();
    const Loaded& loaded = *model->loaded;
    all.name = loaded.name.c_str();
    all.graph = loaded.graph.c_str();
    all.device = loaded.device_name.c_str();
    all.isa = loaded.isa.c_str();
    all.threads = loaded.threads;
    all.channels = c.in_chans;
    all.height = model->height;
    all.width = model->width;
    all.classes = c.num_classes;
    all.features = c.num_features();
    all.outputs = model->outputs();
    all.stages = static_cast<std::int64_t>(c.depths.size());
    all.mean = loaded.mean.empty() ? nullptr : loaded.mean.data();
    all.std = loaded.std.empty() ? nullptr : loaded.std.data();
    all.class_names = loaded.class_names.empty() ? nullptr : loaded.class_names.data();
    const auto said = [](const std::string& text) { return text.empty() ? nullptr : text.c_str(); };
    all.interpolation = said(loaded.preparation.interpolation);
    all.crop_mode = said(loaded.preparation.crop_mode);
    all.crop_pct = loaded.preparation.crop_pct;
    give_info(all, info);
  });
}

swin_status swin_forward(swin_model* model, const float* images, int64_t batch, float* out, void* stream) {
  return guarded([&] {
    NEED("swin_forward", model);
    NEED("swin_forward", images);
    NEED("swin_forward", out);
    check_batch("swin_forward", *model, batch);
    const swin::CudaDeviceGuard guard(model->loaded->device);
    if (model->config().num_classes == 0) {
      model->run(images, batch, out, nullptr, stream);
      return;
    }
    Loaded::Features features = model->loaded->take(batch, stream);
    model->run(images, batch, static_cast<float*>(features.memory.get()), out, stream);
    model->loaded->give_back(std::move(features));
  });
}

swin_status swin_features(swin_model* model, const float* images, int64_t batch, float* out, void* stream) {
  return guarded([&] {
    NEED("swin_features", model);
    NEED("swin_features", images);
    NEED("swin_features", out);
    check_batch("swin_features", *model, batch);
    const swin::CudaDeviceGuard guard(model->loaded->device);
    model->run(images, batch, out, nullptr, stream);
  });
}

swin_status swin_stages(swin_model* model, const float* images, int64_t batch, void* const* out, void* stream) {
  return guarded([&] {
    NEED("swin_stages", model);
    NEED("swin_stages", images);
    NEED("swin_stages", out);
    check_batch("swin_stages", *model, batch);
    model->check_stream("swin_stages", stream);
    const swin::CudaDeviceGuard guard(model->loaded->device);
    const std::vector<void*> places(out, out + model->config().depths.size());
    const Loaded& loaded = *model->loaded;
    loaded.engine->forward_stages(images, model->input(batch), places, {.threads = loaded.threads, .stream = stream});
  });
}

swin_status swin_stage_shape(const swin_model* model, int64_t stage, int64_t shape[3]) {
  return guarded([&] {
    NEED("swin_stage_shape", model);
    NEED("swin_stage_shape", shape);
    const std::vector<swin::StageGeometry> all = model->stages();
    SWIN_CHECK(ValueError, "swin_stage_shape", stage >= 0 && stage < std::int64_t(all.size()), "stage is ", stage,
               "; the model has 0 to ", all.size() - 1);
    shape[0] = all[stage].height;
    shape[1] = all[stage].width;
    shape[2] = all[stage].dim;
  });
}

swin_status swin_normalize(const swin_model* model, const uint8_t* pixels, int64_t batch, const float* mean,
                           const float* std, float* images) {
  return guarded([&] {
    const char* where = "swin_normalize";
    NEED(where, model);
    NEED(where, pixels);
    NEED(where, images);
    check_batch(where, *model, batch);
    SWIN_CHECK(ValueError, where, (mean == nullptr) == (std == nullptr),
               "one of mean and std is NULL; give both or none");
    const Loaded& loaded = *model->loaded;
    const std::int64_t channels = loaded.config().in_chans;
    if (mean == nullptr) {
      SWIN_CHECK(ValueError, where, !loaded.mean.empty(),
                 "the engine file does not say how its images are normalized; "
                 "give mean and std, one number per channel each");
      mean = loaded.mean.data();
      std = loaded.std.data();
    }
    for (std::int64_t i = 0; i < channels; ++i) {
      SWIN_CHECK(ValueError, where, std::isfinite(mean[i]) && std::isfinite(std[i]) && std[i] > 0, "channel ", i,
                 " has mean ", mean[i], " and std ", std[i], "; numbers, and a std above zero, are needed");
    }
    swin::runtime::normalize(pixels, batch, model->height, model->width, channels, mean, std, images, loaded.threads);
  });
}

swin_status swin_prepare(const swin_model* model, const uint8_t* pixels, int64_t height, int64_t width, int64_t stride,
                         float* image) {
  return guarded([&] {
    const char* where = "swin_prepare";
    NEED(where, model);
    NEED(where, pixels);
    NEED(where, image);
    const Loaded& loaded = *model->loaded;
    const std::int64_t channels = loaded.config().in_chans, most = swin::kMaxImageSide;
    SWIN_CHECK(UnsupportedError, where, channels == 1 || channels == 3, "the model's images have ", channels,
               " channels; 1 or 3 are needed. Resize them, and use swin_normalize");
    SWIN_CHECK(ValueError, where, height >= 1 && height <= most && width >= 1 && width <= most, "the image is ", height,
               "x", width, "; sides of 1 to ", most, " are needed");
    const std::int64_t row = width * channels;
    SWIN_CHECK(ValueError, where,
               stride == 0 || (stride >= row && stride <= std::numeric_limits<std::int64_t>::max() / height),
               "stride is ", stride, "; a row has ", row, " bytes, and as many are needed, or more, or 0");
    SWIN_CHECK(
        ValueError, where, !loaded.mean.empty(),
        "the engine file does not say how its images are prepared; resize them, and give swin_normalize mean and "
        "std");
    const swin::runtime::Pixels given{pixels, height, width, channels, stride == 0 ? row : stride};
    const std::vector<std::uint8_t> resized = swin::runtime::prepare(loaded.preparation, given, loaded.exact_mean,
                                                                     model->height, model->width, loaded.threads);
    swin::runtime::normalize(resized.data(), 1, model->height, model->width, channels, loaded.mean.data(),
                             loaded.std.data(), image, loaded.threads);
  });
}

swin_status swin_workspace_bytes(swin_model* model, int64_t batch, int64_t* bytes) {
  return guarded([&] {
    NEED("swin_workspace_bytes", model);
    NEED("swin_workspace_bytes", bytes);
    check_batch("swin_workspace_bytes", *model, batch);
    const swin::CudaDeviceGuard guard(model->loaded->device);
    *bytes = model->loaded->engine->workspace_bytes(model->input(batch));
  });
}

const char* swin_last_error(void) { return t_error.c_str(); }

const char* swin_version(void) { return SWIN_VERSION; }
