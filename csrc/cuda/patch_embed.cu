// patch_embed: the patch embedding's convolution (kernel and stride p) as a float32 GEMM over gathered patches.
// image f32 [B, in_chans, H*p, W*p], weight T [C, in_chans*p*p] -> out T [B*H*W, C]. Formula: swin/ops.h.
//
// An image with NaN or infinity is not refused here, as it is on the CPU: that needs an answer from the device, and an
// op does not wait for one. It ends as NaN features or as zeros, see docs/troubleshooting.md.
//
// Layout: a block computes 128 patches x 32 channels, a thread 8 x 4; 16 values of k at a time in shared memory, both
// operands with k as the slow index so that a thread's 8 and 4 are 16-byte reads. For p = 4 a lane copies 16 bytes, one
// patch's part of one image line, neighbours taking neighbouring patches. Blocks of one patch tile and different
// channels are neighbours, so that the image comes from L2 after the first. float32 multiply-adds, no tensor cores:
// images are not rounded, and this is about 1 % of a forward pass. Floor: 4 bytes a pixel read, 2 bytes a value
// written; 2*k operations a value (k = 48: 154 MB and 3.7 Gop for batch 128 of 224 x 224 and C = 96, so the arithmetic
// is the larger term). Not timed yet.
#include "device.cuh"
#include "kernels.h"

namespace swin::cuda {
namespace {

constexpr int kEmbedThreads = 128;
constexpr int kPatches = 128;  // of a block
constexpr int kChannels = 32;
constexpr int kSlab = 16;  // values of k in shared memory at a time

struct PatchShape {
  FastDiv patches_x, patches_y, channel_tiles, p;
  unsigned rows;  // B*H*W
  int chans, k, c;
  std::int64_t height, width;  // of the image, in pixels
};

// Where a patch begins in the image.
__device__ __forceinline__ std::int64_t patch_origin(const PatchShape& shape, unsigned row) {
  const std::int64_t p = shape.p.divisor();
  unsigned x = row;
  unsigned y = shape.patches_x.split(x);
  const std::int64_t b = shape.patches_y.split(y);
  return (b * shape.chans * shape.height + y * p) * shape.width + x * p;
}

template <class T, bool kPatch4>
__global__ void __launch_bounds__(kEmbedThreads)
    patch_embed_kernel(const PatchShape shape, const float* __restrict__ image, const T* __restrict__ weight,
                       T* __restrict__ out, const bool wide_stores) {
  __shared__ __align__(16) float patches[kSlab][kPatches];
  __shared__ __align__(16) float weights[kSlab][kChannels + 4];  // 16-byte rows, and banks that differ with k
  const int thread = static_cast<int>(threadIdx.x);
  unsigned channel_tile = blockIdx.x;
  const unsigned patch_tile = shape.channel_tiles.split(channel_tile);
  const unsigned first_row = patch_tile * kPatches;
  const int first_channel = static_cast<int>(channel_tile) * kChannels;

  // One patch a thread while copying.
  const bool copies = first_row + thread < shape.rows;
  const std::int64_t origin = patch_origin(shape, copies ? first_row + thread : shape.rows - 1);
  // 8 patches and 4 channels while multiplying.
  const int my_patch = thread / 8 * 8, my_channel = thread % 8 * 4;
  float acc[8][4] = {};

  for (int slab = 0; slab < shape.k; slab += kSlab) {
    if constexpr (kPatch4) {  // kSlab values of k are one colour of the 4x4 patch
      const float* source = image + origin + slab / kSlab * shape.height * shape.width;
#pragma unroll
      for (int line = 0; line < 4; ++line) {
        const float4 four = copies ? *reinterpret_cast<const float4*>(source + line * shape.width) : float4{0, 0, 0, 0};
        patches[4 * line][thread] = four.x;
        patches[4 * line + 1][thread] = four.y;
        patches[4 * line + 2][thread] = four.z;
        patches[4 * line + 3][thread] = four.w;
      }
    } else {
#pragma unroll 4
      for (int i = 0; i < kSlab; ++i) {
        unsigned dx = static_cast<unsigned>(slab + i);
        float value = 0.0f;
        if (copies && slab + i < shape.k) {
          unsigned dy = shape.p.split(dx);
          const std::int64_t channel = shape.p.split(dy);
          value = image[origin + (channel * shape.height + dy) * shape.width + dx];
        }
        patches[i][thread] = value;
      }
    }
#pragma unroll
    for (int i = 0; i < kSlab * kChannels / kEmbedThreads; ++i) {
      const int channel = thread / kSlab + i * (kEmbedThreads / kSlab), k = thread % kSlab;
      float value = 0.0f;
      if (first_channel + channel < shape.c && slab + k < shape.k) {
        value = to_float(weight[static_cast<std::int64_t>(first_channel + channel) * shape.k + slab + k]);
      }
      weights[k][channel] = value;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kSlab; ++k) {
      const float4 low = *reinterpret_cast<const float4*>(&patches[k][my_patch]);
      const float4 high = *reinterpret_cast<const float4*>(&patches[k][my_patch + 4]);
      const float4 w = *reinterpret_cast<const float4*>(&weights[k][my_channel]);
      const float x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        acc[i][0] += x[i] * w.x;
        acc[i][1] += x[i] * w.y;
        acc[i][2] += x[i] * w.z;
        acc[i][3] += x[i] * w.w;
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const unsigned row = first_row + my_patch + i;
    const int channel = first_channel + my_channel;
    if (row >= shape.rows) break;
    T* target = out + static_cast<std::int64_t>(row) * shape.c + channel;
    if (wide_stores) {  // C is a multiple of 4
      if (channel < shape.c) {
        *reinterpret_cast<uint2*>(target) = uint2{pack<T>(acc[i][0], acc[i][1]), pack<T>(acc[i][2], acc[i][3])};
      }
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (channel + j < shape.c) target[j] = from_float<T>(acc[i][j]);
      }
    }
  }
}

}  // namespace

template <class T>
void patch_embed(const PatchEmbedArgs& args, const ExecContext& context) {
  const std::int64_t p = args.patch_size, chans = args.image.dim(1), height = args.image.dim(2),
                     width = args.image.dim(3);
  const std::int64_t c = args.out.dim(1), rows = args.out.dim(0), tiles = ceil_div(c, kChannels);
  const PatchShape shape{FastDiv(width / p),
                         FastDiv(height / p),
                         FastDiv(tiles),
                         FastDiv(p),
                         count32("patch_embed", "patches", rows),
                         static_cast<int>(chans),
                         static_cast<int>(count32("patch_embed", "values of a patch", chans * p * p)),
                         static_cast<int>(count32("patch_embed", "channels", c)),
                         height,
                         width};
  const unsigned blocks = count32("patch_embed", "blocks", ceil_div(rows, kPatches) * tiles);
  const bool wide_stores = c % 4 == 0 && is_aligned(args.out.data, 8);
  if (p == 4 && is_aligned(args.image.data, 16)) {
    SWIN_LAUNCH("patch_embed", (patch_embed_kernel<T, true>), blocks, kEmbedThreads, 0, context.stream, shape,
                args.image.as<const float>(), args.weight.as<const T>(), args.out.as<T>(), wide_stores);
  } else {
    SWIN_LAUNCH("patch_embed", (patch_embed_kernel<T, false>), blocks, kEmbedThreads, 0, context.stream, shape,
                args.image.as<const float>(), args.weight.as<const T>(), args.out.as<T>(), wide_stores);
  }
}

SWIN_INSTANTIATE(patch_embed, PatchEmbedArgs)

}  // namespace swin::cuda
