// The step on the CPU. An image is cut into tiles of cells. A tile is small enough that its buffers
// stay in the nearest cache, and every array is read and written once.
#include <algorithm>
#include <new>
#include <vector>

#include "step.hpp"

namespace sld_edge {
namespace {

constexpr int TILE = 256;  // cells
constexpr int LANES = 16;  // partial sums side by side, so that compilers vectorize the sum

// The cells [start, start + length) of every channel of one image.
struct Tile {
    std::int64_t image, start;
    int length;
};

// Numbers that the loops of a tile hand on.
struct Buffers {
    float edits[SLD_EDGE_CHANNELS][TILE] = {};  // of the strongest concept
    float mu[SLD_EDGE_CHANNELS][TILE] = {};     // the largest of all concepts
    float sums[CONCEPT_SQUARES][TILE] = {};     // per cell, over channels
    float edit_sizes[TILE] = {};
    float concept_squares[TILE];
};

float sum(const float *values, int length) {
    float lanes[LANES] = {};
    int i = 0;
    for (; i + LANES <= length; i += LANES) {
        for (int lane = 0; lane < LANES; ++lane) lanes[lane] += values[i + lane];
    }
    float total = 0.0f;
    for (; i < length; ++i) total += values[i];
    for (const float lane : lanes) total += lane;
    return total;
}

template <typename Prediction>
void add_concept(const sld_edge_step &step, std::int64_t concept_index, std::int64_t at,
                 const Settings settings, int length, int channel, Buffers &b) {
    const auto *uncond = static_cast<const Prediction *>(step.noise_pred_uncond) + at;
    const auto *text = static_cast<const Prediction *>(step.noise_pred_text) + at;
    const auto *safety = static_cast<const Prediction *>(step.noise_pred_safety) +
                         concept_index * elements(step) + at;
    float *edits = b.edits[channel], *mu = b.mu[channel];
#pragma omp simd
    for (int i = 0; i < length; ++i) {
        const float safety_pred = widen(safety[i]);
        const ConceptEdit of_concept =
            concept_edit(widen(uncond[i]), widen(text[i]), safety_pred, settings);
        const float change = applied(of_concept.edit, settings);
        edits[i] = stronger(of_concept.edit, edits[i]);
        mu[i] = of_concept.mu > mu[i] ? of_concept.mu : mu[i];
        b.concept_squares[i] += change * change;
        b.sums[BAD_PREDICTIONS][i] += is_finite(safety_pred) ? 0.0f : 1.0f;
    }
}

template <typename Prediction>
void step_channel(const sld_edge_step &step, std::int64_t at, const Row row,
                  const Settings settings, int length, int channel, Buffers &b) {
    const auto *uncond = static_cast<const Prediction *>(step.noise_pred_uncond) + at;
    const auto *text = static_cast<const Prediction *>(step.noise_pred_text) + at;
    const float *edits = b.edits[channel], *mu = b.mu[channel];
#pragma omp simd
    for (int i = 0; i < length; ++i) {
        const float u = widen(uncond[i]), t = widen(text[i]);
        const Element e = step_element(step, row, settings, at + i, u, t, edits[i]);
        b.edit_sizes[i] += std::fabs(e.edit);
        b.sums[EDIT_SQUARES][i] += e.edit * e.edit;
        b.sums[GUIDED_SQUARES][i] += e.guided * e.guided;
        b.sums[EDITED][i] += mu[i] > 0.0f ? 1.0f : 0.0f;
        b.sums[BAD_PREDICTIONS][i] += is_finite(u) && is_finite(t) ? 0.0f : 1.0f;
        b.sums[BAD_LATENTS][i] += is_finite(e.next) ? 0.0f : 1.0f;
    }
}

template <typename Prediction>
void step_tile(const sld_edge_step &step, const Tile &tile, float *sums) {
    Buffers b;
    const Settings settings = settings_of(step, tile.image);
    const Row row = row_of(step);
    const std::int64_t first = tile.image * SLD_EDGE_CHANNELS * cells(step) + tile.start;
    for (std::int64_t c = 0; c < step.concepts; ++c) {
        std::fill_n(b.concept_squares, tile.length, 0.0f);
        for (int channel = 0; channel < SLD_EDGE_CHANNELS; ++channel) {
            const std::int64_t at = first + channel * cells(step);
            add_concept<Prediction>(step, c, at, settings, tile.length, channel, b);
        }
        sums[CONCEPT_SQUARES + c] = sum(b.concept_squares, tile.length);
    }
    for (int channel = 0; channel < SLD_EDGE_CHANNELS; ++channel) {
        const std::int64_t at = first + channel * cells(step);
        step_channel<Prediction>(step, at, row, settings, tile.length, channel, b);
    }
    const std::int64_t at = tile.image * cells(step) + tile.start;
    for (int i = 0; i < tile.length; ++i) {
        step.edit_map_next[at + i] = step.edit_map[at + i] + b.edit_sizes[i] / SLD_EDGE_CHANNELS;
    }
    for (int i = 0; i < CONCEPT_SQUARES; ++i) sums[i] = sum(b.sums[i], tile.length);
}

template <typename Prediction>
void step_images(const sld_edge_step &step, [[maybe_unused]] int threads) {
    const std::int64_t tiles = parts(step, TILE);
    const int width = sums(step);
    std::vector<float> partial(static_cast<std::size_t>(step.images * tiles * width));
    std::vector<double> total(static_cast<std::size_t>(width));
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
#endif
    for (std::int64_t index = 0; index < step.images * tiles; ++index) {
        const std::int64_t start = index % tiles * TILE;
        const auto length = static_cast<int>(std::min<std::int64_t>(TILE, cells(step) - start));
        step_tile<Prediction>(step, {index / tiles, start, length}, &partial[index * width]);
    }
    for (std::int64_t image = 0; image < step.images; ++image) {
        std::fill(total.begin(), total.end(), 0.0);
        const float *of_tile = &partial[image * tiles * width];
        for (std::int64_t tile = 0; tile < tiles; ++tile, of_tile += width) {
            for (int i = 0; i < width; ++i) total[i] += of_tile[i];
        }
        report(step, image, total.data());
    }
}

}  // namespace
}  // namespace sld_edge

extern "C" int sld_edge_safe_step_cpu(const sld_edge_step *step, int threads) {
    using namespace sld_edge;
    const int status = check(step);
    if (status != SLD_EDGE_OK) return status;
    if (threads < 1 || threads > SLD_EDGE_MAX_THREADS) return SLD_EDGE_WRONG_THREADS;
    try {
        const bool half = step->prediction_type == SLD_EDGE_FP16;
        (half ? step_images<Half> : step_images<float>)(*step, threads);
    } catch (const std::bad_alloc &) {
        return SLD_EDGE_NO_MEMORY;
    }
    return SLD_EDGE_OK;
}
