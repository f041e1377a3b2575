// Reads engine files (docs/weight_format.md): the counterpart of pyharness/engine_file.py, without Python.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "prepare.h"
#include "swin/error.h"
#include "swin/graph.h"
#include "swin/tensor.h"

namespace swin::runtime {

// A file that is missing, cut off, no engine file, or of a newer version; the message names the file and what to do.
class FileError : public Error {
 public:
  using Error::Error;
};

// An engine file in memory. The views point into `memory` and stay valid when the file is moved or copied.
struct EngineFile {
  std::string name;                 // of the model: "swin_tiny_patch4_window7_224"
  std::string graph;                // "ft_int8", "geluless_int8", "fused_int8"
  ModelConfig config;               // int8_mode included; whether the numbers make a Swin, stage_geometries() says
  std::vector<double> mean, std;    // of the input's normalization, one per channel; empty where the file does not say
  Preparation preparation;          // of the input; what is wrong with it, preparing images says
  std::vector<std::string> classes;  // their names, in order; empty where the file does not say
  std::vector<TensorView> tensors;  // the weight list, in order; where a slot is empty, a view without data
  std::vector<std::string> names;   // of `tensors`, such as "layers.0.blocks.0.attn.qkv.weight"
  std::shared_ptr<const void> memory;
};

// FileError where the file cannot be read or is not such a file, or its floating-point tensors hold NaN or infinity.
// Whether the tensors are those of the graph, and the scales of use, its loader checks. std::bad_alloc without memory.
EngineFile read_engine_file(const std::string& path);
// The same of a file's content, which is copied: nothing of it is used after the call. `origin` names it in messages.
EngineFile parse_engine_file(const std::string& origin, const void* data, std::size_t bytes);

}  // namespace swin::runtime
