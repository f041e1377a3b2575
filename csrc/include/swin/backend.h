// What a graph needs of the machine it runs on: an op table, memory, and weights in the table's layout.
#pragma once

#include <cstddef>
#include <cstdint>
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

  // Zeroed memory aligned to at least 64 bytes; std::bad_alloc where there is none. It may be asked for while streams
  // are being recorded, and is part of no recording; but freeing it is an error then.
  virtual DeviceBuffer allocate(std::size_t bytes) const = 0;
  // These two are work among the operations of context.stream.
  virtual void fill(void* data, int byte, std::size_t bytes, const ExecContext& context) const = 0;
  virtual void copy(void* to, const void* from, std::size_t bytes, const ExecContext& context) const = 0;
  // Waits for everything enqueued on context.stream before: for tests, not for forward passes.
  virtual void copy_to_host(void* host, const void* data, std::size_t bytes, const ExecContext& context) const = 0;

  // What `work` enqueues on the stream of the context that it is given, recorded and not run. Null where the backend
  // records nothing, or where something that another thread did spoilt the recording.
  using Work = std::function<void(const ExecContext&)>;
  virtual std::unique_ptr<Recording> record(const ExecContext&, const Work&) const { return nullptr; }
  // Which recording of the caller's own context.stream is part of at the moment; 0: of none.
  virtual std::uint64_t callers_recording(const ExecContext&) const { return 0; }
  // Milliseconds that `work` takes on context.stream, from start to end. A GPU runs it once more before, untimed.
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
