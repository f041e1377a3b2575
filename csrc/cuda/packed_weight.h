// A GEMM's weights on the GPU: s8 [N, K] row-major, as they are in the weight list. Every provider reads them so.
#pragma once

#include <cstdint>
#include <utility>

#include "swin/backend.h"

namespace swin::cuda {

class CudaPackedWeight : public PackedWeight {
 public:
  // `memory` holds n * k bytes on the device, aligned to at least 16.
  CudaPackedWeight(std::int64_t n, std::int64_t k, InputRange input, DeviceBuffer memory)
      : PackedWeight(n, k, input), owner(std::move(memory)), data(static_cast<const std::int8_t*>(owner.get())) {}

  const DeviceBuffer owner;
  const std::int8_t* const data;
};

}  // namespace swin::cuda
