/* The safe step: Safe Latent Diffusion, guidance and the sampler's row, in one pass.
 *
 * What the `guidance` graph of a bundle does (export/graphs/guidance.py has the formulas), as a plain C
 * function on the CPU and another on a CUDA device. docs/native.md has an example.
 *
 * Sizes: B images, n concepts, latents of 4 channels of h x w cells. Every array is C-contiguous:
 * in [B,4,h,w] the last index changes fastest. No memory is kept between calls.
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

/* Raised whenever a caller that was compiled against an older header would be misunderstood. */
#define SLD_EDGE_ABI_VERSION 1u

#define SLD_EDGE_MAX_CONCEPTS 64
#define SLD_EDGE_MAX_THREADS 1024

/* What a function returns; sld_edge_status_message has a sentence for each. */
enum {
    SLD_EDGE_OK = 0,
    SLD_EDGE_WRONG_ABI = 1,       /* step->abi_version is not this library's */
    SLD_EDGE_NULL_POINTER = 2,    /* an array, or the step itself, is NULL */
    SLD_EDGE_WRONG_SIZE = 3,      /* B, n, h or w is below 1 or too large */
    SLD_EDGE_WRONG_CHOICE = 4,    /* prediction_type or combine is none of those below */
    SLD_EDGE_WRONG_THREADS = 5,   /* threads is not from 1 to SLD_EDGE_MAX_THREADS */
    SLD_EDGE_OVERLAP = 6,         /* an output lies over an input or over another output */
    SLD_EDGE_WRONG_WORKSPACE = 7, /* the CUDA workspace is NULL or too small */
    SLD_EDGE_NO_MEMORY = 8,       /* the CPU's sums could not be allocated */
    SLD_EDGE_NO_CUDA = 9,         /* this library was built without its CUDA part */
    SLD_EDGE_CUDA_FAILED = 10     /* a kernel was refused; cudaGetLastError() says why */
};

/* The type of the three predictions; everything else is FP32, and so is all arithmetic. */
enum { SLD_EDGE_FP32 = 0, SLD_EDGE_FP16 = 1 };

/* How several concepts' edits become one, element by element. */
enum {
    SLD_EDGE_STRONGEST = 0, /* the edit of the largest size, with its sign */
    SLD_EDGE_SUM = 1
};

/* One step. The caller owns every array; on the CUDA entry all pointers are of the device.
 * Inputs may be the same array (a branch that was not computed is bound to another); an output must
 * not overlap an input or another output. */
typedef struct sld_edge_step {
    uint32_t abi_version;    /* SLD_EDGE_ABI_VERSION */
    int32_t prediction_type; /* SLD_EDGE_FP32 or SLD_EDGE_FP16 */
    int32_t combine;         /* SLD_EDGE_STRONGEST or SLD_EDGE_SUM */
    int32_t concepts;        /* n, 1 to SLD_EDGE_MAX_CONCEPTS */
    int64_t images;          /* B */
    int64_t height;          /* h, in latent cells */
    int64_t width;           /* w */

    /* inputs */
    const void *noise_pred_uncond; /* [B,4,h,w] of prediction_type */
    const void *noise_pred_text;   /* [B,4,h,w] */
    const void *noise_pred_safety; /* [n,B,4,h,w] */
    const float *latents;          /* [B,4,h,w] */
    const float *momentum;         /* [B,4,h,w] */
    const float *history;          /* [4,B,4,h,w], newest first */
    const float *noise;            /* [B,4,h,w] */
    const float *edit_map;         /* [B,h,w] */
    const float *row;              /* [10]: p, q, a, b0 to b4, s, c_in_next */
    const float *guidance_scale;   /* [B] */
    const float *safety; /* [B,5]: scale, threshold, momentum_scale, momentum_beta, active (0, 1) */

    /* outputs */
    float *latents_next;     /* [B,4,h,w] */
    float *unet_latents;     /* [B,4,h,w], latents_next times c_in_next */
    float *momentum_next;    /* [B,4,h,w] */
    float *history_next;     /* [4,B,4,h,w] */
    float *edit_map_next;    /* [B,h,w], plus the mean |edit| over channels */
    float *share;            /* [B], share of the latents that was edited */
    float *strength;         /* [B], norm of the edit against that of the plain guidance; or 0 */
    float *concept_strength; /* [n,B], the same for each concept's own edit, without momentum */
    float *finite; /* [B]: 1; 0 if latents_next is not finite though all predictions were; or -1 */
} sld_edge_step;

/* The ABI version that the library was built with. */
SLD_EDGE_API uint32_t sld_edge_abi_version(void);

/* A sentence about a status; never NULL, never to be freed. */
SLD_EDGE_API const char *sld_edge_status_message(int status);

/* Run a step on the CPU with that many threads; it returns when all is written. The results do not
 * depend on the number of threads. On any status but SLD_EDGE_OK no output was touched. */
SLD_EDGE_API int sld_edge_safe_step_cpu(const sld_edge_step *step, int threads);

/* Bytes of device memory that the CUDA entry needs beside the arrays; 0 for sizes it refuses. */
SLD_EDGE_API size_t sld_edge_cuda_workspace_bytes(const sld_edge_step *step);

/* Queue a step on a CUDA stream (a cudaStream_t, NULL for the default one) of the current device.
 * It allocates nothing and does not wait, so it may be captured into a CUDA graph; arrays and
 * workspace must live until the stream has come this far. */
SLD_EDGE_API int sld_edge_safe_step_cuda(const sld_edge_step *step, void *workspace,
                                         size_t workspace_bytes, void *stream);

#ifdef __cplusplus
}
#endif

#endif /* SLD_EDGE_H */
