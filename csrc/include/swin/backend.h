// What a graph needs of the machine it runs on: an op table, memory, and weights in the table's layout.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "swin/ops.h"

namespace swin {

// Memory of a backend, freed with the last reference.
using DeviceBuffer = std::shared_ptr<void>;

// A vector or matrix of parameters in the backend's float type.
struct Parameter {
  DeviceBuffer owner;
  TensorView view;
};

class Backend {
 public:
  virtual ~Backend() = default;

  virtual std::string name() const = 0;      // "cpu"
  virtual std::string variant() const = 0;   // the instruction set or GPU architecture its kernels were built for
  virtual const OpTable& ops() const = 0;

  // Zeroed memory aligned to at least 64 bytes; std::bad_alloc where there is none.
  virtual DeviceBuffer allocate(std::size_t bytes) const = 0;
  virtual void fill(void* data, int byte, std::size_t bytes) const = 0;
  virtual void copy_to_host(void* host, const void* data, std::size_t bytes) const = 0;

  // `host` is float16 or float32 in host memory; the result is in ops().float_dtype.
  virtual Parameter upload_parameter(const TensorView& host) const = 0;
  // `host` is s8 [N, K] in host memory.
  virtual std::unique_ptr<PackedWeight> pack_weight(const TensorView& host) const = 0;

  // Columns of one row of attention scores in memory, at least `window_area`.
  virtual std::int64_t score_pitch(std::int64_t window_area) const = 0;
};

}  // namespace swin
