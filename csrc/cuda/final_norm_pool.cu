// final_norm_pool: mean over an image's tokens of LayerNorm(residual). residual T [B*L, C] -> out f32 [B, C].
// Formula: swin/ops.h.
//
// mean_t(n_t * gamma + beta) = mean_t(n_t) * gamma + beta, so gamma and beta are applied once.
// Layout: a block an image, a warp a token at a time with the row in registers (as in norm.cuh); each lane sums its own
// columns over its warp's tokens, and the block adds up its warps in shared memory, in a fixed order. Floor: 2 bytes an
// element; 10 MB for Swin-T at batch 128, so latency and launch are what is left. C not a multiple of 8, misaligned or
// above 1536: mean and deviation of a tile of tokens first, then a thread a column.
#include "device.cuh"
#include "kernels.h"

namespace swin::cuda {
namespace {

constexpr int kPoolThreads = 512;
constexpr int kPoolWarps = kPoolThreads / kWarp;

template <class T, int kChunks>
__global__ void __launch_bounds__(kPoolThreads, 1)
    pool_kernel(const T* __restrict__ residual, const T* __restrict__ gamma, const T* __restrict__ beta,
                float* __restrict__ out, const int tokens, const int chunks) {
  __shared__ __align__(16) float total[kChunks * kWarp * 8];
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const std::int64_t c = 8 * static_cast<std::int64_t>(chunks);
  const float share = 1.0f / static_cast<float>(c);
  float sums[kChunks][8] = {};
  for (int token = warp; token < tokens; token += kPoolWarps) {
    const T* row = residual + (static_cast<std::int64_t>(blockIdx.x) * tokens + token) * c;
    Words4 kept[kChunks];
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      if (k * kWarp + lane < chunks) kept[k] = load_words(row + 8 * (k * kWarp + lane));
    }
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      if (k * kWarp + lane < chunks) {
        float x[8];
        unpack8<T>(kept[k], x);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += x[i];
      }
    }
    const float mean = sum_over<kWarp>(sum) * share;
    float squares = 0.0f;
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      if (k * kWarp + lane < chunks) {
        float x[8];
        unpack8<T>(kept[k], x);
#pragma unroll
        for (int i = 0; i < 8; ++i) squares += (x[i] - mean) * (x[i] - mean);
      }
    }
    const float rstd = rsqrtf(sum_over<kWarp>(squares) * share + kLayerNormEps);
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      if (k * kWarp + lane < chunks) {
        float x[8];
        unpack8<T>(kept[k], x);
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[k][i] += (x[i] - mean) * rstd;
      }
    }
  }
  for (int turn = 0; turn < kPoolWarps; ++turn) {
    if (warp == turn) {
#pragma unroll
      for (int k = 0; k < kChunks; ++k) {
        float* part = total + 8 * (k * kWarp + lane);
#pragma unroll
        for (int i = 0; i < 8; ++i) part[i] = turn == 0 ? sums[k][i] : part[i] + sums[k][i];
      }
    }
    __syncthreads();
  }
  const float weight = 1.0f / static_cast<float>(tokens);
  for (int i = static_cast<int>(threadIdx.x); i < c; i += kPoolThreads) {
    out[blockIdx.x * c + i] = total[i] * weight * to_float(gamma[i]) + to_float(beta[i]);
  }
}

constexpr int kPoolTile = 256;  // tokens whose statistics are in shared memory at a time

template <class T>
__global__ void __launch_bounds__(kPoolThreads, 1)
    pool_scalar_kernel(const T* __restrict__ residual, const T* __restrict__ gamma, const T* __restrict__ beta,
                       float* __restrict__ out, const int tokens, const std::int64_t c) {
  __shared__ float means[kPoolTile], rstds[kPoolTile];
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const T* image = residual + static_cast<std::int64_t>(blockIdx.x) * tokens * c;
  out += blockIdx.x * c;
  for (int first = 0; first < tokens; first += kPoolTile) {
    const int count = min(kPoolTile, tokens - first);
    for (int token = warp; token < count; token += kPoolWarps) {
      const T* row = image + (first + token) * c;
      float sum = 0.0f, squares = 0.0f;
      for (std::int64_t i = lane; i < c; i += kWarp) sum += to_float(row[i]);
      const float mean = sum_over<kWarp>(sum) / static_cast<float>(c);
      for (std::int64_t i = lane; i < c; i += kWarp) {
        const float centred = to_float(row[i]) - mean;
        squares += centred * centred;
      }
      squares = sum_over<kWarp>(squares);
      if (lane == 0) {
        means[token] = mean;
        rstds[token] = rsqrtf(squares / static_cast<float>(c) + kLayerNormEps);
      }
    }
    __syncthreads();
    for (std::int64_t i = threadIdx.x; i < c; i += kPoolThreads) {
      float sum = first == 0 ? 0.0f : out[i];
      for (int token = 0; token < count; ++token) {
        sum += (to_float(image[(first + token) * c + i]) - means[token]) * rstds[token];
      }
      out[i] = first + count < tokens ? sum : sum / static_cast<float>(tokens) * to_float(gamma[i]) + to_float(beta[i]);
    }
    __syncthreads();
  }
}

}  // namespace

template <class T>
void final_norm_pool(const FinalNormPoolArgs& args, const ExecContext& context) {
  const std::int64_t batch = args.out.dim(0), c = args.out.dim(1), chunks = c / 8;
  const unsigned blocks = count32("final_norm_pool", "images", batch);
  const int tokens = static_cast<int>(count32("final_norm_pool", "tokens", args.residual.dim(0) / batch));
  const T *residual = args.residual.as<const T>(), *gamma = args.gamma.as<const T>(), *beta = args.beta.as<const T>();
  float* out = args.out.as<float>();
  const bool vectorised = c % 8 == 0 && chunks <= 6 * kWarp && is_aligned(residual, 16);
  if (!vectorised) {
    SWIN_LAUNCH("final_norm_pool", pool_scalar_kernel<T>, blocks, kPoolThreads, 0, context.stream, residual, gamma,
                beta, out, tokens, c);
  } else if (chunks <= 4 * kWarp) {
    SWIN_LAUNCH("final_norm_pool", (pool_kernel<T, 4>), blocks, kPoolThreads, 0, context.stream, residual, gamma, beta,
                out, tokens, static_cast<int>(chunks));
  } else {
    SWIN_LAUNCH("final_norm_pool", (pool_kernel<T, 6>), blocks, kPoolThreads, 0, context.stream, residual, gamma, beta,
                out, tokens, static_cast<int>(chunks));
  }
}

SWIN_INSTANTIATE(final_norm_pool, FinalNormPoolArgs)

}  // namespace swin::cuda
