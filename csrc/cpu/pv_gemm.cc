// pv_gemm: out[window*N + i, head*d + e] = requantize(sum_j p[i, j] * v[j, e]), j < N.
// p s8 [BW, h, N, pitch] of 0..127, v s8 [BW, h, N, d] -> out s8 [BW*N, h*d]. Formula: swin/ops.h.
#include "gemm_core.h"
#include "kernels.h"

namespace swin::cpu::SWIN_ISA {

void pv_gemm(const PvGemmArgs& args, const ExecContext& context) {
  using Dot = NonNegativeDot;
  const std::int64_t heads = args.v.dim(1), n = args.v.dim(2), d = args.v.dim(3), pitch = args.p.dim(3), c = heads * d;
  const std::int64_t steps = steps_of<Dot>(n), units = units_of(d), unit = unit_bytes<Dot>(n);
  const float factor = args.factor;
  parallel_rows(context, args.v.dim(0) * heads, 1, [&](std::int64_t first, std::int64_t last) {
    char* scratch = static_cast<char*>(
        thread_scratch(units * kLanes * sizeof(std::int32_t) + rows_bytes<Dot>(n, n) + units * unit));
    std::int8_t* packed_v = reinterpret_cast<std::int8_t*>(scratch);
    std::int32_t* starts = reinterpret_cast<std::int32_t*>(scratch + units * unit);
    for (std::int64_t index = first; index < last; ++index) {
      const std::int64_t window = index / heads, head = index % heads;
      for (std::int64_t u = 0; u < units; ++u) {
        pack_unit_kn<Dot>(args.v.as<const std::int8_t>() + index * n * d, d, d, n, u * kLanes, packed_v + u * unit);
        store_start<Dot>(starts + u * kLanes, packed_v + u * unit, steps);
      }
      // Whole words may be read where the pitch has room for them: what lies behind column N meets weights of zero.
      const std::int8_t* rows = args.p.as<const std::int8_t>() + index * n * pitch;
      const Rows p = Dot::kInPlace && pitch >= steps * Dot::kStepK
                         ? Rows{reinterpret_cast<const char*>(rows), pitch}
                         : prepare_rows<Dot>(rows, pitch, n, n, starts + units * kLanes);
      std::int8_t* out = args.out.as<std::int8_t>() + window * n * c + head * d;
      gemm_block<Dot>(p, n, steps, packed_v, starts, 0, units,
                      [=]<int V>(std::int64_t column) SWIN_INLINE {
                        return [=](std::int64_t row, const Vi* acc) SWIN_INLINE {
                          Vf y[V];
                          for (int v = 0; v < V; ++v) y[v] = __builtin_convertvector(acc[v], Vf) * factor;
                          store_s8_columns<V>(out + row * c + column, y, d - column);
                        };
                      });
    }
  });
}

}  // namespace swin::cpu::SWIN_ISA
