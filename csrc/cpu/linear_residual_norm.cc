// linear_residual_norm: a GEMM whose rows go from window order back into the residual stream, and LayerNorm and
// quantization of the rows that are complete. x s8 [P, K], w s8 [C, K] -> residual f32 [M, C], out s8 [M, C].
// Formula: swin/ops.h.
//
// Rows are taken in window order, as they lie. Where there is padding they are taken in image order, copied together first.
#include "kernels.h"
#include "linear.h"

namespace swin::cpu::SWIN_ISA {
namespace {

// To `to`, while `next`, where there is any, is on its way.
template <bool kAdd, bool kWhole>
struct EmitFloats {
  Channels channels;
  FloatRows to, next;

  template <int V>
  SWIN_INLINE auto operator()(std::int64_t column) const {
    return [columns = channels.at<V>(column), all = channels, to = to, column](auto row, const Vi* acc) SWIN_INLINE {
      float* x = to.rows + to.target[row];
      all.template each<V, kWhole>(column, [&](int v, std::int64_t i, std::int64_t lanes) SWIN_INLINE {
        const Vf y = columns.value(acc, v);
        store(x + i, kAdd ? load(x + i, lanes) + y : y, lanes);
      });
    };
  }

  // Rows of the residual stream, which is larger than the second-level cache and lies in another order than x.
  SWIN_INLINE void fetch(std::int64_t row, std::int64_t column) const {
    if (next.rows == nullptr) return;
    const float* x = next.rows + next.target[row] + column;
    __builtin_prefetch(x, 1, 3);
    __builtin_prefetch(x + kLanes, 1, 3);
  }
};

// The task's rows of the image from x [P, k] in window order.
void gather_rows(const WindowGeometry& g, const std::int8_t* x, std::int64_t k, const BlockTask& task, std::int8_t* rows) {
  WindowRows source(g, task.first);
  for (std::int64_t r = 0; r < task.rows; ++r, source.next()) std::memcpy(rows + r * k, x + source.row() * k, k);
}

}  // namespace

void multiply_and_add(const CpuPackedWeight& w, const std::int8_t* x, const BlockTask& task, void* scratch,
                      const Channels& channels, const FloatRows& to) {
  with_known(false, w.n, [&](auto known) {
    multiply_block<Inputs::kAny>(w, x, w.k, task, scratch, EmitFloats<true, known.whole>{channels, to, to});
  });
}
void multiply_and_store(const CpuPackedWeight& w, const std::int8_t* x, const BlockTask& task, void* scratch,
                        const Channels& channels, const FloatRows& to, const FloatRows& next) {
  with_known(false, w.n, [&](auto known) {
    multiply_block<Inputs::kAny>(w, x, w.k, task, scratch, EmitFloats<false, known.whole>{channels, to, next});
  });
}

void linear_residual_norm(const LinearResidualNormArgs& args, const ExecContext& context) {
  const CpuPackedWeight& w = static_cast<const CpuPackedWeight&>(*args.w);
  const std::int64_t m = args.geometry.tokens(), k = w.k, c = w.n;
  const float *gamma = args.gamma.as<const float>(), *beta = args.beta.as<const float>();
  float* residual = args.residual.as<float>();
  std::int8_t* out = args.out.as<std::int8_t>();
  const Channels channels(args.scale, args.bias, c);
  const std::int64_t gemm_bytes = block_bytes(w, kBlockRows), branch_end = gemm_bytes + branch_bytes(args.norm, c);
  const bool padded = args.geometry.is_padded();
  BlockCounts counts(w, m);
  parallel_blocks(context, m, w, branch_end + (padded ? kBlockRows * k : 0), [&](const BlockTask& task, void* scratch) {
    std::int64_t target[kBlockRows];
    const std::int8_t* x = args.x.as<const std::int8_t>();
    if (padded) {
      std::int8_t* rows = static_cast<std::int8_t*>(scratch) + branch_end;
      if (!task.same_rows) gather_rows(args.geometry, x, k, task, rows);
      x = rows;
      for (std::int64_t r = 0; r < task.rows; ++r) target[r] = (task.first + r) * c;
    } else {
      ImageRows rows(args.geometry, task.first);
      for (std::int64_t r = 0; r < task.rows; ++r, rows.next()) target[r] = rows.row() * c;
      x += task.first * k;
    }
    if (args.norm == NormPlace::kResPostNorm) {
      float* branch = branch_rows(args.branch, task, c, static_cast<char*>(scratch) + gemm_bytes);
      multiply_to_rows(w, x, task, scratch, channels, branch, FloatRows{residual, target});
      if (!counts.completes(task)) return;
      AddQuantize norm(gamma, beta, c, args.quant);
      for (std::int64_t r = 0; r < task.rows; ++r) norm.add(branch + r * c, residual + target[r], out + target[r]);
      norm.flush();
      return;
    }
    multiply_and_add(w, x, task, scratch, channels, FloatRows{residual, target});
    if (!counts.completes(task)) return;
    NormQuantize norm(gamma, beta, c, args.quant);
    for (std::int64_t r = 0; r < task.rows; ++r) norm.add(residual + target[r], out + target[r]);
    norm.flush();
  });
}

}  // namespace swin::cpu::SWIN_ISA
