// linear_s8: a GEMM with a scale and a bias per output channel: out = clamp(rne(float(acc) * scale[n] + bias[n])), or
// the sum itself where out is float. x s8 [M, K], w s8 [N, K] packed at load -> out s8 or f32 [M, N]. Formula: swin/ops.h.
#include "kernels.h"
#include "linear.h"

namespace swin::cpu::SWIN_ISA {

void linear_s8(const LinearS8Args& args, const ExecContext& context) {
  const CpuPackedWeight& w = static_cast<const CpuPackedWeight&>(*args.w);
  const std::int64_t m = args.x.dim(0), k = w.k, n = w.n;
  const Channels channels(args.scale, args.bias, n);
  const bool bounded = channels.below_2_to_31(k);
  parallel_blocks(context, m, w, block_bytes(w, kBlockRows), [&](const BlockTask& task, void* scratch) {
    const std::int8_t* x = args.x.as<const std::int8_t>() + task.first * k;
    if (args.out.dtype == DType::kS8) {
      std::int8_t* out = args.out.as<std::int8_t>() + task.first * n;
      with_known(bounded, n, [&](auto known) {
        multiply_block<Inputs::kSigned>(w, x, k, task, scratch, [=]<int V>(std::int64_t column) SWIN_INLINE {
          return [=, columns = channels.at<V>(column)](std::int64_t row, const Vi* acc) SWIN_INLINE {
            Vf y[V];
            for (int v = 0; v < V; ++v) y[v] = columns.value(acc, v);
            store_s8_columns<V, false, known.below_2_to_31>(out + row * n + column, y,
                                                            columns_left<V>(n, column, known));
          };
        });
      });
    } else {
      multiply_to_rows(w, x, task, scratch, channels, args.out.as<float>() + task.first * n);
    }
  });
}

}  // namespace swin::cpu::SWIN_ISA
