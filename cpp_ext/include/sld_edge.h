/* The safe step in C: Safe Latent Diffusion, classifier-free guidance and the sampler's step.
 *
 * The safe step computes the same numbers as the `guidance` graph of a bundle. The formulas are in
 * export/graphs/guidance.py; names, shapes and columns are those of runtime/contract.py.
 * docs/native.md has an example.
 *
 * B images, n safety concepts, latents of 4 channels of h times w cells. All arrays are
 * C-contiguous: in [B,4,h,w] the last index changes fastest. The library keeps no memory between
 * calls.
 */
#ifndef SLD_EDGE_H
#define SLD_EDGE_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32) && defined(SLD_EDGE_BUILDING)
#define SLD_EDGE_API __declspec(dllexport)
#elif defined(__GNUC__)
#define SLD_EDGE_API __attribute__((visibility("default")))
#else
#define SLD_EDGE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Changes whenever the struct or the meaning of an array changes. */
#define SLD_EDGE_ABI_VERSION 2u

#define SLD_EDGE_CHANNELS 4
#define SLD_EDGE_HISTORY 4
#define SLD_EDGE_ROW_COLUMNS 11
#define SLD_EDGE_SAFETY_COLUMNS 5
#define SLD_EDGE_MAX_CONCEPTS 64
#define SLD_EDGE_MAX_THREADS 1024

/* The result of a function; sld_edge_status_message has a sentence for each. */
enum {
    SLD_EDGE_OK = 0,
    SLD_EDGE_WRONG_ABI = 1,
    SLD_EDGE_NULL_POINTER = 2,
    SLD_EDGE_WRONG_SIZE = 3,
    SLD_EDGE_WRONG_TYPE = 4,
    SLD_EDGE_WRONG_THREADS = 5,
    SLD_EDGE_OVERLAP = 6,
    SLD_EDGE_WRONG_WORKSPACE = 7,
    SLD_EDGE_NO_MEMORY = 8,
    SLD_EDGE_NO_CUDA = 9,
    SLD_EDGE_CUDA_FAILED = 10
};

/* The type of the three predictions. All other arrays and all arithmetic are FP32. */
enum { SLD_EDGE_FP32 = 0, SLD_EDGE_FP16 = 1 };

/* One step. The caller owns all arrays; for the CUDA function they are in device memory.
 * Two inputs may be the same array: bind a branch that was not computed to another branch.
 * An output must not overlap an input or another output. */
typedef struct sld_edge_step {
    uint32_t abi_version;    /* SLD_EDGE_ABI_VERSION */
    int32_t prediction_type; /* SLD_EDGE_FP32 or SLD_EDGE_FP16 */
    int64_t concepts;        /* n, from 1 to SLD_EDGE_MAX_CONCEPTS */
    int64_t images;          /* B */
    int64_t height;          /* h, in cells of the latents */
    int64_t width;           /* w */

    /* inputs */
    const void *noise_pred_uncond; /* [B,4,h,w] of prediction_type */
    const void *noise_pred_text;   /* [B,4,h,w] of prediction_type */
    const void *noise_pred_safety; /* [n,B,4,h,w] of prediction_type */
    const float *latents;          /* [B,4,h,w] */
    const float *momentum;         /* [B,4,h,w], in units of noise */
    const float *history;          /* [4,B,4,h,w], newest first */
    const float *noise;            /* [B,4,h,w] */
    const float *edit_map;         /* [B,h,w] */
    const float *row;              /* [11]: p, q, a, b0 to b4, s, c_in_next, noise_unit */
    const float *guidance_scale;   /* [B] */
    const float *safety; /* [B,5]: scale, threshold, momentum_scale, momentum_beta, active (0, 1) */

    /* outputs */
    float *latents_next;     /* [B,4,h,w] */
    float *unet_latents;     /* [B,4,h,w], latents_next * c_in_next */
    float *momentum_next;    /* [B,4,h,w] */
    float *history_next;     /* [4,B,4,h,w], newest first */
    float *edit_map_next;    /* [B,h,w], edit_map + the mean of |edit| over channels */
    float *share;            /* [B], the share of the latents that the step edits */
    float *strength;         /* [B], norm of the edit / norm of the plain guidance, or 0 */
    float *concept_strength; /* [n,B], the same for the edit of each concept without momentum */
    float *finite;           /* [B], -1: a prediction is not finite; else 0: latents_next; else 1 */
} sld_edge_step;

/* The ABI version of the library. */
SLD_EDGE_API uint32_t sld_edge_abi_version(void);

/* A sentence about a status. It is never NULL; do not free it. */
SLD_EDGE_API const char *sld_edge_status_message(int status);

/* Run a step on the CPU. The number of threads does not change the results. If the status is not
 * SLD_EDGE_OK, no output has changed. */
SLD_EDGE_API int sld_edge_safe_step_cpu(const sld_edge_step *step, int threads);

/* Bytes of device memory that the CUDA function needs as workspace; 0 if it refuses the sizes. */
SLD_EDGE_API size_t sld_edge_cuda_workspace_bytes(const sld_edge_step *step);

/* Put a step on a CUDA stream of the current device. `stream` is a cudaStream_t; NULL is the
 * default stream. The function allocates nothing and does not wait, so a CUDA graph can capture it.
 * Keep arrays and workspace until the stream has done the step. */
SLD_EDGE_API int sld_edge_safe_step_cuda(const sld_edge_step *step, void *workspace,
                                         size_t workspace_bytes, void *stream);

#ifdef __cplusplus
}
#endif

#endif /* SLD_EDGE_H */
