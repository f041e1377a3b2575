// norm_shift_partition: LayerNorm of the residual stream, quantized, rows in window order. residual T [M, C] -> out s8
// [P, C]. Formula: swin/ops.h.
//
// Layout: 4 to 32 lanes a row, 16 bytes of residual and 8 of output a lane and step (norm.cuh). Rows are taken in
// image order, so that none is padding; shift and partition are four divisions by constants per row (window_rows.cuh).
// Floor: 3 bytes an element (2 read, 1 written), and a byte for each of the padding (zero_padding.h). No version was
// timed yet.
#include "kernels.h"
#include "norm.cuh"
#include "window_rows.cuh"
#include "zero_padding.h"

namespace swin::cuda {
namespace {

template <class T>
struct NormShiftPartition {
  const T *residual, *gamma, *beta;
  std::int8_t* out;
  WindowRows windows;
  std::int64_t c;
  float quant;

  static constexpr int kLongest = 6;
  struct Row {
    const T* in;
    std::int8_t* out;
  };
  using Raw = Words4;
  using Kept = Words4;

  __device__ __forceinline__ Row row(unsigned r) const { return {residual + r * c, out + windows.window_row(r) * c}; }
  __device__ __forceinline__ Raw load(const Row& row, int chunk) const { return load_words(row.in + 8 * chunk); }
  __device__ __forceinline__ Kept keep(const Row&, int, const Raw& raw) const { return raw; }
  __device__ __forceinline__ void unpack(const Kept& kept, float (&x)[8]) const { unpack8<T>(kept, x); }
  __device__ __forceinline__ void store(const Row& row, int chunk, float (&y)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i] *= quant;
    store_quantized<8>(row.out + 8 * chunk, y);
  }

  __device__ __forceinline__ float first(const Row& row, int i) const { return to_float(row.in[i]); }
  __device__ __forceinline__ float again(const Row& row, int i) const { return to_float(row.in[i]); }
  __device__ __forceinline__ void store_one(const Row& row, int i, float y) const {
    const float scaled[1] = {y * quant};
    store_quantized<1>(row.out + i, scaled);
  }
};

}  // namespace

template <class T>
void norm_shift_partition(const NormShiftPartitionArgs& args, const ExecContext& context) {
  const char* name = "norm_shift_partition";
  const std::int64_t c = args.residual.dim(1);
  const NormShiftPartition<T> op{args.residual.as<const T>(),
                                 args.gamma.as<const T>(),
                                 args.beta.as<const T>(),
                                 args.out.as<std::int8_t>(),
                                 WindowRows(args.geometry),
                                 c,
                                 args.quant};
  const bool vectorised = c % 8 == 0 && is_aligned(op.residual, 16) && is_aligned(op.gamma, 16) &&
                          is_aligned(op.beta, 16) && is_aligned(op.out, 8);
  launch_norm(name, op, args.geometry.tokens(), c, vectorised, context.stream);
  zero_padding(name, args.out, args.geometry, context.stream);
}

SWIN_INSTANTIATE(norm_shift_partition, NormShiftPartitionArgs)

}  // namespace swin::cuda
