"""The error of FP16 and BF16 arithmetic on the miniature, and the effect of mistakes.

python -m sld_edge.benchmarks.studies.fp16_error [--seeds 8] [--bf16]

The bounds of the self-test come from these numbers. The FP16 graphs run on the CPU, which rounds
the result of every operation to FP16; the reference is the FP32 graphs with the same weights.
Mistakes are put into the FP32 graphs: a bias that is left out, two branches that are exchanged.
BF16 is OpenVINO's, on a processor with BF16 units.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from sld_edge.engines.base import Array
from sld_edge.engines.onnxruntime.engine import OrtEngine
from sld_edge.runtime.bundle import Bundle
from sld_edge.runtime.commands.console import run_command
from sld_edge.runtime.pipeline import Pipeline
from sld_edge.runtime.selftest.comparison import level_error, output_error, share_error
from sld_edge.runtime.selftest.feeds import Feeds
from sld_edge.runtime.selftest.miniature import unpack
from sld_edge.runtime.selftest.pictures import IMAGES, SEED, made
from sld_edge.runtime.selftest.tolerances import BOUNDS

NETWORKS = ("text_encoder", "unet", "unet_shallow", "vae_decoder")


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Errors of each output, a number for each seed; of pictures, in levels of 255."""

    outputs: dict[str, list[float]]

    def largest(self, name: str) -> float:
        """Return the largest error of an output, "COMPONENT.OUTPUT"."""
        return max(self.outputs[name])


def arithmetic_errors(fp16: Bundle, seeds: Sequence[int]) -> Errors:
    """Return the error of FP16 arithmetic for every output of every network."""
    fp32 = Bundle.open()
    errors: dict[str, list[float]] = {}
    for name in NETWORKS:
        wanted, got = (_engine(bundle, name) for bundle in (fp32, fp16))
        for seed in seeds:
            feeds = _feeds(fp32, seed).of(name)
            for output, error in _compared(got.run(feeds), wanted.run(feeds)):
                errors.setdefault(f"{name}.{output}", []).append(error)
    return Errors(outputs=errors)


def bf16_errors(seeds: Sequence[int]) -> dict[str, list[float]]:
    """Return the error of OpenVINO's BF16: of every output, and of the self-test's pictures."""
    errors: dict[str, list[float]] = {}

    def add(name: str, error: float) -> None:
        errors.setdefault(name, []).append(error)

    with (
        Pipeline.load(provider="openvino", cpu_precision="bf16") as tested,
        Pipeline.load(provider="cpu") as reference,
    ):
        for name, seed in product(NETWORKS, seeds):
            feeds = _feeds(reference.bundle, seed).of(name)
            found = (pipeline.engine(name).run(feeds) for pipeline in (tested, reference))
            for output, error in _compared(*found):
                add(f"{name}.{output}", error)
        for seed in range(SEED, SEED + len(seeds)):
            for name, levels, share in _pictures_compared(tested, reference, seed):
                add(f"pictures, {name}: levels", levels)
                add(f"pictures, {name}: share", share)
    return errors


def bias_effects(bundle: Bundle, name: str, seed: int = 7) -> dict[str, float]:
    """Return a component's largest error for each bias that is left out, by the bias's name."""
    component = bundle.manifest.components[name]
    path = bundle.graph(component).path
    feeds = _feeds(bundle, seed).of(name)
    wanted = _engine(bundle, name).run(feeds)
    effects = {}
    model = onnx.load(str(path), load_external_data=True)
    with tempfile.TemporaryDirectory() as folder:
        for tensor in model.graph.initializer:
            if not tensor.name.endswith(".bias") or not tensor.raw_data.strip(b"\0"):
                continue
            kept, tensor.raw_data = tensor.raw_data, bytes(len(tensor.raw_data))
            onnx.save(model, str(Path(folder) / "changed.onnx"))
            tensor.raw_data = kept
            with OrtEngine(Path(folder) / "changed.onnx", as_is=True) as engine:
                found = engine.run(feeds)
            effects[tensor.name] = max(error for _, error in _compared(found, wanted))
    return effects


def exchange_effect(seed: int = 7) -> float:
    """Return the error of the UNet's output with the branches of prompt and concept exchanged."""
    bundle = Bundle.open()
    feeds = _feeds(bundle, seed).of("unet")
    predicted = _engine(bundle, "unet").run(feeds)["noise_pred"]
    parts = np.split(predicted, 3)
    return output_error(np.concatenate([parts[0], parts[2], parts[1]]), predicted)


def picture_errors(fp16: Bundle, noise: float = 0.0) -> dict[str, float]:
    """Return the largest error of the self-test's pictures: mean levels, and the edited share.

    With `noise`, the FP32 pipeline is compared with itself, where every UNet call has got random
    noise of that relative size.
    """
    with (
        Pipeline.load(None if noise else fp16.path, provider="cpu") as tested,
        Pipeline.load(provider="cpu") as reference,
    ):
        if noise:
            _add_noise(tested, noise)
        _, levels, share = zip(*_pictures_compared(tested, reference, SEED), strict=True)
    return {"levels": max(levels), "share": max(share)}


def _add_noise(pipeline: Pipeline, noise: float) -> None:
    engine: Any = pipeline.engine("unet")
    right, rng = engine.run, np.random.default_rng(3)

    def run(feeds: Any) -> dict[str, Array]:
        found: dict[str, Array] = right(feeds)
        clean = found["noise_pred"]
        drawn = rng.standard_normal(clean.shape, np.float32)
        size = noise * np.linalg.norm(clean) / np.linalg.norm(drawn)
        return {**found, "noise_pred": clean + np.float32(size) * drawn}

    engine.run = run


def _pictures_compared(
    tested: Pipeline, reference: Pipeline, seed: int
) -> Iterator[tuple[str, float, float]]:
    """Yield name, mean levels and difference of the edited share of the self-test's pictures."""
    for sampler, safety in IMAGES:
        got, wanted = (
            made(pipeline, sampler, safety, seed=seed) for pipeline in (tested, reference)
        )
        yield f"{sampler}, {safety}", level_error(got, wanted), share_error(got, wanted)


def _compared(got: dict[str, Array], wanted: dict[str, Array]) -> Iterator[tuple[str, float]]:
    for output, array in wanted.items():
        yield output, output_error(got[output], array)


def _engine(bundle: Bundle, name: str) -> OrtEngine:
    return OrtEngine(bundle.graph(bundle.manifest.components[name]).path, as_is=True)


def _feeds(bundle: Bundle, seed: int) -> Feeds:
    size = bundle.manifest.size
    return replace(Feeds(bundle=bundle, width=size.width, height=size.height), seed=seed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the errors; return the exit code."""
    return run_command(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=8, help="of the inputs (default: 8)")
    parser.add_argument("--bf16", action="store_true", help="only the error of BF16")
    options = parser.parse_args(arguments)
    seeds = range(max(1, options.seeds))
    if options.bf16:
        for name, found in bf16_errors(seeds).items():
            print(f"{name}: largest {max(found):.1e}, median {np.median(found):.1e}")
        return
    with tempfile.TemporaryDirectory() as folder:
        unpack("fp16", Path(folder) / "fp16")
        fp16 = Bundle.open(Path(folder) / "fp16")
        for name, errors in arithmetic_errors(fp16, seeds).outputs.items():
            print(f"{name}: largest {max(errors):.1e}, median {np.median(errors):.1e}")
        print(f"the self-test's pictures: {picture_errors(fp16)}")
        noise = BOUNDS["fp16"].network
        print(f"the same, FP32 with noise of {noise:g}: {picture_errors(fp16, noise)}")
        print(f"unet, branches exchanged: {exchange_effect():.1e}")
        for component in ("unet", "text_encoder", "vae_decoder"):
            effects: NDArray[Any] = np.array(
                sorted(bias_effects(Bundle.open(), component).values())
            )
            print(
                f"{component}, a bias left out: smallest {effects[:3]}, "
                f"median {np.median(effects):.1e}, {len(effects)} of them"
            )


if __name__ == "__main__":
    sys.exit(main())
