#include "swin/geometry.h"

#include <algorithm>

#include "swin/error.h"

namespace swin {

std::vector<StageGeometry> stage_geometries(const ModelConfig& c) {
  const char* where = "swin_int8";
  const std::size_t stages = c.depths.size();
  SWIN_CHECK(ShapeError, where, stages > 0 && c.num_heads.size() == stages && c.window_size.size() == stages,
             "depths, num_heads and window_size have ", stages, ", ", c.num_heads.size(), " and ", c.window_size.size(),
             " entries; each needs one per stage");
  SWIN_CHECK(ShapeError, where, c.patch_size > 0 && c.in_chans > 0 && c.embed_dim > 0 && c.num_classes >= 0,
             "patch_size, in_chans and embed_dim must be positive, num_classes not negative");
  SWIN_CHECK(ShapeError, where,
             c.img_h > 0 && c.img_w > 0 && c.img_h % c.patch_size == 0 && c.img_w % c.patch_size == 0, "an image of ",
             c.img_h, "x", c.img_w, " does not divide into patches of ", c.patch_size);
  SWIN_CHECK(ValueError, where, c.int8_mode == 1 || c.int8_mode == 2, "int8_mode is ", c.int8_mode,
             "; 1 or 2 is needed");
  SWIN_CHECK(ValueError, where, c.version == 1 || c.version == 2, "version is ", c.version,
             "; Swin-V1 and -V2 are known");
  SWIN_CHECK(ValueError, where, c.version == 1 || c.int8_mode == 1, "Swin-V2 has int8_mode 1 only, found ",
             c.int8_mode);
  SWIN_CHECK(ValueError, where, c.version == 1 || !c.qk_scale,
             "Swin-V2 has a logit_scale of each head's own; a qk_scale has no place in it");
  std::vector<StageGeometry> all;
  for (std::size_t i = 0; i < stages; ++i) {
    StageGeometry g{};
    g.dim = c.embed_dim << i;
    g.heads = c.num_heads[i];
    // Patch merging pads odd sizes.
    g.height = i == 0 ? c.img_h / c.patch_size : (all.back().height + 1) / 2;
    g.width = i == 0 ? c.img_w / c.patch_size : (all.back().width + 1) / 2;
    const std::int64_t window = c.window_size[i];
    SWIN_CHECK(ShapeError, where, window > 0 && c.depths[i] > 0, "stage ", i, " has window ", window, " and ",
               c.depths[i], " blocks; both must be positive");
    g.window_h = std::min(g.height, window);
    g.window_w = std::min(g.width, window);
    g.shift_h = g.height <= window ? 0 : window / 2;
    g.shift_w = g.width <= window ? 0 : window / 2;
    g.hidden = static_cast<std::int64_t>(g.dim * c.mlp_ratio);
    g.has_downsample = i + 1 < stages;
    g.pad_first = c.pad_first;
    g.shifts = c.depths[i] > 1 && (g.shift_h > 0 || g.shift_w > 0);
    SWIN_CHECK(ShapeError, where, g.heads > 0 && g.dim % g.heads == 0, "stage ", i, ": ", g.dim,
               " channels do not divide into ", g.heads, " heads");
    SWIN_CHECK(ShapeError, where, g.hidden > 0, "stage ", i, ": mlp_ratio ", c.mlp_ratio, " leaves no hidden channels");
    all.push_back(g);
  }
  return all;
}

std::vector<StageGeometry> stage_geometries(const ModelConfig& c, std::int64_t height, std::int64_t width) {
  const char* where = "swin_int8";
  SWIN_CHECK(ShapeError, where, height <= kMaxImageSide && width <= kMaxImageSide, "an image of ", height, "x", width,
             " is larger than ", kMaxImageSide, "x", kMaxImageSide);
  const std::vector<StageGeometry> own = stage_geometries(c);
  ModelConfig resized = c;
  resized.img_h = height;
  resized.img_w = width;
  std::vector<StageGeometry> all = stage_geometries(resized);
  for (std::size_t i = 0; i < all.size(); ++i) {
    const StageGeometry &g = all[i], &o = own[i];
    const bool smaller = g.window_h < o.window_h || g.window_w < o.window_w;
    SWIN_CHECK(ShapeError, where, g.window_h == o.window_h && g.window_w == o.window_w, "at ", height, "x", width,
               " stage ", i, " would have windows of ", g.window_h, "x", g.window_w, ", the model, made for images of ",
               c.img_h, "x", c.img_w, ", has ", o.window_h, "x", o.window_w, "; ",
               smaller ? "larger images are needed, or a model made for this size"
                       : "convert the checkpoint for a size whose windows are not cut short by the image");
  }
  return all;
}

}  // namespace swin
