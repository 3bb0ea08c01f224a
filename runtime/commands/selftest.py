"""The self-test: compares a provider on this machine with the CPU, on the miniature bundle.

The reference runs the exported graphs on the CPU, unchanged: no node is fused, nothing is prepared.
Each component gets the same inputs on both sides; then both sides make whole images.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sld_edge.engines.base import Array, Engine, TensorSpec
from sld_edge.engines.cache import SELF_TEST, private_folder
from sld_edge.engines.errors import BundleError, EngineError, InputError, OutputError, UserError
from sld_edge.engines.onnxruntime.engine import OrtEngine
from sld_edge.engines.providers import status
from sld_edge.engines.tensorrt.plan_info import FLAVOURS
from sld_edge.runtime.bundle import EMBEDDED, Bundle
from sld_edge.runtime.contract import PREDICTIONS, ROW
from sld_edge.runtime.loader import Loader, LoadSettings
from sld_edge.runtime.manifest import Component
from sld_edge.runtime.pipeline import Pipeline
from sld_edge.runtime.result import Result
from sld_edge.runtime.samplers import sampler_table

Say = Callable[[str], None]
Build = Callable[[Path, str], None]

_PROMPT = "a skull in an alley"  # the preset medium edits two thirds of the latent
_STEPS, _SEED, _COUNT = 10, 7, 2
_IMAGES = tuple(product(("ddim", "euler-a"), ("off", "medium", "max")))  # euler-a adds noise
_B = 2
_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """The largest differences that pass.

    Attributes:
        network: relative L2 error of the float32 outputs of a network.
        guidance: relative L2 error of guidance's outputs; TF32 has no effect on them, because the
            graph has no matrix product.
        levels: mean difference of pictures decoded from the same latents, in levels of 255.
        image_levels: mean difference of whole images, in levels of 255.
        share: difference of the mean share that safety edited.
    """

    network: float
    guidance: float
    levels: float
    image_levels: float
    share: float


# The same arithmetic in another order: measured 1e-6, and almost no pixel changes.
CPU = Tolerance(network=1e-4, guidance=1e-5, levels=0.02, image_levels=0.1, share=0.002)
# TF32, which GPUs use for FP32 matrix products, keeps 10 bits: 5e-4 a rounding, 1e-3 in total.
# Noise of 2e-3 at every UNet call changed the images here by 0.5 levels and the share by 0.017.
DEVICE = Tolerance(network=2e-3, guidance=1e-5, levels=0.5, image_levels=2.0, share=0.05)


class _AsExported(Loader):
    """Loads every graph of the bundle for the CPU, unchanged."""

    def load(self, name: str, component: Component) -> Engine:
        """Return a component's engine."""
        return OrtEngine(self.bundle.graph(component).path, as_is=True)


def self_test(provider: str, *, say: Say, build: Build | None = None) -> bool:
    """Test a provider on this machine; return whether every comparison passed.

    Args:
        provider: "auto" or one of `engines.providers.NAMES`.
        say: prints a line.
        build: builds a bundle's plans for this device and a flavour of TensorRT; without it, only
            plans of an earlier self-test can be used.

    Raises:
        UserError: the provider does not work here, or its plans cannot be built.
    """
    reference = Pipeline(_AsExported.open(None, LoadSettings(provider="cpu")))
    with reference, _tested(provider, say, build) as tested:
        say(f"{tested.provider} against the exported graphs on the cpu, miniature model")
        for name, why in tested.fallbacks.items():
            say(f"note: {name}: {why}")
        check = _SelfTest(tested, reference, say)
        check.components()
        check.numerics()
        check.images()
    return _verdict(tested.provider, check.failed, say)


@contextmanager
def _tested(provider: str, say: Say, build: Build | None) -> Iterator[Pipeline]:
    """Load the miniature bundle for a provider, and build its plans if they are needed."""
    if provider not in FLAVOURS:
        with Pipeline.load(provider=provider) as pipeline:
            yield pipeline
        return
    tensorrt = status(provider)
    if not tensorrt.usable:  # checked before plans are built
        raise InputError(f"provider {provider} does not work here", got=tensorrt.reason)
    with _folder() as root:
        bundle = root / f"{provider}-{Bundle.open().sha256[:16]}"
        with _planned(bundle, provider, say, build) as pipeline:
            yield pipeline


def _planned(bundle: Path, flavour: str, say: Say, build: Build | None) -> Pipeline:
    """Load the plans of an earlier self-test; build them if there are none that fit."""
    try:
        return Pipeline.load(bundle, provider=flavour)
    except (BundleError, EngineError):  # missing, damaged, or for another version or device
        if build is None:
            raise
    say(f"building the miniature's plans for {flavour} in {bundle}")
    try:
        shutil.rmtree(bundle, ignore_errors=True)
        shutil.copytree(EMBEDDED, bundle)
    except OSError as error:
        raise OutputError(
            f"cannot copy the miniature bundle to {bundle}",
            got=error.strerror or error,
            do="free some space, or set SLD_EDGE_CACHE to another folder or to off",
        ) from error
    build(bundle, flavour)
    return Pipeline.load(bundle, provider=flavour)


@contextmanager
def _folder() -> Iterator[Path]:
    """Give the folder for plans: in the cache, or a temporary folder without a cache."""
    root = private_folder(SELF_TEST)
    if root is not None:
        yield root
        return
    with tempfile.TemporaryDirectory(prefix="sld-edge-") as folder:
        yield Path(folder)


class _SelfTest:
    """Compares two pipelines; `failed` has the names of the failed comparisons."""

    def __init__(self, tested: Pipeline, reference: Pipeline, say: Say) -> None:
        self.tested, self.reference = tested, reference
        self.failed: list[str] = []
        self._say = say
        self._bounds = CPU if tested.provider == "cpu" else DEVICE

    def components(self) -> None:
        """Compare every component's outputs for the same inputs."""
        self._say("components, the same inputs on both sides:")
        bundle = self.reference.bundle
        for name, component in bundle.manifest.components.items():
            with self._watched(name):
                feeds = _feeds(name, component, bundle)
                wanted = self.reference.engine(name).run(feeds)
                got = self.tested.engine(name).run(feeds)
                for spec in component.outputs:
                    self._output(name, spec.name, got[spec.name], wanted[spec.name])

    def numerics(self) -> None:
        """Check that NaN and infinity are reported; a compiler for GPUs may remove these checks."""
        self._say("NaN and infinity, put into the first of two images:")
        components = self.reference.bundle.manifest.components
        for case, name, feeds, code in _broken_feeds(components, self.reference.bundle):
            with self._watched(f"{name}, {case}"):
                finite = self.tested.engine(name).run(feeds)["finite"]
                passed = bool(np.array_equal(finite, [code, 1]))
                text = f"finite {finite.tolist()}, wanted {[float(code), 1.0]}"
                self._tell(f"{name}, {case}", text, passed)

    def images(self) -> None:
        """Compare whole images and the effect of safety on them."""
        self._say(f"{_COUNT} images each, {_STEPS} steps (the first time includes loading):")
        policy = self.tested.policy
        for sampler, preset in _IMAGES:
            if policy.default_preset(preset) != preset:
                self._say(f"  skipped  {sampler}, safety {preset}: this device's policy")
                continue
            name = f"{sampler}, safety {preset}"
            with self._watched(name):
                wanted, slow = _timed_images(self.reference, sampler, preset)
                got, fast = _timed_images(self.tested, sampler, preset)
                self._image(name, got, wanted, f"{fast:.2f} s, reference {slow:.2f} s")

    def _output(self, component: str, output: str, got: Array, wanted: Array) -> None:
        name = f"{component}: {output}"
        if (got.dtype, got.shape) != (wanted.dtype, wanted.shape):
            text = f"{got.dtype} {list(got.shape)}, wanted {wanted.dtype} {list(wanted.shape)}"
            self._tell(name, text, False)
            return
        difference = got.astype(np.float64) - wanted.astype(np.float64)
        largest = float(np.abs(difference).max())
        if got.dtype == np.uint8:
            mean, allowed = float(np.abs(difference).mean()), self._bounds.levels
            text = f"mean {mean:.3f} levels (to {allowed:g}), largest {largest:.0f}"
            self._tell(name, text, mean <= allowed)
            return
        norm = float(np.linalg.norm(wanted.astype(np.float64)))
        error = float(np.linalg.norm(difference)) / (norm if norm > 0 else 1.0)
        allowed = self._bounds.guidance if component == "guidance" else self._bounds.network
        text = f"relative error {error:.1e} (to {allowed:.0e}), largest {largest:.1e}"
        self._tell(name, text, error <= allowed)  # false for NaN

    def _image(self, name: str, got: Result, wanted: Result, times: str) -> None:
        difference = _pixels(got) - _pixels(wanted)
        mean, largest = np.abs(difference).mean(), np.abs(difference).max()
        square = float((difference**2).mean())
        psnr = f"{10 * np.log10(255**2 / square):.1f} dB" if square > 0 else "equal"
        share, wanted_share = (
            np.array([report["safety"]["mean_share"] for report in result.reports])
            for result in (got, wanted)
        )
        apart = float(np.abs(share - wanted_share).max())
        text = (
            f"mean {mean:.2f} levels (to {self._bounds.image_levels:g}), largest {largest:.0f}, "
            f"{psnr}; share {share.mean():.4f}, {apart:.4f} apart (to {self._bounds.share:g}); "
            f"{times}"
        )
        self._tell(name, text, mean <= self._bounds.image_levels and apart <= self._bounds.share)

    def _tell(self, name: str, text: str, passed: bool) -> None:
        self._say(f"  {'pass' if passed else 'FAIL'}  {name}: {text}")
        if not passed:
            self.failed.append(name)

    @contextmanager
    def _watched(self, name: str) -> Iterator[None]:
        """Count an error as a failure of `name` and continue."""
        try:
            yield
        except UserError as error:
            self._tell(name, str(error), False)


def _feeds(name: str, component: Component, bundle: Bundle) -> dict[str, Array]:
    """Return inputs of a component for two images and all branches, the same at every call."""
    rng = np.random.default_rng([_SEED, *name.encode()])
    return {spec.name: _feed(spec, bundle, rng) for spec in component.inputs}


def _feed(spec: TensorSpec, bundle: Bundle, rng: np.random.Generator) -> Array:
    shape = tuple(_sizes(bundle)[size] if isinstance(size, str) else size for size in spec.shape)
    if spec.name in _SETTINGS:
        return np.array(_SETTINGS[spec.name], np.float32)
    if spec.name == "row":
        return _sampler_row(bundle)
    if spec.name == "input_ids":
        text = next(iter(bundle.manifest.texts))
        words = len(json.loads(bundle.tokenizer_json(text))["model"]["vocab"])
        return rng.integers(0, words, shape, np.int64)
    if spec.dtype == "uint8":
        return rng.integers(0, 256, shape, np.uint8)
    drawn = rng.standard_normal(shape, np.float32)
    return np.abs(drawn) if spec.name == "edit_map" else drawn


# A value for each image. Safety: the preset strong, then numbers whose edit does not saturate.
_SETTINGS: Mapping[str, Any] = {
    "timestep": [801, 81],
    "guidance_scale": [7.5, 3],
    "safety": [[2000, 0.025, 0.5, 0.7, 1], [0.5, 0.25, 0.3, 0.4, 1]],
}


def _sizes(bundle: Bundle) -> dict[str, int]:
    manifest = bundle.manifest
    width, height = manifest.size.width, manifest.size.height
    cell = manifest.latents.downscale
    return {
        "N": 1,  # texts are encoded one by one
        "B": _B,
        "K*B": (2 + len(manifest.safety_concepts)) * _B,
        "n": len(manifest.safety_concepts),
        "L": manifest.text_length,
        "h": height // cell,
        "w": width // cell,
        "H": height,
        "W": width,
    }


def _sampler_row(bundle: Bundle) -> Array:
    """Return a sampler's row that uses the history and adds some noise."""
    manifest = bundle.manifest
    scheduler = {**manifest.scheduler, "prediction_type": manifest.prediction_type}
    row: Array = sampler_table("unipc", scheduler, _STEPS).rows()[_STEPS // 2]
    row[ROW.index("s")] = 0.3
    return row


def _broken_feeds(
    components: Mapping[str, Component], bundle: Bundle
) -> Iterator[tuple[str, str, dict[str, Array], int]]:
    """Give case, component, inputs, and the expected value of `finite` for the first image."""
    for name, value in product(PREDICTIONS, (np.nan, np.inf)):
        feeds = _feeds("guidance", components["guidance"], bundle)
        feeds[name].reshape(-1)[0] = value
        yield f"{value} in {name}", "guidance", feeds, -1
    feeds = _feeds("guidance", components["guidance"], bundle)
    feeds["guidance_scale"][0] = _FLOAT32_MAX
    yield "latents that overflow", "guidance", feeds, 0
    feeds = _feeds("vae_decoder", components["vae_decoder"], bundle)
    feeds["latents"][0, 0, 0, 0] = np.nan
    yield "nan in latents", "vae_decoder", feeds, 0


def _pixels(result: Result) -> NDArray[np.float64]:
    return np.stack([np.asarray(image) for image in result.images]).astype(np.float64)


def _timed_images(pipeline: Pipeline, sampler: str, preset: str) -> tuple[Result, float]:
    begin = time.perf_counter()
    result = pipeline(
        _PROMPT, safety=preset, sampler=sampler, steps=_STEPS, seed=_SEED, count=_COUNT
    )
    return result, time.perf_counter() - begin


def _verdict(provider: str, failed: list[str], say: Say) -> bool:
    if not failed:
        say(f"self-test of {provider}: pass")
        return True
    more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
    advice = (
        "update onnxruntime, or run with SLD_EDGE_CACHE=off"
        if provider == "cpu"
        else f"update driver and {provider}, try --no-cuda-graph; until it passes, --provider cpu"
    )
    say(f"self-test of {provider}: FAIL: {'; '.join(failed[:3])}{more} | {advice}")
    return False
