"""Plans beside ONNX Runtime: the same random input, and how far the outputs are apart."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sld_edge.engines.base import Array
from sld_edge.engines.device import Device
from sld_edge.engines.errors import EngineError, MissingPackageError
from sld_edge.engines.ort import OrtEngine
from sld_edge.engines.plan_build import reason_of
from sld_edge.engines.plan_info import PlanInfo
from sld_edge.engines.tensorrt import TrtEngine
from sld_edge.export.verify import TOLERANCES
from sld_edge.runtime.bundle import Bundle
from sld_edge.runtime.plans import Plan, plan_name, require_fit
from sld_edge.runtime.tokenizer import Tokenizer, input_ids

# Whole levels: an error far below one level still flips a few roundings.
_LEVELS_TOLERANCE = 1e-3
_PROMPT = "a photograph of a lighthouse in a storm"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far a plan is from ONNX Runtime: relative L2 distance of the output that is furthest."""

    component: str
    output: str
    error: float
    tolerance: float
    passed: bool

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "TOO FAR"
        found = f"{self.component:<14} {self.error:.1e} in {self.output}"
        return f"{found}, at most {self.tolerance:.0e}: {verdict}"


def comparing_device() -> Device:
    """Open the device that plans are compared on, and see that Polygraphy is there.

    Raises:
        MissingPackageError: no Polygraphy, or no CUDA bindings.
        EngineError: no device.
    """
    _polygraphy()
    try:
        return Device()
    except EngineError as error:
        raise EngineError(
            "--compare runs the plans, which needs a GPU",
            got=reason_of(error),
            do="leave it out here",
        ) from error


def compare_plans(
    bundle: Bundle, infos: Sequence[PlanInfo], device: Device, *, say: Callable[[str], None]
) -> bool:
    """Compare every plan of a bundle with ONNX Runtime on the CPU; say a line each.

    Returns:
        Whether all are within their tolerances: relative L2 1e-4 in FP32, 2e-2 in FP16.

    Raises:
        EngineError: a plan does not fit the device, or does not run.
    """
    passed = True
    for info in infos:
        comparison = compare_plan(bundle, info, device)
        say(str(comparison))
        passed = passed and comparison.passed
    return passed


def compare_plan(bundle: Bundle, info: PlanInfo, device: Device) -> Comparison:
    """Run one plan and its graph on the same input of the plan's best shapes."""
    plan = Plan(path=bundle.path / plan_name(info.component), info=info)
    require_fit(plan, bundle, device)
    component = bundle.manifest.components[info.component]
    graph = bundle.graph(component).path
    feeds = _feeds(bundle, info)
    with OrtEngine(graph, as_is=True) as reference:
        wanted = reference.run(feeds)
    source = plan.path.with_name(str(info.options.get("refit_from", graph.name)))
    with TrtEngine(plan.path, info, device, source=source) as engine:
        got = engine.run(feeds)
    return compared(info, wanted, got)


def compared(info: PlanInfo, wanted: Mapping[str, Array], got: Mapping[str, Array]) -> Comparison:
    """Compare a plan's outputs with those of its graph, with Polygraphy."""
    comparator, logger = _polygraphy()
    norms = {
        name: float(np.linalg.norm(array.astype(np.float64))) for name, array in wanted.items()
    }
    tolerances = {name: _tolerance(info, array) for name, array in wanted.items()}
    results = comparator.RunResults()
    results.add([dict(wanted)], runner_name="onnxruntime")
    results.add([dict(got)], runner_name=info.engine)
    limits = {name: tolerances[name] * norm for name, norm in norms.items()}
    with logger.verbosity(logger.CRITICAL):
        accuracy = comparator.Comparator.compare_accuracy(
            results, compare_func=comparator.L2CompareFunc(l2_threshold=limits)
        )
    ((_, (outputs,)),) = accuracy[0].items()
    # Of those beyond their tolerance, else of all, the one that comes nearest to it.
    name, result = max(
        outputs.items(), key=lambda item: (not item[1], _share(item[1].l2_norm, limits[item[0]]))
    )
    return Comparison(
        component=info.component,
        output=name,
        error=_share(result.l2_norm, norms[name]),
        tolerance=tolerances[name],
        passed=bool(accuracy),
    )


def _share(distance: float, norm: float) -> float:
    if not np.isfinite(distance):
        return float("inf")
    return distance / norm if norm else float(distance > 0)


def _tolerance(info: PlanInfo, array: Array) -> float:
    tolerance = TOLERANCES[info.precision]
    return max(tolerance, _LEVELS_TOLERANCE) if array.dtype == np.uint8 else tolerance


def _feeds(bundle: Bundle, info: PlanInfo) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    feeds: dict[str, Array] = {}
    for tensor in info.inputs:
        if tensor.profile is None:
            raise EngineError(f"{info.component}: no sizes of {tensor.spec.name}", do="build again")
        shape = tensor.profile[1]
        if tensor.spec.name == "input_ids":
            tokenizer = Tokenizer(bundle.tokenizer_json(), length=bundle.manifest.text.length)
            values: Array = input_ids([tokenizer(_PROMPT)] * shape[0])
        elif tensor.spec.name == "timestep":
            values = rng.integers(0, 1000, shape)
        elif tensor.spec.dtype == "uint8":
            values = rng.integers(0, 256, shape)
        else:
            values = rng.standard_normal(shape)
        feeds[tensor.spec.name] = values.astype(tensor.spec.dtype)
    return feeds


def _polygraphy() -> tuple[Any, Any]:
    try:
        comparator = importlib.import_module("polygraphy.comparator")
        logger = importlib.import_module("polygraphy.logger").G_LOGGER
    except ImportError as error:
        raise MissingPackageError("polygraphy", extra="compare", why="--compare") from error
    if not hasattr(comparator, "L2CompareFunc"):
        raise MissingPackageError("polygraphy>=0.53", extra="compare", why="--compare")
    return comparator, logger
