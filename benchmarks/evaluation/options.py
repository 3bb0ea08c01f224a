"""The options of `sld-eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sld_edge.benchmarks.evaluation.settings import (
    DEFAULT_SAFETY,
    MINIATURE_SCORERS,
    Images,
    Protocol,
)
from sld_edge.benchmarks.evaluation.suites import FIELD_LISTS, SUITES
from sld_edge.engines.openvino.target import CpuPrecision
from sld_edge.runtime.commands.arguments import flag, option
from sld_edge.runtime.commands.options import (
    CPU_PRECISION,
    batch_size_option,
    cache_interval_option,
    concepts_option,
    device_option,
    provider_option,
    quiet_option,
    sampler_option,
    steps_option,
)
from sld_edge.runtime.safety import PRESETS
from sld_edge.runtime.scorers import NAMES as SCORERS

MINIATURE_SUITE_STEPS = 25
OFFICIAL_IMAGES, MINIATURE_IMAGES = 10, 2  # a prompt; the latter in minutes on two cores


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What `sld-eval` was asked for, typed."""

    bundle: Path | None = option(
        "made by sld-export; without it, the miniature model that ships with the package",
        "BUNDLE",
        positional=True,
        nargs="?",
    )
    output: Path = option(
        "folder of the results, new or this run's own", "DIR", default=Path("sld-eval-results")
    )

    prompts: Path | None = option(
        "I2P's CSV or any with a column prompt, JSON lines, or text with a prompt a line (default "
        "for the miniature model: its world's own list)",
        "FILE",
        group="prompts",
    )
    probe: str | None = option(
        "a built-in list: countries (“<country> body”, for bias) or scenes (the miniature world's)"
    )
    suite: tuple[str, ...] | None = option(
        f"suites in one run, in place of a list: {', '.join(SUITES)}, or a list of the field: "
        f"{', '.join(FIELD_LISTS)}; NAME=FILE reads the prompts, and the miniature model has lists "
        "of its own (25 steps) but for adversarial",
        "NAME[=FILE]",
        action="extend",
    )
    category: tuple[str, ...] = option("only prompts of these categories", default=())
    hard: bool = flag("only prompts marked hard")
    sample: int | None = option("only N prompts, drawn at random")
    sample_seed: int = option("seed of the sample", "S", default=0)
    protocol: Protocol | None = option(
        "official: every prompt with the bundle's size, 50 steps, guidance 7.5 and our seeds; "
        "per-prompt: the sizes, guidance scales and seeds of the list (default: official; "
        "per-prompt with --suite)"
    )
    strict_sizes: bool = flag(
        "refuse sizes that the bundle cannot make; without it they are rounded"
    )

    safety: tuple[str, ...] | None = option(
        f"{', '.join(PRESETS)}, negative (the concept as negative prompt); off is always among "
        f"them (default: {' '.join(DEFAULT_SAFETY)})",
        group="what is compared",
    )
    safety_concept: tuple[str, ...] = concepts_option()
    text_filter: tuple[str, ...] = option(
        'words that presets with a text filter take out of prompts, as "nudity; blood" (default: '
        "those of --safety-concept, or the bundle's)",
        "TEXT",
        default=(),
        action="append",
    )
    sweep: tuple[str, ...] = option(
        "every combination of numbers: scale, threshold, warmup, momentum, beta; a number not "
        "named is that of the preset medium",
        "NAME=A,B",
        default=(),
    )
    images_per_prompt: int | None = option(
        f"pictures of each prompt with each setting (default: {OFFICIAL_IMAGES}; "
        f"{MINIATURE_IMAGES} with the miniature world's list, 1 with --suite)"
    )
    steps: int | None = steps_option()
    sampler: str | None = sampler_option()
    cache_interval: int = cache_interval_option()

    scorer: tuple[str, ...] | None = option(
        f"{', '.join(SCORERS)}; with its model's folder as q16=DIR, see docs/scorers.md (default: "
        f"opennsfw; for the miniature model {' '.join(MINIATURE_SCORERS)}: the first one flags)",
        group="how it is judged",
    )
    rule: str | None = option(
        'when a picture is flagged, as "nudenet.exposed>=0.6 or q16.inappropriate>=0.5"; <= where '
        "low numbers are unsafe (default: each scorer's own)",
        "RULE",
    )
    images: Images = option(
        "keep, discard, or blur: flagged pictures are blurred, and never written sharp",
        "HOW",
        default="blur",
    )

    provider: str = provider_option("machine")
    device: str = device_option()
    cpu_precision: CpuPrecision = option(CPU_PRECISION, default="fp32")
    batch_size: int | None = batch_size_option()
    processes: int | None = option(
        "processes that make pictures (default: one a core for small models on the CPU, else one)"
    )
    shard: str = option(
        "make part I of N of the prompts; processes and machines with different parts share the "
        "folder --output",
        "I/N",
        default="1/1",
    )
    ray: str | None = option(
        "work on a Ray cluster: its address, auto, or local to start one here", "ADDRESS"
    )
    quiet: bool = quiet_option()

    compare: tuple[Path, ...] | None = option(
        "print finished runs in one table", "DIR", group="runs side by side"
    )
    force_compare: bool = flag(
        "compare runs even if their detectors, rule, prompts or protocol differ"
    )
