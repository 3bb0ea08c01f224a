"""The self-test: compares a provider on this machine with the CPU, on the miniature bundle.

The reference runs the exported FP32 graphs on the CPU, unchanged: no node is fused, nothing is
prepared. Each component gets the same inputs on both sides; then both sides make whole images.
Then the provider's pictures are compared with each other, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from sld_edge.engines.openvino.target import CpuPrecision
from sld_edge.engines.tensorrt.plan_info import FLAVOURS
from sld_edge.runtime.loader import LoadSettings
from sld_edge.runtime.result import Result
from sld_edge.runtime.selftest import pictures, stability
from sld_edge.runtime.selftest.checks import Checks, Say
from sld_edge.runtime.selftest.comparison import Comparison
from sld_edge.runtime.selftest.feeds import Feeds
from sld_edge.runtime.selftest.miniature import FORMS, Build, Form, Miniature, miniature
from sld_edge.runtime.selftest.stability import Stability
from sld_edge.runtime.selftest.subject import Subject, reference

# The order in which a run uses the components.
_ORDER = ("text_encoder", "unet", "unet_shallow", "guidance", "vae_decoder")


def self_test(
    provider: str,
    *,
    say: Say,
    build: Build | None = None,
    device: str = "CPU",
    cpu_precision: CpuPrecision = "fp32",
) -> bool:
    """Test a provider on this machine; return whether every check passed.

    Args:
        provider: one of `engines.providers.NAMES`.
        say: prints a line.
        build: builds a bundle's plans for this device and a flavour of TensorRT; without it, only
            plans of an earlier self-test can be used.
        device: of OpenVINO.
        cpu_precision: of OpenVINO on the CPU.

    Raises:
        UserError: the provider does not work here, or its plans cannot be built.
    """
    settings = LoadSettings(provider=provider, device=device, cpu_precision=cpu_precision)
    begin = time.monotonic()
    tests = []
    with reference(None) as subject:
        exact = pictures.Reference(subject.pipeline)
        for form in FORMS:
            with miniature(form, settings, say, build) as made:
                test = _FormTest(made, exact, say)
                test.run()
                tests.append(test)
    say(f"{time.monotonic() - begin:.0f} s")
    return _verdict(provider, tests, say)


class _FormTest:
    """The checks of the miniature in one form."""

    def __init__(self, made: Miniature, exact: pictures.Reference, say: Say) -> None:
        self.form: Form = made.form
        self.checks = Checks(say, prefix=f"{made.form} ")
        self.findings: list[str] = []
        self._made, self._exact, self._say = made, exact, say

    def run(self) -> None:
        """Run every check; an error in one is its failure, and the others follow."""
        repeated = None
        with self.checks.watched("loading and unloading"), self._made.load() as subject:
            self._introduce(subject)
            comparison = self._comparison(subject, self.checks)
            repeated = self._repeated(comparison)
            self._compare(comparison)
            self._say("one picture again, on the provider alone:")
            repeated.check_loaded(subject)
        provider = self._made.provider
        has_graphs = provider in FLAVOURS
        if repeated is not None:
            compiles = provider == "tensorrt-rtx"
            repeated.check_reloaded(self._made.load, has_graphs=has_graphs, compiles=compiles)
        if self.checks.failed and has_graphs:
            self._without_graphs()

    def _compare(self, comparison: Comparison) -> None:
        self._say("components, the same inputs on both sides:")
        comparison.components()
        self._say("NaN and infinity, put into the first image:")
        comparison.numerics()
        alone = len(self.checks.failed)
        many, steps = pictures.COUNT, pictures.STEPS
        self._say(f"{many} images each, {steps} steps (the first time includes loading):")
        comparison.images()
        if self.checks.failed and not alone:
            where = comparison.first_wrong(*pictures.IMAGES[-1])
            self.findings.append(f"every {self.form} component is right alone; {where}")

    def _repeated(self, comparison: Comparison) -> Stability:
        levels = comparison.judge.bounds().image_levels
        return Stability(_ask, comparison.checks, steps=pictures.REPEATED_STEPS, levels=levels)

    def first_component(self) -> str | None:
        """Return the first component, in the order of a run, that failed alone."""
        for name in _ORDER:
            if any(failed.startswith(f"{self.form} {name}") for failed in self.checks.failed):
                return f"{self.form} {name}"
        return None

    def _introduce(self, subject: Subject) -> None:
        provider = self._made.provider
        self._say(
            f"{provider} against the exported FP32 graphs on the cpu, miniature model in "
            f"{self.form}; the UNet runs on {subject.form_of('unet')}"
        )
        for name, why in subject.pipeline.fallbacks.items():
            self._say(f"note: {name}: {why}")

    def _comparison(self, subject: Subject, checks: Checks) -> Comparison:
        size = subject.pipeline.bundle.manifest.size
        feeds = Feeds(bundle=subject.pipeline.bundle, width=size.width, height=size.height)
        return Comparison(subject.pipeline, self._exact, feeds, checks)

    def _without_graphs(self) -> None:
        """Make the images once more without CUDA graphs, and find whether the graphs are wrong."""
        self._say("the images once more, without CUDA graphs:")
        checks = Checks(self._say, prefix=f"{self.form} without CUDA graphs, ")
        with checks.watched("loading and unloading"), self._made.load(False) as subject:
            comparison = self._comparison(subject, checks)
            comparison.images()
            self._repeated(comparison).check_loaded(subject)
        if checks.failed:
            self.findings.append(f"{self.form} is wrong without CUDA graphs too")
        else:
            self.findings.append(f"{self.form} pictures pass with --no-cuda-graph")


def _ask(subject: Subject, **asked: int) -> Result:
    """Make the picture that `Stability` compares."""
    safety = subject.pipeline.policy.default_preset("medium")
    asked = {"count": 1, "steps": pictures.REPEATED_STEPS, **asked}
    return pictures.made(subject.pipeline, "euler-a", safety, **asked)


def _verdict(provider: str, tests: Sequence[_FormTest], say: Say) -> bool:
    failed = [name for test in tests for name in test.checks.failed]
    if not failed:
        say(f"self-test of {provider}: pass")
        return True
    for test in tests:
        for finding in test.findings:
            say(f"finding: {finding}")
    first = next((name for test in tests if (name := test.first_component())), None)
    more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
    wrong = f" | the first wrong component: {first}" if first is not None else ""
    say(
        f"self-test of {provider}: FAIL: {'; '.join(failed[:3])}{more}{wrong} | "
        f"{_advice(provider, tests)}"
    )
    return False


def _advice(provider: str, tests: Sequence[_FormTest]) -> str:
    if provider == "cpu":
        return "update onnxruntime, or run with SLD_EDGE_CACHE=off"
    if provider == "openvino":
        return "update openvino and the device's driver; until it passes, --provider cpu"
    forms = [test.form for test in tests if test.checks.failed]
    if forms == ["fp32"]:
        return "FP16 passes: use bundles in FP16, without --precision fp32 or --fp32-components"
    advice = f"update driver and {provider}"
    if provider in FLAVOURS and any(stability.GRAPHS in name for name in _names(tests)):
        advice += ", try --no-cuda-graph"
    return f"{advice}; until it passes, --provider cpu"


def _names(tests: Sequence[_FormTest]) -> list[str]:
    return [name for test in tests for name in test.checks.failed]
