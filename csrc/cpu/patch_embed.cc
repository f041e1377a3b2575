// patch_embed: the patch embedding's convolution (kernel and stride p) as a float32 GEMM over gathered patches.
// image f32 [B, in_chans, H*p, W*p], weight f32 [C, in_chans*p*p] -> out f32 [B*H*W, C]. Formula: swin/ops.h.
#include "kernels.h"
#include "simd.h"

namespace swin::cpu::SWIN_ISA {
namespace {

constexpr int kRows = 4;  // patches that share one pass over the weights

// out[r, :] = patches[r, :] @ weight_t for `rows` patches of k values; weight_t is [k, c], c a multiple of kLanes.
template <int Rows>
void multiply(const float* patches, const float* weight_t, std::int64_t k, std::int64_t c_padded, float* out,
              std::int64_t c) {
  for_lanes(c, [&](std::int64_t i, std::int64_t n) {
    Vf acc[Rows] = {};
    for (std::int64_t j = 0; j < k; ++j) {
      const Vf w = load(weight_t + j * c_padded + i);
      for (int r = 0; r < Rows; ++r) acc[r] += patches[r * k + j] * w;
    }
    for (int r = 0; r < Rows; ++r) store(out + r * c + i, acc[r], n);
  });
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
        for (std::int64_t line = 0; line < chans * p; ++line) {
          const float* source = image + ((b * chans + line / p) * height + y * p + line % p) * width + x * p;
          std::memcpy(patches + r * k + line * p, source, p * sizeof(float));
        }
      }
      float* out = args.out.as<float>() + row * c;
      switch (rows) {
        case 4:
          multiply<4>(patches, weight_t, k, c_padded, out, c);
          break;
        case 3:
          multiply<3>(patches, weight_t, k, c_padded, out, c);
          break;
        case 2:
          multiply<2>(patches, weight_t, k, c_padded, out, c);
          break;
        default:
          multiply<1>(patches, weight_t, k, c_padded, out, c);
          break;
      }
    }
  });
}

}  // namespace swin::cpu::SWIN_ISA
