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

// Whether any of `count` values is NaN or infinity: those have all exponent bits set.
inline bool any_not_finite(const float* values, std::int64_t count) {
  Vi bad{};
  for_lanes(count, [&](std::int64_t i, std::int64_t n) { bad |= (bits_of(load(values + i, n)) & 0x7f800000) == 0x7f800000; });
  return sum_of(__builtin_convertvector(bad, Vf)) != 0.0f;
}

// The least index that any thread reported, or what it began with.
class Least {
 public:
  explicit Least(std::int64_t none) : least_(none) {}
  void report(std::int64_t index) {
    std::int64_t known = __atomic_load_n(&least_, __ATOMIC_RELAXED);
    while (index < known && !__atomic_compare_exchange_n(&least_, &known, index, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }
  std::int64_t get() const { return __atomic_load_n(&least_, __ATOMIC_RELAXED); }

 private:
  std::int64_t least_;
};

}  // namespace

void patch_embed(const PatchEmbedArgs& args, const ExecContext& context) {
  const std::int64_t chans = args.image.dim(1), height = args.image.dim(2), width = args.image.dim(3);
  const std::int64_t p = args.patch_size, w_patches = width / p, per_image = (height / p) * w_patches;
  const std::int64_t k = chans * p * p, c = args.out.dim(1), c_padded = ceil_div(c, kLanes) * kLanes;
  const float* image = args.image.as<const float>();
  const std::int64_t all_rows = args.out.dim(0);
  Least bad_row(all_rows);
  parallel_rows(context, all_rows, 64, [&](std::int64_t first, std::int64_t last) {
    float* weight_t = static_cast<float*>(thread_scratch((k * c_padded + kRows * k) * sizeof(float)));
    float* patches = weight_t + k * c_padded;
    std::memset(weight_t, 0, k * c_padded * sizeof(float));
    for (std::int64_t i = 0; i < c; ++i) {
      for (std::int64_t j = 0; j < k; ++j) weight_t[j * c_padded + i] = args.weight.as<const float>()[i * k + j];
    }
    std::int64_t b = first / per_image, y = first % per_image / w_patches, x = first % w_patches;
    for (std::int64_t row = first; row < last; row += kRows) {
      const std::int64_t rows = min_of(kRows, last - row);
      for (std::int64_t r = 0; r < rows; ++r) {
        gather_patch(image + (b * chans * height + y * p) * width + x * p, chans, p, height, width, patches + r * k);
        if (++x == w_patches) {
          x = 0;
          if (++y == height / p) y = 0, ++b;
        }
      }
      if (any_not_finite(patches, rows * k)) {
        // Of several images in these rows it is the first that is named.
        std::int64_t r = 0;
        while (!any_not_finite(patches + r * k, k)) ++r;
        bad_row.report(row + r);
        return;
      }
      dispatch(rows, patches, weight_t, k, c_padded, args.out.as<float>() + row * c, c);
    }
  });
  if (bad_row.get() < all_rows) refuse_image(bad_row.get() / per_image);
}

}  // namespace swin::cpu::SWIN_ISA
