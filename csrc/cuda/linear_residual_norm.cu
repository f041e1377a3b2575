// linear_residual_norm: residual += acc * scale[n] + bias[n], window order undone; out = quantize(LayerNorm(residual)).
// With kResPostNorm residual += LayerNorm(acc * scale[n] + bias[n]); out = quantize(residual).
// x s8 [P, K] in window order, w s8 [C, K], scale, bias f32 [C]; branch f32 [P, C]; residual T [M, C] and out s8 [M, C]
// in image order. Formula: swin/ops.h.
//
// Many rows of few channels: one kernel, a block having whole rows (row_tiles.cuh). Floor: P*K + C*K + 5*M*C bytes.
// Else two, the GEMM (tile_gemm.cuh), whose epilogue updates the residual where a row's token lies in the image, and the
// LayerNorm of norm_shift_partition.cu, as a block has 96 of a row's columns. Floor: P*K + C*K + 4*M*C bytes, then
// 3*M*C. With kResPostNorm the GEMM, then of the tuner's choice (gemm_channels.cu), stores y to `branch`, and the norm is
// that of norm_residual.cuh. Floor: P*K + C*K + 4*P*C bytes, then 9*M*C.
// Rows of padding are multiplied like any other, and left out behind that.
#include "gemm_tiles.h"
#include "kernels.h"
#include "norm_residual.cuh"
#include "row_tiles.cuh"

namespace swin::cuda {
namespace {

template <class Tile, NormPlace kNorm, class T>
__global__ void __launch_bounds__(Tile::kThreads) linear_rows_kernel(const GemmOperands g, const RowEnd<T> end) {
  SWIN_DYNAMIC_SHARED(shared);
  const unsigned first_row = blockIdx.x * Tile::kM;
  Accumulators<Tile> acc;
  multiply_tile<Tile, true>(g, first_row, 0, shared, acc);
  end_rows<Tile, kNorm>(end, first_row, acc, reinterpret_cast<float*>(shared + kStages * Tile::kStepBytes));
}

template <class T>
bool run_in_row_blocks(const char* op, const GemmOperands& g, const RowEnd<T>& end, NormPlace norm, void* stream) {
  if (!rows_in_blocks(g.rows, g.columns) || !end.aligned() || !takes_copies(g)) return false;
  return with_row_tile(g.columns, [&](auto tile) {
    using Chosen = decltype(tile);
    const auto kernel = norm == NormPlace::kPreNorm ? linear_rows_kernel<Chosen, NormPlace::kPreNorm, T>
                                                    : linear_rows_kernel<Chosen, NormPlace::kResPostNorm, T>;
    launch_row_blocks<Chosen>(op, kernel, g.rows, kStages * Chosen::kStepBytes + Chosen::kSumBytes, stream, g, end);
  });
}

}  // namespace

template <class T>
void end_linear(const char* op, const TensorView& x, const PackedWeight& w, const TensorView& branch,
                const RowEnd<T>& end, std::int64_t tokens, void* stream) {
  channels_gemm(op, x, w, GemmOutput::kChannelsF32, end.scale, end.bias, branch.data, stream);
  const NormBranch<T, RowEnd<T>> norm{end, branch.as<const float>(), w.n};
  launch_norm(op, norm, tokens, w.n, norm.vectorised(), stream);
}
template void end_linear(const char*, const TensorView&, const PackedWeight&, const TensorView&, const RowEnd<__half>&,
                         std::int64_t, void*);
template void end_linear(const char*, const TensorView&, const PackedWeight&, const TensorView&,
                         const RowEnd<__nv_bfloat16>&, std::int64_t, void*);

template <class T>
void linear_residual_norm(const LinearResidualNormArgs& args, const ExecContext& context) {
  const char* op = "linear_residual_norm";
  const std::int64_t tokens = args.residual.dim(0);
  const GemmOperands g = operands(op, args.x, *args.w);
  const RowEnd<T> end{args.scale.as<const float>(),
                      args.bias.as<const float>(),
                      args.residual.as<T>(),
                      args.gamma.as<const T>(),
                      args.beta.as<const T>(),
                      args.out.as<std::int8_t>(),
                      WindowRows(args.geometry),
                      true,
                      g.rows,
                      args.quant};
  if (run_in_row_blocks(op, g, end, args.norm, context.stream)) return;
  if (args.norm == NormPlace::kResPostNorm) {
    return end_linear(op, args.x, *args.w, args.branch, end, tokens, context.stream);
  }
  run_linear(op, args.x, *args.w,
             AddRows<T, WindowRows>(end.scale, end.bias, end.residual, args.w->n, WindowRows(args.geometry)),
             context.stream);
  norm_shift_partition<T>(
      NormShiftPartitionArgs{args.residual, args.gamma, args.beta, args.out, image_order(tokens), args.quant}, context);
}

SWIN_INSTANTIATE(linear_residual_norm, LinearResidualNormArgs)

}  // namespace swin::cuda
