"""Checks of a written graph: always its structure and a run; on request, diffusers' numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sld_edge.engines.base import Array, TensorSpec
from sld_edge.engines.errors import CheckpointError, MissingPackageError, NumericsError
from sld_edge.engines.onnxruntime.engine import OrtEngine

if TYPE_CHECKING:
    from sld_edge.export.checkpoints.checkpoint import Checkpoint

# Relative L2 distance to diffusers in FP32. FP16: weights and sums are rounded to 11 bits.
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2}
# The decoder gives whole levels: a tiny error still changes how a few numbers round.
_LEVELS_TOLERANCE = 1e-3
_CELLS = 8  # height and width of the latents of a trial run


@dataclass(frozen=True, kw_only=True)
class GraphFacts:
    """The opset, inputs and outputs that a graph declares."""

    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def graph_facts(path: Path) -> GraphFacts:
    """Check a graph's structure and shapes with ONNX's checker and read its tensors.

    Raises:
        CheckpointError: the graph is malformed, which is a bug in sld-edge.
    """
    onnx = require_onnx()
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # the checker and shape inference share no base class
        raise CheckpointError(
            f"{path.name} was built wrong",
            got=str(error).split("\n", 1)[0],
            do="report this, or try --via torch",
        ) from error
    model = onnx.load(str(path), load_external_data=False)
    opset = next(item.version for item in model.opset_import if item.domain in ("", "ai.onnx"))
    return GraphFacts(
        opset=opset,
        inputs=tuple(map(_spec, model.graph.input)),
        outputs=tuple(map(_spec, model.graph.output)),
    )


def random_feeds(
    inputs: tuple[TensorSpec, ...], *, vocab_size: int, downscale: int, branches: int = 2
) -> dict[str, Array]:
    """Return small random inputs for a graph, always the same: B = 2 images, K = `branches`."""
    rng = np.random.default_rng(0)
    images = 2
    sizes = {
        "B": images,
        "N": images,
        "K*B": branches * images,
        "h": _CELLS,
        "w": _CELLS,
        "H": _CELLS * downscale,
        "W": _CELLS * downscale,
    }
    feeds: dict[str, Array] = {}
    for spec in inputs:
        # Only the context's length may be open, too; any length will do.
        shape = [size if isinstance(size, int) else sizes.get(size, 77) for size in spec.shape]
        if spec.name == "input_ids":
            values: NDArray[Any] = rng.integers(0, vocab_size, shape)
        elif spec.name in ("timestep", "time_ids"):
            values = rng.integers(0, 1000, shape)
        elif spec.dtype == "uint8":
            values = rng.integers(0, 256, shape)
        else:
            values = rng.standard_normal(shape)
        feeds[spec.name] = values.astype(spec.dtype)
    return feeds


def run_checked(path: Path, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Run a graph once on the CPU.

    There ONNX Runtime computes much of FP16 in FP32. So this check misses numbers that overflow
    only in FP16 on a GPU; the runtime checks every run.

    Raises:
        NumericsError: NaN or infinity in an output.
    """
    with OrtEngine(path, as_is=True) as engine:
        outputs = engine.run(feeds)
    for name, array in outputs.items():
        # Whole levels cannot hold NaN; the output `finite` shows it.
        if not np.isfinite(array).all() or (name == "finite" and not (array > 0).all()):
            raise NumericsError(
                f"{path.name}: {name} is not finite on random input",
                do="the weights are damaged, or overflow: try --precision fp32",
            )
    return outputs


def errors_against_diffusers(
    checkpoint: Checkpoint, folder: Path, graphs: Mapping[str, GraphFacts], *, downscale: int
) -> dict[str, float]:
    """Compare every graph that diffusers has a module for, on the same random input.

    Returns:
        Relative L2 distance of graph and module in FP32, by component.

    Raises:
        MissingPackageError: no torch, diffusers or transformers.
    """
    from sld_edge.export.via_torch import graph_modules, run_module

    modules = graph_modules(checkpoint, precision="fp32")
    vocab_size = int(checkpoint.models["text_encoder"].config["vocab_size"])
    errors = {}
    for name, module in modules.items():
        facts = graphs[name]
        feeds = random_feeds(facts.inputs, vocab_size=vocab_size, downscale=downscale, branches=3)
        got = run_checked(folder / f"{name}.onnx", feeds)[facts.outputs[0].name].astype(np.float64)
        want = run_module(module, [feeds[spec.name] for spec in facts.inputs]).astype(np.float64)
        if got.shape != want.shape:
            raise CheckpointError(f"{name}: shape", got=got.shape, expected=want.shape)
        errors[name] = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    return errors


def require_agreement(errors: Mapping[str, float], *, precision: str) -> None:
    """Raise a CheckpointError that names every component beyond its tolerance."""
    limits = dict.fromkeys(errors, TOLERANCES[precision])
    if "vae_decoder" in limits:
        limits["vae_decoder"] = max(limits["vae_decoder"], _LEVELS_TOLERANCE)
    wrong = {name: error for name, error in errors.items() if not error <= limits[name]}
    if wrong:
        raise CheckpointError(
            "the graphs do not agree with diffusers",
            got=", ".join(f"{name} {error:.1e}" for name, error in wrong.items()),
            expected=", ".join(f"{name} <= {limits[name]:.0e}" for name in wrong),
            do="report this, and use --via torch",
        )


def _spec(value: Any) -> TensorSpec:
    onnx = require_onnx()
    tensor = value.type.tensor_type
    shape = tuple(
        dim.dim_param if dim.HasField("dim_param") else int(dim.dim_value)
        for dim in tensor.shape.dim
    )
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    return TensorSpec(name=value.name, dtype=np.dtype(dtype).name, shape=shape)


def require_onnx() -> Any:
    """Import onnx, or say how to install it."""
    try:
        import onnx
        import onnx.checker
        import onnx.helper
    except ImportError as error:
        raise MissingPackageError("onnx", extra="export", why="export") from error
    return onnx
