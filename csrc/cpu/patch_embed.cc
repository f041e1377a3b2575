// patch_embed: the patch embedding's convolution (kernel and stride p) as a float32 GEMM whose rows are read where they
// lie in the image. image f32 [B, in_chans, H*p, W*p], weight f32 [C, in_chans*p*p] -> out f32 [B*H*W, C]. Formula:
// swin/ops.h.
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

// Patches of an image that lie side by side, the first with its upper left corner at `corner`: in_chans planes, of
// which each has p of their lines.
struct Patches {
  const float* corner;
  std::int64_t chans, p, plane, width;

  // Calls body(line) for all lines, from channel to channel: patch r's part of one begins r * p behind the first's.
  template <class Body>
  SWIN_INLINE void each_line(Body&& body) const {
    for (std::int64_t chan = 0; chan < chans; ++chan) {
      for (std::int64_t y = 0; y < p; ++y) body(corner + chan * plane + y * width);
    }
  }
};

// out[r, i ...] = patch r @ weight_t[:, i ...] of R patches, for V vectors of channels, of which the last may be
// partial; weight_t is [in_chans*p*p, c_padded], c_padded a multiple of kLanes. kSize: p, 0: any.
template <int R, int V, int kSize>
inline void multiply_columns(const Patches& patches, const float* weight_t, std::int64_t c_padded, float* out,
                             std::int64_t c, std::int64_t i) {
  const std::int64_t p = kSize > 0 ? kSize : patches.p;
  Vf acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {  // one by one: `= {}` is memory that GCC clears
    for (int v = 0; v < V; ++v) acc[r][v] = Vf{};
  }
  const float* weights = weight_t + i;
  patches.each_line([&](const float* line) SWIN_INLINE {
    for (std::int64_t x = 0; x < p; ++x, weights += c_padded) {
      Vf w[V];
      for (int v = 0; v < V; ++v) w[v] = load(weights + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vf value = splat(line[r * p + x]);
#pragma GCC unroll 3
        for (int v = 0; v < V; ++v) acc[r][v] += value * w[v];
      }
    }
  });
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      store(out + r * c + i + v * kLanes, acc[r][v], min_of(kLanes, c - i - v * kLanes));
    }
  }
}

template <int R, int kSize>
void multiply(const Patches& patches, const float* weight_t, std::int64_t c_padded, float* out, std::int64_t c) {
  std::int64_t i = 0;
  for (; i + kVectors * kLanes <= c_padded; i += kVectors * kLanes) {
    multiply_columns<R, kVectors, kSize>(patches, weight_t, c_padded, out, c, i);
  }
  for (; i < c_padded; i += kLanes) multiply_columns<R, 1, kSize>(patches, weight_t, c_padded, out, c, i);
}

template <int R = kRows>
void dispatch(std::int64_t count, const Patches& patches, const float* weight_t, std::int64_t c_padded, float* out,
              std::int64_t c) {
  if (count == R) {
    if (patches.p == 4) return multiply<R, 4>(patches, weight_t, c_padded, out, c);  // as all published Swins
    multiply<R, 0>(patches, weight_t, c_padded, out, c);
  } else if constexpr (R > 1) {
    dispatch<R - 1>(count, patches, weight_t, c_padded, out, c);
  }
}

// Whether any value of `count` patches is NaN or infinity: those have all exponent bits set.
inline bool any_not_finite(const Patches& patches, std::int64_t count) {
  Vi bad{};
  patches.each_line([&](const float* line) SWIN_INLINE {
    for_lanes(count * patches.p, [&](std::int64_t i, std::int64_t n)
                                     SWIN_INLINE { bad |= (bits_of(load(line + i, n)) & 0x7f800000) == 0x7f800000; });
  });
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
  Least bad_image(args.image.dim(0));
  parallel_rows(context, all_rows, 64, [&](std::int64_t first, std::int64_t last) {
    float* weight_t = static_cast<float*>(thread_scratch(k * c_padded * sizeof(float)));
    std::memset(weight_t, 0, k * c_padded * sizeof(float));
    for (std::int64_t i = 0; i < c; ++i) {
      for (std::int64_t j = 0; j < k; ++j) weight_t[j * c_padded + i] = args.weight.as<const float>()[i * k + j];
    }
    for (std::int64_t row = first; row < last;) {
      const std::int64_t b = row / per_image, y = row % per_image / w_patches, x = row % w_patches;
      const std::int64_t count = min_of(min_of(kRows, last - row), w_patches - x);
      const Patches patches{image + (b * chans * height + y * p) * width + x * p, chans, p, height * width, width};
      if (any_not_finite(patches, count)) {
        bad_image.report(b);
        return;
      }
      dispatch(count, patches, weight_t, c_padded, args.out.as<float>() + row * c, c);
      row += count;
    }
  });
  if (bad_image.get() < args.image.dim(0)) refuse_image(bad_image.get());
}

}  // namespace swin::cpu::SWIN_ISA
