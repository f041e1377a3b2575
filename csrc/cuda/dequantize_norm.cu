// dequantize_norm: out = LayerNorm(x * dequant). x s8 [M, C] -> out T [M, C]. Formula: swin/ops.h.
//
// Layout: norm.cuh; a chunk is 8 bytes read and 16 written, and stays in registers as s8. Floor: 3 bytes an element.
// Not timed yet.
#include "kernels.h"
#include "norm.cuh"

namespace swin::cuda {
namespace {

template <class T>
struct DequantizeNorm {
  const std::int8_t* x;
  const T *gamma, *beta;
  T* out;
  std::int64_t c;
  float dequant;

  static constexpr int kLongest = 6;
  struct Row {
    const std::int8_t* x;
    T* out;
  };
  using Raw = S8<8>;
  using Kept = S8<8>;

  __device__ __forceinline__ Row row(unsigned r) const { return {x + r * c, out + r * c}; }
  __device__ __forceinline__ Raw load(const Row& row, int chunk) const { return load_s8<8>(row.x + 8 * chunk); }
  __device__ __forceinline__ Kept keep(const Row&, int, const Raw& raw) const { return raw; }
  __device__ __forceinline__ void unpack(const Kept& kept, float (&y)[8]) const {
    to_floats(kept, y);
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i] *= dequant;
  }
  __device__ __forceinline__ void store(const Row& row, int chunk, float (&y)[8]) const {
    store_floats<T, 8>(row.out + 8 * chunk, y);
  }

  __device__ __forceinline__ float first(const Row& row, int i) const { return static_cast<float>(row.x[i]) * dequant; }
  __device__ __forceinline__ float again(const Row& row, int i) const { return first(row, i); }
  __device__ __forceinline__ void store_one(const Row& row, int i, float y) const { row.out[i] = from_float<T>(y); }
};

}  // namespace

template <class T>
void dequantize_norm(const DequantizeNormArgs& args, const ExecContext& context) {
  const std::int64_t c = args.x.dim(1);
  const DequantizeNorm<T> op{args.x.as<const std::int8_t>(),
                             args.gamma.as<const T>(),
                             args.beta.as<const T>(),
                             args.out.as<T>(),
                             c,
                             args.dequant};
  const bool vectorised = c % 8 == 0 && is_aligned(op.x, 8) && is_aligned(op.gamma, 16) && is_aligned(op.beta, 16) &&
                          is_aligned(op.out, 16);
  launch_norm("dequantize_norm", op, args.x.dim(0), c, vectorised, context.stream);
}

SWIN_INSTANTIATE(dequantize_norm, DequantizeNormArgs)

}  // namespace swin::cuda
