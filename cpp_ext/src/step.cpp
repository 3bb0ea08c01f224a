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
    // Divided, for the product itself may not fit.
    const std::int64_t copies = CHANNELS * (step.concepts > HISTORY ? step.concepts : HISTORY);
    return step.images <= LARGEST_ARRAY / copies / cells(step);
}

int check(const sld_edge_step *step) {
    if (step == nullptr) return SLD_EDGE_NULL_POINTER;
    if (step->abi_version != SLD_EDGE_ABI_VERSION) return SLD_EDGE_WRONG_ABI;
    const sld_edge_step &s = *step;
    if (s.prediction_type != SLD_EDGE_FP32 && s.prediction_type != SLD_EDGE_FP16) {
        return SLD_EDGE_WRONG_CHOICE;
    }
    if (s.combine != SLD_EDGE_STRONGEST && s.combine != SLD_EDGE_SUM) return SLD_EDGE_WRONG_CHOICE;
    if (!sizes_are_usable(s)) return SLD_EDGE_WRONG_SIZE;

    const std::int64_t wide = sizeof(float);
    const std::int64_t prediction = elements(s) * (s.prediction_type == SLD_EDGE_FP16 ? 2 : wide);
    const std::int64_t whole = elements(s) * wide;
    const std::int64_t map = s.images * cells(s) * wide, images = s.images * wide;
    const std::array<Range, 9> outputs = {{{s.latents_next, whole},
                                           {s.unet_latents, whole},
                                           {s.momentum_next, whole},
                                           {s.history_next, HISTORY * whole},
                                           {s.edit_map_next, map},
                                           {s.share, images},
                                           {s.strength, images},
                                           {s.concept_strength, s.concepts * images},
                                           {s.finite, images}}};
    const std::array<Range, 11> inputs = {{{s.noise_pred_uncond, prediction},
                                           {s.noise_pred_text, prediction},
                                           {s.noise_pred_safety, s.concepts * prediction},
                                           {s.latents, whole},
                                           {s.momentum, whole},
                                           {s.history, HISTORY * whole},
                                           {s.noise, whole},
                                           {s.edit_map, map},
                                           {s.row, 10 * wide},
                                           {s.guidance_scale, images},
                                           {s.safety, 5 * images}}};
    for (const Range &input : inputs) {
        if (input.start == nullptr) return SLD_EDGE_NULL_POINTER;
    }
    for (const Range &output : outputs) {
        if (output.start == nullptr) return SLD_EDGE_NULL_POINTER;
    }
    for (std::size_t i = 0; i < outputs.size(); ++i) {
        for (const Range &input : inputs) {
            if (overlap(outputs[i], input)) return SLD_EDGE_OVERLAP;
        }
        for (std::size_t j = 0; j < i; ++j) {
            if (overlap(outputs[i], outputs[j])) return SLD_EDGE_OVERLAP;
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
            return "abi_version is another than this library's: compile against its header";
        case SLD_EDGE_NULL_POINTER:
            return "the step or one of its arrays is NULL: bind every input and output";
        case SLD_EDGE_WRONG_SIZE:
            return "a size is below 1 or too large: see images, concepts, height and width";
        case SLD_EDGE_WRONG_CHOICE:
            return "prediction_type or combine is not one of the header's";
        case SLD_EDGE_WRONG_THREADS:
            return "threads is not from 1 to SLD_EDGE_MAX_THREADS";
        case SLD_EDGE_OVERLAP:
            return "an output overlaps an input or another output: give it memory of its own";
        case SLD_EDGE_WRONG_WORKSPACE:
            return "the workspace is NULL or smaller than sld_edge_cuda_workspace_bytes says";
        case SLD_EDGE_NO_MEMORY:
            return "no memory for the sums";
        case SLD_EDGE_NO_CUDA:
            return "built without CUDA: build with -DSLD_EDGE_CUDA=ON";
        case SLD_EDGE_CUDA_FAILED:
            return "CUDA refused a kernel: cudaGetLastError() says why";
        default:
            return "no status of this library";
    }
}
