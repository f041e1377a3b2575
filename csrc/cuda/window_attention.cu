// window_attention: QK^T, + bias + mask, softmax, PV of one window and head after the other, nothing written in between.
// qkv s8 [BW*N, 3*h*d], bias T [h, N, N], mask T [windows, N, N] or [D, N, N] with mask_of s32 [windows], or none,
// head_scale f32 [h] or none -> out s8 [BW*N, h*d]. Formula: swin/ops.h.
//
// Layout: a warp computes 16 rows of one window and head, with m16n8k32; for N = 49 a block's four warps are one window and
// head, whose K and V they share in L1.
// - scores stay in the accumulators. Column c of tile i is key (c/2)*2*kTiles + 2i + c%2, so a lane has 2*kTiles adjacent keys
//   of two rows: a row's largest score and the sum of its probabilities are two shuffles away.
// - probabilities, four a word, are at once the left operand of PV: the lane that computed them owns just those k of the
//   product, as a sum over k may run in any order. V's words are transposed in registers as in pv_gemm.cu.
// - up to 64 keys: bias and mask of a lane's scores are in registers too, and the warp walks over the images, for which
//   they are the same.
// - more keys go by in parts of 32, twice: for the row's largest, then, with the products made again, for PV.
// - cosine: squares of K's bytes are summed where they are loaded, and 1/len goes through shared memory to the lanes
//   that have the key's scores.
// Floor: 4*h*d bytes a row. Not timed yet. For odd channels and misaligned tensors: a warp a row.
#include "attention.cuh"
#include "kernels.h"
#include "transpose_bytes.cuh"

namespace swin::cuda {
namespace {

constexpr const char* kOp = "window_attention";
constexpr float kLog2E = 1.44269504f;
constexpr int kWarps = kAttentionThreads / kWarp;
constexpr int kHeldTiles = 8, kPartTiles = 4;  // of 8 keys
constexpr int kLongestRow = 1024;              // of the kernel for what is left

struct AttentionShape {
  FastDiv strips, heads, windows;  // strips of 16 rows; windows that masks are for, or 1
  unsigned items, images, images_per_warp;  // items: warps
  int n, d;
  float qk_scale, pv_factor;  // qk_scale: log2(e), times qk_factor where there is no head_scale

  __device__ __forceinline__ std::int64_t channels() const { return static_cast<std::int64_t>(heads.divisor()) * d; }
};

// Which mask a window of an image has; negative: none. Without `mask_of` they lie one after the other.
__device__ __forceinline__ int number_of_mask(const void* masks, const std::int32_t* mask_of, unsigned window) {
  if (masks == nullptr) return -1;
  return mask_of == nullptr ? static_cast<int>(window) : mask_of[window];
}
template <class T>
__device__ __forceinline__ const T* row_of_mask(const T* masks, int number, int row, int n) {
  return number < 0 ? nullptr : masks + (static_cast<std::int64_t>(number) * n + row) * n;
}

// (bias + mask) * log2(e) of a row's keys from `key` on; -infinity beyond n. Keys beyond it load the last one's, so that
// no load stands in a branch of its own and waits for the one before.
template <class T, int kKeys>
__device__ __forceinline__ void load_added(const T* bias_row, const T* mask_row, int key, int n, float (&x)[kKeys]) {
#pragma unroll
  for (int j = 0; j < kKeys; ++j) x[j] = to_float(bias_row[min(key + j, n - 1)]);
  if (mask_row != nullptr) {
#pragma unroll
    for (int j = 0; j < kKeys; ++j) x[j] += to_float(mask_row[min(key + j, n - 1)]);
  }
#pragma unroll
  for (int j = 0; j < kKeys; ++j) x[j] = key + j < n ? x[j] * kLog2E : -INFINITY;
}

// Of eight adjacent keys; `vectors`: n is a multiple of 8, and the rows lie at 16-byte boundaries.
template <class T>
__device__ __forceinline__ void load_eight_added(const T* bias_row, const T* mask_row, int key, int n, bool vectors,
                                                 float (&x)[8]) {
  if (vectors && key < n) {
    load_floats(bias_row + key, x);
    float mask[8] = {};
    if (mask_row != nullptr) load_floats(mask_row + key, mask);
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] = (x[j] + mask[j]) * kLog2E;
  } else {
    load_added(bias_row, mask_row, key, n, x);
  }
}

__device__ __forceinline__ int add_squares(const S8<8>& bytes, int sum) {
  const int low = static_cast<int>(bytes.word[0]), high = static_cast<int>(bytes.word[1]);
  return __dp4a(high, high, __dp4a(low, low, sum));
}
__device__ __forceinline__ float inverse_length(float squares) { return rsqrtf(fmaxf(squares, 1.0f)); }

// Of four sums over a quad's lanes, lane t's is the t-th: three shuffles where each of them for all lanes takes eight.
__device__ __forceinline__ int sum_for_lane(const int (&x)[4], int t) {
  const bool upper = t >= 2, odd = t % 2 != 0;
  const int first = (upper ? x[2] : x[0]) + __shfl_xor_sync(kAllLanes, upper ? x[0] : x[2], 2);
  const int second = (upper ? x[3] : x[1]) + __shfl_xor_sync(kAllLanes, upper ? x[1] : x[3], 2);
  return (odd ? second : first) + __shfl_xor_sync(kAllLanes, odd ? first : second, 1);
}

// acc += q k^T for 32 channels, of which this lane loads those from e on; `low` and `high` are q's. The keys are
// 8 * kTiles from first_key on. With kSquares also squares += k^2, those of every fourth tile in this lane.
template <bool kSquares, int kTiles>
__device__ __forceinline__ void multiply_keys(const S8<8>& low, const S8<8>& high, const std::int8_t* k, int pitch,
                                              int first_key, int n, int e, int d, int (&acc)[kTiles][4],
                                              int (&squares)[kTiles / 4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4;
  const std::uint32_t a[4] = {low.word[0], high.word[0], low.word[1], high.word[1]};
#pragma unroll
  for (int i = 0; i < kTiles / 4; ++i) {
    int parts[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int key = first_key + (g / 2) * (2 * kTiles) + 2 * (4 * i + j) + g % 2;
      const S8<8> keys = load_fragment<true>(k + key * pitch, e, d, key < n);
      mma_s8_16832(acc[4 * i + j], a, keys.word);
      if constexpr (kSquares) parts[j] = add_squares(keys, 0);
    }
    if constexpr (kSquares) squares[i] += sum_for_lane(parts, lane % 4);
  }
}

// Turns multiply_keys' sums of squares into 1/len of the warp's keys, in their order, for all of its lanes to read.
template <int kTiles>
__device__ __forceinline__ void share_inverse_lengths(const int (&squares)[kTiles / 4], float* inverse) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
  __syncwarp();  // nobody reads those of the keys before any more
#pragma unroll
  for (int i = 0; i < kTiles / 4; ++i) {
    inverse[(g / 2) * (2 * kTiles) + 2 * (4 * i + t) + g % 2] = inverse_length(static_cast<float>(squares[i]));
  }
  __syncwarp();
}

// result += p v for 32 keys, of which this lane has eight, from `token` on, and columns [column, column + 32).
__device__ __forceinline__ void multiply_values(const std::uint32_t (&p)[4], const std::int8_t* v, int pitch, int token,
                                                int n, int column, int d, int (&result)[4][4]) {
  const int g = static_cast<int>(threadIdx.x) % kWarp / 4;
  std::uint32_t words[8], first[4], second[4];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const bool exists = token + i < n && column + 4 * g < d;
    words[i] = exists ? load_s8<4>(v + (token + i) * pitch + column + 4 * g).word[0] : 0;
  }
  transpose_bytes(words, first);
  transpose_bytes(words + 4, second);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t b[2] = {first[i], second[i]};
    mma_s8_16832(result[i], p, b);
  }
}

// Four probabilities of a row, which are added to its sum.
__device__ __forceinline__ std::uint32_t four_probabilities(const float (&x)[4], float top, int& sum) {
  float y[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) y[j] = 127.0f * exp2_approx(x[j] - top);
  const std::uint32_t p = quantize_x4(y);
  sum = __dp4a(static_cast<int>(p), 0x01010101, sum);
  return p;
}

// Rows row and row + 8 of the window; columns [column, column + 32).
__device__ __forceinline__ void store_rows(std::int8_t* target, int row, int n, int c, int column, int d,
                                           const float (&factor)[2], const int (&result)[4][4]) {
  const int t = static_cast<int>(threadIdx.x) % 4;
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

// Up to 64 keys.
template <class T, bool kCosine>
__global__ void __launch_bounds__(kAttentionThreads, 3)
    attention_kernel(const AttentionShape shape, const std::int8_t* __restrict__ qkv, const T* __restrict__ bias,
                     const T* __restrict__ masks, const std::int32_t* __restrict__ mask_of,
                     std::int8_t* __restrict__ out, const float* __restrict__ head_scale) {
  constexpr int kTiles = kHeldTiles, kOwnedKeys = 2 * kTiles;
  unsigned strip = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (strip >= shape.items) return;  // a whole warp
  unsigned head = shape.strips.split(strip);
  unsigned window = shape.heads.split(head);
  const unsigned first_image = shape.windows.split(window) * shape.images_per_warp;
  const unsigned last_image = min(first_image + shape.images_per_warp, shape.images);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
  const int n = shape.n, d = shape.d, row = static_cast<int>(strip) * 16 + g, first_key = kOwnedKeys * t;
  const int c = static_cast<int>(shape.channels()), full_pitch = 3 * c;  // offsets within a window are 32 bits wide

  const int mask = number_of_mask(masks, mask_of, window);
  float held[2][kOwnedKeys];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = min(row + 8 * half, n - 1);  // rows beyond the window are computed and not stored
    const T* bias_row = bias + (static_cast<std::int64_t>(head) * n + r) * n;
    const T* mask_row = row_of_mask(masks, mask, r, n);
    load_added(bias_row, mask_row, first_key, n, held[half]);
  }

#pragma unroll 1
  for (unsigned image = first_image; image < last_image; ++image) {
    // Else the offsets of all keys stay in registers from image to image, more of them than a cosine leaves free.
    const int pitch = kCosine ? opaque(full_pitch) : full_pitch;
    const std::int64_t first_row = static_cast<std::int64_t>(image * shape.windows.divisor() + window) * n;
    const std::int8_t* q = qkv + first_row * pitch + static_cast<std::int64_t>(head) * d;
    const std::int8_t *k = q + c, *v = k + c;
    std::int8_t* target = out + first_row * c + static_cast<std::int64_t>(head) * d;

    int acc[kTiles][4], key_squares[kTiles / 4] = {}, row_squares[2] = {0, 0};
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
      if constexpr (kCosine) {
        row_squares[0] = add_squares(low, row_squares[0]);
        row_squares[1] = add_squares(high, row_squares[1]);
      }
      multiply_keys<kCosine>(low, high, k, pitch, 0, n, e, d, acc, key_squares);
    }
    float* inverse = nullptr;  // 1/len of the keys
    if constexpr (kCosine) {
      __shared__ __align__(16) float shared[kWarps][8 * kTiles];
      inverse = shared[threadIdx.x / kWarp];
      share_inverse_lengths<kTiles>(key_squares, inverse);
    }

    std::uint32_t p[2][kTiles / 2];
    float factor[2];  // of PV's sums: pv_factor over the sum of the row's probabilities
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float scale[kOwnedKeys];
      if constexpr (kCosine) {
        const float of_row =
            head_scale[head] * shape.qk_scale * inverse_length(sum_over<4>(static_cast<float>(row_squares[half])));
        load_floats(inverse + first_key, scale);
#pragma unroll
        for (int j = 0; j < kOwnedKeys; ++j) scale[j] *= of_row;
      } else {
#pragma unroll
        for (int j = 0; j < kOwnedKeys; ++j) scale[j] = shape.qk_scale;
      }
      float top = -INFINITY;
#pragma unroll
      for (int j = 0; j < kOwnedKeys; ++j) {
        int& score = acc[j / 2][2 * half + j % 2];  // from here on the bits of a float
        const float x = __int2float_rn(score) * scale[j] + held[half][j];
        score = __float_as_int(x);
        top = fmaxf(top, x);
      }
      top = max_over<4>(top);
      int sum = 0;
#pragma unroll
      for (int i = 0; i < kTiles / 2; ++i) {
        float x[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) x[j] = __int_as_float(acc[2 * i + j / 2][2 * half + j % 2]);
        p[half][i] = four_probabilities(x, top, sum);
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
        const std::uint32_t a[4] = {p[0][2 * step], p[1][2 * step], p[0][2 * step + 1], p[1][2 * step + 1]};
        multiply_values(a, v, pitch, first_key + 8 * step, n, column, d, result);
      }
      store_rows(target, row, n, c, column, d, factor, result);
    }
  }
}

// Any number of keys, in parts. Each 32 columns of v have a pass of their own.
template <class T, bool kCosine>
__global__ void __launch_bounds__(kAttentionThreads, 4)
    attention_parts_kernel(const AttentionShape shape, const std::int8_t* __restrict__ qkv, const T* __restrict__ bias,
                           const T* __restrict__ masks, const std::int32_t* __restrict__ mask_of,
                           std::int8_t* __restrict__ out,
                           const float* __restrict__ head_scale, const bool vectors) {
  constexpr int kTiles = kPartTiles, kOwnedKeys = 2 * kTiles, kKeys = 8 * kTiles;
  static_assert(kOwnedKeys == 8);
  unsigned strip = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (strip >= shape.items) return;  // a whole warp
  unsigned head = shape.strips.split(strip);
  unsigned window = shape.heads.split(head);
  const unsigned image = shape.windows.split(window);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
  const int n = shape.n, d = shape.d, row = static_cast<int>(strip) * 16 + g;
  const int c = static_cast<int>(shape.channels()), pitch = 3 * c;  // offsets within a window are 32 bits wide
  const std::int64_t first_row = static_cast<std::int64_t>(image * shape.windows.divisor() + window) * n;
  const std::int8_t* q = qkv + first_row * pitch + static_cast<std::int64_t>(head) * d;
  const std::int8_t *k = q + c, *v = k + c;
  std::int8_t* target = out + first_row * c + static_cast<std::int64_t>(head) * d;

  const int mask = number_of_mask(masks, mask_of, window);
  const T *bias_row[2], *mask_row[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = min(row + 8 * half, n - 1);  // rows beyond the window are computed and not stored
    bias_row[half] = bias + (static_cast<std::int64_t>(head) * n + r) * n;
    mask_row[half] = row_of_mask(masks, mask, r, n);
  }
  const auto load_rows = [&](int e, S8<8>(&fragments)[2]) {
    fragments[0] = load_fragment<true>(q + row * pitch, e, d, row < n);
    fragments[1] = load_fragment<true>(q + (row + 8) * pitch, e, d, row + 8 < n);
  };
  S8<8> first_fragments[2];  // of the channels that most heads have no more than
  load_rows(8 * t, first_fragments);
  float row_scale[2] = {shape.qk_scale, shape.qk_scale};
  if constexpr (kCosine) {
    int squares[2] = {add_squares(first_fragments[0], 0), add_squares(first_fragments[1], 0)};
#pragma unroll 1
    for (int e = 32 + 8 * t; e < d; e += 32) {
      S8<8> fragments[2];
      load_rows(e, fragments);
      squares[0] = add_squares(fragments[0], squares[0]);
      squares[1] = add_squares(fragments[1], squares[1]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      row_scale[half] *= head_scale[head] * inverse_length(sum_over<4>(static_cast<float>(squares[half])));
    }
  }

  // Logits of this lane's eight keys of the part that begins at `first`.
  const auto load_logits = [&](int first, float (&x)[2][kOwnedKeys]) {
    float added[2][kOwnedKeys];  // loaded first, to be there when the products are
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      load_eight_added(bias_row[half], mask_row[half], first + kOwnedKeys * t, n, vectors, added[half]);
    }
    int acc[kTiles][4], squares[kTiles / 4] = {};
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) acc[i][j] = 0;
    }
    multiply_keys<kCosine>(first_fragments[0], first_fragments[1], k, pitch, first, n, 8 * t, d, acc, squares);
#pragma unroll 1
    for (int step = 32; step < d; step += 32) {
      S8<8> fragments[2];
      load_rows(step + 8 * t, fragments);
      multiply_keys<kCosine>(fragments[0], fragments[1], k, pitch, first, n, step + 8 * t, d, acc, squares);
    }
    float inverse[kOwnedKeys];
    if constexpr (kCosine) {
      __shared__ __align__(16) float shared[kWarps][kKeys];
      share_inverse_lengths<kTiles>(squares, shared[threadIdx.x / kWarp]);
      load_floats(shared[threadIdx.x / kWarp] + kOwnedKeys * t, inverse);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < kOwnedKeys; ++j) {
        const float scale = kCosine ? row_scale[half] * inverse[j] : row_scale[half];
        x[half][j] = __int2float_rn(acc[j / 2][2 * half + j % 2]) * scale + added[half][j];
      }
    }
  };

  float top[2] = {-INFINITY, -INFINITY};
#pragma unroll 1
  for (int first = 0; first < n; first += kKeys) {
    float x[2][kOwnedKeys];
    load_logits(first, x);
#pragma unroll
    for (int j = 0; j < kOwnedKeys; ++j) {
      top[0] = fmaxf(top[0], x[0][j]);
      top[1] = fmaxf(top[1], x[1][j]);
    }
  }
  top[0] = max_over<4>(top[0]);
  top[1] = max_over<4>(top[1]);

#pragma unroll 1
  for (int column = 0; column < d; column += 32) {
    int result[4][4], sum[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) result[i][j] = 0;
    }
#pragma unroll 1
    for (int first = 0; first < n; first += kKeys) {
      float x[2][kOwnedKeys];
      load_logits(first, x);
      std::uint32_t p[4];  // of the upper row's keys 0..3, the lower one's, the upper one's 4..7, the lower one's
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* four = x[i % 2] + i / 2 * 4;
        p[i] = four_probabilities({four[0], four[1], four[2], four[3]}, top[i % 2], sum[i % 2]);
      }
      multiply_values(p, v, pitch, first + kOwnedKeys * t, n, column, d, result);
    }
    const float factor[2] = {shape.pv_factor / sum_over<4>(static_cast<float>(sum[0])),
                             shape.pv_factor / sum_over<4>(static_cast<float>(sum[1]))};
    store_rows(target, row, n, c, column, d, factor, result);
  }
}

// Any shape and alignment: a warp a row, scores in shared memory.
template <class T, bool kCosine>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_rows_kernel(const AttentionShape shape, const std::int8_t* __restrict__ qkv, const T* __restrict__ bias,
                          const T* __restrict__ masks, const std::int32_t* __restrict__ mask_of,
                          std::int8_t* __restrict__ out,
                          const float* __restrict__ head_scale) {
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
  const int mask = number_of_mask(masks, mask_of, static_cast<unsigned>(window % shape.windows.divisor()));
  const T* mask_row = row_of_mask(masks, mask, static_cast<int>(row), n);

  float row_scale = shape.qk_scale;
  if constexpr (kCosine) {
    float squares = 0;
    for (int e = lane; e < d; e += kWarp) {
      const int x = first[row * pitch + e];
      squares += static_cast<float>(x * x);
    }
    row_scale *= head_scale[head] * inverse_length(sum_over<kWarp>(squares));
  }
  float top = -INFINITY;
  for (int j = lane; j < n; j += kWarp) {
    int sum = 0, squares = 0;
    for (int e = 0; e < d; ++e) {
      const int key = first[j * pitch + c + e];
      sum += first[row * pitch + e] * key;
      squares += key * key;
    }
    float x = to_float(bias_row[j]);
    if (mask_row != nullptr) x += to_float(mask_row[j]);
    const float scale = kCosine ? row_scale * inverse_length(static_cast<float>(squares)) : row_scale;
    x = __int2float_rn(sum) * scale + x * kLog2E;
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

// Windows of an image, as far as masks tell them apart.
std::int64_t masked_windows(const WindowAttentionArgs& args) {
  if (args.mask_of) return args.mask_of.dim(0);
  return args.mask ? args.mask.dim(0) : 1;
}

template <class T, bool kCosine>
void run(const WindowAttentionArgs& args, AttentionShape shape, const ExecContext& context) {
  const std::int64_t heads = args.bias.dim(0), windows = masked_windows(args);
  const auto start = [&](auto kernel, std::int64_t warps, auto... more) {
    shape.items = count32(kOp, "warps", warps);
    SWIN_LAUNCH(kOp, kernel, static_cast<unsigned>(ceil_div(warps, kWarps)), kAttentionThreads, 0, context.stream,
                shape, args.qkv.as<const std::int8_t>(), args.bias.as<const T>(), args.mask.as<const T>(),
                args.mask_of.as<const std::int32_t>(), args.out.as<std::int8_t>(), args.head_scale.as<const float>(), more...);
  };
  if (shape.d % 8 != 0 || !is_aligned(args.qkv.data, 8) || !is_aligned(args.out.data, 8)) {
    SWIN_CHECK(UnsupportedError, kOp, shape.n <= kLongestRow, "windows have ", shape.n, " tokens; a GPU takes at most ",
               kLongestRow);
    shape.strips = FastDiv(shape.n);
    start(attention_rows_kernel<T, kCosine>, args.out.dim(0) * heads);
    return;
  }
  const std::int64_t strips = ceil_div(shape.n, 16), warps = strips * heads * windows;  // of an image
  shape.strips = FastDiv(strips);
  if (shape.n <= 8 * kHeldTiles) {
    // As many images a warp as leave enough of them for the largest GPU, few enough to share bias and mask.
    const std::int64_t per_warp = shape.images * warps / (kWarps * 4096);
    shape.images_per_warp = static_cast<unsigned>(per_warp < 1 ? 1 : per_warp > 32 ? 32 : per_warp);
    start(attention_kernel<T, kCosine>, warps * ceil_div(shape.images, shape.images_per_warp));
  } else {
    const bool vectors = shape.n % 8 == 0 && is_aligned(args.bias.data, 16) && is_aligned(args.mask.data, 16);
    start(attention_parts_kernel<T, kCosine>, warps * shape.images, vectors);
  }
}

}  // namespace

template <class T>
void window_attention(const WindowAttentionArgs& args, const ExecContext& context) {
  SWIN_CHECK(UnsupportedError, kOp, args.bias.rank == 3, "bias is compact, ", args.bias.describe(),
             "; a GPU takes [h, N, N]");
  const std::int64_t heads = args.bias.dim(0), n = args.bias.dim(1), rows = args.out.dim(0), c = args.out.dim(1);
  const std::int64_t d = c / heads, windows = masked_windows(args), all_windows = rows / n;
  count32(kOp, "rows", rows);
  count32(kOp, "bytes of a window", (n + 32) * 3 * c);
  const AttentionShape shape{FastDiv(1),
                             FastDiv(heads),
                             FastDiv(windows),
                             0,
                             static_cast<unsigned>(all_windows / windows),
                             1,
                             static_cast<int>(n),
                             static_cast<int>(d),
                             args.head_scale ? kLog2E : args.qk_factor * kLog2E,
                             args.pv_factor};
  if (args.head_scale) {
    run<T, true>(args, shape, context);
  } else {
    run<T, false>(args, shape, context);
  }
}

SWIN_INSTANTIATE(window_attention, WindowAttentionArgs)

}  // namespace swin::cuda
