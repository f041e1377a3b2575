// patch_merge_norm: gather 2x2 neighbours to 4C channels, zeros beyond an odd H or W, LayerNorm, quantize. residual T
// [B*H*W, C] -> out s8 [B*ceil(H/2)*ceil(W/2), 4C]. Formula: swin/ops.h.
//
// Layout: norm.cuh over rows of 4C; a chunk finds its neighbour by one division, nothing is gathered in memory.
// Floor: 3 bytes an element (2 read, 1 written).
#include "kernels.h"
#include "norm.cuh"

namespace swin::cuda {
namespace {

template <class T>
struct PatchMergeNorm {
  const T *residual, *gamma, *beta;
  std::int8_t* out;
  FastDiv half_h, half_w;  // rounded up
  FastDiv per_neighbour;   // chunks, or channels on the scalar path, of one neighbour
  std::int64_t c;
  unsigned height, width;
  float quant;

  static constexpr int kLongest = 12;
  struct Row {
    const T* corner;
    std::int8_t* out;
    unsigned exist;  // bit i: neighbour i lies in the image
  };
  using Raw = Words4;
  using Kept = Words4;

  __device__ __forceinline__ Row row(unsigned r) const {
    unsigned x = r;
    unsigned y = half_w.split(x);
    const unsigned b = half_h.split(y);
    y *= 2;
    x *= 2;
    const unsigned exist = (y + 1 < height ? 0b1111u : 0b0101u) & (x + 1 < width ? 0b1111u : 0b0011u);
    return {residual + ((b * height + y) * width + x) * c, out + r * 4 * c, exist};
  }
  // Neighbours 0..3 in the order (0,0) (1,0) (0,1) (1,1) of (row parity, column parity).
  __device__ __forceinline__ const T* neighbour(const Row& row, unsigned which) const {
    return row.corner + ((which & 1) * width + (which >> 1)) * c;
  }
  __device__ __forceinline__ Raw load(const Row& row, int chunk) const {
    unsigned within = static_cast<unsigned>(chunk);
    const unsigned which = per_neighbour.split(within);
    return row.exist >> which & 1 ? load_words(neighbour(row, which) + 8 * within) : Raw{};
  }
  __device__ __forceinline__ Kept keep(const Row&, int, const Raw& raw) const { return raw; }
  __device__ __forceinline__ void unpack(const Kept& kept, float (&x)[8]) const { unpack8<T>(kept, x); }
  __device__ __forceinline__ void store(const Row& row, int chunk, float (&y)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i] *= quant;
    store_quantized<8>(row.out + 8 * chunk, y);
  }

  __device__ __forceinline__ float first(const Row& row, int i) const {
    unsigned within = static_cast<unsigned>(i);
    const unsigned which = per_neighbour.split(within);
    return row.exist >> which & 1 ? to_float(neighbour(row, which)[within]) : 0.0f;
  }
  __device__ __forceinline__ float again(const Row& row, int i) const { return first(row, i); }
  __device__ __forceinline__ void store_one(const Row& row, int i, float y) const {
    const float scaled[1] = {y * quant};
    store_quantized<1>(row.out + i, scaled);
  }
};

}  // namespace

template <class T>
void patch_merge_norm(const PatchMergeNormArgs& args, const ExecContext& context) {
  const std::int64_t c = args.residual.dim(1);
  PatchMergeNorm<T> op{args.residual.as<const T>(),
                       args.gamma.as<const T>(),
                       args.beta.as<const T>(),
                       args.out.as<std::int8_t>(),
                       FastDiv(ceil_div(args.height, 2)),
                       FastDiv(ceil_div(args.width, 2)),
                       FastDiv(c),
                       c,
                       static_cast<unsigned>(args.height),
                       static_cast<unsigned>(args.width),
                       args.quant};
  const bool vectorised = c % 8 == 0 && 4 * c / 8 <= PatchMergeNorm<T>::kLongest * kWarp &&
                          is_aligned(op.residual, 16) && is_aligned(op.gamma, 16) && is_aligned(op.beta, 16) &&
                          is_aligned(op.out, 8);
  if (vectorised) op.per_neighbour = FastDiv(c / 8);
  launch_norm("patch_merge_norm", op, args.out.dim(0), 4 * c, vectorised, context.stream);
}

SWIN_INSTANTIATE(patch_merge_norm, PatchMergeNormArgs)

}  // namespace swin::cuda
