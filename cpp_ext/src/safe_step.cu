// The step on a CUDA device. A thread does the four channels of one cell. A block adds up the sums
// of its threads in a tree of fixed shape, and a second kernel adds up the sums of the blocks in
// order, so the figures are the same in every run.
#include <cuda_runtime.h>

#include <limits>

#include "step.hpp"

namespace sld_edge {

constexpr int BLOCK = 128;  // threads of a block, each with one cell

static_assert(CONCEPT_SQUARES + SLD_EDGE_MAX_CONCEPTS <= BLOCK, "one thread for each sum");
static_assert((CONCEPT_SQUARES + SLD_EDGE_MAX_CONCEPTS) * BLOCK * sizeof(float) <= 48 << 10,
              "every device gives a block 48 KiB of shared memory");

#ifndef SLD_EDGE_CUDA_ON_CPU  // the tests run the kernels as loops
// Run `body` on every thread of the block, and wait for all of them.
template <typename Body>
__device__ void each_thread(const Body &body) {
    body(static_cast<int>(threadIdx.x));
    __syncthreads();
}
#endif

// The block's shared memory; the launch sets its size.
template <typename Number>
__device__ Number *shared_memory() {
    extern __shared__ double memory[];
    return reinterpret_cast<Number *>(memory);
}

// Do the step for one cell. Sum `i` goes to `sum[i * BLOCK]`.
template <typename Prediction>
__device__ void step_cell(const sld_edge_step &step, std::int64_t image, std::int64_t cell,
                          float *sum) {
    constexpr int CHANNELS = SLD_EDGE_CHANNELS;
    const Settings settings = settings_of(step, image);
    const Row row = row_of(step);
    const std::int64_t stride = cells(step), first = image * CHANNELS * stride + cell;

    float uncond[CHANNELS], text[CHANNELS], edits[CHANNELS] = {}, mu[CHANNELS] = {};
    float bad_predictions = 0.0f;
    for (int k = 0; k < CHANNELS; ++k) {
        const std::int64_t at = first + k * stride;
        uncond[k] = widen(static_cast<const Prediction *>(step.noise_pred_uncond)[at]);
        text[k] = widen(static_cast<const Prediction *>(step.noise_pred_text)[at]);
        bad_predictions += is_finite(uncond[k]) && is_finite(text[k]) ? 0.0f : 1.0f;
    }
    for (int c = 0; c < step.concepts; ++c) {
        const auto *safety =
            static_cast<const Prediction *>(step.noise_pred_safety) + c * elements(step);
        float squares = 0.0f;
        for (int k = 0; k < CHANNELS; ++k) {
            const float safety_pred = widen(safety[first + k * stride]);
            const ConceptEdit of_concept = concept_edit(uncond[k], text[k], safety_pred, settings);
            const float change = applied(of_concept.edit, settings);
            edits[k] = stronger(of_concept.edit, edits[k]);
            mu[k] = of_concept.mu > mu[k] ? of_concept.mu : mu[k];
            squares += change * change;
            bad_predictions += is_finite(safety_pred) ? 0.0f : 1.0f;
        }
        sum[(CONCEPT_SQUARES + c) * BLOCK] = squares;
    }

    float squares = 0.0f, guided_squares = 0.0f, edited = 0.0f, size = 0.0f, bad_latents = 0.0f;
    for (int k = 0; k < CHANNELS; ++k) {
        const Element e =
            step_element(step, row, settings, first + k * stride, uncond[k], text[k], edits[k]);
        size += std::fabs(e.edit);
        squares += e.edit * e.edit;
        guided_squares += e.guided * e.guided;
        edited += mu[k] > 0.0f ? 1.0f : 0.0f;
        bad_latents += is_finite(e.next) ? 0.0f : 1.0f;
    }
    const std::int64_t at = image * stride + cell;
    step.edit_map_next[at] = step.edit_map[at] + size / CHANNELS;
    sum[EDIT_SQUARES * BLOCK] = squares;
    sum[GUIDED_SQUARES * BLOCK] = guided_squares;
    sum[EDITED * BLOCK] = edited;
    sum[BAD_PREDICTIONS * BLOCK] = bad_predictions;
    sum[BAD_LATENTS * BLOCK] = bad_latents;
}

// Blocks: images * parts(step, BLOCK). Shared memory: sums(step) * BLOCK floats. The sums of each
// block go to `partial` [images, parts, sums].
template <typename Prediction>
__global__ void step_kernel(sld_edge_step step, float *partial) {
    float *shared = shared_memory<float>();
    const std::int64_t blocks = parts(step, BLOCK), block = blockIdx.x;
    const std::int64_t start = block % blocks * BLOCK;
    const int width = sums(step);
    each_thread([&](int thread) {
        if (start + thread < cells(step)) {
            step_cell<Prediction>(step, block / blocks, start + thread, shared + thread);
        } else {
            for (int i = 0; i < width; ++i) shared[i * BLOCK + thread] = 0.0f;
        }
    });
    for (int half = BLOCK / 2; half > 0; half /= 2) {
        each_thread([&](int thread) {
            for (int i = 0; i < width && thread < half; ++i) {
                shared[i * BLOCK + thread] += shared[i * BLOCK + thread + half];
            }
        });
    }
    each_thread([&](int thread) {
        if (thread < width) partial[block * width + thread] = shared[thread * BLOCK];
    });
}

// Blocks: images. Shared memory: sums(step) doubles.
__global__ void report_kernel(sld_edge_step step, const float *partial) {
    double *total = shared_memory<double>();
    const std::int64_t blocks = parts(step, BLOCK), image = blockIdx.x;
    const int width = sums(step);
    each_thread([&](int thread) {
        if (thread >= width) return;
        total[thread] = 0.0;
        for (std::int64_t i = 0; i < blocks; ++i) {
            total[thread] += partial[(image * blocks + i) * width + thread];
        }
    });
    each_thread([&](int thread) {
        if (thread == 0) report(step, image, total);
    });
}

namespace {

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), std::int64_t blocks, std::size_t shared,
                   void *stream, Arguments... arguments) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(BLOCK);
    config.dynamicSmemBytes = shared;
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace
}  // namespace sld_edge

extern "C" size_t sld_edge_cuda_workspace_bytes(const sld_edge_step *step) {
    using namespace sld_edge;
    if (step == nullptr || !sizes_are_usable(*step)) return 0;
    const std::int64_t blocks = step->images * parts(*step, BLOCK);
    if (blocks > std::numeric_limits<std::int32_t>::max()) return 0;  // the largest grid
    return static_cast<std::size_t>(blocks * sums(*step)) * sizeof(float);
}

extern "C" int sld_edge_safe_step_cuda(const sld_edge_step *step, void *workspace,
                                       size_t workspace_bytes, void *stream) {
    using namespace sld_edge;
    const int status = check(step);
    if (status != SLD_EDGE_OK) return status;
    const std::size_t needed = sld_edge_cuda_workspace_bytes(step);
    if (needed == 0) return SLD_EDGE_WRONG_SIZE;
    if (workspace == nullptr || workspace_bytes < needed) return SLD_EDGE_WRONG_WORKSPACE;
    auto *partial = static_cast<float *>(workspace);
    const bool half = step->prediction_type == SLD_EDGE_FP16;
    const std::size_t shared = sums(*step) * BLOCK * sizeof(float);
    cudaError_t error = launch(half ? step_kernel<Half> : step_kernel<float>,
                               step->images * parts(*step, BLOCK), shared, stream, *step, partial);
    if (error == cudaSuccess) {
        error = launch(report_kernel, step->images, sizeof(double) * sums(*step), stream, *step,
                       static_cast<const float *>(partial));
    }
    return error == cudaSuccess ? SLD_EDGE_OK : SLD_EDGE_CUDA_FAILED;
}
