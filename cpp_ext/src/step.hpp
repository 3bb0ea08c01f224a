// The arrays of a step: checks, sizes, and the loads and stores that CPU and CUDA share.
#pragma once

#include <cstddef>
#include <cstdint>

#include "arithmetic.hpp"

namespace sld_edge {

// Sums over an image; after them follows the sum of squares of each concept's edit.
enum Sum { EDIT_SQUARES, GUIDED_SQUARES, EDITED, BAD_PREDICTIONS, BAD_LATENTS, CONCEPT_SQUARES };

// The results for one number of the latents that the sums need.
struct Element {
    float next, edit, guided;
};

// SLD_EDGE_OK, or the first mistake in a step.
int check(const sld_edge_step *step);

// Whether the sizes are in the range that CPU and CUDA code can index.
bool sizes_are_usable(const sld_edge_step &step);

// Cells of one channel of one image.
SLD_EDGE_BOTH std::int64_t cells(const sld_edge_step &step) { return step.height * step.width; }

// Numbers in [B,4,h,w].
SLD_EDGE_BOTH std::int64_t elements(const sld_edge_step &step) {
    return step.images * SLD_EDGE_CHANNELS * cells(step);
}

// Each image is summed in parts of `length` cells; the last part may be shorter.
SLD_EDGE_BOTH std::int64_t parts(const sld_edge_step &step, std::int64_t length) {
    return (cells(step) + length - 1) / length;
}

// Sums of each part.
SLD_EDGE_BOTH int sums(const sld_edge_step &step) {
    return CONCEPT_SQUARES + static_cast<int>(step.concepts);
}

// Do guidance and the sampler's step for the number at index `at`, after all concepts.
SLD_EDGE_BOTH Element step_element(const sld_edge_step &step, const Row &row,
                                   const Settings &settings, std::int64_t at, float uncond,
                                   float text, float edit) {
    const std::int64_t stride = elements(step);
    const float latents = step.latents[at], momentum = step.momentum[at];
    const float *past = step.history + at;
    const float past1 = past[0], past2 = past[stride], past3 = past[2 * stride];
    const float past4 = past[3 * stride];

    const float gamma = edit + settings.momentum_scale * momentum;
    const float guided = uncond + settings.guidance_scale * (text - uncond);
    const float change = applied(gamma, settings);
    const float kept = row.p * latents + row.q * (guided - change);
    const float before = row.b1 * past1 + row.b2 * past2 + row.b3 * past3 + row.b4 * past4;
    const float next = row.a * latents + row.b0 * kept + before + row.s * step.noise[at];

    step.latents_next[at] = next;
    step.unet_latents[at] = row.c_in_next * next;
    step.momentum_next[at] =
        settings.momentum_beta * momentum + (1.0f - settings.momentum_beta) * gamma;
    float *history = step.history_next + at;
    history[0] = kept;
    history[stride] = past1;
    history[2 * stride] = past2;
    history[3 * stride] = past3;
    return {next, change, guided};
}

// Norm / norm of the plain guidance; 0 if there is no plain guidance.
SLD_EDGE_BOTH float ratio_of_norms(double squares, double guided_squares) {
    const float guided = static_cast<float>(std::sqrt(guided_squares));
    return guided == 0.0f ? 0.0f : static_cast<float>(std::sqrt(squares)) / guided;
}

// Write the figures of an image from its sums.
SLD_EDGE_BOTH void report(const sld_edge_step &step, std::int64_t image, const double *total) {
    const double numbers = static_cast<double>(SLD_EDGE_CHANNELS * cells(step));
    const float active = settings_of(step, image).active;
    step.share[image] = active * static_cast<float>(total[EDITED] / numbers);
    step.strength[image] = ratio_of_norms(total[EDIT_SQUARES], total[GUIDED_SQUARES]);
    step.finite[image] = total[BAD_PREDICTIONS] > 0 ? -1.0f : total[BAD_LATENTS] > 0 ? 0.0f : 1.0f;
    for (std::int64_t c = 0; c < step.concepts; ++c) {
        step.concept_strength[c * step.images + image] =
            ratio_of_norms(total[CONCEPT_SQUARES + c], total[GUIDED_SQUARES]);
    }
}

}  // namespace sld_edge
