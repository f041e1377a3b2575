// mlp_residual_norm: FC1, activation, FC2, residual += FC2's result; out = quantize(LayerNorm(residual)) in the next block's
// window order. With kResPostNorm residual += LayerNorm(FC2's result); out = quantize(residual).
// x s8 [M, C] in image order, w1 s8 [F, C], w2 s8 [C, F], scales and biases f32; hidden s8 [M, F] or none; branch f32
// [M, C]; residual T [M, C], out s8 [P, C] or none. Formula: swin/ops.h.
//
// Without `hidden` (row_blocks.h says where): one kernel, a block having 128 whole rows (row_tiles.cuh) and going through the
// hidden channels 64 at a time. FC1's result for them is quantized into shared memory, where FC2 takes it from: hidden rows
// never get to memory. W2's part is copied while FC1 runs, W1's next one while FC2 does.
// Floor: M*C + 5*M*C bytes, and 2*C*F of weights for each block from the second-level cache.
// With `hidden`: two GEMMs of the tuner's choice (gemm_channels.cu), FC1 with the activation and the quantization in its epilogue, FC2 with the
// residual's sum in its own, and the LayerNorm of norm_shift_partition.cu. Floor: M*C + 2*M*F + 2*C*F + 4*M*C bytes, then 3*M*C.
// With kResPostNorm FC2 stores its result to `branch`, and the norm of norm_residual.cuh moves 9*M*C bytes.
// Where `out` has rows of padding, they are zeroed behind each of these (zero_padding.h). None was timed yet.
#include "gemm_tiles.h"
#include "kernels.h"
#include "row_tiles.cuh"
#include "zero_padding.h"

namespace swin::cuda {
namespace {

constexpr const char* kOp = "mlp_residual_norm";

struct MlpOperands {
  const std::int8_t *x, *w1, *w2;
  unsigned rows;
  int hidden;  // F
  const float *scale1, *bias1;
  float hidden_quant;
};

// A block's shared memory: its rows of x and a step's W1, each as steps of K; the step's W2; its hidden values.
template <class Tile>
struct MlpShared {
  static constexpr int kSteps = (Tile::kChannels + kStepK - 1) / kStepK;
  static constexpr int kX = 0, kW1 = kX + kSteps * Tile::kM * kStepK, kW2 = kW1 + kSteps * kHiddenStep * kStepK;
  static constexpr int kHidden = kW2 + Tile::kChannels * kHiddenStep, kSums = kHidden + Tile::kM * kHiddenStep;
  static constexpr int kBytes = kSums + Tile::kSumBytes;
  static_assert(kHiddenStep == kStepK && kBytes <= 64 << 10, "Turing's blocks have 64 KiB");
};

template <class Tile, NormPlace kNorm, class T, bool kRelu>
__global__ void __launch_bounds__(Tile::kThreads) mlp_rows_kernel(const MlpOperands mlp, const RowEnd<T> end) {
  using Shared = MlpShared<Tile>;
  constexpr int kThreads = Tile::kThreads, kC = Tile::kChannels;
  SWIN_DYNAMIC_SHARED(shared);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const unsigned first_row = blockIdx.x * Tile::kM;
  const int warp_row = warp / Tile::kWarpsN * 16 * Tile::kRowTiles, side = warp % Tile::kWarpsN;

  Accumulators<Tile> acc;
  clear(acc);
  const auto load_w1 = [&](int first) {
    for (int s = 0; s < Shared::kSteps; ++s) {
      load_step<kHiddenStep, kThreads, true>(shared + Shared::kW1 + s * kHiddenStep * kStepK, mlp.w1, first, mlp.hidden, kC,
                                             s * kStepK);
    }
  };
  for (int s = 0; s < Shared::kSteps; ++s) {
    load_step<Tile::kM, kThreads, true>(shared + Shared::kX + s * Tile::kM * kStepK, mlp.x, first_row, mlp.rows, kC,
                                        s * kStepK);
  }
  load_w1(0);
  commit_copies();

  for (int first = 0; first < mlp.hidden; first += kHiddenStep) {
    wait_copies<0>();
    __syncthreads();  // x and W1 are there; nobody reads W2 and the hidden values any more
    load_step<kC, kThreads, true>(shared + Shared::kW2, mlp.w2, 0, kC, mlp.hidden, first);
    commit_copies();

    int inner[Tile::kRowTiles][4][4] = {};  // 32 of the 64 hidden channels
#pragma unroll
    for (int s = 0; s < Shared::kSteps; ++s) {
      multiply_step(shared + Shared::kX + (s * Tile::kM + warp_row) * kStepK,
                    shared + Shared::kW1 + (s * kHiddenStep + 32 * side) * kStepK, inner);
    }
    const int column = 32 * side + kOwned * (lane % 4);
    const ChannelScale scales{mlp.scale1, kRelu ? nullptr : mlp.bias1};
    const ChannelScale::Column<kOwned> shares = scales.column<kOwned>(first + column);
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x[kOwned];
#pragma unroll
        for (int v = 0; v < kOwned; ++v) x[v] = __int2float_rn(inner[i][v / 2][2 * half + v % 2]);
        shares.apply(x);
#pragma unroll
        for (int v = 0; v < kOwned; ++v) x[v] = kRelu ? fmaxf(x[v], 0.0f) : gelu(x[v]) * mlp.hidden_quant;
        const int row = warp_row + 16 * i + 8 * half + lane / 4;
        store_quantized<kOwned>(shared + Shared::kHidden + row * kHiddenStep + column, x);
      }
    }

    wait_copies<0>();
    __syncthreads();  // W2 and the hidden values are there; nobody reads W1 any more
    if (first + kHiddenStep < mlp.hidden) load_w1(first + kHiddenStep);
    commit_copies();
    multiply_step(shared + Shared::kHidden + warp_row * kHiddenStep, shared + Shared::kW2 + side * (kC / 2) * kHiddenStep, acc);
  }
  end_rows<Tile, kNorm>(end, first_row, acc, reinterpret_cast<float*>(shared + Shared::kSums));
}

template <class T>
RowEnd<T> row_end(const MlpResidualNormArgs& args) {
  return {args.scale2.as<const float>(),
          args.bias2.as<const float>(),
          args.residual.as<T>(),
          args.gamma.as<const T>(),
          args.beta.as<const T>(),
          args.out.as<std::int8_t>(),
          WindowRows(args.out ? args.geometry : image_order(args.x.dim(0))),
          false,
          count32(kOp, "rows", args.x.dim(0)),
          args.quant};
}

template <class Tile, NormPlace kNorm, class T>
auto rows_kernel(Activation activation) {
  return activation == Activation::kRelu ? mlp_rows_kernel<Tile, kNorm, T, true>
                                         : mlp_rows_kernel<Tile, kNorm, T, false>;
}

template <class T>
void run_in_row_blocks(const MlpResidualNormArgs& args, void* stream) {
  const GemmOperands first = operands(kOp, args.x, *args.w1);
  const std::int64_t c = args.w1->k;
  const MlpOperands mlp{first.x,
                        first.w,
                        static_cast<const CudaPackedWeight&>(*args.w2).data,
                        first.rows,
                        static_cast<int>(first.columns),
                        args.scale1.as<const float>(),
                        args.bias1.as<const float>(),
                        args.hidden_quant};
  const RowEnd<T> end = row_end<T>(args);
  const bool possible = mlp.hidden % kHiddenStep == 0 && end.aligned() && takes_copies(first) && is_aligned(mlp.w2, 16) &&
                        with_row_tile(c, [&](auto tile) {
                          using Chosen = decltype(tile);
                          const auto kernel = args.norm == NormPlace::kPreNorm
                                                  ? rows_kernel<Chosen, NormPlace::kPreNorm, T>(args.activation)
                                                  : rows_kernel<Chosen, NormPlace::kResPostNorm, T>(args.activation);
                          launch_row_blocks<Chosen>(kOp, kernel, mlp.rows, MlpShared<Chosen>::kBytes, stream, mlp, end);
                        });
  SWIN_CHECK(ValueError, kOp, possible, "memory for the hidden rows, s8 [", mlp.rows, ", ", mlp.hidden,
             "], is needed for this shape or alignment");
  if (args.out) zero_padding(kOp, args.out, args.geometry, stream);
}

}  // namespace

template <class T>
void mlp_residual_norm(const MlpResidualNormArgs& args, const ExecContext& context) {
  if (!args.hidden) return run_in_row_blocks<T>(args, context.stream);
  const GemmOutput activated =
      args.activation == Activation::kRelu ? GemmOutput::kChannelsRelu : GemmOutput::kChannelsGelu;
  channels_gemm(kOp, args.x, *args.w1, activated, args.scale1.as<const float>(), args.bias1.as<const float>(),
                args.hidden.data, context.stream, args.hidden_quant);
  if (args.norm == NormPlace::kResPostNorm) {
    end_linear(kOp, args.hidden, *args.w2, args.branch, row_end<T>(args), args.x.dim(0), context.stream);
    if (args.out) zero_padding(kOp, args.out, args.geometry, context.stream);
    return;
  }
  channels_gemm(kOp, args.hidden, *args.w2, kChannelsAdd<T>, args.scale2.as<const float>(), args.bias2.as<const float>(),
                args.residual.data, context.stream);
  if (!args.out) return;
  norm_shift_partition<T>(
      NormShiftPartitionArgs{args.residual, args.gamma, args.beta, args.out, args.geometry, args.quant}, context);
}

SWIN_INSTANTIATE(mlp_residual_norm, MlpResidualNormArgs)

}  // namespace swin::cuda
