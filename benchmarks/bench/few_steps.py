"""Few steps and safety, measured together: the miniature's twin beside the miniature in 50 steps.

Every row makes the same prompts of the suite "hidden" with the same seeds. Pictures are judged as
`sld-eval` judges them, and a stopped measurement goes on from the output folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from sld_edge.benchmarks.bench.options import BenchOptions
from sld_edge.benchmarks.bench.report import Report, counted
from sld_edge.benchmarks.bench.summary import digits, median
from sld_edge.benchmarks.evaluation.evaluator import Task, request_from_tasks
from sld_edge.benchmarks.evaluation.prompts import PromptList, chosen
from sld_edge.benchmarks.evaluation.report_tables import SHARE, cell
from sld_edge.benchmarks.evaluation.rows import Row, read_rows
from sld_edge.benchmarks.evaluation.run import Work, run
from sld_edge.benchmarks.evaluation.settings import (
    MINIATURE_SCORERS,
    EvalSettings,
    Setting,
    loaded,
    settings_from_names,
)
from sld_edge.benchmarks.evaluation.statistics import Estimate, mean_estimate
from sld_edge.benchmarks.evaluation.suites import suite_list
from sld_edge.benchmarks.miniworld.few_steps import write_checkpoint
from sld_edge.benchmarks.miniworld.prompts import CONCEPT
from sld_edge.benchmarks.tables import Table
from sld_edge.engines.errors import InputError
from sld_edge.runtime.pipeline import Pipeline
from sld_edge.runtime.request import Request
from sld_edge.runtime.scorers import flagged, rule_for

SAFETY: Final = ("off", "negative", "strong", "max", "early", "guard", "guard-max", "guard-lite")
FULL_STEPS: Final = 50
FEW_STEPS: Final = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A model and its number of denoising steps; without a bundle, the miniature."""

    name: str
    bundle: Path | None
    sampler: str
    steps: int


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One variant with one setting.

    Attributes:
        variant: its name.
        setting: its name.
        pictures: made.
        unsafe: share of the pictures that the examiner flags.
        withheld: share that screening by the judge withholds.
        unsafe_screened: share that the examiner flags and the judge does not.
        adherence: share of the pictures that show the prompt's shape in its colour.
        branches: UNet branches of a picture, mean.
        seconds: of a picture, all stages, on one thread; median.
        ratio: of `seconds` to the first variant's with the same setting.
    """

    variant: str
    setting: str
    pictures: int
    unsafe: Estimate
    withheld: Estimate
    unsafe_screened: Estimate
    adherence: Estimate
    branches: float
    seconds: float
    ratio: float


def measure_few_steps(options: BenchOptions, *, say: Callable[[str], None]) -> Report:
    """Make and judge the pictures of every variant with every setting.

    Raises:
        InputError: a number of pictures that the suite does not have.
        OutputError: this installation has no weights of the twin.
    """
    prompts = _prompts(options.pictures)
    twin = _twin(options.output / "models")
    variants = [
        Variant(name=f"DDIM, {FULL_STEPS} steps", bundle=None, sampler="ddim", steps=FULL_STEPS)
    ]
    for steps in FEW_STEPS:
        name = f"twin, {counted(steps, 'step')}"
        variants.append(Variant(name=name, bundle=twin, sampler="lcm", steps=steps))
    figures: list[Figures] = []
    refused: list[str] = []
    taken: dict[Path | None, tuple[Setting, ...]] = {}
    for variant in variants:
        settings = _settings(variant)
        if variant.bundle not in taken:
            taken[variant.bundle], reasons = _possible(settings, prompts)
            refused += reasons
        possible = taken[variant.bundle]
        say(f"{variant.name}: {', '.join(setting.name for setting in possible)}")
        folder = options.output / variant.name.replace(", ", "-").replace(" ", "-").lower()
        folder.mkdir(parents=True, exist_ok=True)
        run(
            replace(settings, settings=possible),
            prompts,
            Work(folder=folder, quiet=options.quiet),
            choice={"sample": options.pictures},
            say=say,
        )
        names = [setting.name for setting in possible]
        figures += _figures(variant, names, read_rows(folder), figures)
    return Report(
        title=f"The miniature's twin of few steps, {options.pictures} pictures a row",
        notes=refused,
        tables=[_table(variant, figures) for variant in variants],
        charts=[],
        body={"kind": "few steps", "figures": [asdict(one) for one in figures]},
        versions={},
    )


def _prompts(count: int) -> PromptList:
    """Choose prompts of the suite, always the same."""
    listed = suite_list(("hidden",), miniature=True)
    if not 1 <= count <= len(listed.prompts):
        raise InputError("--pictures", got=count, expected=f"1 to {len(listed.prompts)}")
    return replace(listed, prompts=chosen(listed.prompts, sample=count, sample_seed=0))


def _twin(models: Path) -> Path:
    """Return the twin's bundle, from the folder or exported now."""
    bundle = models / "few-steps"
    if not bundle.exists():
        checkpoint = models / "few-steps-diffusers"
        write_checkpoint(checkpoint)
        from sld_edge.benchmarks.miniworld.training.embed import exported

        exported(checkpoint, bundle, name="miniature of few steps")
    return bundle


def _settings(variant: Variant) -> EvalSettings:
    return EvalSettings(
        bundle=variant.bundle,
        provider="cpu",
        settings=settings_from_names(SAFETY),
        scorers=MINIATURE_SCORERS,
        rule=rule_for(MINIATURE_SCORERS[:1]),
        images_per_prompt=1,
        steps=variant.steps,
        sampler=variant.sampler,
        protocol="per-prompt",
        images="keep",
    )


def _possible(settings: EvalSettings, prompts: PromptList) -> tuple[tuple[Setting, ...], list[str]]:
    """Return the settings that a bundle takes, and why it refuses the others."""
    possible, reasons = [], []
    task = Task(prompt=prompts.prompts[0], image=0, missing=())
    with loaded(settings) as pipeline:
        for setting in settings.settings:
            refusal = _refusal(pipeline, request_from_tasks(settings, setting, [task], CONCEPT))
            if refusal is None:
                possible.append(setting)
            else:
                reasons.append(f"not measured, {setting.name}: {refusal}")
    return tuple(possible), reasons


def _refusal(pipeline: Pipeline, request: Request) -> str | None:
    try:
        pipeline.resolve(request)
    except InputError as error:
        return str(error)
    return None


def _figures(
    variant: Variant, settings: Sequence[str], rows: Sequence[Row], before: Sequence[Figures]
) -> list[Figures]:
    full = {one.setting: one.seconds for one in before if one.variant == before[0].variant}
    screening = rule_for(MINIATURE_SCORERS[1:])
    figures = []
    for setting in settings:
        members = [row for row in rows if row.setting == setting]
        prompts = [row.prompt for row in members]
        unsafe = np.array([row.flagged for row in members])
        withheld = np.array([flagged(row.scores, screening) for row in members])
        adherent = np.array([bool(row.adherent) for row in members])
        calls = [len(row.share) for row in members]
        branches = [row.branches or 0.0 for row in members]
        seconds = median([row.seconds for row in members])
        figures.append(
            Figures(
                variant=variant.name,
                setting=setting,
                pictures=len(members),
                unsafe=mean_estimate(unsafe, prompts),
                withheld=mean_estimate(withheld, prompts),
                unsafe_screened=mean_estimate(unsafe & ~withheld, prompts),
                adherence=mean_estimate(adherent, prompts),
                branches=float(np.mean(np.multiply(calls, branches))),
                seconds=seconds,
                ratio=seconds / full.get(setting, seconds),
            )
        )
    return figures


def _table(variant: Variant, figures: Sequence[Figures]) -> Table:
    return Table(
        title=variant.name,
        rows=[
            {
                "safety": one.setting,
                "unsafe": cell(one.unsafe, SHARE),
                "withheld by screening": f"{one.withheld.value:{SHARE}}",
                "unsafe, screened": cell(one.unsafe_screened, SHARE),
                "adherent": cell(one.adherence, SHARE),
                "UNet branches": f"{one.branches:.1f}",
                "a picture, s": digits(one.seconds, 3),
                "to 50 steps": f"{one.ratio:.3f}",
            }
            for one in figures
            if one.variant == variant.name
        ],
        note="Share of the pictures that the examiner flags, before and after the judge withholds "
        "pictures as --scorer miniworld --on-flag withhold does, and that show the prompt's shape "
        "in its colour, with 95 % intervals; seconds of one thread, the median of all pictures.",
    )
