/* The header from C: one step with numbers worked out by hand, and steps that are refused. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "sld_edge.h"

enum { CELLS = 4 }; /* one image of [4,1,1] */

static int failures = 0;

static void expect(int right, const char *what) {
    if (!right) {
        printf("failed: %s\n", what);
        ++failures;
    }
}

static int near(float got, double wanted) { return fabs(got - wanted) <= 1e-6 * fabs(wanted); }

int main(void) {
    /* unit = 0.5: d = 0.5 * -0.25, so mu = 4 * 0.125 = 0.5; the concept's edit in noise is
     * 0.5 * (0.5 * 0.75) = 0.1875, with momentum gamma = 0.1875 + 0.5 * 1 = 0.6875. */
    const float uncond[CELLS] = {0, 0, 0, 0}, text[CELLS] = {0.5f, 0.5f, 0.5f, 0.5f};
    const float safety_pred[CELLS] = {0.75f, 0.75f, 0.75f, 0.75f};
    const float latents[CELLS] = {1, 2, 3, 4}, momentum[CELLS] = {1, 1, 1, 1};
    const float noise[CELLS] = {1, 1, 1, 1}, edit_map[1] = {0.125f};
    const float history[4 * CELLS] = {1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4};
    const float row[11] = {0, 1, 1, -1, 0.5f, 0.25f, 0, 0, 0.125f, 2, 0.5f};
    const float guidance_scale[1] = {2}, safety[5] = {4, 0.01f, 0.5f, 0.25f, 1};
    float next[CELLS], unet[CELLS], momentum_next[CELLS], history_next[4 * CELLS], map_next[1];
    float share[1], strength[1], concept_strength[1], finite[1];

    sld_edge_step step;
    memset(&step, 0, sizeof step);
    step.abi_version = SLD_EDGE_ABI_VERSION;
    step.prediction_type = SLD_EDGE_FP32;
    step.concepts = 1;
    step.images = step.height = step.width = 1;
    step.noise_pred_uncond = uncond;
    step.noise_pred_text = text;
    step.noise_pred_safety = safety_pred;
    step.latents = latents;
    step.momentum = momentum;
    step.history = history;
    step.noise = noise;
    step.edit_map = edit_map;
    step.row = row;
    step.guidance_scale = guidance_scale;
    step.safety = safety;
    step.latents_next = next;
    step.unet_latents = unet;
    step.momentum_next = momentum_next;
    step.history_next = history_next;
    step.edit_map_next = map_next;
    step.share = share;
    step.strength = strength;
    step.concept_strength = concept_strength;
    step.finite = finite;

    expect(sld_edge_abi_version() == SLD_EDGE_ABI_VERSION, "the version is the header's");
    expect(sld_edge_safe_step_cpu(&step, 1) == SLD_EDGE_OK, "a step");
    for (int i = 0; i < CELLS; ++i) {
        /* guided 1, edit 2 * 0.6875 / 0.5 = 2.75, so m = -1.75;
         * next = x + 1.75 + 0.5 * 1 + 0.25 * 2 + 0.125. */
        expect(near(next[i], i + 1 + 2.875), "latents_next");
        expect(near(unet[i], 2 * (i + 1 + 2.875)), "unet_latents");
        expect(near(momentum_next[i], 0.25 + 0.75 * 0.6875), "momentum_next");
        expect(near(history_next[i], -1.75), "the newest of history_next");
        expect(history_next[3 * CELLS + i] == 3, "the oldest of history_next");
    }
    expect(near(map_next[0], 0.125 + 2.75), "edit_map_next");
    expect(share[0] == 1 && finite[0] == 1, "share and finite");
    expect(near(strength[0], 2.75) && near(concept_strength[0], 0.75), "strengths");

    expect(sld_edge_safe_step_cpu(NULL, 1) == SLD_EDGE_NULL_POINTER, "no step");
    expect(sld_edge_safe_step_cpu(&step, 0) == SLD_EDGE_WRONG_THREADS, "no threads");
    step.latents_next = (float *)latents;
    expect(sld_edge_safe_step_cpu(&step, 1) == SLD_EDGE_OVERLAP, "in place");
    step.latents_next = next;
    step.abi_version = SLD_EDGE_ABI_VERSION + 1;
    expect(sld_edge_safe_step_cpu(&step, 1) == SLD_EDGE_WRONG_ABI, "another version");
    for (int status = -1; status <= SLD_EDGE_CUDA_FAILED + 1; ++status) {
        expect(strlen(sld_edge_status_message(status)) > 3, "a message");
    }
    if (failures == 0) printf("passed\n");
    return failures != 0;
}
