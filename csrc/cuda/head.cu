// head: out = features @ weight^T + bias in float32. features f32 [B, C], weight T [K, C], bias T [K] -> out f32 [B,
// K].
//
// Layout: a warp computes 4 images x 4 classes, its lanes sharing C in chunks of 8 (16 bytes of weights), then adds up
// the lanes. The warps of a block take neighbouring images and the same classes, so weights come from L1 after the
// first. Floor: 2*K*C bytes of weights (1.5 MB for Swin-T), which is what batch 1 waits for; at batch 128 0.2 Gop of
// multiply-adds, a few microseconds. Tiles in shared memory would take half of that and leave batch 1 to a few blocks.
#include "device.cuh"
#include "kernels.h"

namespace swin::cuda {
namespace {

constexpr int kHeadThreads = 128;
constexpr int kHeadTile = 4;

// V features: float32, so two 16-byte loads for 8.
template <int V>
__device__ __forceinline__ void load_features(const float* source, float (&x)[V]) {
  if constexpr (V == 1) {
    x[0] = *source;
  } else {
#pragma unroll
    for (int i = 0; i < V / 4; ++i) {
      const Words4 words = load_words(source + 4 * i);
#pragma unroll
      for (int j = 0; j < 4; ++j) x[4 * i + j] = __uint_as_float(words.word[j]);
    }
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kHeadThreads, 1)
    head_kernel(const float* __restrict__ features, const T* __restrict__ weight, const T* __restrict__ bias,
                float* __restrict__ out, const FastDiv image_tiles, const unsigned items, const int batch,
                const int classes, const std::int64_t c) {
  unsigned tile = blockIdx.x * (kHeadThreads / kWarp) + threadIdx.x / kWarp;
  if (tile >= items) return;  // a whole warp
  const int first_class = static_cast<int>(image_tiles.split(tile)) * kHeadTile,
            first_image = static_cast<int>(tile) * kHeadTile;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  float sums[kHeadTile][kHeadTile] = {};  // [image][class]
  for (std::int64_t i = lane * V; i < c; i += kWarp * V) {
    float x[kHeadTile][V], w[kHeadTile][V];
#pragma unroll
    for (int j = 0; j < kHeadTile; ++j) {  // past the end: the last one again, not stored
      load_features(features + min(first_image + j, batch - 1) * c + i, x[j]);
      load_floats(weight + min(first_class + j, classes - 1) * c + i, w[j]);
    }
#pragma unroll
    for (int b = 0; b < kHeadTile; ++b) {
#pragma unroll
      for (int k = 0; k < kHeadTile; ++k) {
#pragma unroll
        for (int v = 0; v < V; ++v) sums[b][k] += x[b][v] * w[k][v];
      }
    }
  }
#pragma unroll
  for (int b = 0; b < kHeadTile; ++b) {
#pragma unroll
    for (int k = 0; k < kHeadTile; ++k) {
      const float sum = sum_over<kWarp>(sums[b][k]);
      const int image = first_image + b, index = first_class + k;
      if (lane == b * kHeadTile + k && image < batch && index < classes) {
        out[static_cast<std::int64_t>(image) * classes + index] = sum + to_float(bias[index]);
      }
    }
  }
}

}  // namespace

template <class T>
void head(const HeadArgs& args, const ExecContext& context) {
  const std::int64_t batch = args.features.dim(0), c = args.features.dim(1), classes = args.weight.dim(0);
  const std::int64_t image_tiles = ceil_div(batch, kHeadTile);
  const unsigned items = count32("head", "warps", image_tiles * ceil_div(classes, kHeadTile));
  const unsigned blocks = static_cast<unsigned>(ceil_div(items, kHeadThreads / kWarp));
  const float* features = args.features.as<const float>();
  const T *weight = args.weight.as<const T>(), *bias = args.bias.as<const T>();
  if (c % 8 == 0 && is_aligned(features, 16) && is_aligned(weight, 16)) {
    SWIN_LAUNCH("head", (head_kernel<T, 8>), blocks, kHeadThreads, 0, context.stream, features, weight, bias,
                args.out.as<float>(), FastDiv(image_tiles), items, static_cast<int>(batch), static_cast<int>(classes),
                c);
  } else {
    SWIN_LAUNCH("head", (head_kernel<T, 1>), blocks, kHeadThreads, 0, context.stream, features, weight, bias,
                args.out.as<float>(), FastDiv(image_tiles), items, static_cast<int>(batch), static_cast<int>(classes),
                c);
  }
}

SWIN_INSTANTIATE(head, HeadArgs)

}  // namespace swin::cuda
