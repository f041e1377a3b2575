// Engines by the tensors they were made from. The model op is stateless for its caller (so that torch.compile and
// torch.export can trace it and an exported program holds its own weights); packing the weights happens once.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>

#include "swin/engine.h"

namespace swin::binding {

// The engine of these weights, made now if there is none. An engine goes, at the next call of any model, when any of
// its weight tensors is freed, and is made anew when one was changed in place (through torch; writes past torch's
// version counter are not seen, nor any to tensors that were made in inference mode, which have none). Making one is an
// error while the caller records the stream of `context`.
std::shared_ptr<Engine> cached_engine(const std::string& graph, const ModelConfig& config, at::TensorList weights,
                                      const Backend& backend, const ExecContext& context);

}  // namespace swin::binding
