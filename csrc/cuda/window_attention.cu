// window_attention: QK^T, + bias + mask, softmax, PV of one window and head after the other, nothing written in between.
// qkv s8 [BW*N, 3*h*d], bias T [h, N, N], mask T [windows, N, N] or none -> out s8 [BW*N, h*d]. Formula: swin/ops.h.
//
// Layout: a warp computes 16 rows of one window and head, with m16n8k32; for N = 49 a block's four warps are one window and
// head, whose K and V they share in L1.
// - scores stay in the accumulators. Column c of tile i is key (c/2)*2*kTiles + 2i + c%2, so a lane has 2*kTiles adjacent keys
//   of two rows: a row's largest score and the sum of its probabilities are two shuffles away.
// - probabilities, four a word, are at once the left operand of PV: the lane that computed them owns just those k of the
//   product, as a sum over k may run in any order. V's words are transposed in registers as in pv_gemm.cu.
// - up to 64 keys, bias and mask of a lane's scores are in registers, and the warp walks over the images, for which
//   they are the same; up to 160 they are read for each image.
// Floor: 4*h*d bytes a row. Not timed yet. For other N, odd channels and misaligned tensors: a warp a row.
#include "attention.cuh"
#include "kernels.h"
#include "transpose_bytes.cuh"

namespace swin::cuda {
namespace {

constexpr const char* kOp = "window_attention";
constexpr float kLog2E = 1.44269504f;
constexpr int kWarps = kAttentionThreads / kWarp;
constexpr int kHeldTiles = 8, kMostTiles = 20;  // of 8 keys
constexpr int kLongestRow = 1024;               // of the kernel for what is left

struct AttentionShape {
  FastDiv strips, heads, windows;  // strips of 16 rows; windows of the mask, or 1
  unsigned items, images, images_per_warp;  // items: warps
  int n, d;
  float qk_scale, pv_factor;  // qk_scale: qk_factor * log2(e)

  __device__ __forceinline__ std::int64_t channels() const { return static_cast<std::int64_t>(heads.divisor()) * d; }
};

// (bias + mask) * log2(e) of a row's key; -infinity beyond n.
template <class T>
__device__ __forceinline__ float load_added(const T* bias_row, const T* mask_row, int key, int n) {
  if (key >= n) return -INFINITY;
  const float x = to_float(bias_row[key]);
  return (mask_row != nullptr ? x + to_float(mask_row[key]) : x) * kLog2E;
}

template <class T, int kTiles>
__global__ void __launch_bounds__(kAttentionThreads, kTiles <= kHeldTiles ? 3 : 2)
    attention_kernel(const AttentionShape shape, const std::int8_t* __restrict__ qkv, const T* __restrict__ bias,
                     const T* __restrict__ mask, std::int8_t* __restrict__ out) {
  constexpr int kOwnedKeys = 2 * kTiles;
  constexpr bool kHeld = kTiles <= kHeldTiles;
  unsigned strip = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (strip >= shape.items) return;  // a whole warp
  unsigned head = shape.strips.split(strip);
  unsigned window = shape.heads.split(head);
  const unsigned first_image = shape.windows.split(window) * shape.images_per_warp;
  const unsigned last_image = min(first_image + shape.images_per_warp, shape.images);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
  const int n = shape.n, d = shape.d, row = static_cast<int>(strip) * 16 + g, first_key = kOwnedKeys * t;
  const int c = static_cast<int>(shape.channels()), pitch = 3 * c;  // offsets within a window are 32 bits wide

  const T *bias_row[2], *mask_row[2];
  float held[2][kHeld ? kOwnedKeys : 1];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = min(row + 8 * half, n - 1);  // rows beyond the window are computed and not stored
    bias_row[half] = bias + (static_cast<std::int64_t>(head) * n + r) * n;
    mask_row[half] = mask == nullptr ? nullptr : mask + (static_cast<std::int64_t>(window) * n + r) * n;
    if constexpr (kHeld) {
#pragma unroll
      for (int j = 0; j < kOwnedKeys; ++j) held[half][j] = load_added(bias_row[half], mask_row[half], first_key + j, n);
    }
  }

#pragma unroll 1
  for (unsigned image = first_image; image < last_image; ++image) {
    const std::int64_t first_row = static_cast<std::int64_t>(image * shape.windows.divisor() + window) * n;
    const std::int8_t* q = qkv + first_row * pitch + static_cast<std::int64_t>(head) * d;
    const std::int8_t *k = q + c, *v = k + c;
    std::int8_t* target = out + first_row * c + static_cast<std::int64_t>(head) * d;

    int acc[kTiles][4];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) acc[i][j] = 0;
    }
#pragma unroll 1
    for (int step = 0; step < d; step += 32) {
      const int e = step + 8 * t;
      const S8<8> low = load_fragment<true>(q + row * pitch, e, d, row < n);
      const S8<8> high = load_fragment<true>(q + (row + 8) * pitch, e, d, row + 8 < n);
      const std::uint32_t a[4] = {low.word[0], high.word[0], low.word[1], high.word[1]};
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const int key = (g / 2) * kOwnedKeys + 2 * i + g % 2;
        const S8<8> keys = load_fragment<true>(k + key * pitch, e, d, key < n);
        mma_s8_16832(acc[i], a, keys.word);
      }
    }

    std::uint32_t p[2][kTiles / 2];
    float factor[2];  // of PV's sums: pv_factor over the sum of the row's probabilities
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = -INFINITY;
#pragma unroll
      for (int j = 0; j < kOwnedKeys; ++j) {
        int& score = acc[j / 2][2 * half + j % 2];  // from here on the bits of a float
        float added;
        if constexpr (kHeld) {
          added = held[half][j];
        } else {
          added = load_added(bias_row[half], mask_row[half], first_key + j, n);
        }
        const float x = __int2float_rn(score) * shape.qk_scale + added;
        score = __float_as_int(x);
        top = fmaxf(top, x);
      }
      top = max_over<4>(top);
      int sum = 0;
#pragma unroll
      for (int i = 0; i < kTiles / 2; ++i) {
        float y[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) y[j] = 127.0f * exp2_approx(__int_as_float(acc[2 * i + j / 2][2 * half + j % 2]) - top);
        p[half][i] = quantize_x4(y);
        sum = __dp4a(static_cast<int>(p[half][i]), 0x01010101, sum);
      }
      factor[half] = shape.pv_factor / sum_over<4>(static_cast<float>(sum));
    }

#pragma unroll 1
    for (int column = 0; column < d; column += 32) {
      int result[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) result[i][j] = 0;
      }
#pragma unroll
      for (int step = 0; step < kTiles / 4; ++step) {
        const int token = first_key + 8 * step;
        std::uint32_t words[8], first[4], second[4];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const bool exists = token + i < n && column + 4 * g < d;
          words[i] = exists ? load_s8<4>(v + (token + i) * pitch + column + 4 * g).word[0] : 0;
        }
        transpose_bytes(words, first);
        transpose_bytes(words + 4, second);
        const std::uint32_t a[4] = {p[0][2 * step], p[1][2 * step], p[0][2 * step + 1], p[1][2 * step + 1]};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const std::uint32_t b[2] = {first[i], second[i]};
          mma_s8_16832(result[i], a, b);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = row + 8 * half;
        std::uint32_t bytes[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          bytes[j] = requantize_x4<false>(result[0][2 * half + j], result[1][2 * half + j], result[2][2 * half + j],
                                          result[3][2 * half + j], factor[half]);
        }
        if (r < n) store_fragment<true>(target + r * c, column + 8 * t, d, bytes);
      }
    }
  }
}

// Any shape and alignment: a warp a row, scores in shared memory.
template <class T>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_rows_kernel(const AttentionShape shape, const std::int8_t* __restrict__ qkv, const T* __restrict__ bias,
                          const T* __restrict__ mask, std::int8_t* __restrict__ out) {
  __shared__ float scores[kWarps][kLongestRow];
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  unsigned row = blockIdx.x * kWarps + warp;
  if (row >= shape.items) return;  // a whole warp
  unsigned head = shape.strips.split(row);  // `strips`: rows of a window
  const std::int64_t window = shape.heads.split(head);
  const int n = shape.n, d = shape.d;
  const std::int64_t c = shape.channels(), pitch = 3 * c;
  const std::int8_t* first = qkv + window * n * pitch + static_cast<std::int64_t>(head) * d;
  const T* bias_row = bias + (static_cast<std::int64_t>(head) * n + row) * n;
  const T* mask_row =
      mask == nullptr ? nullptr : mask + (window % shape.windows.divisor() * n + static_cast<std::int64_t>(row)) * n;

  float top = -INFINITY;
  for (int j = lane; j < n; j += kWarp) {
    int sum = 0;
    for (int e = 0; e < d; ++e) sum += first[row * pitch + e] * first[j * pitch + c + e];
    float x = to_float(bias_row[j]);
    if (mask_row != nullptr) x += to_float(mask_row[j]);
    x = __int2float_rn(sum) * shape.qk_scale + x * kLog2E;
    scores[warp][j] = x;
    top = fmaxf(top, x);
  }
  top = max_over<kWarp>(top);
  float sum = 0;
  for (int j = lane; j < n; j += kWarp) {
    const float p = static_cast<float>(__float2int_rn(127.0f * exp2_approx(scores[warp][j] - top)));
    scores[warp][j] = p;
    sum += p;
  }
  const float factor = shape.pv_factor / sum_over<kWarp>(sum);
  __syncwarp();
  for (int e = lane; e < d; e += kWarp) {
    float result = 0;  // whole numbers of at most 2^24: exact
    for (int j = 0; j < n; ++j) result += scores[warp][j] * static_cast<float>(first[j * pitch + 2 * c + e]);
    store_quantized<1>(out + (window * n + static_cast<std::int64_t>(row)) * c + static_cast<std::int64_t>(head) * d + e,
                       {result * factor});
  }
}

template <class T, int kTiles>
void run(const WindowAttentionArgs& args, AttentionShape shape, const ExecContext& context) {
  const std::int64_t strips = ceil_div(shape.n, 16);
  const std::int64_t warps = strips * args.bias.dim(0) * (args.mask ? args.mask.dim(0) : 1);
  // As many images a warp as leave enough of them for the largest GPU, few enough to share bias and mask.
  const std::int64_t per_warp = shape.images * warps / (kWarps * 4096);
  shape.images_per_warp = static_cast<unsigned>(per_warp < 1 ? 1 : per_warp > 32 ? 32 : per_warp);
  shape.strips = FastDiv(strips);
  shape.items = count32(kOp, "warps", warps * ceil_div(shape.images, shape.images_per_warp));
  SWIN_LAUNCH(kOp, (attention_kernel<T, kTiles>), static_cast<unsigned>(ceil_div(shape.items, kWarps)), kAttentionThreads, 0,
              context.stream, shape, args.qkv.as<const std::int8_t>(), args.bias.as<const T>(), args.mask.as<const T>(),
              args.out.as<std::int8_t>());
}

}  // namespace

template <class T>
void window_attention(const WindowAttentionArgs& args, const ExecContext& context) {
  const std::int64_t heads = args.bias.dim(0), n = args.bias.dim(1), rows = args.out.dim(0), c = args.out.dim(1);
  const std::int64_t d = c / heads, windows = args.mask ? args.mask.dim(0) : 1, all_windows = rows / n;
  count32(kOp, "rows", rows);
  count32(kOp, "bytes of a window", (n + 16) * 3 * c);
  const AttentionShape shape{FastDiv(n),
                             FastDiv(heads),
                             FastDiv(windows),
                             0,
                             static_cast<unsigned>(all_windows / windows),
                             1,
                             static_cast<int>(n),
                             static_cast<int>(d),
                             args.qk_factor * kLog2E,
                             args.pv_factor};
  const bool aligned = d % 8 == 0 && is_aligned(args.qkv.data, 8) && is_aligned(args.out.data, 8);
  if (aligned && n <= 8 * kHeldTiles) {
    run<T, kHeldTiles>(args, shape, context);
  } else if (aligned && n <= 8 * kMostTiles) {
    run<T, kMostTiles>(args, shape, context);
  } else {
    SWIN_CHECK(UnsupportedError, kOp, n <= kLongestRow, "windows have ", n, " tokens; a GPU takes at most ", kLongestRow);
    AttentionShape by_row = shape;
    by_row.items = count32(kOp, "rows of all heads", rows * heads);
    SWIN_LAUNCH(kOp, attention_rows_kernel<T>, static_cast<unsigned>(ceil_div(by_row.items, kWarps)), kAttentionThreads, 0,
                context.stream, by_row, args.qkv.as<const std::int8_t>(), args.bias.as<const T>(), args.mask.as<const T>(),
                args.out.as<std::int8_t>());
  }
}

SWIN_INSTANTIATE(window_attention, WindowAttentionArgs)

}  // namespace swin::cuda
