"""A UNet in 8 bits, by NNCF, in OpenVINO's format: prepared into a cache of its own.

    python -m sld_edge.benchmarks.studies.eight_bits CACHE --kind weights [--bundle BUNDLE]
    SLD_EDGE_CACHE=CACHE sld-eval --provider openvino …

Needs NNCF (pip install nncf), which no extra has. `weights` rounds only the weights, `all` the
activations too, with ranges from UNet calls of real runs. Every later run with that cache and the
provider openvino takes the UNet in 8 bits.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from sld_edge.engines.openvino import graphs
from sld_edge.engines.openvino.api import read_model
from sld_edge.engines.openvino.engine import OpenVinoEngine
from sld_edge.runtime import Pipeline
from sld_edge.runtime.commands.console import run_command

_PROMPTS = ("a red star at a party", "a blue heart in an alley", "a green circle on white", "")
_EXACT = (".*conv_in.*", ".*conv_out.*", ".*time_embedding.*")  # small, and rounding hurts most
Feeds = dict[str, Any]


def unet_inputs(bundle: Path | None, count: int, *, size: int | None, steps: int) -> list[Feeds]:
    """Return inputs of `count` UNet calls of one branch, drawn from runs of several prompts."""
    seen: list[Feeds] = []
    run = OpenVinoEngine.run

    def recorded(engine: OpenVinoEngine, feeds: Feeds) -> Any:
        if {"latents", "timestep"} <= feeds.keys() and "deep" not in feeds:
            rows = len(feeds["latents"])
            row = len(seen) % rows
            seen.append(
                {k: np.array(v[row : row + 1] if len(v) == rows else v) for k, v in feeds.items()}
            )
        return run(engine, feeds)

    with (
        patch.object(OpenVinoEngine, "run", recorded),
        Pipeline.load(bundle, provider="openvino", evaluation=True) as pipeline,
    ):
        for seed, prompt in enumerate(_PROMPTS):
            pipeline(prompt, safety="strong", seed=seed, steps=steps, width=size, height=size)
    picked = np.random.default_rng(0).permutation(len(seen))[:count]
    return [seen[index] for index in picked]


def prepare(cache: Path, bundle: Path | None, *, kind: str, inputs: list[Feeds]) -> None:
    """Prepare a bundle's UNet in 8 bits, and the other graphs as always."""
    import nncf

    widen = graphs._widen

    def rounded(path: Path) -> Any:
        model = read_model(path)
        widen(model)
        if path.name != "unet.onnx":
            return model
        if kind == "weights":
            return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
        return nncf.quantize(
            model,
            nncf.Dataset(inputs),
            subset_size=len(inputs),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED,
            ignored_scope=nncf.IgnoredScope(patterns=list(_EXACT), validate=False),
        )

    os.environ["SLD_EDGE_CACHE"] = str(cache.resolve())
    with (
        patch.multiple(graphs, read_model=rounded, _widen=lambda model: None),
        Pipeline.load(bundle, provider="openvino", evaluation=True) as pipeline,
    ):
        pipeline.engine("unet")


def _run() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--kind", choices=("weights", "all"), required=True)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--size", type=int)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--calls", type=int, default=100)
    options = parser.parse_args()
    inputs = []
    if options.kind == "all":
        inputs = unet_inputs(options.bundle, options.calls, size=options.size, steps=options.steps)
    prepare(options.cache, options.bundle, kind=options.kind, inputs=inputs)


if __name__ == "__main__":
    raise SystemExit(run_command(_run))
