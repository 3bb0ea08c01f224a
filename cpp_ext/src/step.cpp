#include "step.hpp"

#include <array>

namespace sld_edge {
namespace {

constexpr std::int64_t LARGEST_SIDE = 1 << 20;
constexpr std::int64_t LARGEST_ARRAY = std::int64_t{1} << 40;

struct Range {
    const void *start;
    std::int64_t bytes;
};

bool overlap(const Range &one, const Range &other) {
    const auto a = reinterpret_cast<std::uintptr_t>(one.start);
    const auto b = reinterpret_cast<std::uintptr_t>(other.start);
    return a < b + static_cast<std::uintptr_t>(other.bytes) &&
           b < a + static_cast<std::uintptr_t>(one.bytes);
}

}  // namespace

bool sizes_are_usable(const sld_edge_step &step) {
    if (step.concepts < 1 || step.concepts > SLD_EDGE_MAX_CONCEPTS) return false;
    for (const std::int64_t side : {step.images, step.height, step.width}) {
        if (side < 1 || side > LARGEST_SIDE) return false;
    }
    // Divisions, because the product can be larger than an int64_t.
    const std::int64_t copies =
        SLD_EDGE_CHANNELS * (step.concepts > SLD_EDGE_HISTORY ? step.concepts : SLD_EDGE_HISTORY);
    return step.images <= LARGEST_ARRAY / copies / cells(step);
}

int check(const sld_edge_step *step) {
    if (step == nullptr) return SLD_EDGE_NULL_POINTER;
    if (step->abi_version != SLD_EDGE_ABI_VERSION) return SLD_EDGE_WRONG_ABI;
    const sld_edge_step &s = *step;
    const bool half = s.prediction_type == SLD_EDGE_FP16;
    if (!half && s.prediction_type != SLD_EDGE_FP32) return SLD_EDGE_WRONG_TYPE;
    if (!sizes_are_usable(s)) return SLD_EDGE_WRONG_SIZE;

    const std::int64_t number = sizeof(float), prediction = elements(s) * (half ? 2 : number);
    const std::int64_t latents = elements(s) * number, history = SLD_EDGE_HISTORY * latents;
    const std::int64_t images = s.images * number, map = images * cells(s);
    constexpr std::size_t OUTPUTS = 9;
    const std::array<Range, 20> arrays = {{{s.latents_next, latents},
                                           {s.unet_latents, latents},
                                           {s.momentum_next, latents},
                                           {s.history_next, history},
                                           {s.edit_map_next, map},
                                           {s.share, images},
                                           {s.strength, images},
                                           {s.concept_strength, s.concepts * images},
                                           {s.finite, images},
                                           {s.noise_pred_uncond, prediction},
                                           {s.noise_pred_text, prediction},
                                           {s.noise_pred_safety, s.concepts * prediction},
                                           {s.latents, latents},
                                           {s.momentum, latents},
                                           {s.history, history},
                                           {s.noise, latents},
                                           {s.edit_map, map},
                                           {s.row, SLD_EDGE_ROW_COLUMNS * number},
                                           {s.guidance_scale, images},
                                           {s.safety, SLD_EDGE_SAFETY_COLUMNS * images}}};
    for (const Range &array : arrays) {
        if (array.start == nullptr) return SLD_EDGE_NULL_POINTER;
    }
    for (std::size_t i = 0; i < OUTPUTS; ++i) {
        for (std::size_t j = i + 1; j < arrays.size(); ++j) {
            if (overlap(arrays[i], arrays[j])) return SLD_EDGE_OVERLAP;
        }
    }
    return SLD_EDGE_OK;
}

}  // namespace sld_edge

extern "C" uint32_t sld_edge_abi_version(void) { return SLD_EDGE_ABI_VERSION; }

extern "C" const char *sld_edge_status_message(int status) {
    switch (status) {
        case SLD_EDGE_OK:
            return "done";
        case SLD_EDGE_WRONG_ABI:
            return "abi_version is not the library's: compile with the header of this library";
        case SLD_EDGE_NULL_POINTER:
            return "the step or one of its arrays is NULL: bind every input and output";
        case SLD_EDGE_WRONG_SIZE:
            return "images, concepts, height or width is below 1 or too large";
        case SLD_EDGE_WRONG_TYPE:
            return "prediction_type is not SLD_EDGE_FP32 or SLD_EDGE_FP16";
        case SLD_EDGE_WRONG_THREADS:
            return "threads is not from 1 to SLD_EDGE_MAX_THREADS";
        case SLD_EDGE_OVERLAP:
            return "an output overlaps an input or another output: give it its own memory";
        case SLD_EDGE_WRONG_WORKSPACE:
            return "the workspace is NULL or smaller than sld_edge_cuda_workspace_bytes";
        case SLD_EDGE_NO_MEMORY:
            return "no memory for the sums";
        case SLD_EDGE_NO_CUDA:
            return "the library has no CUDA part: build it with -DSLD_EDGE_CUDA=ON";
        case SLD_EDGE_CUDA_FAILED:
            return "CUDA refused a kernel: cudaGetLastError() has the reason";
        default:
            return "not a status of this library";
    }
}
