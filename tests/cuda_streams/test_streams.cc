// The CUDA backend's host code on a runtime that keeps CUDA's rules (cuda_runtime_api.h): recordings and replays on any
// stream, forward passes within recordings of the caller's, plans of several streams and threads, memory that replays
// go on using. The operations are stand-ins of one line, the plans, the engine and the backend the real ones. Plain
// checks, no framework; every failure is printed and the program's status says whether there was one.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "checks.h"
#include "cuda_runtime_api.h"
#include "kernels_table.h"
#include "swin/cuda.h"
#include "swin/engine.h"
#include "swin/error.h"

namespace {

constexpr int kNorms = 3;  // operations between those that touch the caller's memory
// Called by each of those ahead of its launch and behind it.
std::function<void()> g_amid_operations, g_behind_operations;

std::uint16_t* halves(const swin::TensorView& t) { return t.as<std::uint16_t>(); }
fake::Place all_of(const swin::TensorView& t) { return {t.data, static_cast<std::size_t>(t.nbytes())}; }
void launch(const swin::ExecContext& context, std::function<void()> kernel, std::initializer_list<fake::Place> places) {
  const cudaError_t status = fake::launch(static_cast<cudaStream_t>(context.stream), std::move(kernel), places);
  if (status != cudaSuccess) throw swin::Error(cudaGetErrorString(status));
}

// Pixels as they are to the residual stream, plus 1 by each norm, and a copy to features and logits: a pixel plus
// kNorms.
swin::OpTable stand_ins() {
  swin::OpTable table{};
  table.float_dtype = swin::DType::kF16;
  table.patch_embed = [](const swin::PatchEmbedArgs& a, const swin::ExecContext& context) {
    launch(context,
           [a] {
             for (std::int64_t i = 0; i < a.out.numel(); ++i)
               halves(a.out)[i] = static_cast<std::uint16_t>(a.image.as<const float>()[i]);
           },
           {all_of(a.image), all_of(a.out)});
  };
  table.patch_embed_norm = [](const swin::PatchEmbedNormArgs& a, const swin::ExecContext& context) {
    if (g_amid_operations) g_amid_operations();
    launch(context,
           [a] {
             for (std::int64_t i = 0; i < a.x.numel(); ++i) ++halves(a.x)[i];
           },
           {all_of(a.x)});
    if (g_behind_operations) g_behind_operations();
  };
  table.final_norm_pool = [](const swin::FinalNormPoolArgs& a, const swin::ExecContext& context) {
    launch(context,
           [a] {
             for (std::int64_t i = 0; i < a.out.numel(); ++i) a.out.as<float>()[i] = halves(a.residual)[i];
           },
           {all_of(a.residual), all_of(a.out)});
  };
  table.head = [](const swin::HeadArgs& a, const swin::ExecContext& context) {
    launch(context,
           [a] {
             for (std::int64_t i = 0; i < a.out.numel(); ++i) a.out.as<float>()[i] = a.features.as<const float>()[i];
           },
           {all_of(a.features), all_of(a.out)});
  };
  return table;
}

// One channel, one token an image of 4 x 4.
class TestGraph : public swin::Graph {
 public:
  explicit TestGraph(const swin::Backend& backend) : backend_(backend) {
    config_.img_h = config_.img_w = config_.patch_size = 4;
    config_.in_chans = config_.num_classes = config_.embed_dim = 1;
    config_.depths = config_.num_heads = config_.window_size = {1};
    std::uint16_t weights[16] = {};
    weights_ = backend.upload_parameter({weights, swin::DType::kF16, {1, 16}});
    one_ = backend.upload_parameter({weights, swin::DType::kF16, {1}});
    one_by_one_ = backend.upload_parameter({weights, swin::DType::kF16, {1, 1}});
  }
  const swin::ModelConfig& config() const override { return config_; }
  const swin::Backend& backend() const override { return backend_; }
  std::unique_ptr<swin::Plan> make_plan(const swin::InputShape& input, const swin::Queue& queue,
                                        std::unique_ptr<swin::Plan> retired) const override {
    using swin::OpKind;
    auto plan = std::make_unique<swin::Plan>(backend_, input, queue, std::move(retired));
    const swin::TensorView x(plan->buffer("x", swin::DType::kF16, input.batch), swin::DType::kF16, {input.batch, 1});
    plan->release_spare();
    const auto floats = [&](std::initializer_list<std::int64_t> shape) {
      return swin::TensorView(nullptr, swin::DType::kF32, shape);
    };
    plan->add("patch_embed", OpKind::kFloat, -1, -1,
              swin::PatchEmbedArgs{floats({input.batch, 1, input.height, input.width}), weights_.view, x, 4});
    const float masks[2] = {};
    plan->keep(backend_.upload_float32({const_cast<float*>(masks), swin::DType::kF32, {2}}));
    for (int i = 0; i < kNorms; ++i)
      plan->add("norm", OpKind::kFused, 0, i, swin::PatchEmbedNormArgs{x, {}, one_.view, one_.view});
    plan->add("pool", OpKind::kFloat, -1, -1,
              swin::FinalNormPoolArgs{x, one_.view, one_.view, floats({input.batch, 1})});
    plan->add("head", OpKind::kFloat, -1, -1,
              swin::HeadArgs{floats({input.batch, 1}), one_by_one_.view, one_.view, floats({input.batch, 1})});
    return plan;
  }

 private:
  const swin::Backend& backend_;
  swin::ModelConfig config_;
  swin::Parameter weights_, one_, one_by_one_;
};

// Images and results of one caller. Image i's first pixels are `first` + i, so its logit is that plus kNorms.
struct Caller {
  const std::int64_t batch;
  swin::DeviceBuffer image, features, logits;

  Caller(const swin::Backend& backend, std::int64_t batch, float first) : batch(batch) {
    image = backend.allocate(batch * 16 * sizeof(float));
    features = backend.allocate(batch * sizeof(float));
    logits = backend.allocate(batch * sizeof(float));
    set(first);
  }
  void set(float first) {
    for (std::int64_t i = 0; i < batch; ++i) static_cast<float*>(image.get())[i] = first + i;
  }
  void forward(swin::Engine& engine, cudaStream_t stream) {
    for (std::int64_t i = 0; i < batch; ++i) static_cast<float*>(logits.get())[i] = -1;
    engine.forward(image.get(), {batch, 4, 4}, features.get(), logits.get(), {}, {.threads = 1, .stream = stream});
  }
  bool has(float first) const {
    for (std::int64_t i = 0; i < batch; ++i) {
      if (static_cast<float*>(logits.get())[i] != first + i + kNorms) return false;
    }
    return true;
  }
};

struct Stream {
  cudaStream_t handle = nullptr;
  explicit Stream(unsigned flags = cudaStreamNonBlocking) { cudaStreamCreateWithFlags(&handle, flags); }
  ~Stream() { cudaStreamDestroy(handle); }
  Stream(const Stream&) = delete;
};

swin::Engine new_engine() { return swin::Engine(std::make_unique<TestGraph>(swin::cuda_backend(0))); }
const swin::Backend& backend() { return swin::cuda_backend(0); }

// The fake's counts over `work`.
fake::Counts counted(const std::function<void()>& work) {
  const fake::Counts before = fake::counts();
  work();
  const fake::Counts after = fake::counts();
  return {after.kernels - before.kernels, after.graph_launches - before.graph_launches,
          after.allocations - before.allocations, after.frees - before.frees, after.faults - before.faults};
}

// A capture of the caller's: its graph, ready to launch.
class Recorded {
 public:
  Recorded(cudaStream_t stream, cudaStreamCaptureMode mode, const std::function<void()>& work) {
    EXPECT(cudaStreamBeginCapture(stream, mode) == cudaSuccess);
    try {
      work();
    } catch (const std::exception& e) {
      std::printf("amid a capture: %s\n", e.what());
      ++g_failures;
    }
    cudaGraph_t graph = nullptr;
    const cudaError_t status = cudaStreamEndCapture(stream, &graph);
    EXPECT(status == cudaSuccess);
    if (graph == nullptr) return;
    cudaGraphInstantiate(&executable_, graph, 0);
    cudaGraphDestroy(graph);
  }
  ~Recorded() { cudaGraphExecDestroy(executable_); }
  Recorded(const Recorded&) = delete;
  void replay(cudaStream_t stream) {
    EXPECT(executable_ != nullptr);
    if (executable_ != nullptr) EXPECT(cudaGraphLaunch(executable_, stream) == cudaSuccess);
  }

 private:
  cudaGraphExec_t executable_ = nullptr;
};

// The first call runs as it is, the second records; on the default stream too, which cannot be captured itself.
void from_the_second_call_on_a_recording_runs() {
  const Stream own, blocking(0);
  for (cudaStream_t stream : {cudaStream_t(nullptr), own.handle, blocking.handle}) {
    swin::Engine engine = new_engine();
    Caller caller(backend(), 3, 100);
    fake::Counts c = counted([&] { caller.forward(engine, stream); });
    EXPECT(caller.has(100) && c.kernels == kNorms + 3 && c.graph_launches == 0);
    for (int call = 0; call < 3; ++call) {
      caller.set(200 + 10.0f * call);
      c = counted([&] { caller.forward(engine, stream); });
      EXPECT(caller.has(200 + 10.0f * call) && c.kernels == 3 && c.graph_launches == 1 && c.allocations == 0);
      EXPECT(fake::last_graph_stream() == stream);
    }
    Caller other(backend(), 3, 7);  // other memory of the caller's, the same plan
    c = counted([&] { other.forward(engine, stream); });
    EXPECT(other.has(7) && c.graph_launches == 1 && c.allocations == 0);
  }
}

// What others put on the caller's stream while a recording is made runs there and then.
void a_recording_takes_nothing_of_others() {
  const Stream stream;
  swin::Engine engine = new_engine();
  Caller caller(backend(), 1, 1);
  const swin::DeviceBuffer counter = backend().allocate(sizeof(int));
  int* count = static_cast<int*>(counter.get());
  caller.forward(engine, stream.handle);
  g_amid_operations = [&] {
    std::thread([&] {
      EXPECT(fake::launch(stream.handle, [=] { ++*count; }, {{count, sizeof(int)}}) == cudaSuccess);
    }).join();
  };
  caller.forward(engine, stream.handle);
  g_amid_operations = nullptr;
  EXPECT(*count == kNorms && caller.has(1));
  caller.forward(engine, stream.handle);
  EXPECT(*count == kNorms && caller.has(1));
}

// A thread that waits for the device amid a recording spoils it: that call runs without, and a later one records.
void a_spoilt_recording_is_made_again() {
  for (const bool at_the_end : {false, true}) {
    swin::Engine engine = new_engine();
    Caller caller(backend(), 2, 5);
    caller.forward(engine, nullptr);
    int enqueued = 0;
    (at_the_end ? g_behind_operations : g_amid_operations) = [&] {
      if (++enqueued == (at_the_end ? kNorms : 1)) std::thread([] { cudaDeviceSynchronize(); }).join();
    };
    fake::Counts c = counted([&] { caller.forward(engine, nullptr); });
    EXPECT(caller.has(5) && c.graph_launches == 0 && c.kernels == kNorms + 3);
    g_amid_operations = g_behind_operations = nullptr;
    EXPECT(cudaGetLastError() == cudaSuccess);
    c = counted([&] { caller.forward(engine, nullptr); });
    EXPECT(caller.has(5) && c.graph_launches == 1);
  }
  // An operation's own error is no spoilt recording.
  swin::Engine engine = new_engine();
  Caller caller(backend(), 2, 5);
  caller.forward(engine, nullptr);
  g_amid_operations = [] {
    g_amid_operations = nullptr;
    throw swin::Error("of its own");
  };
  std::string message;
  try {
    caller.forward(engine, nullptr);
  } catch (const swin::Error& e) {
    message = e.what();
  }
  g_amid_operations = nullptr;
  EXPECT(message == "of its own");
  caller.forward(engine, nullptr);
  EXPECT(caller.has(5));
}

// Where recordings are spoilt every time, calls go on without them, and do not try forever.
void recordings_are_given_up() {
  swin::Engine engine = new_engine();
  Caller caller(backend(), 2, 5);
  int enqueued = 0;
  g_amid_operations = [&] {
    ++enqueued;
    cudaDeviceSynchronize();
  };
  for (int call = 0; call < 10; ++call) {
    caller.forward(engine, nullptr);
    EXPECT(caller.has(5));
  }
  g_amid_operations = nullptr;
  EXPECT(enqueued == 10 * kNorms + 3);  // each of three recordings ended at its first operation
}

void recordings_can_be_switched_off() {
  setenv("SWIN_CUDA_GRAPHS", "0", 1);
  swin::Engine engine = new_engine();
  Caller caller(backend(), 2, 5);
  for (int call = 0; call < 3; ++call) {
    const fake::Counts c = counted([&] { caller.forward(engine, nullptr); });
    EXPECT(caller.has(5) && c.graph_launches == 0);
  }
  unsetenv("SWIN_CUDA_GRAPHS");
}

// While one thread records, others make plans, load models, allocate and free.
void threads_do_not_disturb_each_other() {
  swin::Engine engine = new_engine();
  Caller caller(backend(), 2, 5);
  caller.forward(engine, nullptr);
  bool done = false;
  g_amid_operations = [&] {
    if (done) return;
    done = true;
    std::thread([&] {
      swin::Engine another = new_engine();
      Caller theirs(backend(), 4, 9);
      const Stream stream;
      theirs.forward(another, stream.handle);
      theirs.forward(engine, stream.handle);
      EXPECT(theirs.has(9));
    }).join();
  };
  const fake::Counts c = counted([&] { caller.forward(engine, nullptr); });
  g_amid_operations = nullptr;
  EXPECT(done && caller.has(5) && c.graph_launches == 1);
}

// A forward pass is part of the caller's recording, whatever ran on the stream before, and in whatever mode it is
// recorded.
void a_callers_recording_takes_a_forward_pass() {
  for (const auto mode :
       {cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal, cudaStreamCaptureModeRelaxed}) {
    for (const int before : {1, 0, 2, 3, 4, 5, 6, 7}) {
      const Stream stream(before < 4 ? cudaStreamNonBlocking : 0), other;
      swin::Engine engine = new_engine();
      Caller caller(backend(), 2, 5);
      for (int call = 0; call < before % 4; ++call) caller.forward(engine, stream.handle);
      fake::Counts c{};
      Recorded recorded(stream.handle, mode, [&] { c = counted([&] { caller.forward(engine, stream.handle); }); });
      EXPECT(c.kernels == 0 && c.graph_launches == 0);
      for (float first : {20.0f, 30.0f}) {
        caller.set(first);
        recorded.replay(other.handle);
        EXPECT(caller.has(first));
      }
    }
  }
}

// What a recording of the caller's works in stays, and nothing else works there.
void the_memory_of_a_callers_recording_is_its_own() {
  const Stream stream;
  swin::Engine engine = new_engine();
  Caller caller(backend(), 2, 5), later(backend(), 2, 50);
  caller.forward(engine, stream.handle);
  Recorded first(stream.handle, cudaStreamCaptureModeGlobal, [&] { caller.forward(engine, stream.handle); });
  Recorded second(stream.handle, cudaStreamCaptureModeGlobal, [&] { later.forward(engine, stream.handle); });
  const Stream others[6];
  fake::Counts c = counted([&] {
    for (std::int64_t batch = 1; batch < 20; ++batch) {  // many shapes and streams: plans come and go
      Caller eager(backend(), batch, 80);
      for (const Stream& other : others) {
        for (cudaStream_t where : {stream.handle, other.handle}) {
          eager.forward(engine, where);
          EXPECT(eager.has(80));
        }
      }
    }
    caller.set(6);
    first.replay(stream.handle);
    later.set(60);
    second.replay(stream.handle);
  });
  EXPECT(c.faults == 0 && c.frees > 0 && caller.has(6) && later.has(60));
  // Replays of two recordings may overlap, so theirs are two; calls within one recording come one after the other.
  Caller a(backend(), 7, 1), b(backend(), 7, 2);
  c = counted([&] {
    Recorded both(stream.handle, cudaStreamCaptureModeGlobal, [&] {
      a.forward(engine, stream.handle);
      b.forward(engine, stream.handle);
    });
    both.replay(stream.handle);
  });
  EXPECT(a.has(1) && b.has(2) && c.allocations == 2);  // the residual stream, what the plan keeps
  c = counted([&] { Recorded(stream.handle, cudaStreamCaptureModeGlobal, [&] { a.forward(engine, stream.handle); }); });
  EXPECT(c.allocations == 2);
  // Many shapes in one recording.
  std::vector<std::unique_ptr<Caller>> shapes;
  for (std::int64_t batch = 1; batch < 9; ++batch)
    shapes.push_back(std::make_unique<Caller>(backend(), batch, 10.0f * batch));
  Recorded all(stream.handle, cudaStreamCaptureModeGlobal, [&] {
    for (const auto& shape : shapes) shape->forward(engine, stream.handle);
  });
  all.replay(stream.handle);
  for (const auto& shape : shapes) EXPECT(shape->has(10.0f * shape->batch));
}

// Streams in turn: each keeps its plans.
void streams_keep_their_plans() {
  swin::Engine engine = new_engine();
  std::vector<std::unique_ptr<Stream>> streams;
  std::vector<std::unique_ptr<Caller>> callers;
  for (int i = 0; i < 4; ++i) {
    streams.push_back(std::make_unique<Stream>());
    for (int shape = 0; shape < 4; ++shape)
      callers.push_back(std::make_unique<Caller>(backend(), 1 + shape, 10.0f * i));
  }
  const auto round = [&] {
    for (std::size_t i = 0; i < callers.size(); ++i) callers[i]->forward(engine, streams[i / 4]->handle);
  };
  round();
  const fake::Counts c = counted([&] {
    for (int i = 0; i < 5; ++i) round();
  });
  EXPECT(c.allocations == 0 && c.graph_launches == 5 * 16);
  for (std::size_t i = 0; i < callers.size(); ++i) EXPECT(callers[i]->has(10.0f * (i / 4)));
  // Streams that come and go do not add up.
  const fake::Counts many = counted([&] {
    for (int i = 0; i < 100; ++i) {
      streams.push_back(std::make_unique<Stream>());
      Caller(backend(), 1, 3).forward(engine, streams.back()->handle);
    }
  });
  EXPECT(many.allocations == 100 * 5 && many.frees == many.allocations);
}

// Where memory ends, what is idle is given up first.
void idle_plans_make_room() {
  swin::Engine engine = new_engine();
  Caller first(backend(), 1, 3), second(backend(), 2, 4);
  first.forward(engine, nullptr);
  fake::out_of_memory(1);
  const fake::Counts c = counted([&] { second.forward(engine, nullptr); });
  EXPECT(second.has(4) && c.frees == 2);
  fake::out_of_memory(2);
  bool thrown = false;
  try {
    engine.forward(first.image.get(), {1, 4, 4}, first.features.get(), first.logits.get(), {},
                   {.threads = 1, .stream = nullptr});
  } catch (const std::bad_alloc&) {
    thrown = true;
  }
  EXPECT(thrown);
  fake::out_of_memory(0);
  first.forward(engine, nullptr);
  EXPECT(first.has(3));
}

// Poisoned runs and guards go along a stream.
void poisoned_runs_find_nothing() {
  const Stream stream;
  swin::Engine engine = new_engine();
  Caller caller(backend(), 2, 5);
  for (cudaStream_t where : {cudaStream_t(nullptr), stream.handle}) {
    engine.forward(caller.image.get(), {2, 4, 4}, caller.features.get(), caller.logits.get(), {{}, true, nullptr},
                   {.threads = 1, .stream = where});
    EXPECT(caller.has(5));
  }
}

// Work is timed behind an untimed run of itself.
void work_is_timed_behind_itself() {
  const Stream stream;
  const swin::ExecContext context{.threads = 1, .stream = stream.handle};
  double ms = 0;
  const fake::Counts c = counted([&] {
    ms = backend().time_ms(context, [&] {
      for (int i = 0; i < 3; ++i) fake::launch(stream.handle, [] {}, {});
    });
  });
  EXPECT(ms == 3 && c.kernels == 6);
}

// A capture that has failed is no recording that a pass could be part of.
void a_failed_capture_is_said() {
  const Stream stream;
  swin::Engine engine = new_engine();
  Caller caller(backend(), 1, 1);
  EXPECT(cudaStreamBeginCapture(stream.handle, cudaStreamCaptureModeRelaxed) == cudaSuccess);
  cudaDeviceSynchronize();
  std::string error = "no error";
  try {
    caller.forward(engine, stream.handle);
  } catch (const swin::Error& e) {
    error = e.what();
  }
  EXPECT(error.find("the capture that the stream is in has failed before") != std::string::npos);
  cudaGraph_t graph = nullptr;
  EXPECT(cudaStreamEndCapture(stream.handle, &graph) == cudaErrorStreamCaptureInvalidated);
  cudaGetLastError();
  caller.forward(engine, stream.handle);
  EXPECT(caller.has(1));
}

}  // namespace

namespace swin::cuda {
OpTable float16_table() { return stand_ins(); }
OpTable bfloat16_table() { return stand_ins(); }
void require_kernels(int, int) {}
}  // namespace swin::cuda

int main() {
  const std::pair<const char*, void (*)()> tests[] = {
      {"a_callers_recording_takes_a_forward_pass", a_callers_recording_takes_a_forward_pass},  // with capture 0
      {"from_the_second_call_on_a_recording_runs", from_the_second_call_on_a_recording_runs},
      {"a_recording_takes_nothing_of_others", a_recording_takes_nothing_of_others},
      {"a_spoilt_recording_is_made_again", a_spoilt_recording_is_made_again},
      {"recordings_are_given_up", recordings_are_given_up},
      {"recordings_can_be_switched_off", recordings_can_be_switched_off},
      {"threads_do_not_disturb_each_other", threads_do_not_disturb_each_other},
      {"the_memory_of_a_callers_recording_is_its_own", the_memory_of_a_callers_recording_is_its_own},
      {"streams_keep_their_plans", streams_keep_their_plans},
      {"idle_plans_make_room", idle_plans_make_room},
      {"poisoned_runs_find_nothing", poisoned_runs_find_nothing},
      {"work_is_timed_behind_itself", work_is_timed_behind_itself},
      {"a_failed_capture_is_said", a_failed_capture_is_said},
  };
  for (const auto& [name, test] : tests) {
    const int before = g_failures;
    try {
      test();
    } catch (const std::exception& e) {
      std::printf("%s: threw: %s\n", name, e.what());
      ++g_failures;
    }
    g_amid_operations = g_behind_operations = nullptr;
    fake::out_of_memory(0);
    if (g_failures != before) std::printf("%s failed\n", name);
  }
  if (fake::counts().faults != 0) {
    std::printf("%d uses of memory that was freed\n", fake::counts().faults);
    ++g_failures;
  }
  std::printf(g_failures == 0 ? "all passed\n" : "%d failed\n", g_failures);
  return g_failures == 0 ? 0 : 1;
}
