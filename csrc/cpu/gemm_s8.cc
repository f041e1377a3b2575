// gemm_s8: acc[m, n] = sum_k x[m, k] * w[n, k] exactly in int32, then out = requantized int8 (with or without ReLU) or
// the accumulators. x s8 [M, K], w s8 [N, K] packed at load, out s8 or s32 [M, N]. Formula: swin/ops.h.
//
// A task is a block of rows against a range of columns: the rows are packed once into the thread's scratch, then every
// pair of weight units passes over them from cache.
#include "gemm_core.h"
#include "kernels.h"

namespace swin::cpu::SWIN_ISA {
namespace {

constexpr std::int64_t kBlockRows = 48;  // x K of packed rows: at most 288 KiB for Swin-L's K = 6144 and VNNI
constexpr std::int64_t kMinUnits = 8;    // fewer columns a task would pack rows for too little work

class CpuPackedWeight : public PackedWeight {
 public:
  CpuPackedWeight(std::int64_t n, std::int64_t k)
      : PackedWeight(n, k),
        units(static_cast<std::int8_t*>(::operator new(units_of(n) * unit_bytes(k), std::align_val_t{64}))),
        starts(static_cast<std::int32_t*>(
            ::operator new(units_of(n) * kLanes * sizeof(std::int32_t), std::align_val_t{64}))) {}
  ~CpuPackedWeight() override {
    ::operator delete(units, std::align_val_t{64});
    ::operator delete(starts, std::align_val_t{64});
  }

  std::int8_t* const units;
  std::int32_t* const starts;
};

template <class Emit>
void run(const GemmS8Args& args, const ExecContext& context, Emit&& emit) {
  const CpuPackedWeight& w = static_cast<const CpuPackedWeight&>(*args.w);
  const std::int64_t m = args.x.dim(0), k = w.k, steps = steps_of(k), units = units_of(w.n);
  const std::int64_t row_blocks = ceil_div(m, kBlockRows);
  const std::int64_t wanted = context.threads > 1 ? ceil_div(4 * context.threads, row_blocks) : 1;
  const std::int64_t most = units / kMinUnits > 1 ? units / kMinUnits : 1;
  const std::int64_t splits = wanted < most ? wanted : most;
  parallel_rows(context, row_blocks * splits, 1, [&](std::int64_t first_task, std::int64_t last_task) {
    std::int32_t* rows = static_cast<std::int32_t*>(thread_scratch(kBlockRows * steps * sizeof(std::int32_t)));
    for (std::int64_t task = first_task; task < last_task; ++task) {
      const std::int64_t first = task / splits * kBlockRows, count = min_of(kBlockRows, m - first);
      const std::int64_t split = task % splits;
      if (task == first_task || split == 0) {
        pack_rows(args.x.as<const std::int8_t>() + first * k, k, count, k, rows);
      }
      gemm_block(rows, count, steps, w.units, w.starts, split * units / splits, (split + 1) * units / splits,
                 [&](std::int64_t row, std::int64_t column, Vi acc) { emit(first + row, column, acc); });
    }
  });
}

}  // namespace

void gemm_s8(const GemmS8Args& args, const ExecContext& context) {
  const std::int64_t n = args.w->n;
  if (args.out.dtype == DType::kS32) {
    std::int32_t* out = args.out.as<std::int32_t>();
    run(args, context, [=](std::int64_t row, std::int64_t column, Vi acc) {
      std::memcpy(out + row * n + column, &acc, min_of(kLanes, n - column) * sizeof(std::int32_t));
    });
    return;
  }
  std::int8_t* out = args.out.as<std::int8_t>();
  const float factor = args.factor;
  // ReLU is a lower bound of 0 in place of -128: max(0, acc * factor) is rounded and clamped as any other value.
  const Vf floor = splat(args.epilogue == Epilogue::kRelu ? 0.0f : -128.0f);
  run(args, context, [=](std::int64_t row, std::int64_t column, Vi acc) {
    store_s8(out + row * n + column, max_of(__builtin_convertvector(acc, Vf) * factor, floor),
             min_of(kLanes, n - column));
  });
}

std::unique_ptr<PackedWeight> pack_weight(const std::int8_t* w, std::int64_t n, std::int64_t k) {
  auto packed = std::make_unique<CpuPackedWeight>(n, k);
  for (std::int64_t u = 0; u < units_of(n); ++u) {
    std::int8_t* unit = packed->units + u * unit_bytes(k);
    pack_unit_nk(w, k, n, k, u * kLanes, unit);
    store_start(packed->starts, u, start_of(unit, steps_of(k)));
  }
  return packed;
}

std::int64_t spin_s8(std::int64_t iterations) {
  constexpr int kChains = 12;
  Vi acc[kChains] = {};
  Vi a = broadcast(0x01010101), w = broadcast(0x01010101);
  for (std::int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < kChains; ++j) {
      acc[j] = dot(acc[j], a, w);
      asm volatile("" : "+x"(acc[j]));
    }
  }
  return iterations * kChains * kLanes * kStepK * 2;
}

std::int64_t spin_f32(std::int64_t iterations) {
  constexpr int kChains = 12;
  Vf acc[kChains] = {};
  Vf a = splat(1.0f), b = splat(0.5f);
  for (std::int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < kChains; ++j) {
      acc[j] = acc[j] * a + b;
      asm volatile("" : "+x"(acc[j]));
    }
  }
  return iterations * kChains * kLanes * 2;
}

}  // namespace swin::cpu::SWIN_ISA
