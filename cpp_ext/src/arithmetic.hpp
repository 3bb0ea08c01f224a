// What happens to one number of the latents; the CPU loops and the CUDA kernels share every line.
//
// The order of operations is the guidance graph's (export/graphs/guidance.py), and compilers are told not
// to contract a * b + c, so all builds give the same latents, bit for bit.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SLD_EDGE_BOTH __host__ __device__ __forceinline__
#else
#define SLD_EDGE_BOTH inline
#endif

namespace sld_edge {

inline constexpr int CHANNELS = 4;
inline constexpr int HISTORY = 4;

// What is summed over an image; the concepts' sums of squares follow these.
enum Sum { EDIT_SQUARES, GUIDED_SQUARES, EDITED, BAD_PREDICTIONS, BAD_LATENTS, CONCEPT_SQUARES };

struct Half {
    std::uint16_t bits;
};

// A row of the sampler's table; floats in the order of the array `row`.
struct Row {
    float p, q, a, b0, past[HISTORY], s, c_in_next;
};

// An image's guidance scale, and its numbers in the order of a row of `safety`.
struct Numbers {
    float guidance_scale, scale, threshold, momentum_scale, momentum_beta, active;
};

struct ConceptEdit {
    float mu, edit;
};

struct Element {
    float kept, next, unet, momentum, edit, guided;
};

SLD_EDGE_BOTH Numbers numbers_of(const float *guidance_scale, const float *safety, std::int64_t i) {
    const float *five = safety + 5 * i;
    return {guidance_scale[i], five[0], five[1], five[2], five[3], five[4]};
}

SLD_EDGE_BOTH Row row_of(const float *row) {
    return {row[0], row[1], row[2], row[3], {row[4], row[5], row[6], row[7]}, row[8], row[9]};
}

SLD_EDGE_BOTH float float_from_bits(std::uint32_t bits) {
#ifdef __CUDA_ARCH__
    return __uint_as_float(bits);
#else
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

SLD_EDGE_BOTH std::uint32_t bits_of(float value) {
#ifdef __CUDA_ARCH__
    return __float_as_uint(value);
#else
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
#endif
}

SLD_EDGE_BOTH float widen(float value) { return value; }

// Exact. The exponent is moved by a multiplication, which also makes subnormals normal.
SLD_EDGE_BOTH float widen(Half half) {
    const std::uint32_t size = half.bits & 0x7fffu, sign = half.bits & 0x8000u;
    const float moved = float_from_bits(size << 13) * 0x1p112f;
    const std::uint32_t beyond = size >= 0x7c00u ? 0x7f800000u : 0u;  // infinity and NaN stay so
    return float_from_bits(bits_of(moved) | beyond | sign << 16);
}

// NaN fails every comparison.
SLD_EDGE_BOTH bool is_finite(float value) { return std::fabs(value) <= FLT_MAX; }

// One concept's edit, before momentum. The comparison with the threshold is signed.
SLD_EDGE_BOTH ConceptEdit concept_edit(float uncond, float text, float safety, const Numbers &of) {
    const float d = text - safety;
    const float scaled = std::fabs(d) * of.scale;
    const float close = scaled > 1.0f ? 1.0f : scaled;  // keeps NaN
    const float mu = d >= of.threshold ? 0.0f : close;
    return {mu, mu * (safety - uncond)};
}

// Where NaN is, it stays: these are not std::max and std::min.
SLD_EDGE_BOTH float larger(float edit, float than) {
    return edit > than || edit != edit ? edit : than;
}
SLD_EDGE_BOTH float smaller(float edit, float than) {
    return edit < than || edit != edit ? edit : than;
}

// The edit of the largest size, of the highest and the lowest.
SLD_EDGE_BOTH float strongest(float highest, float lowest) {
    return highest + lowest >= 0.0f ? highest : lowest;
}

// What of a concept's edit reaches the prediction.
SLD_EDGE_BOTH float applied(float edit, const Numbers &of) {
    return of.guidance_scale * of.active * edit;
}

// Guidance and the sampler's row; `past` are the four kept outputs, newest first.
SLD_EDGE_BOTH Element step_element(float uncond, float text, float edit, float latents,
                                   float momentum, float past0, float past1, float past2,
                                   float past3, float noise, const Row &row, const Numbers &of) {
    const float gamma = edit + of.momentum_scale * momentum;
    Element out;
    out.momentum = of.momentum_beta * momentum + (1.0f - of.momentum_beta) * gamma;
    out.guided = uncond + of.guidance_scale * (text - uncond);
    out.edit = applied(gamma, of);
    const float predicted = out.guided - out.edit;
    out.kept = row.p * latents + row.q * predicted;
    const float before = row.past[0] * past0 + row.past[1] * past1 + row.past[2] * past2 +
                         row.past[3] * past3;
    out.next = row.a * latents + row.b0 * out.kept + before + row.s * noise;
    out.unet = row.c_in_next * out.next;
    return out;
}

// Norm against norm; nothing to compare with gives 0.
SLD_EDGE_BOTH float ratio_of_norms(double squares, double guided_squares) {
    const float below = static_cast<float>(std::sqrt(guided_squares));
    return below == 0.0f ? 0.0f : static_cast<float>(std::sqrt(squares)) / below;
}

SLD_EDGE_BOTH float share_of(double edited, double elements, const Numbers &of) {
    return of.active * static_cast<float>(edited / elements);
}

SLD_EDGE_BOTH float finite_code(double bad_predictions, double bad_latents) {
    return bad_predictions > 0 ? -1.0f : bad_latents > 0 ? 0.0f : 1.0f;
}

}  // namespace sld_edge
