"""The keys that a sampler reads in a scheduler's configuration, and its defaults for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from sld_edge.engines.errors import InputError


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """A diffusers `scheduler_config.json`, resolved for one sampler.

    Most of diffusers' scheduler classes have these defaults; `READS` has the exceptions.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False
    prediction_type: str = "epsilon"
    timestep_spacing: str = "linspace"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    final_sigmas_type: str = "zero"
    use_karras_sigmas: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    solver_order: int = 2
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    lambda_min_clipped: float = -math.inf
    disable_corrector: tuple[int, ...] = ()
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0


@dataclass(frozen=True, kw_only=True)
class Reads:
    """The keys that a sampler reads besides `_EVERY`, its defaults, and keys with fixed values."""

    keys: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    must: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


_EVERY = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    "prediction_type",
)
_SPACING = ("timestep_spacing", "steps_offset")
_KARRAS = ("use_karras_sigmas", "sigma_min", "sigma_max")
_NO_CLIPPING = {"clip_sample": (False,), "thresholding": (False,)}
_NO_OTHER_SIGMAS = {"use_exponential_sigmas": (False, None), "use_beta_sigmas": (False, None)}
_NO_FLOW = {"use_flow_sigmas": (False,), "thresholding": (False,)}
_DPMPP = Reads(
    keys=(
        *(*_SPACING, *_KARRAS, "rescale_betas_zero_snr", "final_sigmas_type", "solver_order"),
        *("solver_type", "lower_order_final", "euler_at_final", "lambda_min_clipped"),
    ),
    must={
        **_NO_OTHER_SIGMAS,
        **_NO_FLOW,
        "algorithm_type": ("dpmsolver++", "deis"),
        "use_lu_lambdas": (False,),
        "variance_type": (None,),
    },
)

# From the signatures of diffusers' schedulers (0.42): a key that a class does not take is not read,
# and an absent key has that class's default, even if the file names another class.
READS: Mapping[str, Reads] = {
    "ddim": Reads(
        keys=(*_SPACING, "set_alpha_to_one", "rescale_betas_zero_snr"),
        defaults={"timestep_spacing": "leading"},
        must=_NO_CLIPPING,
    ),
    "pndm": Reads(
        keys=(*_SPACING, "set_alpha_to_one"),
        defaults={"timestep_spacing": "leading", "set_alpha_to_one": False},
        must={"skip_prk_steps": (True,)},
    ),
    "euler": Reads(
        keys=(*_SPACING, *_KARRAS, "rescale_betas_zero_snr", "final_sigmas_type"),
        must={
            **_NO_OTHER_SIGMAS,
            "interpolation_type": ("linear",),
            "timestep_type": ("discrete",),
        },
    ),
    "euler-a": Reads(keys=(*_SPACING, "rescale_betas_zero_snr")),
    "dpm++2m": _DPMPP,
    "dpm++2m-karras": _DPMPP,
    "lcm": Reads(
        keys=("rescale_betas_zero_snr", "original_inference_steps", "timestep_scaling"),
        defaults={"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
        must=_NO_CLIPPING,
    ),
    "unipc": Reads(
        keys=(
            *(*_SPACING, *_KARRAS, "rescale_betas_zero_snr", "final_sigmas_type", "solver_order"),
            *("solver_type", "lower_order_final", "disable_corrector"),
        ),
        defaults={"solver_type": "bh2"},
        must={**_NO_OTHER_SIGMAS, **_NO_FLOW, "predict_x0": (True,), "solver_p": (None,)},
    ),
    "lms": Reads(keys=(*_SPACING, "use_karras_sigmas"), must=_NO_OTHER_SIGMAS),
}

_CHOICES = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),
}
_MOST = 100_000  # largest count, also of training timesteps
_INFINITE = (("lambda_min_clipped", -math.inf),)  # the only infinite default in diffusers
_NOT_LINEAR = "it is not linear in the latents, and samplers here are; choose another sampler"


def config_from_scheduler(name: str, scheduler: Mapping[str, Any]) -> SchedulerConfig:
    """Resolve a scheduler's configuration for sampler `name`.

    An absent `clip_sample` is false, also for ddim, where diffusers' default is true. An absent
    `skip_prk_steps` is true, as in every Stable Diffusion checkpoint.

    Raises:
        InputError: a value that this sampler cannot use, or a value of the wrong type.
    """
    reads = READS[name]
    for key, allowed in reads.must.items():
        if key in scheduler and scheduler[key] not in allowed:
            raise InputError(
                f"{name}: {key} in the scheduler's configuration",
                got=scheduler[key],
                expected=allowed[0],
                do=_NOT_LINEAR if key in _NO_CLIPPING else "choose another sampler",
            )
    values = dict(reads.defaults)
    kinds = {item.name: str(item.type) for item in fields(SchedulerConfig)}
    for key in (*_EVERY, *reads.keys):
        if key in scheduler:
            values[key] = _checked(key, scheduler[key], kinds[key])
    for key in ("sigma_min", "sigma_max"):
        if values.get(key) is not None and not values[key] > 0:
            raise InputError(
                f"{key} in the scheduler's configuration", got=values[key], expected="above 0"
            )
    if values.get("num_train_timesteps", 1) < 1:
        raise InputError("num_train_timesteps in the scheduler's configuration", got=0)
    return SchedulerConfig(**values)


def _checked(key: str, value: Any, kind: str) -> Any:
    if value is None and "None" in kind:
        return None
    if kind.startswith("tuple") and isinstance(value, list | tuple):
        if len(value) <= _MOST and all(map(_is_number, value)):
            return tuple(value)
    elif kind.startswith("float") and (_is_number(value) or (key, value) in _INFINITE):
        return float(value)
    elif (
        (kind == "int" and _is_number(value) and value == int(value) and 0 <= value <= _MOST)
        or (kind == "bool" and isinstance(value, bool))
        or (kind == "str" and value in _CHOICES[key])
    ):
        return value
    raise InputError(
        f"{key} in the scheduler's configuration",
        got=repr(value),
        expected=f"one of {', '.join(_CHOICES[key])}" if key in _CHOICES else kind,
    )


def _is_number(value: object) -> bool:
    """Whether a value is a number of moderate size, and not NaN."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and -1e9 <= value <= 1e9  # false for NaN
    )
