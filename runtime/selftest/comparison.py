"""Two pipelines compared: component by component, then whole pictures, then call by call."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from sld_edge.engines.base import Array
from sld_edge.engines.errors import UserError, one_line
from sld_edge.runtime.manifest import Component
from sld_edge.runtime.picture import psnr
from sld_edge.runtime.pipeline import Pipeline
from sld_edge.runtime.request import Request, Sampling
from sld_edge.runtime.result import Result
from sld_edge.runtime.selftest import pictures
from sld_edge.runtime.selftest.checks import Checks
from sld_edge.runtime.selftest.feeds import Feeds, cast_to
from sld_edge.runtime.selftest.pictures import Reference, made
from sld_edge.runtime.selftest.tolerances import Tolerance, tolerance

_APART = 0.05  # relative difference of latents, after which two runs are no longer the same


class Judge:
    """Compares arrays and pictures with a reference; the outcomes go to `checks`."""

    def __init__(
        self,
        components: Mapping[str, Component],
        providers: Mapping[str, str],
        checks: Checks,
        *,
        factor: float = 1,
    ) -> None:
        """Judge the outputs of components that these providers run.

        `factor` widens the bounds of FP16, where the reference rounds to FP16 too.
        """
        self.components, self.checks = components, checks
        self._bounds = {
            name: tolerance(component.precision, providers[name]).times(
                factor if component.precision == "fp16" else 1
            )
            for name, component in components.items()
        }

    def bounds(self, name: str = "unet") -> Tolerance:
        """Return the bounds of a component, by its arithmetic and by the provider that runs it."""
        return self._bounds[name]

    def outputs(self, name: str, got: Mapping[str, Array], wanted: Mapping[str, Array]) -> None:
        """Compare every output of a component."""
        for spec in self.components[name].outputs:
            self._output(name, spec.name, spec.dtype, got[spec.name], wanted[spec.name])

    def image(self, name: str, got: Result, wanted: Result, more: str = "") -> None:
        """Compare the pictures of two results."""
        ours, theirs = pixels(got), pixels(wanted)
        mean, largest = level_error(got, wanted), float(np.abs(ours - theirs).max())
        db = psnr(ours, theirs) if largest else None  # JSON has no infinity
        apart, bounds = share_error(got, wanted), self.bounds()
        share = float(np.mean(_shares(got)))
        text = (
            f"mean {mean:.2f} levels (to {bounds.image_levels:g}), largest {largest:.0f}, "
            f"{'equal' if db is None else f'{db:.1f} dB'}; share {share:.4f}, {apart:.4f} "
            f"apart (to {bounds.share:g}){more}"
        )
        passed = mean <= bounds.image_levels and apart <= bounds.share
        numbers = {"mean_levels": mean, "largest": largest, "psnr_db": db, "share": share}
        self.checks.tell(name, text, passed, **numbers, share_apart=apart)

    def _output(self, component: str, output: str, dtype: str, got: Array, wanted: Array) -> None:
        name = f"{component}: {output}"
        if (got.dtype.name, got.shape) != (dtype, wanted.shape):
            text = f"{got.dtype} {list(got.shape)}, wanted {dtype} {list(wanted.shape)}"
            self.checks.tell(name, text, False)
            return
        bounds, error = self.bounds(component), output_error(got, wanted)
        largest = float(np.abs(got.astype(np.float64) - wanted.astype(np.float64)).max())
        if dtype == "uint8":
            allowed = bounds.levels
            text = f"mean {error:.3f} levels (to {allowed:g}), largest {largest:.0f}"
        else:
            allowed = bounds.guidance if component == "guidance" else bounds.network
            text = f"relative error {error:.1e} (to {allowed:.0e}), largest {largest:.1e}"
        passed = error <= allowed  # false for NaN
        self.checks.tell(name, text, passed, error=error, bound=allowed, largest=largest)


class Comparison:
    """Compares a tested pipeline with a reference."""

    def __init__(
        self, tested: Pipeline, reference: Reference, feeds: Feeds, checks: Checks
    ) -> None:
        """`feeds` draws for the tested pipeline's bundle."""
        self.tested, self.reference = tested, reference.pipeline
        self._pictures = reference
        self.feeds, self.checks = feeds, checks
        components = tested.bundle.manifest.components
        self.judge = Judge(components, tested.providers, checks)

    def components(self) -> None:
        """Compare every component's outputs for the same inputs."""
        for name in self.judge.components:
            with self.checks.watched(name):
                feeds = self.feeds.of(name)
                other = self.reference.bundle.manifest.components[name]
                wanted = self.reference.engine(name).run(cast_to(other, feeds))
                self.judge.outputs(name, self.tested.engine(name).run(feeds), wanted)

    def numerics(self) -> None:
        """Check that NaN and infinity are reported; a compiler for GPUs may remove these checks."""
        for case, name, feeds, wanted in self.feeds.broken():
            with self.checks.watched(f"{name}, {case}"):
                finite = self.tested.engine(name).run(feeds)["finite"]
                passed = bool(np.array_equal(finite, wanted))
                text = f"finite {finite.tolist()}, wanted {wanted}"
                self.checks.tell(f"{name}, {case}", text, passed)

    def images(self) -> None:
        """Compare whole images and the effect of safety on them."""
        policy = self.tested.policy
        for sampler, preset in pictures.IMAGES:
            name = f"{sampler}, safety {preset}"
            if policy.default_preset(preset) != preset:
                self.checks.tell(name, "this device's policy", "not applicable")
                continue
            with self.checks.watched(name):
                wanted = self._pictures.made(sampler, preset)
                begin = time.perf_counter()
                got = made(self.tested, sampler, preset)
                seconds = time.perf_counter() - begin
                self.judge.image(name, got, wanted, f"; {seconds:.2f} s")

    def first_wrong(self, sampler: str, safety: str) -> str:
        """Follow one picture through both pipelines; return the first stage that differs.

        The order is text encoder, UNet calls, decoder; the decoder gets the same latents.
        """
        try:
            return self._first_wrong(sampler, safety)
        except UserError as error:
            return str(error)
        except Exception as error:  # of a library or of ours, as in `Checks.watched`
            return f"{type(error).__name__}: {one_line(error)}"

    def _first_wrong(self, sampler: str, safety: str) -> str:
        texts, bounds = self.tested.bundle.manifest.texts, self.judge.bounds()
        sides = (self.tested, self.reference)
        got, wanted = (side.encode_text(pictures.PROMPT) for side in sides)
        if any(output_error(got[name], wanted[name]) > bounds.network for name in wanted):
            return f"the first difference is in the text: {', '.join(texts)}"
        request = Request(
            prompts=(pictures.PROMPT,),
            safety=safety,
            seed=pictures.SEED,
            sampling=Sampling(steps=pictures.STEPS, sampler=sampler),
        )
        runs = [side.steps(side.resolve(request)) for side in sides]
        last = None
        for ours, theirs in zip(*runs, strict=True):
            mine, last = ours.latents, theirs.latents
            if not output_error(mine, last) <= _APART:
                return (
                    f"the first difference is at UNet call {ours.index + 1} of {ours.calls}, in "
                    "the UNet, guidance, or the loop around them"
                )
        if last is None:
            return "no UNet call was made"
        decoded = [side.decode(last) for side in sides]
        if output_error(decoded[0], decoded[1]) > self.judge.bounds("vae_decoder").levels:
            return "the first difference is in vae_decoder"
        return "a single picture without a batch shows no difference"


def output_error(got: Array, wanted: Array) -> float:
    """Return the relative L2 error of an output; for pictures, the mean difference in levels."""
    difference = got.astype(np.float64) - wanted.astype(np.float64)
    if wanted.dtype == np.uint8:
        return float(np.abs(difference).mean())
    norm = float(np.linalg.norm(wanted.astype(np.float64)))
    return float(np.linalg.norm(difference)) / (norm if norm > 0 else 1.0)


def level_error(got: Result, wanted: Result) -> float:
    """Return the mean difference of pictures, in levels of 255."""
    return float(np.abs(pixels(got) - pixels(wanted)).mean())


def share_error(got: Result, wanted: Result) -> float:
    """Return the largest difference of the mean share that safety edited."""
    return max(
        abs(ours - theirs) for ours, theirs in zip(_shares(got), _shares(wanted), strict=True)
    )


def pixels(result: Result) -> NDArray[np.float64]:
    """Return the pictures of a result as numbers."""
    return np.stack([np.asarray(image) for image in result.images]).astype(np.float64)


def same_bits(got: Result, wanted: Result) -> str | None:
    """Return where two results differ by a bit: in the latents or the pictures; None nowhere."""
    for name, ours, theirs in (
        ("latents", got.latents, wanted.latents),
        ("pictures", pixels(got), pixels(wanted)),
    ):
        if ours.tobytes() != theirs.tobytes():
            count = int((ours != theirs).sum())
            largest = float(np.abs(ours - theirs).max())
            return f"{count} of {ours.size} numbers of the {name} differ, by up to {largest:.1e}"
    return None


def _shares(result: Result) -> list[float]:
    return [float(report["safety"]["mean_share"]) for report in result.reports]
