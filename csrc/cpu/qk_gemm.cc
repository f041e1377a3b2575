// qk_gemm: scores of one window and head, out[i, j] = requantize(sum_e q[i, e] * k[j, e]); columns N..pitch-1 are 0.
// q, k s8 [BW, h, N, d] -> out s8 [BW, h, N, pitch]. Formula: swin/ops.h.
#include "gemm_core.h"
#include "kernels.h"

namespace swin::cpu::SWIN_ISA {

void qk_gemm(const QkGemmArgs& args, const ExecContext& context) {
  const std::int64_t n = args.q.dim(2), d = args.q.dim(3), pitch = args.out.dim(3);
  const std::int64_t steps = steps_of(d), units = units_of(n);
  const float factor = args.factor;
  parallel_rows(context, args.q.dim(0) * args.q.dim(1), 1, [&](std::int64_t first, std::int64_t last) {
    char* scratch =
        static_cast<char*>(thread_scratch((units * kLanes + n * steps) * sizeof(std::int32_t) + units * unit_bytes(d)));
    std::int8_t* packed_k = reinterpret_cast<std::int8_t*>(scratch);
    std::int32_t* starts = reinterpret_cast<std::int32_t*>(scratch + units * unit_bytes(d));
    std::int32_t* packed_q = starts + units * kLanes;
    for (std::int64_t head = first; head < last; ++head) {
      const std::int8_t* k = args.k.as<const std::int8_t>() + head * n * d;
      for (std::int64_t u = 0; u < units; ++u) {
        pack_unit_nk(k, d, n, d, u * kLanes, packed_k + u * unit_bytes(d));
        store_start(starts, u, start_of(packed_k + u * unit_bytes(d), steps));
      }
      pack_rows(args.q.as<const std::int8_t>() + head * n * d, d, n, d, packed_q);
      std::int8_t* out = args.out.as<std::int8_t>() + head * n * pitch;
      // Columns past N meet weights of zero and come out as 0; past the last unit nothing writes but this.
      if (pitch > units * kLanes) std::memset(out, 0, n * pitch);
      gemm_block(packed_q, n, steps, packed_k, starts, 0, units, [&](std::int64_t row, std::int64_t column, Vi acc) {
        store_s8(out + row * pitch + column, __builtin_convertvector(acc, Vf) * factor, min_of(kLanes, pitch - column));
      });
    }
  });
}

}  // namespace swin::cpu::SWIN_ISA
