// The CPU loops, and the CUDA kernels as loops, on arrays of exactly the right size, under
// sanitizers: both give the same numbers with any number of threads, and stay inside their arrays.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "arithmetic.hpp"

namespace {

int failures = 0;

void expect(bool right, const char *what) {
    if (!right) {
        std::printf("failed: %s\n", what);
        ++failures;
    }
}

using Floats = std::vector<float>;

// A step and the memory of its arrays.
struct Arrays {
    sld_edge_step step = {};
    std::vector<Floats> inputs, outputs;
    std::vector<std::vector<std::uint16_t>> halves;

    Arrays(std::int64_t images, int concepts, std::int64_t height, std::int64_t width, int type,
           float noise_unit) {
        const auto cells = static_cast<std::size_t>(images * height * width);
        const auto n = static_cast<std::size_t>(concepts), b = static_cast<std::size_t>(images);
        step.abi_version = SLD_EDGE_ABI_VERSION;
        step.prediction_type = type;
        step.concepts = concepts;
        step.images = images;
        step.height = height;
        step.width = width;
        std::mt19937 random(7);
        inputs.reserve(16);
        outputs.reserve(16);
        halves.reserve(3);
        const void **predictions[] = {&step.noise_pred_uncond, &step.noise_pred_text,
                                      &step.noise_pred_safety};
        for (int i = 0; i < 3; ++i) {
            const std::size_t size = 4 * cells * (i == 2 ? n : 1);
            if (type == SLD_EDGE_FP16) {
                *predictions[i] = half(random, size);
            } else {
                *predictions[i] = input(random, size);
            }
        }
        step.latents = input(random, 4 * cells);
        step.momentum = input(random, 4 * cells);
        step.history = input(random, 16 * cells);
        step.noise = input(random, 4 * cells);
        step.edit_map = input(random, cells);
        float *row = input(random, SLD_EDGE_ROW_COLUMNS);
        row[SLD_EDGE_ROW_COLUMNS - 1] = noise_unit;
        step.row = row;
        step.guidance_scale = input(random, b);
        float *safety = input(random, 5 * b);
        for (std::size_t i = 0; i < b; ++i) {
            const float numbers[] = {2.0f, 0.01f, 0.3f, 0.4f, i % 3 == 2 ? 0.0f : 1.0f};
            std::memcpy(safety + 5 * i, numbers, sizeof numbers);
        }
        step.safety = safety;
        step.latents_next = output(4 * cells);
        step.unet_latents = output(4 * cells);
        step.momentum_next = output(4 * cells);
        step.history_next = output(16 * cells);
        step.edit_map_next = output(cells);
        step.share = output(b);
        step.strength = output(b);
        step.concept_strength = output(n * b);
        step.finite = output(b);
    }

    float *input(std::mt19937 &random, std::size_t size) {
        std::normal_distribution<float> normal;
        Floats &array = inputs.emplace_back(size);
        for (float &number : array) number = normal(random);
        return array.data();
    }

    // Any sign, exponents around 1, and some subnormal numbers.
    const std::uint16_t *half(std::mt19937 &random, std::size_t size) {
        auto &array = halves.emplace_back(size);
        for (auto &number : array) {
            const auto bits = static_cast<std::uint32_t>(random());
            const std::uint32_t exponent = bits % 32 == 0 ? 0 : 10 + bits % 6;
            number = static_cast<std::uint16_t>((bits >> 16 & 0x83ff) | exponent << 10);
        }
        return array.data();
    }

    float *output(std::size_t size) {
        return outputs.emplace_back(size, std::numeric_limits<float>::quiet_NaN()).data();
    }

    void overwrite() {
        for (Floats &array : outputs) std::fill(array.begin(), array.end(), -999.0f);
    }
};

bool same_bits(const Floats &one, const Floats &other) {
    return std::memcmp(one.data(), other.data(), sizeof(float) * one.size()) == 0;
}

bool close(const Floats &one, const Floats &other) {
    for (std::size_t i = 0; i < one.size(); ++i) {
        if (!(std::fabs(one[i] - other[i]) <= 1e-6f * std::fabs(other[i]))) return false;
    }
    return true;
}

void compare(Arrays &arrays) {
    expect(sld_edge_safe_step_cpu(&arrays.step, 1) == SLD_EDGE_OK, "one thread");
    const std::vector<Floats> wanted = arrays.outputs;
    for (const int threads : {2, 3, 7}) {
        arrays.overwrite();
        expect(sld_edge_safe_step_cpu(&arrays.step, threads) == SLD_EDGE_OK, "threads");
        for (std::size_t i = 0; i < wanted.size(); ++i) {
            expect(same_bits(arrays.outputs[i], wanted[i]), "any number of threads gives the same");
        }
    }
    arrays.overwrite();
    std::vector<char> workspace(sld_edge_cuda_workspace_bytes(&arrays.step));
    const int status =
        sld_edge_safe_step_cuda(&arrays.step, workspace.data(), workspace.size(), nullptr);
    expect(status == SLD_EDGE_OK, "the kernels");
    for (std::size_t i = 0; i < wanted.size(); ++i) {
        // The first five outputs have no sums; the figures are sums in another order.
        const bool same = i < 5 ? same_bits(arrays.outputs[i], wanted[i])
                                : close(arrays.outputs[i], wanted[i]);
        expect(same, "the kernels and the CPU loops give the same");
    }
}

void refuse() {
    Arrays arrays(2, 2, 3, 5, SLD_EDGE_FP32, 1.0f);
    const auto status_with = [&](auto change) {
        sld_edge_step step = arrays.step;
        change(step);
        return sld_edge_safe_step_cpu(&step, 1);
    };
    using S = sld_edge_step;
    const std::int64_t huge = std::int64_t{1} << 62;
    expect(status_with([](S &s) { s.prediction_type = 2; }) == SLD_EDGE_WRONG_TYPE, "type");
    expect(status_with([](S &s) { s.abi_version = 1; }) == SLD_EDGE_WRONG_ABI, "an old caller");
    expect(status_with([](S &s) { s.concepts = 0; }) == SLD_EDGE_WRONG_SIZE, "no concept");
    expect(status_with([](S &s) { s.concepts = 65; }) == SLD_EDGE_WRONG_SIZE, "many concepts");
    expect(status_with([](S &s) { s.images = 0; }) == SLD_EDGE_WRONG_SIZE, "no image");
    expect(status_with([&](S &s) { s.height = huge; }) == SLD_EDGE_WRONG_SIZE, "a huge side");
    expect(status_with([](S &s) { s.images = s.height = s.width = 1 << 20; }) ==
               SLD_EDGE_WRONG_SIZE,
           "a huge product");
    expect(status_with([](S &s) { s.finite = nullptr; }) == SLD_EDGE_NULL_POINTER, "no output");
    expect(status_with([](S &s) { s.row = nullptr; }) == SLD_EDGE_NULL_POINTER, "no input");
    expect(status_with([](S &s) { s.unet_latents = s.latents_next + 1; }) == SLD_EDGE_OVERLAP,
           "two outputs");
    expect(status_with([](S &s) { s.history_next = const_cast<float *>(s.history) + 8; }) ==
               SLD_EDGE_OVERLAP,
           "history in place");
    expect(sld_edge_safe_step_cpu(&arrays.step, 1025) == SLD_EDGE_WRONG_THREADS, "many threads");
    for (const Floats &output : arrays.outputs) {
        for (const float number : output) expect(std::isnan(number), "a refusal writes nothing");
    }
    const std::size_t bytes = sld_edge_cuda_workspace_bytes(&arrays.step);
    std::vector<char> workspace(bytes);
    expect(sld_edge_safe_step_cuda(&arrays.step, workspace.data(), bytes - 1, nullptr) ==
               SLD_EDGE_WRONG_WORKSPACE,
           "a small workspace");
    expect(sld_edge_safe_step_cuda(&arrays.step, nullptr, bytes, nullptr) ==
               SLD_EDGE_WRONG_WORKSPACE,
           "no workspace");
}

// All 65536 numbers of FP16 against the definition of FP16.
void widen_all() {
    for (unsigned bits = 0; bits < 0x10000; ++bits) {
        const unsigned exponent = bits >> 10 & 0x1f, fraction = bits & 0x3ff;
        const float got = sld_edge::widen(sld_edge::Half{static_cast<std::uint16_t>(bits)});
        if (exponent == 31 && fraction != 0) {
            expect(std::isnan(got), "NaN stays NaN");
            continue;
        }
        const float size = exponent == 31 ? std::numeric_limits<float>::infinity()
                           : exponent == 0
                               ? std::ldexp(static_cast<float>(fraction), -24)
                               : std::ldexp(static_cast<float>(fraction + 1024),
                                            static_cast<int>(exponent) - 25);
        expect(got == (bits & 0x8000 ? -size : size) && std::signbit(got) == (bits >> 15 == 1),
               "a half is exact");
    }
}

}  // namespace

int main() {
    widen_all();
    refuse();
    for (const int type : {SLD_EDGE_FP32, SLD_EDGE_FP16}) {
        for (const float unit : {1.0f, 0.37f, -1.9f}) {
            for (const int concepts : {1, 3, SLD_EDGE_MAX_CONCEPTS}) {
                Arrays least(1, concepts, 1, 1, type, unit);
                compare(least);
                Arrays small(3, concepts, 5, 7, type, unit);
                compare(small);
            }
            Arrays large(2, 2, 37, 31, type, unit);  // several tiles and blocks, the last not full
            compare(large);
        }
    }
    if (failures == 0) std::printf("passed\n");
    return failures != 0;
}
