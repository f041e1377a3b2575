// linear_residual_norm: a GEMM whose rows go from window order back into the residual stream, and LayerNorm and
// quantization of the rows that are complete. x s8 [M, K], w s8 [C, K] -> residual f32 [M, C], out s8 [M, C].
// Formula: swin/ops.h.
#include "kernels.h"
#include "linear.h"

namespace swin::cpu::SWIN_ISA {

void multiply_and_add(const CpuPackedWeight& w, const std::int8_t* x, const BlockTask& task, void* scratch,
                      const ResidualAdd& add) {
  multiply_block<Inputs::kAny>(w, x, w.k, task, scratch, add);
}

void linear_residual_norm(const LinearResidualNormArgs& args, const ExecContext& context) {
  const CpuPackedWeight& w = static_cast<const CpuPackedWeight&>(*args.w);
  const std::int64_t m = args.x.dim(0), k = w.k, c = w.n;
  float* residual = args.residual.as<float>();
  const Channels channels(args.scale, args.bias, c);
  BlockCounts counts(w, m);
  parallel_blocks(context, m, w, block_bytes(w, kBlockRows), [&](const BlockTask& task, void* scratch) {
    std::int64_t target[kBlockRows];
    ImageRows rows(args.geometry, task.first);
    for (std::int64_t r = 0; r < task.rows; ++r, rows.next()) target[r] = rows.row();
    multiply_and_add(w, args.x.as<const std::int8_t>() + task.first * k, task, scratch,
                     ResidualAdd{channels, residual, target});
    if (!counts.completes(task)) return;
    NormQuantize norm(args.gamma.as<const float>(), args.beta.as<const float>(), c, args.quant);
    for (std::int64_t r = 0; r < task.rows; ++r) {
      norm.add(residual + target[r] * c, args.out.as<std::int8_t>() + target[r] * c);
    }
    norm.flush();
  });
}

}  // namespace swin::cpu::SWIN_ISA
