// The step for Python. The signature is the check of types, axes and layout; sizes that must agree
// are compared here, so no call can reach memory that is not the arrays'.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <string>

#include "arithmetic.hpp"
#include "sld_edge.h"

namespace nb = nanobind;
using namespace nb::literals;

template <>
struct nanobind::detail::dtype_traits<sld_edge::Half> {
    static constexpr dlpack::dtype value{static_cast<std::uint8_t>(dlpack::dtype_code::Float), 16,
                                         1};
    static constexpr auto name = const_name("float16");
};

namespace {

using sld_edge::CHANNELS;
using sld_edge::HISTORY;

template <typename Number, ssize_t... sizes>
using Array = nb::ndarray<Number, nb::shape<sizes...>, nb::c_contig, nb::device::cpu>;

template <typename Number>
using Latents = Array<Number, -1, CHANNELS, -1, -1>;  // [B,4,h,w]
template <typename Number>
using Stack = Array<Number, -1, -1, CHANNELS, -1, -1>;  // [n,B,4,h,w]
template <typename Number>
using History = Array<Number, HISTORY, -1, CHANNELS, -1, -1>;
template <typename Number>
using Map = Array<Number, -1, -1, -1>;  // [B,h,w]
template <typename Number>
using Images = Array<Number, -1>;  // [B]

// The sizes that all arrays must share.
struct Sizes {
    std::size_t images, height, width;

    template <typename Given>
    void expect(const char *name, const Given &array, std::size_t axis_of_images,
                bool has_cells) const {
        const std::size_t last = array.ndim() - 1;
        const bool same = array.shape(axis_of_images) == images &&
                          (!has_cells ||
                           (array.shape(last - 1) == height && array.shape(last) == width));
        if (!same) throw nb::value_error((std::string(name) + " has other sizes than latents").c_str());
    }
};

template <typename Prediction>
void safe_step(Latents<const Prediction> noise_pred_uncond, Latents<const Prediction> noise_pred_text,
               Stack<const Prediction> noise_pred_safety, Latents<const float> latents,
               Latents<const float> momentum, History<const float> history,
               Latents<const float> noise, Map<const float> edit_map, Array<const float, 10> row,
               Images<const float> guidance_scale, Array<const float, -1, 5> safety,
               Latents<float> latents_next, Latents<float> unet_latents,
               Latents<float> momentum_next, History<float> history_next,
               Map<float> edit_map_next, Images<float> share, Images<float> strength,
               Array<float, -1, -1> concept_strength, Images<float> finite, int combine,
               int threads) {
    const Sizes sizes{latents.shape(0), latents.shape(2), latents.shape(3)};
    sizes.expect("noise_pred_uncond", noise_pred_uncond, 0, true);
    sizes.expect("noise_pred_text", noise_pred_text, 0, true);
    sizes.expect("noise_pred_safety", noise_pred_safety, 1, true);
    sizes.expect("momentum", momentum, 0, true);
    sizes.expect("history", history, 1, true);
    sizes.expect("noise", noise, 0, true);
    sizes.expect("edit_map", edit_map, 0, true);
    sizes.expect("guidance_scale", guidance_scale, 0, false);
    sizes.expect("safety", safety, 0, false);
    sizes.expect("latents_next", latents_next, 0, true);
    sizes.expect("unet_latents", unet_latents, 0, true);
    sizes.expect("momentum_next", momentum_next, 0, true);
    sizes.expect("history_next", history_next, 1, true);
    sizes.expect("edit_map_next", edit_map_next, 0, true);
    sizes.expect("share", share, 0, false);
    sizes.expect("strength", strength, 0, false);
    sizes.expect("concept_strength", concept_strength, 1, false);
    sizes.expect("finite", finite, 0, false);
    if (concept_strength.shape(0) != noise_pred_safety.shape(0)) {
        throw nb::value_error("concept_strength has other sizes than noise_pred_safety");
    }
    if (noise_pred_safety.shape(0) > SLD_EDGE_MAX_CONCEPTS) {
        throw nb::value_error("noise_pred_safety has too many concepts");
    }

    sld_edge_step step = {};
    step.abi_version = SLD_EDGE_ABI_VERSION;
    step.prediction_type = sizeof(Prediction) == 2 ? SLD_EDGE_FP16 : SLD_EDGE_FP32;
    step.combine = combine;
    step.concepts = static_cast<std::int32_t>(noise_pred_safety.shape(0));
    step.images = static_cast<std::int64_t>(sizes.images);
    step.height = static_cast<std::int64_t>(sizes.height);
    step.width = static_cast<std::int64_t>(sizes.width);
    step.noise_pred_uncond = noise_pred_uncond.data();
    step.noise_pred_text = noise_pred_text.data();
    step.noise_pred_safety = noise_pred_safety.data();
    step.latents = latents.data();
    step.momentum = momentum.data();
    step.history = history.data();
    step.noise = noise.data();
    step.edit_map = edit_map.data();
    step.row = row.data();
    step.guidance_scale = guidance_scale.data();
    step.safety = safety.data();
    step.latents_next = latents_next.data();
    step.unet_latents = unet_latents.data();
    step.momentum_next = momentum_next.data();
    step.history_next = history_next.data();
    step.edit_map_next = edit_map_next.data();
    step.share = share.data();
    step.strength = strength.data();
    step.concept_strength = concept_strength.data();
    step.finite = finite.data();
    int status;
    {
        nb::gil_scoped_release release;
        status = sld_edge_safe_step_cpu(&step, threads);
    }
    if (status == SLD_EDGE_NO_MEMORY) throw std::bad_alloc();
    if (status != SLD_EDGE_OK) throw nb::value_error(sld_edge_status_message(status));
}

template <typename Prediction>
void define(nb::module_ &m, const char *doc) {
    m.def("safe_step", &safe_step<Prediction>, nb::kw_only(), "noise_pred_uncond"_a.noconvert(),
          "noise_pred_text"_a.noconvert(), "noise_pred_safety"_a.noconvert(),
          "latents"_a.noconvert(), "momentum"_a.noconvert(), "history"_a.noconvert(),
          "noise"_a.noconvert(), "edit_map"_a.noconvert(), "row"_a.noconvert(),
          "guidance_scale"_a.noconvert(), "safety"_a.noconvert(), "latents_next"_a.noconvert(),
          "unet_latents"_a.noconvert(), "momentum_next"_a.noconvert(),
          "history_next"_a.noconvert(), "edit_map_next"_a.noconvert(), "share"_a.noconvert(),
          "strength"_a.noconvert(), "concept_strength"_a.noconvert(), "finite"_a.noconvert(),
          "combine"_a, "threads"_a, doc);
}

}  // namespace

NB_MODULE(_kernels, m) {
    m.doc() = "The safe step as native code; sld_edge.cpp_ext.safe_step is its door.";
    m.attr("ABI_VERSION") = sld_edge_abi_version();
    m.attr("MAX_CONCEPTS") = SLD_EDGE_MAX_CONCEPTS;
    m.attr("STRONGEST") = static_cast<int>(SLD_EDGE_STRONGEST);
    m.attr("SUM") = static_cast<int>(SLD_EDGE_SUM);
    define<float>(m, "Write a step's outputs, from FP32 predictions.");
    define<sld_edge::Half>(m, "Write a step's outputs, from FP16 predictions.");
}
