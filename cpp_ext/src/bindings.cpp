// The step for Python. The signature checks types and layout; `data_of` checks every shape, so no
// call can read or write outside its arrays.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <new>
#include <string>
#include <vector>

#include "sld_edge.h"

namespace nb = nanobind;

namespace {

using Prediction = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;  // FP32 or FP16
using Input = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using Shape = std::vector<std::int64_t>;

template <typename Array>
auto *data_of(const Array &array, const char *name, const Shape &shape) {
    const std::int64_t *axes = array.shape_ptr();
    if (!std::equal(axes, axes + array.ndim(), shape.begin(), shape.end())) {
        throw nb::value_error((std::string(name) + " does not fit the latents' shape").c_str());
    }
    return array.data();
}

std::int32_t type_of(const Prediction &uncond, const Prediction &text, const Prediction &safety) {
    const nb::dlpack::dtype type = uncond.dtype(), single = nb::dtype<float>();
    const nb::dlpack::dtype half = {single.code, 16, 1};
    if ((type != single && type != half) || text.dtype() != type || safety.dtype() != type) {
        throw nb::type_error("the predictions are not all FP32 or all FP16");
    }
    return type == half ? SLD_EDGE_FP16 : SLD_EDGE_FP32;
}

void safe_step(Prediction noise_pred_uncond, Prediction noise_pred_text,
               Prediction noise_pred_safety, Input latents, Input momentum, Input history,
               Input noise, Input edit_map, Input row, Input guidance_scale, Input safety,
               Output latents_next, Output unet_latents, Output momentum_next, Output history_next,
               Output edit_map_next, Output share, Output strength, Output concept_strength,
               Output finite, int threads) {
    if (latents.ndim() != 4 || noise_pred_safety.ndim() != 5) {
        throw nb::value_error("latents is not [B,4,h,w] or noise_pred_safety is not [n,B,4,h,w]");
    }
    sld_edge_step step = {};
    step.abi_version = SLD_EDGE_ABI_VERSION;
    step.prediction_type = type_of(noise_pred_uncond, noise_pred_text, noise_pred_safety);
    const std::int64_t n = step.concepts = noise_pred_safety.shape_ptr()[0];
    const std::int64_t B = step.images = latents.shape_ptr()[0];
    const std::int64_t h = step.height = latents.shape_ptr()[2];
    const std::int64_t w = step.width = latents.shape_ptr()[3];
    const Shape whole = {B, SLD_EDGE_CHANNELS, h, w};
    const Shape kept = {SLD_EDGE_HISTORY, B, SLD_EDGE_CHANNELS, h, w};
#define SLD_EDGE_BIND(name, ...) step.name = data_of(name, #name, __VA_ARGS__)
    SLD_EDGE_BIND(noise_pred_uncond, whole);
    SLD_EDGE_BIND(noise_pred_text, whole);
    SLD_EDGE_BIND(noise_pred_safety, {n, B, SLD_EDGE_CHANNELS, h, w});
    SLD_EDGE_BIND(latents, whole);
    SLD_EDGE_BIND(momentum, whole);
    SLD_EDGE_BIND(history, kept);
    SLD_EDGE_BIND(noise, whole);
    SLD_EDGE_BIND(edit_map, {B, h, w});
    SLD_EDGE_BIND(row, {SLD_EDGE_ROW_COLUMNS});
    SLD_EDGE_BIND(guidance_scale, {B});
    SLD_EDGE_BIND(safety, {B, SLD_EDGE_SAFETY_COLUMNS});
    SLD_EDGE_BIND(latents_next, whole);
    SLD_EDGE_BIND(unet_latents, whole);
    SLD_EDGE_BIND(momentum_next, whole);
    SLD_EDGE_BIND(history_next, kept);
    SLD_EDGE_BIND(edit_map_next, {B, h, w});
    SLD_EDGE_BIND(share, {B});
    SLD_EDGE_BIND(strength, {B});
    SLD_EDGE_BIND(concept_strength, {n, B});
    SLD_EDGE_BIND(finite, {B});
#undef SLD_EDGE_BIND
    int status;
    {
        nb::gil_scoped_release release;
        status = sld_edge_safe_step_cpu(&step, threads);
    }
    if (status == SLD_EDGE_NO_MEMORY) throw std::bad_alloc();
    if (status != SLD_EDGE_OK) throw nb::value_error(sld_edge_status_message(status));
}

constexpr auto exact(const char *name) { return nb::arg(name).noconvert(); }

}  // namespace

NB_MODULE(_kernels, m) {
    m.doc() = "Native code of sld_edge.cpp_ext.safe_step.";
    m.def("safe_step", &safe_step, nb::kw_only(), exact("noise_pred_uncond"),
          exact("noise_pred_text"), exact("noise_pred_safety"), exact("latents"),
          exact("momentum"), exact("history"), exact("noise"), exact("edit_map"), exact("row"),
          exact("guidance_scale"), exact("safety"), exact("latents_next"), exact("unet_latents"),
          exact("momentum_next"), exact("history_next"), exact("edit_map_next"), exact("share"),
          exact("strength"), exact("concept_strength"), exact("finite"), nb::arg("threads"),
          "Write the outputs of a step.");
}
