/* The engine without Python: INT8 Swin models from engine files, in C (docs/runtime.md).
 *
 *   swin_model* model;
 *   if (swin_load("swin.engine.safetensors", NULL, &model) != SWIN_OK) { puts(swin_last_error()); ... }
 *   swin_forward(model, images, batch, logits, NULL);
 *   swin_free(model);
 *
 * Every function that can fail returns a swin_status; swin_last_error() then says what was found and what is needed. No
 * function ends the process, prints, or lets an exception out.
 *
 * A model may be used from several threads at a time. On the CPU all calls of a process share one pool of threads: a call
 * that finds the pool busy computes on its own thread alone. */
#ifndef SWIN_INT8_H
#define SWIN_INT8_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define SWIN_API __attribute__((visibility("default")))
#else
#define SWIN_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct swin_model swin_model;

typedef enum swin_status {
  SWIN_OK = 0,
  SWIN_ERROR_FILE = 1,        /* an engine file that is missing, cut off, damaged, or of another kind or version */
  SWIN_ERROR_ARGUMENT = 2,    /* a null pointer, a number out of range, a name nobody knows, an image with NaN */
  SWIN_ERROR_UNSUPPORTED = 3, /* a device, instruction set or interpolation that this machine or this build lacks */
  SWIN_ERROR_MEMORY = 4,
  SWIN_ERROR_INTERNAL = 5
} swin_status;

/* Zero everything, set struct_size to sizeof(swin_options), then what is wanted. A library takes the structs of
 * programs that were built with an older header, and with a newer one as long as what it does not know is zero. */
typedef struct swin_options {
  size_t struct_size;
  const char* device;   /* "cpu" (also NULL), "cuda" (the first GPU) or "cuda:1" */
  const char* isa;      /* CPU: "amx_int8", "avx2", ...; NULL: SWIN_CPU_ISA of the environment, else the best there is */
  int threads;          /* CPU: how many compute one call, at most 1024; 0: see docs/runtime.md */
  const char* residual; /* CUDA: "float16" (also NULL) or "bfloat16", the type of the residual stream */
} swin_options;

/* Set struct_size before the call. Strings live as long as the model. */
typedef struct swin_info {
  size_t struct_size;
  const char* name;   /* of the model: "swin_tiny_patch4_window7_224" */
  const char* graph;  /* "ft_int8", "geluless_int8" or "fused_int8" */
  const char* device; /* "cpu" or "cuda:0" */
  const char* isa;    /* the instruction set or GPU architecture whose kernels run */
  int threads;
  int64_t channels, height, width; /* of an image */
  int64_t classes;                 /* 0: the model has no head */
  int64_t features;                /* channels of the pooled features */
  int64_t outputs;                 /* numbers that swin_forward gives per image: classes, or features without a head */
  int64_t stages;
  const float* mean;               /* [channels], of the images' normalization; NULL where the file does not say */
  const float* std;                /* [channels] */
  const char* const* class_names;  /* [classes], in UTF-8; NULL where the file does not say */
  const char* interpolation;       /* how swin_prepare resizes: "bicubic"; NULL where the file does not say */
  double crop_pct;                 /* what share of the resized image's side it takes; 0 where the file does not say */
  const char* crop_mode;           /* "center" (also NULL), "squash" or "border" */
} swin_info;

/* Reads an engine file and packs its weights for the device. `options` may be NULL. *model is NULL after an error. */
SWIN_API swin_status swin_load(const char* path, const swin_options* options, swin_model** model);

/* The same of a file's `size` bytes in memory, which are not needed after the call. */
SWIN_API swin_status swin_load_memory(const void* bytes, size_t size, const swin_options* options, swin_model** model);

/* The same model for images of another size. The two share the weights in memory, so that this costs next to nothing, and are
 * freed each by itself, in any order. Sides are multiples of the patch size; SWIN_ERROR_ARGUMENT where a stage's windows
 * would be of another size than the model's (docs/backbone.md). *other is NULL after an error. */
SWIN_API swin_status swin_at_size(const swin_model* model, int64_t height, int64_t width, swin_model** other);

/* NULL is let be. No call with the model may be under way. */
SWIN_API void swin_free(swin_model* model);

SWIN_API swin_status swin_get_info(const swin_model* model, swin_info* info);

/* float32 images [batch, channels, height, width], normalized as in training -> float32 out [batch, outputs].
 *
 * On the CPU, `stream` is NULL, and an image with NaN or infinity is refused by name. On CUDA, both are memory of the
 * model's device and `stream` is a cudaStream_t; the call enqueues the work and returns (the first call of a batch size
 * waits, to choose kernels). While `stream` is captured, the call becomes part of the caller's graph, which needs the
 * model for as long as it is launched; there has to be a call of that batch size before. The calling thread's current
 * device is left as it was. */
SWIN_API swin_status swin_forward(swin_model* model, const float* images, int64_t batch, float* out, void* stream);

/* The same up to the pooled features: float32 out [batch, features]. */
SWIN_API swin_status swin_features(swin_model* model, const float* images, int64_t batch, float* out, void* stream);

/* For a model that is a backbone: what its stages give, the residual stream behind a stage's last block, ahead of patch
 * merging and of the final norm. `out` has info.stages places, each NULL (not wanted) or memory for [batch, height, width,
 * channels] of that stage, float32 on the CPU, of the residual stream's type on CUDA. Nothing behind the last stage that is
 * wanted is computed. */
SWIN_API swin_status swin_stages(swin_model* model, const float* images, int64_t batch, void* const* out, void* stream);

/* Height, width and channels of what a stage (from 0) gives. */
SWIN_API swin_status swin_stage_shape(const swin_model* model, int64_t stage, int64_t shape[3]);

/* uint8 pixels [batch, height, width, channels] -> float32 images [batch, channels, height, width] in host memory,
 * (pixel / 255 - mean) / std, to the bit what torchvision's ToTensor and Normalize give. `mean` and `std` have one number
 * per channel; both NULL: the file's own, SWIN_ERROR_ARGUMENT where it has none. */
SWIN_API swin_status swin_normalize(const swin_model* model, const uint8_t* pixels, int64_t batch, const float* mean,
                                    const float* std, float* images);

/* A photograph -> one float32 image [channels, height, width] in host memory, as the model takes it: resized, cropped
 * and normalized as the engine file says, to the bit what timm's evaluation transform gives of an image in Pillow.
 * `pixels` are uint8 [height, width, channels], red first (of a model of one channel, grey), from the upper left
 * corner, sides of 1 to 65536; `stride` is the bytes from one row to the next, 0 where they follow each other. The size
 * of the result is that of the model (swin_get_info), also of one from swin_at_size. SWIN_ERROR_ARGUMENT where the file
 * does not say how, SWIN_ERROR_UNSUPPORTED where it says a way that this library does not know. */
SWIN_API swin_status swin_prepare(const swin_model* model, const uint8_t* pixels, int64_t height, int64_t width,
                                  int64_t stride, float* image);

/* Bytes of buffers that one call with `batch` images works in, beside the weights. They are kept for the next. */
SWIN_API swin_status swin_workspace_bytes(swin_model* model, int64_t batch, int64_t* bytes);

/* What the calling thread's last failed call found; "" before there was one. Valid until its next failed call. */
SWIN_API const char* swin_last_error(void);

/* "0.1.0" */
SWIN_API const char* swin_version(void);

#ifdef __cplusplus
}
#endif

#endif /* SWIN_INT8_H */
