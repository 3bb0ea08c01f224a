"""Sampler tables against diffusers' schedulers, call by call, in float64.

Tolerance: both sides do the same maths in float64, in another order, so the error is rounding; the
worst seen over all cases is 4e-14 of the largest latent. 1e-12 leaves room for other processors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from oracles.schedulers import in_float64, scheduler_from_config, step
from sld_edge.engines.errors import InputError
from sld_edge.runtime.contract import ROW
from sld_edge.runtime.samplers import SAMPLERS, SamplerTable, sampler_table

TOLERANCE = 1e-12
# Of the Stable Diffusion 1.5 checkpoint.
SD = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "clip_sample": False,
}
SHAPE = (1, 2, 3, 3)
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")
# Predictions that diffusers' class refuses: it is run on the epsilon that the output stands for.
BY_EPSILON = {("pndm", "sample"), ("euler-a", "sample")}


def latents_by_table(
    table: SamplerTable, start: Any, outputs: Any, noise: Any
) -> Iterator[tuple[Any, Any]]:
    """Run the rows as the guidance graph does: what the UNet is given, and the next latents."""
    x = start * table.init_noise_sigma
    history = np.zeros((4, *start.shape))
    for i in range(table.calls):
        fed = table.c_in[i] * x
        kept = table.p[i] * x + table.q[i] * outputs[i]
        x = table.a[i] * x + table.b[i, 0] * kept + table.s[i] * noise[i]
        x = x + np.tensordot(table.b[i, 1:], history, axes=1)
        history = np.concatenate([kept[None], history[:3]])
        yield fed, x


def latents_by_diffusers(
    name: str, config: dict[str, Any], steps: int, start: Any, outputs: Any, noise: Any, eta: float
) -> Iterator[tuple[Any, Any]]:
    by_epsilon = (name, config.get("prediction_type")) in BY_EPSILON
    if by_epsilon:
        config = {**config, "prediction_type": "epsilon"}
    scheduler = scheduler_from_config(name, config)
    scheduler.set_timesteps(steps)
    x = torch.tensor(start) * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        fed = scheduler.scale_model_input(x, t)
        output = torch.tensor(outputs[i])
        if by_epsilon and name == "pndm":
            alpha = scheduler.alphas_cumprod[t]
            output = (x - alpha**0.5 * output) / (1 - alpha) ** 0.5
        elif by_epsilon:
            output = (x - output) / scheduler.sigmas[i]
        x = step(name, scheduler, output, t, x, torch.tensor(noise[i]), eta)
        yield fed.numpy(), x.numpy()


def draws(calls: int, dtype: Any = np.float64) -> tuple[Any, Any, Any]:
    random = np.random.default_rng(5)
    start, outputs, noise = (
        random.standard_normal(shape).astype(dtype)
        for shape in (SHAPE, (calls, *SHAPE), (calls, *SHAPE))
    )
    return start, outputs, noise


def worst_error(
    name: str,
    config: dict[str, Any],
    steps: int,
    eta: float = 0.0,
    table: SamplerTable | None = None,
) -> tuple[float, str]:
    """Compare every call; give the worst error relative to the largest latent, and where it is."""
    if table is None:
        table = sampler_table(name, config, steps, eta=eta)
    inputs = draws(table.calls)
    with in_float64(name):
        theirs = list(latents_by_diffusers(name, config, steps, *inputs, eta))
    assert len(theirs) == table.calls
    errors = {
        f"call {i} of {table.calls}, {what}": float(np.abs(a - b).max() / np.abs(b).max())
        for i, (ours, wanted) in enumerate(
            zip(latents_by_table(table, *inputs), theirs, strict=True)
        )
        for what, a, b in zip(("model input", "latents"), ours, wanted, strict=True)
    }
    assert all(np.isfinite(error) for error in errors.values())
    where = max(errors, key=lambda key: errors[key])
    return errors[where], f"{name} {steps} steps {config}: {where}"


def assert_same(
    name: str, config: dict[str, Any], steps: int, eta: float = 0.0, atol: float = 0.0
) -> None:
    table = sampler_table(name, config, steps, eta=eta)
    oracle = {**config}
    if (name, config.get("prediction_type")) in BY_EPSILON:
        oracle["prediction_type"] = "epsilon"
    scheduler = scheduler_from_config(name, oracle)
    scheduler.set_timesteps(steps)
    wanted = scheduler.timesteps.double().numpy()
    differ = np.abs(table.timesteps - wanted) > atol if len(wanted) == table.calls else [True]
    assert not np.any(differ), (
        f"{name} {steps} steps {config}: timestep differs at call {np.argmax(differ)}: "
        f"{table.timesteps} is not {wanted}"
    )
    error, where = worst_error(name, config, steps, eta)
    assert error < TOLERANCE, f"{error:.1e} at {where}"


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_call_is_diffusers(name: str, prediction: str) -> None:
    cases = [*product(SPACINGS, (1, 2, 3, 7, 20)), ("leading", 50)]
    for spacing, steps in cases:
        config = {**SD, "prediction_type": prediction, "timestep_spacing": spacing}
        assert_same(name, config, steps)


@pytest.mark.parametrize("name", SAMPLERS)
def test_absent_keys_take_the_defaults_of_the_samplers_own_class(name: str) -> None:
    for steps in (3, 16):
        assert_same(name, SD, steps)
        assert_same(name, {"clip_sample": False, "skip_prk_steps": True}, steps)


SCHEDULES = [
    {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": np.linspace(0.001, 0.01, 1000).tolist()},
    {"num_train_timesteps": 500, "steps_offset": 0},
    {"set_alpha_to_one": True, "steps_offset": 0},
    {"final_sigmas_type": "sigma_min"},
]


@pytest.mark.parametrize("extra", SCHEDULES, ids=lambda extra: next(iter(extra)))
@pytest.mark.parametrize("name", SAMPLERS)
def test_noise_schedules(name: str, extra: dict[str, Any]) -> None:
    for steps in (4, 17):
        assert_same(name, {**SD, **extra}, steps)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_zero_terminal_signal(name: str, spacing: str) -> None:
    config = {
        **SD,
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
        "timestep_spacing": spacing,
    }
    assert_same(name, config, 9)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_eta(eta: float, prediction: str) -> None:
    for spacing, one in product(SPACINGS, (True, False)):
        config = {**SD, "prediction_type": prediction, "timestep_spacing": spacing}
        assert_same("ddim", {**config, "set_alpha_to_one": one}, 8, eta)


SOLVERS = [
    ("dpm++2m", {"solver_type": "heun"}),
    ("dpm++2m", {"solver_type": "bh2"}),  # of a UniPC checkpoint: midpoint
    ("dpm++2m", {"solver_order": 1}),
    ("dpm++2m", {"lower_order_final": False, "final_sigmas_type": "sigma_min"}),
    ("dpm++2m", {"euler_at_final": True, "final_sigmas_type": "sigma_min"}),
    ("dpm++2m", {"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"}),
    ("dpm++2m", {"lambda_min_clipped": -2.0, "timestep_spacing": "leading"}),
    ("dpm++2m", {"use_karras_sigmas": True}),
    ("dpm++2m-karras", {"sigma_min": 0.1, "sigma_max": 10.0}),
    ("dpm++2m-karras", {"final_sigmas_type": "sigma_min"}),
    # diffusers' bh1 gives NaN where the last sigma is 0.
    ("unipc", {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}),
    ("unipc", {"solver_type": "midpoint"}),  # of a DPM-Solver checkpoint: bh2
    ("unipc", {"solver_order": 1}),
    ("unipc", {"solver_order": 3}),
    ("unipc", {"solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"}),
    ("unipc", {"solver_order": 3, "prediction_type": "v_prediction"}),
    ("unipc", {"lower_order_final": False, "final_sigmas_type": "sigma_min"}),
    ("unipc", {"disable_corrector": [0, 1, 3]}),
    ("unipc", {"use_karras_sigmas": True}),
    ("unipc", {"use_karras_sigmas": True, "sigma_min": 0.1, "final_sigmas_type": "sigma_min"}),
    ("lcm", {"original_inference_steps": 100, "timestep_scaling": 3.0}),
]


@pytest.mark.parametrize(("name", "extra"), SOLVERS, ids=str)
def test_solver_options(name: str, extra: dict[str, Any]) -> None:
    for steps in (1, 2, 6, 18):
        assert_same(name, {**SD, **extra}, steps)


@pytest.mark.parametrize("extra", [{}, {"sigma_min": 0.2, "sigma_max": 12.0}], ids=str)
@pytest.mark.parametrize("name", ["euler", "lms"])
def test_karras_sigmas_give_fractional_timesteps(name: str, extra: dict[str, Any]) -> None:
    # diffusers' float32 tables hang on the square root of the machine's maths library: 6.1e-5, one
    # float32 step at t = 999, is all that it moves these fractions.
    for steps in (2, 6, 18):
        assert_same(name, {**SD, "use_karras_sigmas": True, **extra}, steps, atol=6.2e-5)


@pytest.mark.parametrize("name", ["dpm++2m-karras", "unipc"])
@pytest.mark.parametrize("schedule", ["scaled_linear", "squaredcos_cap_v2"])
def test_whole_karras_timesteps_round_as_diffusers(name: str, schedule: str) -> None:
    """Some lie so near a half (575.5 of 18 steps) that only float32 tables round them alike."""
    config = {**SD, "beta_schedule": schedule, "use_karras_sigmas": True}
    scheduler = scheduler_from_config(name, config)
    for steps in (*range(1, 30), 35, 40, 50, 75, 100):
        scheduler.set_timesteps(steps)
        np.testing.assert_array_equal(
            sampler_table(name, config, steps).timesteps, scheduler.timesteps.numpy(), str(steps)
        )


@pytest.mark.parametrize("name", SAMPLERS)
def test_float32_rows_follow_diffusers_as_shipped(name: str) -> None:
    """Without the float64 oracle: float32 on both sides, so float32 rounding over 20 calls."""
    table = sampler_table(name, SD, 20, eta=0.0)
    start, outputs, noise = draws(table.calls, np.float32)
    *_, (_, wanted) = latents_by_diffusers(name, SD, 20, start, outputs, noise, 0.0)
    x = start * np.float32(table.init_noise_sigma)
    history = np.zeros((4, *SHAPE), np.float32)
    for row, output, z in zip(table.rows(), outputs, noise, strict=True):
        kept = row[0] * x + row[1] * output
        x = row[2] * x + row[3] * kept + np.tensordot(row[4:8], history, axes=1) + row[8] * z
        history = np.concatenate([kept[None], history[:3]])
    assert x.dtype == np.float32
    assert np.abs(x - wanted).max() < 2e-5 * np.abs(wanted).max()


def swapped(table: SamplerTable, one: int, other: int) -> SamplerTable:
    b = table.b.copy()
    b[:, [one, other]] = b[:, [other, one]]
    return replace(table, b=b)


MUTATIONS = [
    ("pndm", lambda table: swapped(table, 1, 2)),
    ("pndm", lambda table: swapped(table, 3, 4)),
    ("lms", lambda table: swapped(table, 2, 3)),
    ("unipc", lambda table: swapped(table, 1, 2)),
    ("dpm++2m", lambda table: swapped(table, 0, 1)),
    ("euler-a", lambda table: replace(table, s=-table.s)),
    ("lcm", lambda table: replace(table, s=-table.s)),
    ("euler", lambda table: replace(table, c_in=np.roll(table.c_in, 1))),
    ("ddim", lambda table: replace(table, a=table.a * (1 + 1e-8))),
]


@pytest.mark.parametrize(("name", "mutate"), MUTATIONS)
def test_the_comparison_sees_a_wrong_table(name: str, mutate: Any) -> None:
    error, _ = worst_error(name, SD, 10, table=mutate(sampler_table(name, SD, 10)))
    assert error > TOLERANCE


def test_rows_lay_the_columns_out_as_the_guidance_graph_reads_them() -> None:
    table = sampler_table("euler-a", SD, 5)
    rows = table.rows()
    assert rows.dtype == np.float32
    assert rows.shape == (5, len(ROW))
    values: dict[str, Any] = {
        "p": table.p,
        "q": table.q,
        "a": table.a,
        "s": table.s,
        "noise_unit": np.ones(5),
    }
    values |= {f"b{j}": table.b[:, j] for j in range(5)} | {"c_in_next": [*table.c_in[1:], 1.0]}
    columns = [values[name] for name in ROW]
    np.testing.assert_array_equal(rows, np.stack(columns, axis=1).astype(np.float32))


def test_numbers_of_the_papers() -> None:
    """PLMS' weights are Adams-Bashforth's (arXiv 2202.09778, equation 12)."""
    b = sampler_table("pndm", SD, 10).b[6]
    np.testing.assert_allclose(b[:4] / b[:4].sum(), np.array([55, -59, 37, -9]) / 24, rtol=1e-12)


def test_no_call_falls_off_training_where_diffusers_makes_one_too_many() -> None:
    config = {**SD, "timestep_spacing": "trailing"}
    scheduler = scheduler_from_config("ddim", config)
    scheduler.set_timesteps(61)
    assert scheduler.timesteps[-1] == -1  # the reason for the difference
    table = sampler_table("ddim", config, 61)
    np.testing.assert_array_equal(table.timesteps, scheduler.timesteps[:-1].numpy())


REFUSED = [
    ("heun", {}, 10, {}, "one of ddim, pndm, euler,"),
    ("ddim", {}, 0, {}, "from 1 to 1000"),
    ("pndm", {}, 1001, {}, "from 1 to 1000"),
    ("lcm", {}, 51, {}, "at most 50"),
    ("euler", {}, 10, {"eta": 0.5}, "0, or up to 1 for ddim"),
    ("ddim", {}, 10, {"eta": 1.5}, "0, or up to 1 for ddim"),
    ("ddim", {"clip_sample": True}, 10, {}, "not linear"),
    ("unipc", {"thresholding": True}, 10, {}, "not linear"),
    ("pndm", {"skip_prk_steps": False}, 10, {}, "expected True"),
    ("dpm++2m", {"solver_order": 3}, 10, {}, "expected 1 or 2"),
    ("unipc", {"solver_order": 4}, 10, {}, "expected 1, 2 or 3"),
    ("dpm++2m", {"algorithm_type": "sde-dpmsolver++"}, 10, {}, "expected dpmsolver++"),
    ("euler", {"use_beta_sigmas": True}, 10, {}, "expected False"),
    ("euler", {"prediction_type": "flow"}, 10, {}, "one of epsilon, v_prediction, sample"),
    ("euler", {"beta_schedule": "cubic"}, 10, {}, "one of linear, scaled_linear"),
    ("euler", {"steps_offset": "one"}, 10, {}, "expected int"),
    ("euler", {"beta_start": -0.1}, 10, {}, "between 0 and 1"),
    ("euler", {"trained_betas": [0.1, 0.2]}, 10, {}, "1000 between 0 and 1"),
    ("ddim", {}, 1000, {}, "at most 999"),
    ("dpm++2m", {}, 1000, {}, "not finite"),
    ("lms", {"timestep_spacing": "leading", "num_train_timesteps": 4}, 4, {}, "not finite"),
    (
        "ddim",
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        10,
        {},
        "not finite",
    ),
]


@pytest.mark.parametrize(("name", "extra", "steps", "options", "message"), REFUSED)
def test_what_cannot_be_honoured_is_refused(
    name: str, extra: dict[str, Any], steps: int, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        sampler_table(name, {**SD, **extra}, steps, **options)
    assert message in str(caught.value)
