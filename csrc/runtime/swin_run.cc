// swin_run: an engine file's model on images, or on random ones to see how fast it is. Uses swin_int8.h and nothing
// else of the engine.
#include <algorithm>
#include <barrier>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "npy.h"
#include "ppm.h"
#include "swin_int8.h"

namespace {

using swin::runtime::kMostSide;
using swin::runtime::NpyReader;
using swin::runtime::NpyWriter;
using swin::runtime::Photograph;
using swin::runtime::PpmReader;
using Clock = std::chrono::steady_clock;

double seconds_between(Clock::time_point start, Clock::time_point end) {
  return std::chrono::duration<double>(end - start).count();
}

constexpr const char* kUsage = R"(usage: swin_run MODEL [options]

Runs the model of an engine file (pyharness/convert.py to-engine) on the CPU. With --images it classifies; without, it
measures on random images.

  --images FILE      photographs of any size, which the program resizes, crops and normalizes as the engine file says:
                     binary PPM of 8 bits (P6), one image or one after the other, or one of uint8 [height, width,
                     channels] as .npy. Or an .npy file of images that have their size, the model's or another, which
                     are not resized: float32 [n, channels, height, width], normalized as in training, or uint8 [n,
                     height, width, channels], which the program normalizes as the engine file says
  --mean M,M,M --std S,S,S
                     normalize uint8 [n, height, width, channels] with these instead
  --top N            print the N likeliest classes of each image (default 1; 0: none)
  --labels FILE      names of the classes, one a line (default: the engine file's, where it has any)
  --out FILE.npy     write the results, float32 [n, classes]
  --features         pooled features in place of logits
  --batch N          images a call (default 1)
  --img-size HxW     give the model photographs of this size, and random images (default: the model's)
  --threads N        threads a call (default: one for each processor this one may run on)
  --isa NAME         instruction set: amx_int8, avx512_vnni, avx_vnni, avx2, neon_i8mm, neon_dotprod,
                     portable
  --callers N        measure with N callers at a time, each with `--threads` of its own (default 1)
  --seconds S        measure for S seconds (default 3 without --images, 0 with)
  --json             say everything as one JSON object
  --version, --help
)";

struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Arguments {
  std::string model, images, labels, out;
  std::vector<float> mean, std;
  const char* isa = nullptr;
  int top = 1, threads = 0, callers = 1;
  std::int64_t batch = 1, height = 0, width = 0;  // 0: the model's
  double seconds = -1;
  bool features = false, json = false;
};

double number(const std::string& option, const std::string& text, double least, double most) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0' || !(value >= least && value <= most)) {
    throw UsageError(option + " is '" + text + "'; a number from " + std::to_string(static_cast<long long>(least)) +
                     " to " + std::to_string(static_cast<long long>(most)) + " is needed");
  }
  return value;
}

std::int64_t whole(const std::string& option, const std::string& text, double least, double most) {
  const double value = number(option, text, least, most);
  if (value != std::floor(value)) throw UsageError(option + " is '" + text + "'; a whole number is needed");
  return static_cast<std::int64_t>(value);
}

std::vector<float> numbers(const std::string& option, const std::string& text) {
  std::vector<float> all;
  for (std::size_t at = 0; at <= text.size();) {
    const std::size_t comma = std::min(text.find(',', at), text.size());
    all.push_back(static_cast<float>(number(option, text.substr(at, comma - at), -1e6, 1e6)));
    at = comma + 1;
  }
  return all;
}

// "800x1344"
std::pair<std::int64_t, std::int64_t> sides(const std::string& option, const std::string& text) {
  constexpr double kMostSide = 65536;
  const std::size_t cross = text.find('x');
  if (cross == std::string::npos) {
    throw UsageError(option + " is '" + text + "'; height and width are needed, such as 800x1344");
  }
  return {whole(option, text.substr(0, cross), 1, kMostSide), whole(option, text.substr(cross + 1), 1, kMostSide)};
}

Arguments parse(int argc, char** argv) {
  Arguments a;
  const std::map<std::string, std::function<void(const std::string&, char*)>> options = {
      {"--images", [&](const std::string&, char* v) { a.images = v; }},
      {"--labels", [&](const std::string&, char* v) { a.labels = v; }},
      {"--out", [&](const std::string&, char* v) { a.out = v; }},
      {"--isa", [&](const std::string&, char* v) { a.isa = v; }},
      {"--mean", [&](const std::string& o, char* v) { a.mean = numbers(o, v); }},
      {"--std", [&](const std::string& o, char* v) { a.std = numbers(o, v); }},
      {"--top", [&](const std::string& o, char* v) { a.top = static_cast<int>(whole(o, v, 0, 1000)); }},
      {"--batch", [&](const std::string& o, char* v) { a.batch = whole(o, v, 1, 65536); }},
      {"--img-size", [&](const std::string& o, char* v) { std::tie(a.height, a.width) = sides(o, v); }},
      {"--threads", [&](const std::string& o, char* v) { a.threads = static_cast<int>(whole(o, v, 1, 1024)); }},
      {"--callers", [&](const std::string& o, char* v) { a.callers = static_cast<int>(whole(o, v, 1, 1024)); }},
      {"--seconds", [&](const std::string& o, char* v) { a.seconds = number(o, v, 0, 86400); }},
  };
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--help" || word == "-h") {
      std::fputs(kUsage, stdout);
      std::exit(0);
    } else if (word == "--version") {
      std::puts(swin_version());
      std::exit(0);
    } else if (word == "--features") {
      a.features = true;
    } else if (word == "--json") {
      a.json = true;
    } else if (const auto option = options.find(word); option != options.end()) {
      if (++i == argc) throw UsageError(word + " needs a value");
      option->second(word, argv[i]);
    } else if (word.size() > 1 && word[0] == '-') {
      throw UsageError("there is no option " + word);
    } else if (a.model.empty()) {
      a.model = word;
    } else {
      throw UsageError("'" + word + "' is left over; one engine file is needed");
    }
  }
  if (a.model.empty()) throw UsageError("no engine file was given");
  if (a.mean.empty() != a.std.empty()) throw UsageError("--mean and --std go together");
  if (a.images.empty() && !(a.out.empty() && a.labels.empty() && a.mean.empty())) {
    throw UsageError("--out, --labels, --mean and --std are of images, and there is no --images");
  }
  if (a.seconds < 0) a.seconds = a.images.empty() ? 3 : 0;
  if (a.images.empty() && a.seconds == 0) throw UsageError("--seconds 0 without --images leaves nothing to do");
  return a;
}

void need(swin_status status) {
  if (status != SWIN_OK) throw std::runtime_error(swin_last_error());
}

class Model {
 public:
  explicit Model(const Arguments& a) : features_(a.features) {
    swin_options options{};
    options.struct_size = sizeof options;
    options.threads = a.threads;
    options.isa = a.isa;
    const Clock::time_point start = Clock::now();
    need(swin_load(a.model.c_str(), &options, &model_));
    load_ms_ = 1000 * seconds_between(start, Clock::now());
    info_.struct_size = sizeof info_;
    need(swin_get_info(model_, &info_));
    if (a.height > 0) set_size(a.height, a.width);
  }
  ~Model() { swin_free(model_); }
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  // From now on images are of this size.
  void set_size(std::int64_t height, std::int64_t width) {
    swin_model* other = nullptr;
    need(swin_at_size(model_, height, width, &other));
    swin_free(std::exchange(model_, other));
    need(swin_get_info(model_, &info_));
  }

  const swin_info& info() const { return info_; }
  double load_ms() const { return load_ms_; }
  std::int64_t outputs() const { return features_ ? info_.features : info_.outputs; }
  bool gives_logits() const { return !features_ && info_.classes > 0; }
  std::int64_t image_size() const { return info_.channels * info_.height * info_.width; }
  void run(const float* images, std::int64_t batch, float* out) {
    need((features_ ? swin_features : swin_forward)(model_, images, batch, out, nullptr));
  }
  void normalize(const std::uint8_t* pixels, std::int64_t batch, const Arguments& a, float* images) {
    need(swin_normalize(model_, pixels, batch, a.mean.empty() ? nullptr : a.mean.data(),
                        a.std.empty() ? nullptr : a.std.data(), images));
  }
  void prepare(const Photograph& image, float* out) {
    need(swin_prepare(model_, image.pixels.data(), image.height, image.width, 0, out));
  }

 private:
  const bool features_;
  swin_model* model_ = nullptr;
  swin_info info_{};
  double load_ms_ = 0;
};

// Text as JSON has it.
std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const unsigned char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += static_cast<char>(c);
    } else if (c < 0x20) {
      char escaped[8];
      std::snprintf(escaped, sizeof escaped, "\\u%04x", c);
      out += escaped;
    } else {
      out += static_cast<char>(c);
    }
  }
  return out + "\"";
}

std::vector<std::string> read_labels(const std::string& path, const swin_info& info) {
  const std::int64_t classes = info.classes;
  if (path.empty() && info.class_names != nullptr) return {info.class_names, info.class_names + classes};
  std::vector<std::string> labels;
  if (path.empty()) return labels;
  std::ifstream file(path);
  if (!file) throw std::runtime_error(path + ": cannot be read");
  for (std::string line; std::getline(file, line);) {
    if (!line.empty() && line.back() == '\r') line.pop_back();
    labels.push_back(line);
  }
  if (static_cast<std::int64_t>(labels.size()) != classes) {
    throw std::runtime_error(path + ": has " + std::to_string(labels.size()) + " lines, and the model " +
                             std::to_string(classes) + " classes");
  }
  return labels;
}

struct Guess {
  std::int64_t label;
  double probability;
};

// The `top` likeliest classes of one image, the first of equal ones first.
std::vector<Guess> guesses_of(const float* logits, std::int64_t classes, int top) {
  std::vector<Guess> all(classes);
  const float largest = *std::max_element(logits, logits + classes);
  double sum = 0;
  for (std::int64_t i = 0; i < classes; ++i) sum += (all[i] = {i, std::exp(double(logits[i]) - largest)}).probability;
  top = static_cast<int>(std::min<std::int64_t>(top, classes));
  std::partial_sort(all.begin(), all.begin() + top, all.end(), [](const Guess& a, const Guess& b) {
    return a.probability > b.probability || (a.probability == b.probability && a.label < b.label);
  });
  all.resize(top);
  for (Guess& guess : all) guess.probability /= sum;
  return all;
}

// The images of a file, as the model takes them.
class Images {
 public:
  virtual ~Images() = default;
  // At most how many there are; nothing where that is not known.
  virtual std::optional<std::int64_t> count() const = 0;
  // The next ones, no more than `most`, into [n, channels, height, width]; n, 0 at the end.
  virtual std::int64_t read(float* images, std::int64_t most) = 0;
};

// An array [n, ...], of the model's size or another, which the model is set to.
class ArrayImages : public Images {
 public:
  ArrayImages(Model& model, const Arguments& a, NpyReader file) : model_(model), a_(a), file_(std::move(file)) {
    if (a.height > 0) throw UsageError("--img-size is of random images and photographs; these have their own size");
    take_size();
    const std::int64_t channels = model.info().channels;
    if (file_.is_u8() && !a.mean.empty() && static_cast<std::int64_t>(a.mean.size()) != channels) {
      throw UsageError("--mean and --std have " + std::to_string(a.mean.size()) + " and " +
                       std::to_string(a.std.size()) + " numbers; " + std::to_string(channels) +
                       " are needed, one per channel");
    }
    if (!file_.is_u8() && !a.mean.empty()) throw UsageError("--mean and --std are of uint8 images; these are float32");
  }

  std::optional<std::int64_t> count() const override { return file_.shape()[0]; }
  std::int64_t read(float* images, std::int64_t most) override {
    const std::int64_t n = std::min(most, file_.shape()[0] - done_), values = n * model_.image_size();
    if (file_.is_u8()) {
      pixels_.resize(values);
      file_.read(pixels_.data(), values);
      if (n > 0) model_.normalize(pixels_.data(), n, a_, images);
    } else {
      file_.read(images, values);
    }
    done_ += n;
    return n;
  }

 private:
  void take_size() {
    const std::vector<std::int64_t>& s = file_.shape();
    const swin_info& i = model_.info();
    const std::size_t channels = file_.is_u8() ? 3 : 1, height = file_.is_u8() ? 1 : 2;
    const bool fits = s.size() == 4 && s[0] > 0 && s[channels] == i.channels;
    if (fits && s[height] == i.height && s[height + 1] == i.width) return;
    try {
      if (fits) return model_.set_size(s[height], s[height + 1]);
    } catch (const std::runtime_error& e) {
      throw std::runtime_error(a_.images + ": " + e.what());
    }
    const std::string c = std::to_string(i.channels);
    const std::string needed = file_.is_u8() ? "height, width, " + c : c + ", height, width";
    throw std::runtime_error(a_.images + ": holds " + file_.describe() + "; [n, " + needed + "] is needed by " +
                             i.name + (file_.is_u8() ? ", or a photograph's [" + needed + "]" : ""));
  }

  Model& model_;
  const Arguments& a_;
  NpyReader file_;
  std::vector<std::uint8_t> pixels_;
  std::int64_t done_ = 0;
};

// Photographs of any size, which are prepared as the engine file says.
class Photographs : public Images {
 public:
  using Next = std::function<bool(Photograph&)>;

  Photographs(Model& model, const Arguments& a, Next next) : model_(model), a_(a), next_(std::move(next)) {
    if (!a.mean.empty()) {
      throw UsageError(
          "--mean and --std are of uint8 images [n, ...]; photographs are prepared as the engine file says");
    }
  }

  std::optional<std::int64_t> count() const override { return {}; }
  std::int64_t read(float* images, std::int64_t most) override {
    std::int64_t n = 0;
    for (; n < most && next_(image_); ++n) {
      const std::int64_t channels = model_.info().channels;
      if (image_.channels != channels) {
        throw std::runtime_error(a_.images + ": has images of " + std::to_string(image_.channels) + " channels; " +
                                 model_.info().name + " takes " + std::to_string(channels));
      }
      try {
        model_.prepare(image_, images + n * model_.image_size());
      } catch (const std::runtime_error& e) {
        throw std::runtime_error(a_.images + ": " + e.what());
      }
    }
    return n;
  }

 private:
  Model& model_;
  const Arguments& a_;
  Next next_;
  Photograph image_;
};

// The one photograph of an array [height, width, channels].
Photographs::Next only(NpyReader file, const std::string& path) {
  const std::vector<std::int64_t>& s = file.shape();
  const bool fits = std::all_of(s.begin(), s.end(), [](std::int64_t side) { return side >= 1 && side <= kMostSide; });
  if (!fits) {
    throw std::runtime_error(path + ": holds " + file.describe() + "; sides of 1 to " + std::to_string(kMostSide) +
                             " are needed");
  }
  auto once = std::make_shared<std::optional<NpyReader>>(std::move(file));
  return [once](Photograph& image) {
    if (!*once) return false;
    const std::vector<std::int64_t>& shape = (*once)->shape();
    image = {shape[0], shape[1], shape[2], {}};
    for (std::int64_t y = 0; y < image.height; ++y) {  // a file that is cut off takes no more memory than it has bytes
      const std::int64_t row = image.width * image.channels;
      image.pixels.resize((y + 1) * row);
      (*once)->read(image.pixels.data() + y * row, row);
    }
    once->reset();
    return true;
  };
}

std::unique_ptr<Images> open_images(Model& model, const Arguments& a) {
  swin::runtime::File file = swin::runtime::open_file(a.images);
  const int first = std::fgetc(file.get());
  std::ungetc(first, file.get());
  if (first == 'P') {
    auto reader = std::make_shared<PpmReader>(a.images, std::move(file));
    return std::make_unique<Photographs>(model, a, [reader](Photograph& image) { return reader->read(image); });
  }
  NpyReader array(a.images, std::move(file));
  if (array.is_u8() && array.shape().size() == 3) {
    return std::make_unique<Photographs>(model, a, only(std::move(array), a.images));
  }
  return std::make_unique<ArrayImages>(model, a, std::move(array));
}

// Every image of the file: prints or, as JSON, appends its likeliest classes; writes all results.
void classify(Model& model, const Arguments& a, std::string& json) {
  const std::unique_ptr<Images> file = open_images(model, a);
  const int top = model.gives_logits() ? a.top : 0;
  const std::vector<std::string> labels = read_labels(a.labels, model.info());
  const std::int64_t batch = std::min(a.batch, file->count().value_or(a.batch));
  std::vector<float> images(batch * model.image_size()), out(batch * model.outputs());
  std::unique_ptr<NpyWriter> writer;
  if (!a.out.empty()) writer = std::make_unique<NpyWriter>(a.out, model.outputs());
  json += ", \"images\": [";
  std::int64_t first = 0;
  while (const std::int64_t n = file->read(images.data(), batch)) {
    model.run(images.data(), n, out.data());
    if (writer) writer->write(out.data(), n);
    for (std::int64_t i = 0; i < n && top > 0; ++i) {
      std::string line = std::to_string(first + i), list;
      for (const Guess& g : guesses_of(out.data() + i * model.outputs(), model.outputs(), top)) {
        char text[64];
        std::snprintf(text, sizeof text, "  %lld %.4f", static_cast<long long>(g.label), g.probability);
        line += text + (labels.empty() ? "" : " " + labels[g.label]);
        std::snprintf(text, sizeof text, "{\"class\": %lld, \"probability\": %.6g", static_cast<long long>(g.label),
                      g.probability);
        list += (list.empty() ? "" : ", ") + std::string(text) +
                (labels.empty() ? "" : ", \"label\": " + quoted(labels[g.label])) + "}";
      }
      if (!a.json) std::puts(line.c_str());
      json += (first + i > 0 ? ", [" : "[") + list + "]";
    }
    first += n;
  }
  json += "]";
  if (writer) writer->finish();
}

struct Timing {
  double median, p10, p90;  // milliseconds of a call
  std::size_t calls;
  double images_per_s;  // of all callers together
};

// `callers` threads call on random images for so many seconds, after calls that are not counted: the first of a batch
// size makes its plan.
Timing measure(Model& model, const Arguments& a) {
  constexpr int kWarmUp = 3;
  std::vector<std::vector<double>> ms(a.callers);
  std::vector<std::exception_ptr> errors(a.callers);
  std::barrier warm(a.callers);
  Clock::time_point begin{};  // written by the first caller, read by it alone
  const auto call = [&](int caller) {
    std::mt19937 random(caller);
    std::normal_distribution<float> normal;
    std::vector<float> images(a.batch * model.image_size()), out(a.batch * model.outputs());
    for (float& x : images) x = normal(random);
    for (int i = 0; i < kWarmUp; ++i) model.run(images.data(), a.batch, out.data());
    warm.arrive_and_wait();
    const Clock::time_point first = Clock::now();
    if (caller == 0) begin = first;
    for (Clock::time_point start = first, end = first; ms[caller].empty() || seconds_between(first, end) < a.seconds;
         start = end) {
      model.run(images.data(), a.batch, out.data());
      end = Clock::now();
      ms[caller].push_back(1000 * seconds_between(start, end));
    }
  };
  std::vector<std::thread> others;
  const auto guarded = [&](int caller) {
    try {
      call(caller);
    } catch (...) {
      errors[caller] = std::current_exception();
      warm.arrive_and_drop();
    }
  };
  try {
    while (static_cast<int>(others.size()) + 1 < a.callers)
      others.emplace_back(guarded, static_cast<int>(others.size()) + 1);
  } catch (const std::system_error& error) {
    for (int i = static_cast<int>(others.size()) + 1; i < a.callers; ++i) warm.arrive_and_drop();
    errors.back() = std::make_exception_ptr(
        std::runtime_error("only " + std::to_string(others.size() + 1) + " of " + std::to_string(a.callers) +
                           " callers could be started (" + error.what() + "); give fewer with --callers"));
  }
  guarded(0);
  for (std::thread& thread : others) thread.join();
  const double elapsed = seconds_between(begin, Clock::now());
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
  std::vector<double> all;
  for (const std::vector<double>& mine : ms) all.insert(all.end(), mine.begin(), mine.end());
  std::sort(all.begin(), all.end());
  const auto at = [&](double share) { return all[static_cast<std::size_t>(std::lround(share * (all.size() - 1)))]; };
  return {at(0.5), at(0.1), at(0.9), all.size(), all.size() * a.batch / elapsed};
}

// The most memory that this program held. Not getrusage's, which begins with what the process held that started it.
double peak_megabytes() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind("VmHWM:", 0) == 0) return std::strtod(line.c_str() + 6, nullptr) * 1024 / 1e6;  // it counts in KiB
  }
  return 0;
}

int run(const Arguments& a) {
  Model model(a);
  const swin_info& i = model.info();
  const std::string output = std::to_string(model.outputs()) + (model.gives_logits() ? " classes" : " features");
  char text[256];
  std::string json = "{\"version\": " + quoted(swin_version()) + ", \"model\": " + quoted(i.name) +
                     ", \"graph\": " + quoted(i.graph) + ", \"device\": " + quoted(i.device) +
                     ", \"isa\": " + quoted(i.isa);
  std::snprintf(text, sizeof text, ", \"threads\": %d, \"batch\": %lld, \"load_ms\": %.3f", i.threads,
                static_cast<long long>(a.batch), model.load_ms());
  json += text;
  if (a.images.empty()) {
    json += ", \"image\": [" + std::to_string(i.channels) + ", " + std::to_string(i.height) + ", " +
            std::to_string(i.width) + "]";
  }
  if (!a.json && a.images.empty()) {
    std::printf("model    %s, %s, %lld x %lld x %lld -> %s\n", i.name, i.graph, static_cast<long long>(i.channels),
                static_cast<long long>(i.height), static_cast<long long>(i.width), output.c_str());
    std::printf("engine   %s, %s %s, %d thread%s; loaded in %.0f ms\n", swin_version(), i.device, i.isa, i.threads,
                i.threads == 1 ? "" : "s", model.load_ms());
  }
  if (!a.images.empty()) classify(model, a, json);
  if (a.seconds > 0) {
    const Timing t = measure(model, a);
    std::snprintf(text, sizeof text,
                  ", \"callers\": %d, \"latency_ms\": {\"median\": %.4f, \"p10\": %.4f, \"p90\": %.4f, \"runs\": %zu}, "
                  "\"images_per_s\": %.2f",
                  a.callers, t.median, t.p10, t.p90, t.calls, t.images_per_s);
    json += text;
    if (!a.json) {
      std::printf("latency  %.3f ms a batch of %lld (p10 %.3f, p90 %.3f, %zu calls)\n", t.median,
                  static_cast<long long>(a.batch), t.p10, t.p90, t.calls);
      std::printf("images   %.1f a second, of %d caller%s\n", t.images_per_s, a.callers, a.callers == 1 ? "" : "s");
    }
  }
  std::snprintf(text, sizeof text, ", \"peak_mb\": %.1f}", peak_megabytes());
  json += text;
  if (a.json) {
    std::puts(json.c_str());
  } else if (a.images.empty()) {
    std::printf("memory   %.0f MB at most, of the whole process\n", peak_megabytes());
  }
  if (std::fflush(stdout) != 0) throw std::runtime_error("standard output cannot be written");
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(parse(argc, argv));
  } catch (const UsageError& e) {
    std::fprintf(stderr, "error: %s. `swin_run --help` lists the options.\n", e.what());
    return 2;
  } catch (const std::bad_alloc&) {
    std::fputs("error: there is not enough memory; use a smaller --batch\n", stderr);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
  }
  return 1;
}
