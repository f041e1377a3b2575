// mlp_residual_norm: FC1, activation, FC2, residual, LayerNorm and quantization of the next block, x s8 [M, C] ->
// residual f32 [M, C], out s8 [P, C] in the next block's window order. Formula: swin/ops.h.
//
// A block of rows goes through both GEMMs at once, its hidden rows in the thread's cache. Where the caller gives memory for
// all hidden rows, and threads are too many to have rows enough of their own, the GEMMs run one after the other instead: with
// few rows and large weights it is the weights whose way is long, and split by columns each thread reads only its own.
#include "gelu.h"
#include "kernels.h"
#include "linear.h"

namespace swin::cpu::SWIN_ISA {
namespace {

struct Mlp {
  const MlpResidualNormArgs& args;
  const CpuPackedWeight &w1, &w2;
  const std::int64_t m, c, f;
  const Channels channels1, channels2;
  const bool bounded1;

  explicit Mlp(const MlpResidualNormArgs& args)
      : args(args),
        w1(static_cast<const CpuPackedWeight&>(*args.w1)),
        w2(static_cast<const CpuPackedWeight&>(*args.w2)),
        m(args.x.dim(0)),
        c(w2.n),
        f(w1.n),
        channels1(args.scale1, args.bias1, f),
        channels2(args.scale2, args.bias2, c),
        bounded1(channels1.below_2_to_31(c)) {}

  // Hidden columns of `task`'s rows, to `hidden` [rows, f].
  void first(const BlockTask& task, std::int8_t* hidden, void* scratch) const {
    const auto multiply = [&]<bool kRelu>(auto known, auto activate) {
      multiply_block<Inputs::kSigned>(
          w1, args.x.as<const std::int8_t>() + task.first * c, c, task, scratch,
          [=, channels = channels1, f = f]<int V>(std::int64_t column) SWIN_INLINE {
            return [=, columns = channels.template at<V>(column)]<int R = 1>(std::int64_t row, const Vi* acc)
                       SWIN_INLINE {
                         Vf y[R * V];
                         for (int r = 0; r < R; ++r) {
                           for (int v = 0; v < V; ++v) y[r * V + v] = columns.value(acc + r * V, v);
                         }
                         activate(y);
                         for (int r = 0; r < R; ++r) {
                           store_s8_columns<V, kRelu, known.below_2_to_31>(hidden + (row + r) * f + column, y + r * V,
                                                                           columns_left<V>(f, column, known));
                         }
                       };
          });
    };
    if (args.activation == Activation::kRelu) {
      with_known(bounded1, f, [&](auto known) { multiply.template operator()<true>(known, [](auto&) SWIN_INLINE {}); });
    } else {
      const float quant = args.hidden_quant;
      with_known(false, f, [&](auto known) {
        multiply.template operator()<false>(known, [quant](auto& y) SWIN_INLINE {
          gelu(y);
          for (Vf& value : y) value = value * quant;
        });
      });
    }
  }

  bool post_norm() const { return args.norm == NormPlace::kResPostNorm; }

  // FC2 of `hidden` [rows, f] for the columns of `task`: added to the residual, or to `branch` [rows, c] for finish().
  void second(const BlockTask& task, const std::int8_t* hidden, void* scratch, float* branch) const {
    std::int64_t target[kBlockRows];
    for (std::int64_t r = 0; r < task.rows; ++r) target[r] = (task.first + r) * c;
    const FloatRows residual{args.residual.as<float>(), target};
    if (post_norm()) {
      multiply_to_rows(w2, hidden, task, scratch, channels2, branch, residual);
    } else {
      multiply_and_add(w2, hidden, task, scratch, channels2, residual);
    }
  }

  void finish(const BlockTask& task, const float* branch) const {
    const float *gamma = args.gamma.as<const float>(), *beta = args.beta.as<const float>();
    float* residual = args.residual.as<float>() + task.first * c;
    std::int8_t* out = args.out.as<std::int8_t>();
    if (post_norm()) {
      AddQuantize norm(gamma, beta, c, args.quant);
      each_target(task, [&](std::int64_t r, std::int64_t target) {
        norm.add(branch + r * c, residual + r * c, out == nullptr ? out : out + target * c);
      });
      norm.flush();
    } else if (out != nullptr) {
      NormQuantize norm(gamma, beta, c, args.quant);
      each_target(task, [&](std::int64_t r, std::int64_t target) { norm.add(residual + r * c, out + target * c); });
      norm.flush();
    }
  }

  // Calls body(row of the task, row of out).
  template <class Body>
  void each_target(const BlockTask& task, Body&& body) const {
    if (!args.out) {
      for (std::int64_t r = 0; r < task.rows; ++r) body(r, 0);
      return;
    }
    WindowRows target(args.geometry, task.first);
    for (std::int64_t r = 0; r < task.rows; ++r, target.next()) body(r, target.row());
  }
};

}  // namespace

void mlp_residual_norm(const MlpResidualNormArgs& args, const ExecContext& context) {
  const Mlp mlp(args);
  if (args.out) zero_padding(args.geometry, mlp.c, args.out.as<std::int8_t>(), context);
  const std::int64_t scratch1 = block_bytes(mlp.w1, kBlockRows), scratch2 = block_bytes(mlp.w2, kBlockRows);
  const std::int64_t branch = branch_bytes(args.norm, mlp.c);
  const std::int64_t weights = 2 * mlp.c * mlp.f;
  if (args.hidden && !rows_for_each_thread(context, mlp.m, weights)) {
    std::int8_t* hidden = args.hidden.as<std::int8_t>();
    parallel_blocks(context, mlp.m, mlp.w1, scratch1, [&](const BlockTask& task, void* scratch) {
      mlp.first(task, hidden + task.first * mlp.f, scratch);
    });
    BlockCounts counts(mlp.w2, mlp.m);
    parallel_blocks(context, mlp.m, mlp.w2, scratch2 + branch, [&](const BlockTask& task, void* scratch) {
      float* rows = branch_rows(args.branch, task, mlp.c, static_cast<char*>(scratch) + scratch2);
      mlp.second(task, hidden + task.first * mlp.f, scratch, rows);
      if (counts.completes(task)) mlp.finish(task, rows);
    });
    return;
  }
  const std::int64_t scratch_bytes = scratch1 > scratch2 ? scratch1 : scratch2;
  const std::int64_t block_bytes = scratch_bytes + branch + kBlockRows * mlp.f;
  parallel_row_blocks(context, mlp.m, mlp.w1, weights, block_bytes, [&](BlockTask task, void* scratch) {
    float* rows = reinterpret_cast<float*>(static_cast<char*>(scratch) + scratch_bytes);
    std::int8_t* hidden = static_cast<std::int8_t*>(scratch) + scratch_bytes + branch;
    task.last_unit = units_of(mlp.f);
    mlp.first(task, hidden, scratch);
    task.last_unit = units_of(mlp.c);
    mlp.second(task, hidden, scratch, rows);
    mlp.finish(task, rows);
  });
}

}  // namespace swin::cpu::SWIN_ISA
