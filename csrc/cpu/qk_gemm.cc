// qk_gemm: scores of one window and head, out[i, j] = requantize(sum_e q[i, e] * k[j, e]); columns N..pitch-1 are 0.
// q, k s8 [BW, h, N, d] -> out s8 [BW, h, N, pitch]. Formula: swin/ops.h.
#include "gemm_core.h"
#include "kernels.h"

namespace swin::cpu::SWIN_ISA {

void qk_gemm(const QkGemmArgs& args, const ExecContext& context) {
  using Dot = SignedDot;
  const std::int64_t n = args.q.dim(2), d = args.q.dim(3), pitch = args.out.dim(3);
  const std::int64_t steps = steps_of<Dot>(d), units = units_of(n), unit = unit_bytes<Dot>(d);
  const float factor = args.factor;
  parallel_rows(context, args.q.dim(0) * args.q.dim(1), 1, [&](std::int64_t first, std::int64_t last) {
    char* scratch = static_cast<char*>(
        thread_scratch(units * kLanes * sizeof(std::int32_t) + rows_bytes<Dot>(n, d) + units * unit));
    std::int8_t* packed_k = reinterpret_cast<std::int8_t*>(scratch);
    std::int32_t* starts = reinterpret_cast<std::int32_t*>(scratch + units * unit);
    for (std::int64_t head = first; head < last; ++head) {
      const std::int8_t* k = args.k.as<const std::int8_t>() + head * n * d;
      for (std::int64_t u = 0; u < units; ++u) {
        pack_unit_nk<Dot>(k, d, n, d, u * kLanes, packed_k + u * unit);
        store_start<Dot>(starts + u * kLanes, packed_k + u * unit, steps);
      }
      const Rows q = prepare_rows<Dot>(args.q.as<const std::int8_t>() + head * n * d, d, n, d, starts + units * kLanes);
      std::int8_t* out = args.out.as<std::int8_t>() + head * n * pitch;
      // Columns past N meet weights of zero and come out as 0; past the last unit nothing writes but this.
      if (pitch > units * kLanes) std::memset(out, 0, n * pitch);
      gemm_block<Dot>(q, n, steps, packed_k, starts, 0, units,
                      [=]<int V>(std::int64_t column) SWIN_INLINE {
                        return [=](std::int64_t row, const Vi* acc) SWIN_INLINE {
                          Vf y[V];
                          for (int v = 0; v < V; ++v) y[v] = __builtin_convertvector(acc[v], Vf) * factor;
                          store_s8_columns<V>(out + row * pitch + column, y, pitch - column);
                        };
                      });
    }
  });
}

}  // namespace swin::cpu::SWIN_ISA
