// The CUDA backend's integer GEMMs as seen from outside: tune them ahead of time, and say which provider runs which.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace swin {

// What a GEMM leaves in memory. FT's graphs (docs/epilogues.md): requantized by one factor, behind a ReLU or not, or the
// accumulators. The fused graph (docs/fused.md): y = float(acc) * scale[n] + bias[n] in float32, and of it
//   kChannelsS8      clamp(rne(y), -128, 127)
//   kChannelsRelu    clamp(rne(max(0, y)), 0, 127)
//   kChannelsGelu    clamp(rne(GELU(y) * factor), -128, 127)
//   kChannelsF32     y
//   kChannelsAddF16, kChannelsAddBF16   out += y, out being float16 or bfloat16, the sum rounded once
enum class GemmOutput {
  kS8,
  kS8Relu,
  kS32,
  kChannelsS8,
  kChannelsRelu,
  kChannelsGelu,
  kChannelsF32,
  kChannelsAddF16,
  kChannelsAddBF16
};

// "s8", "s8_relu", "s32", "channels_s8", "channels_relu", "channels_gelu", "channels_f32", "channels_add_f16",
// "channels_add_bf16"
const char* name_of(GemmOutput output);
GemmOutput gemm_output_of(const std::string& name);  // ValueError where there is no such name
bool has_channels(GemmOutput output);                // whether it is one of the fused graph's, with a scale per channel
int output_bytes(GemmOutput output);                 // of one value

// out [m, n] = epilogue(x s8 [m, k] times w s8 [n, k] transposed).
struct GemmShape {
  std::int64_t m = 0, n = 0, k = 0;
  GemmOutput output = GemmOutput::kS8;

  bool operator==(const GemmShape& o) const { return m == o.m && n == o.n && k == o.k && output == o.output; }
};

// Proves and times every candidate of every provider for each shape on the current device, keeps the fastest of each
// provider in the config file (SWIN_GEMM_CONFIG; where empty, gemm.json in the user's cache folder) and uses them from
// now on. Shapes the file already holds for this device and these library versions are left alone unless `again`.
// Returns JSON: {"config": path, "saved": "" or what went wrong, "device": ..., "sm": ..., "versions": {...},
// "shapes": [{"m", "n", "k", "output", "tuned": whether it was measured now, "chosen": provider, "candidate", "us",
// "best": [{"provider", "candidate", "us"} ...], "offered": {provider: n}, "proven": {provider: n},
// "refused": [{"provider", "candidate", "why"} ...]}]}.
// It allocates and synchronizes: not during a forward pass, not inside a CUDA graph capture.
std::string tune_gemm(const std::vector<GemmShape>& shapes, bool again = false);

// The GEMMs that ran in this process so far, on every device, in the form of "shapes" above without what only tuning
// knows: [{"device", "sm", "m", "n", "k", "output", "provider", "candidate", "us" or null}].
std::string gemm_choices();

// What this build can use, without a device: [{"provider", "version", "built": bool, "why": where it is not}].
std::string gemm_providers();

}  // namespace swin
