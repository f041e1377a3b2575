// What a graph needs of the machine it runs on: an op table, memory, and weights in the table's layout.
#pragma once

#include <cstddef>
#include <functional>
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

// Work a backend recorded once and can enqueue again at little cost (a CUDA graph).
class Recording {
 public:
  virtual ~Recording() = default;
  virtual void replay(const ExecContext& context) const = 0;
};

class Backend {
 public:
  virtual ~Backend() = default;

  virtual std::string name() const = 0;     // "cpu"
  virtual std::string variant() const = 0;  // the instruction set or GPU architecture its kernels were built for
  virtual const OpTable& ops() const = 0;

  // Zeroed memory aligned to at least 64 bytes; std::bad_alloc where there is none.
  virtual DeviceBuffer allocate(std::size_t bytes) const = 0;
  // These two wait for everything enqueued before them and are done when they return: for tests, not for forward
  // passes.
  virtual void fill(void* data, int byte, std::size_t bytes) const = 0;
  virtual void copy_to_host(void* host, const void* data, std::size_t bytes) const = 0;
  // Within the backend's memory, as work among the operations.
  virtual void copy(void* to, const void* from, std::size_t bytes, const ExecContext& context) const = 0;

  // What `work` enqueues on context.stream, recorded and not run. None where the backend records nothing, or where the
  // stream is being recorded by the caller's caller.
  virtual std::unique_ptr<Recording> record(const ExecContext&, const std::function<void()>&) const { return nullptr; }
  // Milliseconds that `work` takes on context.stream, from start to end.
  virtual double time_ms(const ExecContext& context, const std::function<void()>& work) const;

  // `host` is float16 or float32 in host memory; the result is in ops().float_dtype.
  virtual Parameter upload_parameter(const TensorView& host) const = 0;
  // `host` is float32 in host memory and stays so: what accumulators are scaled with is beyond float16's range.
  virtual Parameter upload_float32(const TensorView& host) const = 0;
  // `host` is s32 in host memory.
  virtual Parameter upload_int32(const TensorView& host) const = 0;
  // `host` is s8 [N, K] in host memory. `input`: what the weight will be multiplied by.
  virtual std::unique_ptr<PackedWeight> pack_weight(const TensorView& host,
                                                    InputRange input = InputRange::kSigned) const = 0;

  // Columns of one row of attention scores in memory, at least `window_area`.
  virtual std::int64_t score_pitch(std::int64_t window_area) const = 0;
  // Whether window_attention takes its bias in compact form for windows of so many tokens, and is the faster for it.
  virtual bool takes_compact_bias(std::int64_t) const { return false; }
  // Whether mlp_residual_norm wants memory for all hidden rows, [rows, hidden].
  virtual bool mlp_keeps_hidden(std::int64_t rows, std::int64_t dim, std::int64_t hidden) const = 0;
};

}  // namespace swin
