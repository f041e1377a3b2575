// softmax: out[i, :] = quantize(softmax_j(scores[i, j] * dequant * scale + bias[head, i, j] + mask[window, i, j])).
// scores s8 [BW, h, N, pitch], bias T [h, N, N], mask T [windows, N, N] or none -> out s8 [BW, h, N, pitch]; columns
// N..pitch-1 are 0. Formula: swin/ops.h.
//
// Layout: 8, 16 or 32 lanes a row, 8 columns a lane and step, so that a row of 49 leaves 1 of 8 lanes partly idle where
// a warp a row would leave 18 of 32. The row stays in registers: read once, written once. Bias and mask depend on head,
// row and window of the image, not on the image: a block takes 16 (8, 4) rows of one window and walks over the images,
// with bias + mask of its rows in registers as float32. Per score that is 1 multiply-add, 1 exponential, 1
// multiplication and the conversions; the two table lookups of the straightforward kernel, unaligned for odd N, are
// gone from the loop. The next image's scores are loaded before this one's are used. Floor: 2 bytes a score (pitch, not
// N). Not timed yet. For other pitches and N > 768: a warp a row, three passes.
#include "device.cuh"
#include "kernels.h"

namespace swin::cuda {
namespace {

constexpr int kThreads = 128;
constexpr float kLog2E = 1.44269504f;
constexpr float kLowest = -3.0e38f;

struct SoftmaxShape {
  FastDiv n, row_blocks, windows;  // windows of the mask, or 1
  unsigned rows;                   // h * N: rows of one window, over its heads
  unsigned images, images_per_block;
  int pitch;
  float scale, quant;  // scale: dequant * scale * log2(e)
};

template <class T, int kLanes, int kChunks>
__global__ void __launch_bounds__(kThreads)
    softmax_kernel(const SoftmaxShape shape, const std::int8_t* __restrict__ scores, const T* __restrict__ bias,
                   const T* __restrict__ mask, std::int8_t* __restrict__ out) {
  constexpr int kRows = kThreads / kLanes;
  const int lane = static_cast<int>(threadIdx.x) % kLanes, n = static_cast<int>(shape.n.divisor());
  unsigned row_block = blockIdx.x;
  unsigned window = shape.row_blocks.split(row_block);
  const unsigned first_image = shape.windows.split(window) * shape.images_per_block;
  const unsigned last_image = min(first_image + shape.images_per_block, shape.images);
  const unsigned slot = row_block * kRows + threadIdx.x / kLanes;
  const bool live = slot < shape.rows;
  const unsigned row = live ? slot : shape.rows - 1;

  // (bias + mask) * log2(e); columns past N are -infinity and come out as 0.
  float added[kChunks][8];
  unsigned token = row;
  shape.n.split(token);
  const T* bias_row = bias + static_cast<std::int64_t>(row) * n;
  const T* mask_row = mask == nullptr ? nullptr : mask + (static_cast<std::int64_t>(window) * n + token) * n;
#pragma unroll
  for (int k = 0; k < kChunks; ++k) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int j = (k * kLanes + lane) * 8 + i;
      float x = -INFINITY;
      if (j < n) {
        x = to_float(bias_row[j]);
        if (mask_row != nullptr) x += to_float(mask_row[j]);
        x *= kLog2E;
      }
      added[k][i] = x;
    }
  }

  const std::int64_t step = static_cast<std::int64_t>(shape.windows.divisor()) * shape.rows * shape.pitch;  // an image
  std::int64_t offset =
      ((static_cast<std::int64_t>(first_image) * shape.windows.divisor() + window) * shape.rows + row) * shape.pitch +
      8 * lane;
  S8<8> next[kChunks];
#pragma unroll
  for (int k = 0; k < kChunks; ++k) {
    next[k] = S8<8>{};
    if ((k * kLanes + lane) * 8 < shape.pitch) next[k] = load_s8<8>(scores + offset + 8 * k * kLanes);
  }
  for (unsigned image = first_image; image < last_image; ++image, offset += step) {
    float x[kChunks][8];
    float top = kLowest;
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      to_floats(next[k], x[k]);
      if (image + 1 < last_image && (k * kLanes + lane) * 8 < shape.pitch) {
        next[k] = load_s8<8>(scores + offset + step + 8 * k * kLanes);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        x[k][i] = x[k][i] * shape.scale + added[k][i];
        top = fmaxf(top, x[k][i]);
      }
    }
    top = max_over<kLanes>(top);
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        x[k][i] = exp2_approx(x[k][i] - top);
        sum += x[k][i];
      }
    }
    const float factor = shape.quant * reciprocal_approx(sum_over<kLanes>(sum));
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
#pragma unroll
      for (int i = 0; i < 8; ++i) x[k][i] *= factor;
      if (live && (k * kLanes + lane) * 8 < shape.pitch) store_quantized<8>(out + offset + 8 * k * kLanes, x[k]);
    }
  }
}

// Any N and pitch.
template <class T>
__global__ void __launch_bounds__(kThreads)
    softmax_scalar_kernel(const SoftmaxShape shape, const std::int8_t* __restrict__ scores, const T* __restrict__ bias,
                          const T* __restrict__ mask, std::int8_t* __restrict__ out, const std::int64_t all_rows) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, n = static_cast<int>(shape.n.divisor());
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (index >= all_rows) return;  // a whole warp
  const std::int64_t bw = index / shape.rows, row = index % shape.rows;
  const T* bias_row = bias + row * n;
  const T* mask_row = mask == nullptr ? nullptr : mask + (bw % shape.windows.divisor() * n + row % n) * n;
  const std::int8_t* q = scores + index * shape.pitch;
  const auto at = [&](int j) {
    float x = to_float(bias_row[j]);
    if (mask_row != nullptr) x += to_float(mask_row[j]);
    return static_cast<float>(q[j]) * shape.scale + x * kLog2E;
  };
  float top = kLowest;
  for (int j = lane; j < n; j += kWarp) top = fmaxf(top, at(j));
  top = max_over<kWarp>(top);
  float sum = 0.0f;
  for (int j = lane; j < n; j += kWarp) sum += exp2_approx(at(j) - top);
  const float factor = shape.quant * reciprocal_approx(sum_over<kWarp>(sum));
  for (int j = lane; j < shape.pitch; j += kWarp) {
    const float y[1] = {j < n ? exp2_approx(at(j) - top) * factor : 0.0f};
    store_quantized<1>(out + index * shape.pitch + j, y);
  }
}

template <class T, int kLanes, int kChunks>
void run(const SoftmaxArgs& args, SoftmaxShape shape, const ExecContext& context) {
  const std::int64_t row_blocks = ceil_div(shape.rows, kThreads / kLanes), windows = args.mask ? args.mask.dim(0) : 1;
  // As many images a block as leave a few thousand blocks: enough for the largest GPU, few enough to share the tables.
  const std::int64_t per_block = shape.images * row_blocks * windows / 4096;
  shape.images_per_block = static_cast<unsigned>(per_block < 1 ? 1 : per_block > 32 ? 32 : per_block);
  shape.row_blocks = FastDiv(row_blocks);
  const std::int64_t blocks = row_blocks * windows * ceil_div(shape.images, shape.images_per_block);
  SWIN_LAUNCH("softmax", (softmax_kernel<T, kLanes, kChunks>), count32("softmax", "blocks", blocks), kThreads, 0,
              context.stream, shape, args.scores.as<const std::int8_t>(), args.bias.as<const T>(),
              args.mask.as<const T>(), args.out.as<std::int8_t>());
}

}  // namespace

template <class T>
void softmax(const SoftmaxArgs& args, const ExecContext& context) {
  const std::int64_t bw = args.scores.dim(0), heads = args.scores.dim(1), n = args.scores.dim(2),
                     pitch = args.scores.dim(3);
  const std::int64_t windows = args.mask ? args.mask.dim(0) : 1;
  const SoftmaxShape shape{FastDiv(n),
                           FastDiv(1),
                           FastDiv(windows),
                           count32("softmax", "rows of a window", heads * n),
                           count32("softmax", "windows", bw / windows),
                           1,
                           static_cast<int>(count32("softmax", "columns", pitch)),
                           args.dequant * args.scale * kLog2E,
                           args.quant};
  const bool vectorised = pitch % 8 == 0 && is_aligned(args.scores.data, 8) && is_aligned(args.out.data, 8);
  if (!vectorised || pitch > 768) {
    const std::int64_t rows = bw * heads * n;
    SWIN_LAUNCH("softmax", softmax_scalar_kernel<T>, count32("softmax", "blocks", ceil_div(rows, kThreads / kWarp)),
                kThreads, 0, context.stream, shape, args.scores.as<const std::int8_t>(), args.bias.as<const T>(),
                args.mask.as<const T>(), args.out.as<std::int8_t>(), rows);
  } else if (pitch <= 64) {
    run<T, 8, 1>(args, shape, context);
  } else if (pitch <= 128) {
    run<T, 8, 2>(args, shape, context);
  } else if (pitch <= 192) {
    run<T, 8, 3>(args, shape, context);
  } else if (pitch <= 256) {
    run<T, 8, 4>(args, shape, context);
  } else if (pitch <= 384) {
    run<T, 16, 3>(args, shape, context);
  } else {
    run<T, 32, 3>(args, shape, context);
  }
}

SWIN_INSTANTIATE(softmax, SoftmaxArgs)

}  // namespace swin::cuda
