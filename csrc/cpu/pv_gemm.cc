// pv_gemm: out[window*N + i, head*d + e] = requantize(sum_j p[i, j] * v[j, e]), j < N.
// p s8 [BW, h, N, pitch], v s8 [BW, h, N, d] -> out s8 [BW*N, h*d]. Formula: swin/ops.h.
#include "gemm_core.h"
#include "kernels.h"

namespace swin::cpu::SWIN_ISA {

void pv_gemm(const PvGemmArgs& args, const ExecContext& context) {
  const std::int64_t heads = args.v.dim(1), n = args.v.dim(2), d = args.v.dim(3), pitch = args.p.dim(3), c = heads * d;
  const std::int64_t steps = steps_of(n), units = units_of(d);
  const float factor = args.factor;
  parallel_rows(context, args.v.dim(0) * heads, 1, [&](std::int64_t first, std::int64_t last) {
    char* scratch =
        static_cast<char*>(thread_scratch((units * kLanes + n * steps) * sizeof(std::int32_t) + units * unit_bytes(n)));
    std::int8_t* packed_v = reinterpret_cast<std::int8_t*>(scratch);
    std::int32_t* starts = reinterpret_cast<std::int32_t*>(scratch + units * unit_bytes(n));
    std::int32_t* packed_p = starts + units * kLanes;
    for (std::int64_t index = first; index < last; ++index) {
      const std::int64_t window = index / heads, head = index % heads;
      for (std::int64_t u = 0; u < units; ++u) {
        pack_unit_kn(args.v.as<const std::int8_t>() + index * n * d, d, d, n, u * kLanes, packed_v + u * unit_bytes(n));
        store_start(starts, u, start_of(packed_v + u * unit_bytes(n), steps));
      }
      pack_rows(args.p.as<const std::int8_t>() + index * n * pitch, pitch, n, n, packed_p);
      std::int8_t* out = args.out.as<std::int8_t>() + window * n * c + head * d;
      gemm_block(packed_p, n, steps, packed_v, starts, 0, units, [&](std::int64_t row, std::int64_t column, Vi acc) {
        store_s8(out + row * c + column, __builtin_convertvector(acc, Vf) * factor, min_of(kLanes, d - column));
      });
    }
  });
}

}  // namespace swin::cpu::SWIN_ISA
