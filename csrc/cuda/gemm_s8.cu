// gemm_s8: acc[m, n] = sum_k x[m, k] * w[n, k] exactly in int32, then requantized int8 (with or without ReLU) or the
// accumulators. x s8 [M, K], w s8 [N, K] as it is in the weight list, out s8 or s32 [M, N]. Formula: swin/ops.h.
//
// The entry alone: what runs a shape is the tuner's choice among the providers (gemm_tuner.h). On the host shim the plain
// kernel stands for all of them; CUTLASS and cuBLASLt need a GPU.
#include "device.cuh"
#include "gemm_reference.h"
#include "kernels.h"
#include "packed_weight.h"
#if !defined(SWIN_HOST_SHIM)
#include "gemm_tuner.h"
#endif

namespace swin::cuda {

template <class T>
void gemm_s8(const GemmS8Args& args, const ExecContext& context) {
  const auto& weight = static_cast<const CudaPackedWeight&>(*args.w);
  GemmShape shape{args.x.dim(0), weight.n, weight.k, GemmOutput::kS8};
  if (args.epilogue == Epilogue::kRelu) shape.output = GemmOutput::kS8Relu;
  if (args.out.dtype == DType::kS32) shape.output = GemmOutput::kS32;
  const GemmCall call{args.x.as<const std::int8_t>(), weight.data, args.out.data, args.factor};
#if !defined(SWIN_HOST_SHIM)
  // Every allocation is aligned far beyond this; a slice of one (as tests take) may not be, and then no library takes it.
  if (is_aligned(call.x, 16) && is_aligned(call.w, 16) && is_aligned(call.out, 16)) {
    gemm_tuner().kernel(shape, context.stream).run(call, context.stream);
    return;
  }
#endif
  plain_gemm(shape, call, context.stream);
}

SWIN_INSTANTIATE(gemm_s8, GemmS8Args)

}  // namespace swin::cuda
