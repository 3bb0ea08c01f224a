// The step on the CPU. An image is cut into tiles of cells. The four channels of a tile are done in
// turn, so that its buffers stay in the nearest cache; every array is read and written once.
#include <algorithm>
#include <cstdint>
#include <new>
#include <vector>

#include "arithmetic.hpp"
#include "step.hpp"

namespace sld_edge {
namespace {

constexpr int TILE = 256;  // cells
constexpr int LANES = 16;  // sums side by side, so that adding them up can be vectorized

// Cells [start, start + length) of every channel of one image.
struct Tile {
    std::int64_t image, start;
    int length;
};

// What a tile keeps between its loops, a number a cell.
struct Buffers {
    float highest[CHANNELS][TILE];  // the concepts' edits; or their sum
    float lowest[CHANNELS][TILE];
    float mu[CHANNELS][TILE];  // the largest of the concepts
    float squares[TILE], guided_squares[TILE], edited[TILE], edit[TILE];
    float bad_predictions[TILE], bad_latents[TILE];
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

void clear(float *values, int length) { std::fill(values, values + length, 0.0f); }

template <typename Prediction, int Combine, bool First>
void add_concept(const Prediction *uncond, const Prediction *text, const Prediction *safety,
                 const Numbers of, int length, float *highest, float *lowest, float *most,
                 float *squares, float *bad) {
#pragma omp simd
    for (int i = 0; i < length; ++i) {
        const float concept_pred = widen(safety[i]);
        const auto [mu, edit] = concept_edit(widen(uncond[i]), widen(text[i]), concept_pred, of);
        if constexpr (First) {
            highest[i] = edit;
            lowest[i] = edit;
            most[i] = mu;
        } else {
            most[i] = mu > most[i] ? mu : most[i];
            if constexpr (Combine == SLD_EDGE_SUM) {
                highest[i] += edit;
            } else {
                highest[i] = larger(edit, highest[i]);
                lowest[i] = smaller(edit, lowest[i]);
            }
        }
        const float size = applied(edit, of);
        squares[i] += size *size;
        bad[i] += is_finite(concept_pred) ? 0.0f : 1.0f;
    }
}

// Every concept of a tile; leaves their edits in the buffers and their squares in `sums`.
template <typename Prediction, int Combine>
void add_concepts(const sld_edge_step &step, const Tile &tile, const Numbers &of, Buffers &b,
                  float *sums) {
    const auto *uncond = static_cast<const Prediction *>(step.noise_pred_uncond);
    const auto *text = static_cast<const Prediction *>(step.noise_pred_text);
    const auto *safety = static_cast<const Prediction *>(step.noise_pred_safety);
    for (int c = 0; c < step.concepts; ++c) {
        clear(b.squares, tile.length);
        for (int channel = 0; channel < CHANNELS; ++channel) {
            const std::int64_t at =
                (tile.image * CHANNELS + channel) * cells(step) + tile.start;
            const auto one = c == 0 ? add_concept<Prediction, Combine, true>
                                    : add_concept<Prediction, Combine, false>;
            one(uncond + at, text + at, safety + c *elements(step) + at, of, tile.length,
                b.highest[channel], b.lowest[channel], b.mu[channel], b.squares,
                b.bad_predictions);
        }
        sums[CONCEPT_SQUARES + c] = sum(b.squares, tile.length);
    }
}

template <typename Prediction, int Combine>
void step_channel(const sld_edge_step &step, const Tile &tile, const Row row, const Numbers of,
                  int channel, Buffers &b) {
    const std::int64_t at = (tile.image * CHANNELS + channel) * cells(step) + tile.start;
    const std::int64_t older = elements(step);
    const auto *uncond = static_cast<const Prediction *>(step.noise_pred_uncond) + at;
    const auto *text = static_cast<const Prediction *>(step.noise_pred_text) + at;
    const float *latents = step.latents + at;
    const float *momentum = step.momentum + at;
    const float *noise = step.noise + at;
    const float *past0 = step.history + at;
    const float *past1 = past0 + older;
    const float *past2 = past1 + older;
    const float *past3 = past2 + older;
    float *next = step.latents_next + at;
    float *unet = step.unet_latents + at;
    float *momentum_next = step.momentum_next + at;
    float *kept0 = step.history_next + at;
    float *kept1 = kept0 + older;
    float *kept2 = kept1 + older;
    float *kept3 = kept2 + older;
    const float *highest = b.highest[channel];
    const float *lowest = b.lowest[channel];
    const float *mu = b.mu[channel];
    float *edit_size = b.edit;
    float *squares = b.squares;
    float *guided_squares = b.guided_squares;
    float *edited = b.edited;
    float *bad_predictions = b.bad_predictions;
    float *bad_latents = b.bad_latents;
    const int length = tile.length;
#pragma omp simd
    for (int i = 0; i < length; ++i) {
        const float u = widen(uncond[i]), t = widen(text[i]);
        const float edit = Combine == SLD_EDGE_SUM ? highest[i] : strongest(highest[i], lowest[i]);
        const Element e = step_element(u, t, edit, latents[i], momentum[i], past0[i], past1[i],
                                       past2[i], past3[i], noise[i], row, of);
        next[i] = e.next;
        unet[i] = e.unet;
        momentum_next[i] = e.momentum;
        kept0[i] = e.kept;
        kept1[i] = past0[i];
        kept2[i] = past1[i];
        kept3[i] = past2[i];
        edit_size[i] += std::fabs(e.edit);
        squares[i] += e.edit *e.edit;
        guided_squares[i] += e.guided *e.guided;
        edited[i] += mu[i] > 0.0f ? 1.0f : 0.0f;
        bad_predictions[i] += is_finite(u) && is_finite(t) ? 0.0f : 1.0f;
        bad_latents[i] += is_finite(e.next) ? 0.0f : 1.0f;
    }
}

template <typename Prediction, int Combine>
void step_tile(const sld_edge_step &step, const Tile &tile, float *sums) {
    Buffers b;
    const Numbers of = numbers_of(step.guidance_scale, step.safety, tile.image);
    const Row row = row_of(step.row);
    const int length = tile.length;
    clear(b.bad_predictions, length);
    add_concepts<Prediction, Combine>(step, tile, of, b, sums);
    for (float *buffer : {b.squares, b.guided_squares, b.edited, b.edit, b.bad_latents}) {
        clear(buffer, length);
    }
    for (int channel = 0; channel < CHANNELS; ++channel) {
        step_channel<Prediction, Combine>(step, tile, row, of, channel, b);
    }
    const std::int64_t at = tile.image * cells(step) + tile.start;
    for (int i = 0; i < length; ++i) {
        step.edit_map_next[at + i] = step.edit_map[at + i] + b.edit[i] / CHANNELS;
    }
    sums[EDIT_SQUARES] = sum(b.squares, length);
    sums[GUIDED_SQUARES] = sum(b.guided_squares, length);
    sums[EDITED] = sum(b.edited, length);
    sums[BAD_PREDICTIONS] = sum(b.bad_predictions, length);
    sums[BAD_LATENTS] = sum(b.bad_latents, length);
}

template <typename Prediction, int Combine>
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
        step_tile<Prediction, Combine>(step, {index / tiles, start, length},
                                       partial.data() + index *width);
    }
    for (std::int64_t image = 0; image < step.images; ++image) {
        std::fill(total.begin(), total.end(), 0.0);
        const float *of = partial.data() + image * tiles * width;
        for (std::int64_t tile = 0; tile < tiles; ++tile) {
            for (int i = 0; i < width; ++i) total[i] += of[tile *width + i];
        }
        report(step, image, total.data());
    }
}

template <typename Prediction>
void step_images(const sld_edge_step &step, int threads) {
    if (step.combine == SLD_EDGE_SUM) {
        step_images<Prediction, SLD_EDGE_SUM>(step, threads);
    } else {
        step_images<Prediction, SLD_EDGE_STRONGEST>(step, threads);
    }
}

}  // namespace
}  // namespace sld_edge

extern "C" int sld_edge_safe_step_cpu(const sld_edge_step *step, int threads) {
    const int status = sld_edge::check(step);
    if (status != SLD_EDGE_OK) return status;
    if (threads < 1 || threads > SLD_EDGE_MAX_THREADS) return SLD_EDGE_WRONG_THREADS;
    try {
        if (step->prediction_type == SLD_EDGE_FP16) {
            sld_edge::step_images<sld_edge::Half>(*step, threads);
        } else {
            sld_edge::step_images<float>(*step, threads);
        }
    } catch (const std::bad_alloc &) {
        return SLD_EDGE_NO_MEMORY;
    }
    return SLD_EDGE_OK;
}
