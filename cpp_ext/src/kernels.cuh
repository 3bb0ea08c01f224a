// The step on a CUDA device. A thread does the four channels of one cell; a block adds its threads'
// sums up in a tree of fixed shape, and a second kernel adds the blocks' up in order, so the figures
// never change from run to run.
#pragma once

#include "step.hpp"

namespace sld_edge {

inline constexpr int BLOCK = 128;  // threads, and so cells

#ifndef SLD_EDGE_CUDA_ON_CPU  // the tests run the kernels as loops
// Run `body` on every thread of the block, and wait for all of them.
template <typename Body>
__device__ void each_thread(const Body &body) {
    body(static_cast<int>(threadIdx.x));
    __syncthreads();
}
#endif

// The block's shared memory, as large as the launch asked for.
template <typename Number>
__device__ Number *shared_memory() {
    extern __shared__ double memory[];
    return reinterpret_cast<Number *>(memory);
}

// All of one cell. Sum `i` goes to `sum[i * BLOCK]`.
template <typename Prediction, int Combine>
__device__ void step_cell(const sld_edge_step &step, std::int64_t image, std::int64_t cell,
                          float *sum) {
    const Numbers of = numbers_of(step.guidance_scale, step.safety, image);
    const Row row = row_of(step.row);
    const std::int64_t older = elements(step), stride = cells(step);
    const std::int64_t first = image * CHANNELS * stride + cell;
    const auto *safety = static_cast<const Prediction *>(step.noise_pred_safety);

    float uncond[CHANNELS], text[CHANNELS], highest[CHANNELS], lowest[CHANNELS], mu[CHANNELS];
    float bad_predictions = 0.0f;
    for (int k = 0; k < CHANNELS; ++k) {
        const std::int64_t at = first + k * stride;
        uncond[k] = widen(static_cast<const Prediction *>(step.noise_pred_uncond)[at]);
        text[k] = widen(static_cast<const Prediction *>(step.noise_pred_text)[at]);
        bad_predictions += is_finite(uncond[k]) && is_finite(text[k]) ? 0.0f : 1.0f;
    }
    for (int c = 0; c < step.concepts; ++c) {
        float squares = 0.0f;
        for (int k = 0; k < CHANNELS; ++k) {
            const float concept_pred = widen(safety[c * older + first + k * stride]);
            const ConceptEdit of_concept = concept_edit(uncond[k], text[k], concept_pred, of);
            const float edit = of_concept.edit, size = applied(edit, of);
            if (c == 0) {
                highest[k] = lowest[k] = edit;
                mu[k] = of_concept.mu;
            } else if (Combine == SLD_EDGE_SUM) {
                highest[k] += edit;
            } else {
                highest[k] = larger(edit, highest[k]);
                lowest[k] = smaller(edit, lowest[k]);
            }
            mu[k] = of_concept.mu > mu[k] ? of_concept.mu : mu[k];
            squares += size * size;
            bad_predictions += is_finite(concept_pred) ? 0.0f : 1.0f;
        }
        sum[(CONCEPT_SQUARES + c) * BLOCK] = squares;
    }

    float squares = 0.0f, guided = 0.0f, edited = 0.0f, size = 0.0f, bad_latents = 0.0f;
    for (int k = 0; k < CHANNELS; ++k) {
        const std::int64_t at = first + k * stride;
        float past[HISTORY];
        for (int i = 0; i < HISTORY; ++i) past[i] = step.history[i * older + at];
        const float edit = Combine == SLD_EDGE_SUM ? highest[k] : strongest(highest[k], lowest[k]);
        const Element e =
            step_element(uncond[k], text[k], edit, step.latents[at], step.momentum[at], past[0],
                         past[1], past[2], past[3], step.noise[at], row, of);
        step.latents_next[at] = e.next;
        step.unet_latents[at] = e.unet;
        step.momentum_next[at] = e.momentum;
        step.history_next[at] = e.kept;
        for (int i = 1; i < HISTORY; ++i) step.history_next[i * older + at] = past[i - 1];
        size += std::fabs(e.edit);
        squares += e.edit * e.edit;
        guided += e.guided * e.guided;
        edited += mu[k] > 0.0f ? 1.0f : 0.0f;
        bad_latents += is_finite(e.next) ? 0.0f : 1.0f;
    }
    const std::int64_t at = image * stride + cell;
    step.edit_map_next[at] = step.edit_map[at] + size / CHANNELS;
    sum[EDIT_SQUARES * BLOCK] = squares;
    sum[GUIDED_SQUARES * BLOCK] = guided;
    sum[EDITED * BLOCK] = edited;
    sum[BAD_PREDICTIONS * BLOCK] = bad_predictions;
    sum[BAD_LATENTS * BLOCK] = bad_latents;
}

// Blocks: images * parts(step, BLOCK). Shared: sums(step) * BLOCK floats. `partial` gets
// [images, parts, sums].
template <typename Prediction, int Combine>
__global__ void step_kernel(sld_edge_step step, float *partial) {
    float *shared = shared_memory<float>();
    const std::int64_t blocks = parts(step, BLOCK), block = blockIdx.x;
    const std::int64_t start = block % blocks * BLOCK;
    const int width = sums(step);
    each_thread([&](int thread) {
        if (start + thread < cells(step)) {
            step_cell<Prediction, Combine>(step, block / blocks, start + thread, shared + thread);
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

// Blocks: images. Shared: sums(step) doubles.
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

static_assert(CONCEPT_SQUARES + SLD_EDGE_MAX_CONCEPTS <= BLOCK, "one thread a sum");
static_assert((CONCEPT_SQUARES + SLD_EDGE_MAX_CONCEPTS) * BLOCK * sizeof(float) <= 48 << 10,
              "what every device gives a block");

}  // namespace sld_edge
