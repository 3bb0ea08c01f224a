// The step that both entries take: its checks and its sizes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "arithmetic.hpp"
#include "sld_edge.h"

namespace sld_edge {

// SLD_EDGE_OK, or what is wrong with a step.
int check(const sld_edge_step *step);

// Whether the sizes are within what both entries can index.
bool sizes_are_usable(const sld_edge_step &step);

// Cells of one channel of one image.
SLD_EDGE_BOTH std::int64_t cells(const sld_edge_step &step) { return step.height * step.width; }

// Numbers in [B,4,h,w].
SLD_EDGE_BOTH std::int64_t elements(const sld_edge_step &step) {
    return step.images * CHANNELS * cells(step);
}

// Parts of `length` cells that an image is summed in; the last may be shorter.
SLD_EDGE_BOTH std::int64_t parts(const sld_edge_step &step, std::int64_t length) {
    return (cells(step) + length - 1) / length;
}

// Sums that each part has.
SLD_EDGE_BOTH int sums(const sld_edge_step &step) { return CONCEPT_SQUARES + step.concepts; }

// Write an image's figures from its sums.
SLD_EDGE_BOTH void report(const sld_edge_step &step, std::int64_t image, const double *total) {
    const Numbers of = numbers_of(step.guidance_scale, step.safety, image);
    const double size = static_cast<double>(CHANNELS * cells(step));
    step.share[image] = share_of(total[EDITED], size, of);
    step.strength[image] = ratio_of_norms(total[EDIT_SQUARES], total[GUIDED_SQUARES]);
    step.finite[image] = finite_code(total[BAD_PREDICTIONS], total[BAD_LATENTS]);
    for (int c = 0; c < step.concepts; ++c) {
        step.concept_strength[c * step.images + image] =
            ratio_of_norms(total[CONCEPT_SQUARES + c], total[GUIDED_SQUARES]);
    }
}

}  // namespace sld_edge
