// patch_embed: the patch embedding's convolution (kernel and stride p) as a float32 GEMM over gathered patches.
// image f32 [B, in_chans, H*p, W*p], weight f32 [C, in_chans*p*p] -> out f32 [B*H*W, C]. Formula: swin/ops.h.
#include "kernels.h"
#include "simd.h"

namespace swin::cpu::SWIN_ISA {
namespace {

// Patches times vectors of channels that fill the registers with accumulators.
#if defined(SWIN_MASKED_LANES)
constexpr int kRows = 8, kVectors = 3;
#elif defined(__AVX2__)
constexpr int kRows = 6, kVectors = 2;
#else
constexpr int kRows = 4, kVectors = 1;
#endif

// out[r, i ...] = patches[r, :] @ weight_t[:, i ...] for V vectors of channels, of which the last has `lanes`; weight_t is
// [k, c_padded], c_padded a multiple of kLanes.
template <int R, int V>
inline void multiply_columns(const float* patches, const float* weight_t, std::int64_t k, std::int64_t c_padded, float* out,
                             std::int64_t c, std::int64_t i) {
  Vf acc[R][V] = {};
  for (std::int64_t j = 0; j < k; ++j) {
    Vf w[V];
    for (int v = 0; v < V; ++v) w[v] = load(weight_t + j * c_padded + i + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vf x = splat(patches[r * k + j]);
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) acc[r][v] += x * w[v];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      store(out + r * c + i + v * kLanes, acc[r][v], min_of(kLanes, c - i - v * kLanes));
    }
  }
}

template <int R>
void multiply(const float* patches, const float* weight_t, std::int64_t k, std::int64_t c_padded, float* out,
              std::int64_t c) {
  std::int64_t i = 0;
  for (; i + kVectors * kLanes <= c_padded; i += kVectors * kLanes) {
    multiply_columns<R, kVectors>(patches, weight_t, k, c_padded, out, c, i);
  }
  for (; i < c_padded; i += kLanes) multiply_columns<R, 1>(patches, weight_t, k, c_padded, out, c, i);
}

template <int R = kRows>
void dispatch(std::int64_t rows, const float* patches, const float* weight_t, std::int64_t k, std::int64_t c_padded,
              float* out, std::int64_t c) {
  if (rows == R) {
    multiply<R>(patches, weight_t, k, c_padded, out, c);
  } else if constexpr (R > 1) {
    dispatch<R - 1>(rows, patches, weight_t, k, c_padded, out, c);
  }
}

// One patch's lines one after the other; a patch of four columns, as all Swins have, in copies of known size.
inline void gather_patch(const float* corner, std::int64_t chans, std::int64_t p, std::int64_t height, std::int64_t width,
                         float* patch) {
  for (std::int64_t chan = 0; chan < chans; ++chan) {
    for (std::int64_t line = 0; line < p; ++line, patch += p) {
      const float* source = corner + (chan * height + line) * width;
      if (p == 4) {
        std::memcpy(patch, source, 4 * sizeof(float));
      } else {
        for (std::int64_t i = 0; i < p; ++i) patch[i] = source[i];
      }
    }
  }
}

// The first of `images` images of `pixels` values that holds NaN or infinity, or -1. Those have all exponent bits set.
std::int64_t first_not_finite(const float* image, std::int64_t images, std::int64_t pixels) {
  for (std::int64_t b = 0; b < images; ++b) {
    Vi bad{};
    for_lanes(pixels, [&](std::int64_t i, std::int64_t n) {
      bad |= (bits_of(load(image + b * pixels + i, n)) & 0x7f800000) == 0x7f800000;
    });
    if (sum_of(__builtin_convertvector(bad, Vf)) != 0.0f) return b;
  }
  return -1;
}

}  // namespace

void patch_embed(const PatchEmbedArgs& args, const ExecContext& context) {
  const std::int64_t chans = args.image.dim(1), height = args.image.dim(2), width = args.image.dim(3);
  const std::int64_t p = args.patch_size, w_patches = width / p, per_image = (height / p) * w_patches;
  const std::int64_t k = chans * p * p, c = args.out.dim(1), c_padded = ceil_div(c, kLanes) * kLanes;
  const float* image = args.image.as<const float>();
  const std::int64_t bad = first_not_finite(image, args.image.dim(0), chans * height * width);
  if (bad >= 0) refuse_image(bad);
  parallel_rows(context, args.out.dim(0), 64, [&](std::int64_t first, std::int64_t last) {
    float* weight_t = static_cast<float*>(thread_scratch((k * c_padded + kRows * k) * sizeof(float)));
    float* patches = weight_t + k * c_padded;
    std::memset(weight_t, 0, k * c_padded * sizeof(float));
    for (std::int64_t i = 0; i < c; ++i) {
      for (std::int64_t j = 0; j < k; ++j) weight_t[j * c_padded + i] = args.weight.as<const float>()[i * k + j];
    }
    for (std::int64_t row = first; row < last; row += kRows) {
      const std::int64_t rows = min_of(kRows, last - row);
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t b = (row + r) / per_image, y = (row + r) % per_image / w_patches, x = (row + r) % w_patches;
        gather_patch(image + (b * chans * height + y * p) * width + x * p, chans, p, height, width, patches + r * k);
      }
      dispatch(rows, patches, weight_t, k, c_padded, args.out.as<float>() + row * c, c);
    }
  });
}

}  // namespace swin::cpu::SWIN_ISA
