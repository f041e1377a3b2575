// proj_bias_residual_norm: dequantize the projection, add its bias, undo window partition and shift, add to the
// residual, LayerNorm of the residual as it is stored, quantize. proj s8 [P, C] in window order; residual T [M, C] and
// out s8 [M, C] in image order. Formula: swin/ops.h.
//
// Layout: norm.cuh; a row's chunk is 16 bytes of residual read and written, 8 of proj, 8 of output. Rows are taken in
// image order, so that those of proj's padding are left out; reverse and unshift are four divisions by constants per
// row. Floor: 6 bytes an element (3 read, 3 written).
#include "kernels.h"
#include "norm.cuh"
#include "window_rows.cuh"

namespace swin::cuda {
namespace {

template <class T>
struct ProjBiasResidualNorm {
  const std::int8_t* proj;
  const T* bias;
  T* residual;
  const T *gamma, *beta;
  std::int8_t* out;
  WindowRows windows;
  std::int64_t c;
  float dequant, quant;

  static constexpr int kLongest = 6;
  struct Row {
    const std::int8_t* proj;
    T* residual;
    std::int8_t* out;
  };
  struct Raw {
    Words4 residual;
    S8<8> proj;
  };
  using Kept = Words4;

  __device__ __forceinline__ Row row(unsigned r) const {
    const std::int64_t target = r * c;
    return {proj + windows.window_row(r) * c, residual + target, out + target};
  }
  __device__ __forceinline__ Raw load(const Row& row, int chunk) const {
    return {load_words(row.residual + 8 * chunk), load_s8<8>(row.proj + 8 * chunk)};
  }
  __device__ __forceinline__ Kept keep(const Row& row, int chunk, const Raw& raw) const {
    float x[8], p[8], b[8];
    unpack8<T>(raw.residual, x);
    to_floats(raw.proj, p);
    load_floats(bias + 8 * chunk, b);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] += p[i] * dequant + b[i];
    const Words4 rounded = pack8<T>(x);
    store_words(row.residual + 8 * chunk, rounded);
    return rounded;
  }
  __device__ __forceinline__ void unpack(const Kept& kept, float (&x)[8]) const { unpack8<T>(kept, x); }
  __device__ __forceinline__ void store(const Row& row, int chunk, float (&y)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i] *= quant;
    store_quantized<8>(row.out + 8 * chunk, y);
  }

  __device__ __forceinline__ float first(const Row& row, int i) const {
    const T rounded =
        from_float<T>(to_float(row.residual[i]) + (static_cast<float>(row.proj[i]) * dequant + to_float(bias[i])));
    row.residual[i] = rounded;
    return to_float(rounded);
  }
  __device__ __forceinline__ float again(const Row& row, int i) const { return to_float(row.residual[i]); }
  __device__ __forceinline__ void store_one(const Row& row, int i, float y) const {
    const float scaled[1] = {y * quant};
    store_quantized<1>(row.out + i, scaled);
  }
};

}  // namespace

template <class T>
void proj_bias_residual_norm(const ProjBiasResidualNormArgs& args, const ExecContext& context) {
  const std::int64_t c = args.residual.dim(1);
  const ProjBiasResidualNorm<T> op{args.proj.as<const std::int8_t>(),
                                   args.bias.as<const T>(),
                                   args.residual.as<T>(),
                                   args.gamma.as<const T>(),
                                   args.beta.as<const T>(),
                                   args.out.as<std::int8_t>(),
                                   WindowRows(args.geometry),
                                   c,
                                   args.dequant,
                                   args.quant};
  const bool vectorised = c % 8 == 0 && is_aligned(op.proj, 8) && is_aligned(op.bias, 16) &&
                          is_aligned(op.residual, 16) && is_aligned(op.gamma, 16) && is_aligned(op.beta, 16) &&
                          is_aligned(op.out, 8);
  launch_norm("proj_bias_residual_norm", op, args.geometry.tokens(), c, vectorised, context.stream);
}

SWIN_INSTANTIATE(proj_bias_residual_norm, ProjBiasResidualNormArgs)

}  // namespace swin::cuda
