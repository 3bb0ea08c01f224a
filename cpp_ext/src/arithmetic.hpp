// The arithmetic of a step for a single number; the CPU loops and the CUDA kernels share it.
//
// The order of operations is the order of the guidance graph (export/graphs/guidance.py). Compiler
// flags forbid fused multiply-add, so all builds give the same latents, bit for bit.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "sld_edge.h"

#ifdef __CUDACC__
#define SLD_EDGE_BOTH __host__ __device__ __forceinline__
#else
#define SLD_EDGE_BOTH inline
#endif

namespace sld_edge {

struct Half {
    std::uint16_t bits;
};

// The columns of `row`.
struct Row {
    float p, q, a, b0, b1, b2, b3, b4, s, c_in_next, noise_unit;
};

// The numbers of one image: its guidance scale, its row of `safety`, and the unit of noise.
struct Settings {
    float guidance_scale, scale, threshold, momentum_scale, momentum_beta, active, noise_unit;
};

struct ConceptEdit {
    float mu, edit;
};

SLD_EDGE_BOTH Row row_of(const sld_edge_step &step) {
    const float *r = step.row;
    return {r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7], r[8], r[9], r[10]};
}

SLD_EDGE_BOTH Settings settings_of(const sld_edge_step &step, std::int64_t image) {
    const float *s = step.safety + SLD_EDGE_SAFETY_COLUMNS * image;
    return {step.guidance_scale[image], s[0], s[1], s[2], s[3], s[4], row_of(step).noise_unit};
}

template <typename To, typename From>
SLD_EDGE_BOTH To bits_as(From from) {
    To to;
    static_assert(sizeof to == sizeof from);
    std::memcpy(&to, &from, sizeof to);
    return to;
}

SLD_EDGE_BOTH float widen(float value) { return value; }

// Exact. A multiplication moves the exponent; it also makes subnormal numbers normal.
SLD_EDGE_BOTH float widen(Half half) {
    const std::uint32_t size = half.bits & 0x7fffu, sign = half.bits & 0x8000u;
    const float moved = bits_as<float>(size << 13) * 0x1p112f;
    const std::uint32_t not_finite = size >= 0x7c00u ? 0x7f800000u : 0u;  // infinity and NaN
    return bits_as<float>(bits_as<std::uint32_t>(moved) | not_finite | sign << 16);
}

// NaN fails every comparison.
SLD_EDGE_BOTH bool is_finite(float value) { return std::fabs(value) <= FLT_MAX; }

// The edit of one concept, in noise, without momentum. The comparison with the threshold is signed.
SLD_EDGE_BOTH ConceptEdit concept_edit(float uncond, float text, float safety,
                                       const Settings &settings) {
    const float d = settings.noise_unit * (text - safety);
    const float scaled = std::fabs(d) * settings.scale;
    const float close = scaled > 1.0f ? 1.0f : scaled;  // NaN stays NaN
    const float mu = d >= settings.threshold ? 0.0f : close;
    return {mu, mu * (settings.noise_unit * (safety - uncond))};
}

// The stronger of two edits; of two opposite edits of one size, the positive. NaN stays NaN.
SLD_EDGE_BOTH float stronger(float one, float other) {
    const float size = std::fabs(one), other_size = std::fabs(other);
    const bool first = size > other_size || (size == other_size && one > other) || one != one;
    return first ? one : other;
}

// The change that an edit in noise makes to the guided prediction.
SLD_EDGE_BOTH float applied(float edit, const Settings &settings) {
    return settings.guidance_scale * settings.active * edit / settings.noise_unit;
}

}  // namespace sld_edge
