"""The certificate of a device with a bundle: what was run, what passed, how fast, how much memory.

The device makes all its pictures first and is then unloaded; the reference, the bundle's exported
graphs on the CPU, comes last, in the time that is left. A check without time is "skipped", and a
certificate with a skipped check is "incomplete": it never passes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sld_edge.engines.base import Array
from sld_edge.engines.errors import UserError, one_line
from sld_edge.engines.tensorrt.plan_info import FLAVOURS
from sld_edge.runtime.conditions import conditions
from sld_edge.runtime.loader import LoadSettings
from sld_edge.runtime.plans import source_digest
from sld_edge.runtime.process_memory import read_memory, reset_peak
from sld_edge.runtime.request import Request, Sampling
from sld_edge.runtime.result import Result
from sld_edge.runtime.selftest.budget import Budget
from sld_edge.runtime.selftest.certificate_file import FORMAT, FORMAT_VERSION, verdict_of
from sld_edge.runtime.selftest.checks import Checks, Say
from sld_edge.runtime.selftest.comparison import Judge
from sld_edge.runtime.selftest.endurance import (
    LEAST,
    Endurance,
    MemoryWatch,
    endure,
    stages,
)
from sld_edge.runtime.selftest.feeds import Feeds
from sld_edge.runtime.selftest.stability import Stability
from sld_edge.runtime.selftest.subject import Subject, loaded, reference

Compute = Callable[[Path, int], Mapping[str, Any]]  # takes bundle and pixels, gives computed bytes

_PROMPT, _SEED, _PRESET = "a red star at a party", 7, "medium"
_STEPS, _GOLDEN_STEPS = 2, 4  # a step is as slow in a short run; the reference is slow
_SMALL = 256  # pixels, where the plans do not settle the size
_MANY = 0.5  # share of the time in which the many pictures must be made
# Prompt, sampler, preset, seed.
_GOLDEN = (
    ("a skull in an alley", "ddim", "medium", 7),
    ("a skull in an alley", "euler-a", "max", 8),
    ("a lighthouse in a storm", "dpm++2m", "off", 9),
)
# The reference rounds to FP16 as the device does, each in another way.
_BOTH_ROUND = 2.0


@dataclass(kw_only=True)
class _Seen:
    """What the device gave, to be compared after it was unloaded."""

    cold: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    many: Endurance = field(default_factory=Endurance)
    feeds: dict[str, dict[str, Array]] = field(default_factory=dict)
    outputs: dict[str, dict[str, Array]] = field(default_factory=dict)
    golden: dict[str, Result] = field(default_factory=dict)


def certify(
    bundle: Path, *, settings: LoadSettings, budget: Budget, say: Say, compute: Compute
) -> dict[str, Any]:
    """Run every check of a bundle on a device within the budget; return the certificate.

    Args:
        bundle: the bundle.
        settings: the provider and how it runs.
        budget: the time.
        say: prints a line.
        compute: computes the memory that the bundle's graphs need.

    Raises:
        UserError: no such bundle, or the provider does not work here.
    """
    return _Certification(bundle, budget, say, compute).run(settings)


class _Certification:
    def __init__(self, bundle: Path, budget: Budget, say: Say, compute: Compute) -> None:
        self._bundle, self._budget, self._compute = bundle, budget, compute
        self._say, self._checks = say, Checks(say)
        self._seen = _Seen()
        self._size = (0, 0)

    def run(self, settings: LoadSettings) -> dict[str, Any]:
        begin = time.perf_counter()
        with ExitStack() as stack:
            subject = stack.enter_context(loaded(self._bundle, settings))
            provider = subject.loader.provider
            settings = replace(settings, provider=provider)
            facts = self._facts(subject, provider)
            unloaded = stack.pop_all()
        components = subject.pipeline.bundle.manifest.components
        judge = Judge(components, subject.pipeline.providers, self._checks, factor=_BOTH_ROUND)
        repeated = Stability(
            self._repeated,
            self._checks,
            steps=_STEPS,
            levels=judge.bounds().image_levels,
            budget=self._budget,
        )
        with self._checks.watched("loading and unloading"), unloaded:
            self._on_device(subject, repeated, begin)
        repeated.check_reloaded(
            lambda cuda_graph: loaded(self._bundle, settings, cuda_graph=cuda_graph),
            has_graphs=provider in FLAVOURS,
            compiles=provider == "tensorrt-rtx",
        )
        self._against_reference(judge)
        memory = {**self._seen.memory, "computed": self._computed()}
        self._say(_memory_words(memory))
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "verdict": verdict_of(check.outcome for check in self._checks.done),
            **facts,
            "latency_s": {"cold": self._seen.cold, "warm": self._seen.many.latency()},
            "memory": memory,
            "checks": [
                {"name": c.name, "outcome": c.outcome, "text": c.text, "numbers": c.numbers}
                for c in self._checks.done
            ],
            "seconds": round(self._budget.spent, 1),
        }

    def _facts(self, subject: Subject, provider: str) -> dict[str, Any]:
        """Return what is run, where; no name of a user, a host or a folder."""
        bundle, ran_on = subject.pipeline.bundle, subject.loader.description()
        self._size = width, height = _smallest_size(subject)
        self._say(
            f"certifying a bundle with {provider} at {width}x{height} pixels, in up to "
            f"{self._budget.seconds / 60:g} minutes"
        )
        return {
            "conditions": conditions(provider, threads=None),
            "device": ran_on["device"],
            "bundle": {
                "sha256": bundle.sha256,
                "components": {
                    name: {
                        "runs_on": subject.form_of(name),
                        "source_sha256": source_digest(component),
                        "plan_sha256": ran_on["plans"].get(name),
                    }
                    for name, component in bundle.manifest.components.items()
                },
            },
            "settings": {
                "provider": provider,
                "width": width,
                "height": height,
                "steps": _STEPS,
                "golden_steps": _GOLDEN_STEPS,
                "budget_s": self._budget.seconds,
            },
        }

    def _on_device(self, subject: Subject, repeated: Stability, begin: float) -> None:
        seen, watch = self._seen, MemoryWatch(subject=subject)
        reset_peak()
        before = watch.device()
        self._say("cold, then many pictures:")
        with self._checks.watched("the first picture"):
            subject.pipeline.warm_up()
            loaded_at, at_rest = time.perf_counter(), watch.device()
            first = self._picture(subject, _SEED, watch.device)
            seen.cold = {stage: round(sum(times), 6) for stage, times in stages(first).items()}
            seen.cold = {"load": round(loaded_at - begin, 6), **seen.cold}
            seen.many = endure(subject, watch, self._picture, self._checks, self._budget, _MANY)
            self._tell_latency()
            seen.memory = {"device": None, "process": None}
            if subject.device is not None:
                _, total = subject.device.memory()
                seen.memory["device"] = {
                    "before": before,
                    "loaded": at_rest,
                    "peak": watch.device_peak,
                    "total": total,
                }
            reading = read_memory()
            if reading is not None:
                seen.memory["process"] = {"peak": reading.peak, "end": reading.resident}
        self._say("one picture again, on the provider alone:")
        repeated.check_loaded(subject)
        feeds = Feeds(
            bundle=subject.pipeline.bundle, width=self._size[0], height=self._size[1], images=1
        )
        for name in subject.pipeline.bundle.manifest.components:
            with self._checks.watched(name):
                seen.feeds[name] = feeds.of(name)
                seen.outputs[name] = subject.pipeline.engine(name).run(seen.feeds[name])
        for name, refused, golden in self._golden(subject):
            with self._checks.watched(name):
                if not refused and self._budget.covers():
                    seen.golden[name] = golden()

    def _against_reference(self, judge: Judge) -> None:
        """Compare with the exported graphs on the CPU, as far as the time goes."""
        self._say("against the exported graphs on the cpu:")
        seen, slowest = self._seen, 0.0
        with reference(self._bundle) as exact:
            for name, got in seen.outputs.items():
                if not self._budget.covers():
                    self._checks.tell(name, "the time was over", "skipped")
                    continue
                with self._checks.watched(name):
                    begin = time.perf_counter()
                    wanted = exact.pipeline.engine(name).run(seen.feeds[name])
                    slowest = max(slowest, time.perf_counter() - begin)
                    judge.outputs(name, got, wanted)
            for name, refused, golden in self._golden(exact):
                needed = slowest * (_GOLDEN_STEPS + 1)
                if refused:
                    self._checks.tell(name, "this device's policy", "not applicable")
                elif name in self._checks.failed:
                    continue  # on the device
                elif name not in seen.golden or not self._budget.covers(needed):
                    text = f"the time was over; the reference needs about {needed:.0f} s"
                    self._checks.tell(name, text, "skipped")
                else:
                    with self._checks.watched(name):
                        judge.image(name, seen.golden[name], golden())

    def _golden(self, subject: Subject) -> Iterator[tuple[str, bool, Callable[[], Result]]]:
        """Give name, whether a policy refuses it, and maker of every golden picture."""
        policy = subject.pipeline.policy
        for prompt, sampler, safety, seed in _GOLDEN:
            request = self._request(prompt, seed, safety, sampler=sampler, steps=_GOLDEN_STEPS)
            refused = policy.default_preset(safety) != safety

            def make(request: Request = request) -> Result:
                return subject.pipeline.run(subject.pipeline.resolve(request))

            yield f"golden picture, {sampler}, safety {safety}", refused, make

    def _picture(self, subject: Subject, seed: int, progress: Callable[[], object]) -> Result:
        """Make a picture with a prompt of its own, so that its text is encoded."""
        request = self._request(f"{_PROMPT} {seed}", seed, _preset(subject))
        run = subject.pipeline.resolve(request)
        return subject.pipeline.run(run, progress=lambda done, total: progress())

    def _repeated(
        self,
        subject: Subject,
        *,
        steps: int = _STEPS,
        count: int = 1,
        batch_size: int | None = None,
    ) -> Result:
        request = self._request(_PROMPT, _SEED, _preset(subject), steps=steps, count=count)
        return subject.pipeline.run(subject.pipeline.resolve(request), batch_size=batch_size)

    def _request(
        self,
        prompt: str,
        seed: int,
        safety: str,
        *,
        sampler: str | None = None,
        steps: int = _STEPS,
        count: int = 1,
    ) -> Request:
        width, height = self._size
        return Request(
            prompts=(prompt,),
            safety=safety,
            seed=seed,
            count=count,
            width=width,
            height=height,
            sampling=Sampling(steps=steps, sampler=sampler),
        )

    def _tell_latency(self) -> None:
        """Say the latency; too few pictures are a skipped check."""
        latency = self._seen.many.latency()
        enough = bool(latency) and latency["picture"]["count"] >= LEAST
        text = "; ".join(
            f"{stage} {times['p50']:.3f} s (p95 {times['p95']:.3f})"
            for stage, times in latency.items()
        )
        self._checks.tell("warm latency", text or "no picture", True if enough else "skipped")

    def _computed(self) -> dict[str, Any]:
        try:
            return dict(self._compute(self._bundle, max(self._size)))
        except UserError as error:
            return {"why_not": one_line(error)}


def _memory_words(memory: Mapping[str, Any]) -> str:
    peaks = [
        f"{kind} {memory[kind]['peak'] / 1e6:.0f} MB"
        for kind in ("device", "process")
        if memory.get(kind)
    ]
    run = memory["computed"].get("a run")
    computed = f"{run / 1e6:.0f} MB" if run is not None else memory["computed"]["why_not"]
    return f"peak memory: {', '.join(peaks) or 'not known'}; computed for the graphs: {computed}"


def _preset(subject: Subject) -> str:
    return subject.pipeline.policy.default_preset(_PRESET)


def _smallest_size(subject: Subject) -> tuple[int, int]:
    """Return the smallest width and height that the plans take; without plans, a small size."""
    manifest = subject.pipeline.bundle.manifest
    plan = subject.loader.plans.get("unet")
    for tensor in plan.info.inputs if plan is not None else ():
        if tensor.spec.name == "latents" and tensor.profile is not None:
            height, width = tensor.profile[0][2:]
            return width * manifest.latents.downscale, height * manifest.latents.downscale
    return min(_SMALL, manifest.size.width), min(_SMALL, manifest.size.height)
