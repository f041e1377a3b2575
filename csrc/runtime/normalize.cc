#include "normalize.h"

#include <algorithm>
#include <vector>

#include "thread_pool.h"

namespace swin::runtime {
namespace {

constexpr std::int64_t kValues = 256;  // of a pixel's channel
constexpr std::int64_t kRows = 16;     // of one image, a task

struct Job {
  const std::uint8_t* pixels;
  std::int64_t height, width, channels;
  const float* table;  // [channels, 256]
  float* images;
  std::int64_t tasks_an_image;
};

void normalize_rows(const Job& job, std::int64_t task) {
  const std::int64_t image = task / job.tasks_an_image, plane = job.height * job.width;
  const std::int64_t first = task % job.tasks_an_image * kRows * job.width;
  const std::int64_t last = std::min(first + kRows * job.width, plane);
  const std::uint8_t* pixels = job.pixels + image * plane * job.channels;
  for (std::int64_t c = 0; c < job.channels; ++c) {
    const float* table = job.table + c * kValues;
    float* out = job.images + (image * job.channels + c) * plane;
    for (std::int64_t i = first; i < last; ++i) out[i] = table[pixels[i * job.channels + c]];
  }
}

}  // namespace

void normalize(const std::uint8_t* pixels, std::int64_t batch, std::int64_t height, std::int64_t width,
               std::int64_t channels, const float* mean, const float* std, float* images, int threads) {
  std::vector<float> table(channels * kValues);
  for (std::int64_t c = 0; c < channels; ++c) {
    for (std::int64_t v = 0; v < kValues; ++v) {
      table[c * kValues + v] = (static_cast<float>(v) / 255.0f - mean[c]) / std[c];
    }
  }
  Job job{pixels, height, width, channels, table.data(), images, (height + kRows - 1) / kRows};
  cpu::run_tasks(
      threads, batch * job.tasks_an_image,
      [](void* closure, std::int64_t task) { normalize_rows(*static_cast<const Job*>(closure), task); }, &job);
}

}  // namespace swin::runtime
