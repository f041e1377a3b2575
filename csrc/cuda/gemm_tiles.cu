// Our own tiles on mma.sync (tile_gemm.cuh) as a GEMM provider: the fused graph's outputs, from Turing to Blackwell.
//
// acc[m, n] = sum_k x[m, k] * w[n, k]; out [M, N] = the output's epilogue of acc * scale[n] + bias[n] (swin/cuda_gemm.h).
// Floor: M*K + N*K + what the epilogue moves in bytes, 2*M*N*K operations. Not timed yet.
#include "gemm_tiles.h"

#include "linear_epilogues.cuh"

namespace swin::cuda {
namespace {

constexpr const char* kOp = "gemm_s8 (swin_tiles)";

// The epilogue that makes the shape's output, handed to `use`.
template <class Use>
void with_epilogue(const GemmShape& shape, const GemmCall& call, const Use& use) {
  const float *scale = call.scale, *bias = call.bias;
  const std::int64_t n = shape.n;
  const auto bytes = static_cast<std::int8_t*>(call.out);
  switch (shape.output) {
    case GemmOutput::kChannelsS8: return use(QuantizeRows<Then::kQuantize>(scale, bias, bytes, n));
    case GemmOutput::kChannelsRelu: return use(QuantizeRows<Then::kRelu>(scale, bias, bytes, n));
    case GemmOutput::kChannelsGelu: return use(QuantizeRows<Then::kGelu>(scale, bias, bytes, n, call.factor));
    case GemmOutput::kChannelsF32: return use(StoreRows<float>(scale, bias, static_cast<float*>(call.out), n));
    case GemmOutput::kChannelsAddF16:
      return use(AddRows<__half, SameRows>(scale, bias, static_cast<__half*>(call.out), n));
    case GemmOutput::kChannelsAddBF16:
      return use(AddRows<__nv_bfloat16, SameRows>(scale, bias, static_cast<__nv_bfloat16*>(call.out), n));
    default: throw UnsupportedError(detail::concat(kOp, ": no epilogue for ", name_of(shape.output)));
  }
}

GemmOperands operands_of(const char* op, const GemmShape& shape, const GemmCall& call) {
  return {call.x, call.w, count32(op, "rows", shape.m), count32(op, "columns", shape.n),
          static_cast<int>(count32(op, "values of K", shape.k))};
}

using Launch = void (*)(const GemmShape&, const GemmCall&, void* stream);

template <class Tile>
void launch(const GemmShape& shape, const GemmCall& call, void* stream) {
  const GemmOperands g = operands_of(kOp, shape, call);
  with_epilogue(shape, call, [&](const auto& epilogue) { launch_tiles<Tile, true>(kOp, g, epilogue, stream); });
}

struct NamedTile {
  const char* name;
  Launch launch;
  int shared_bytes;
};
template <class Tile>
constexpr NamedTile named(const char* name) {
  return {name, launch<Tile>, Tile::kSharedBytes};
}
// The larger a tile, the fewer bytes it takes from the second-level cache for a product, (kM + kN) / (kM * kN), and the
// fewer of them there are for the multiprocessors.
constexpr NamedTile kTileList[] = {
    named<Tile<256, 128, 4, 2>>("mma_256x128"), named<Tile<128, 128, 2, 2>>("mma_128x128"),
    named<LargeTile>("mma_128x96"),             named<Tile<64, 128, 2, 2>>("mma_64x128"),
    named<SmallTile>("mma_64x64"),
};
constexpr int kTuringBytes = 64 << 10;  // of shared memory that a block of it can have

class TileKernel : public GemmKernel {
 public:
  TileKernel(const GemmShape& shape, Launch launch) : shape_(shape), launch_(launch) {}
  void run(const GemmCall& call, void* stream) const override { launch_(shape_, call, stream); }

 private:
  const GemmShape shape_;
  const Launch launch_;
};

class TilesProvider : public GemmProvider {
 public:
  const char* name() const override { return kTiles; }
  std::string version() const override { return "1"; }
  std::vector<GemmCandidate> candidates(const GemmShape& shape, int sm, std::string* why) const override {
    std::vector<GemmCandidate> found;
    if (has_channels(shape.output) && shape.k % 16 == 0 && shape.n % kOwned == 0) {
      for (const NamedTile& tile : kTileList) {
        if (sm >= 80 || tile.shared_bytes <= kTuringBytes) found.push_back({tile.name, ""});
      }
    } else if (why != nullptr) {
      *why = has_channels(shape.output) ? "K must be a multiple of 16, N of 8" : "its kernels scale each channel";
    }
    return found;
  }
  std::unique_ptr<GemmKernel> prepare(const GemmShape& shape, const GemmCandidate& candidate) const override {
    for (const NamedTile& tile : kTileList) {
      if (candidate.name == tile.name) return std::make_unique<TileKernel>(shape, tile.launch);
    }
    throw UnsupportedError(detail::concat(kOp, ": this build has no kernel ", candidate.name));
  }
};

}  // namespace

void tile_gemm(const char* op, const GemmShape& shape, const GemmCall& call, void* stream) {
  const GemmOperands g = operands_of(op, shape, call);
  with_epilogue(shape, call,
                [&](const auto& epilogue) { launch_tile_gemm(op, g, epilogue.aligned(), epilogue, stream); });
}

const GemmProvider& tiles_provider() {
  static const TilesProvider provider;
  return provider;
}

}  // namespace swin::cuda
