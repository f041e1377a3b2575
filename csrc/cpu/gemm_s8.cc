// gemm_s8: acc[m, n] = sum_k x[m, k] * w[n, k] exactly in int32, then out = requantized int8 (with or without ReLU) or
// the accumulators. x s8 [M, K], w s8 [N, K] packed at load, out s8 or s32 [M, N]. Formula: swin/ops.h.
//
// A task is a block of rows against a range of columns: the rows are prepared once in the thread's scratch, then every
// pair of weight units passes over them from cache.
#include "kernels.h"
#include "packed_gemm.h"

namespace swin::cpu::SWIN_ISA {
namespace {

// `emit_columns(first)`: what becomes of results, as multiply_block wants it, row 0 being row `first` of the output.
template <class Emit>
void run(const GemmS8Args& args, const ExecContext& context, Emit emit_columns) {
  const CpuPackedWeight& w = static_cast<const CpuPackedWeight&>(*args.w);
  const std::int64_t m = args.x.dim(0), k = w.k;
  parallel_blocks(context, m, w, block_bytes(w, kBlockRows), [&](const BlockTask& task, void* scratch) {
    multiply_block<Inputs::kAny>(w, args.x.as<const std::int8_t>() + task.first * k, k, task, scratch,
                                 emit_columns(task.first));
  });
}

template <bool Relu>
void requantize(const GemmS8Args& args, const ExecContext& context) {
  const std::int64_t n = args.w->n;
  std::int8_t* out = args.out.as<std::int8_t>();
  const float factor = args.factor;
  with_known(results_below_2_to_31(args.w->k, factor < 0 ? -factor : factor, 0), n, [&](auto known) {
    run(args, context, [=](std::int64_t first) {
      return [=, rows = out + first * n]<int V>(std::int64_t column) SWIN_INLINE {
        return [=](std::int64_t row, const Vi* acc) SWIN_INLINE {
          Vf y[V];
          for (int v = 0; v < V; ++v) y[v] = __builtin_convertvector(acc[v], Vf) * factor;
          store_s8_columns<V, Relu, known.below_2_to_31>(rows + row * n + column, y, columns_left<V>(n, column, known));
        };
      };
    });
  });
}

}  // namespace

void gemm_s8(const GemmS8Args& args, const ExecContext& context) {
  if (args.out.dtype == DType::kS32) {
    const std::int64_t n = args.w->n;
    std::int32_t* out = args.out.as<std::int32_t>();
    run(args, context, [=](std::int64_t first) {
      return [=, rows = out + first * n]<int V>(std::int64_t column) SWIN_INLINE {
        return [=](std::int64_t row, const Vi* acc) SWIN_INLINE {
          std::memcpy(rows + row * n + column, acc, min_of(V * kLanes, n - column) * sizeof(std::int32_t));
        };
      };
    });
  } else if (args.epilogue == Epilogue::kRelu) {
    requantize<true>(args, context);
  } else {
    requantize<false>(args, context);
  }
}

}  // namespace swin::cpu::SWIN_ISA
