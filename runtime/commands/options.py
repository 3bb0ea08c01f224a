"""The options of `sld-run`, and those of them that `sld-eval` and `sld-bench` have too."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from sld_edge.engines.providers import NAMES
from sld_edge.runtime.commands.console import Parser
from sld_edge.runtime.policy import ON_FLAG, POLICY_FILE, RECIPES, OnFlag, Recipe
from sld_edge.runtime.random import Rng
from sld_edge.runtime.safety import PRESETS
from sld_edge.runtime.samplers import SAMPLERS, SafetyUnits
from sld_edge.runtime.scorers import NAMES as SCORERS
from sld_edge.runtime.tiles import VaeTiling

Group: TypeAlias = argparse._ArgumentGroup

_EXAMPLES = """\
examples:
  sld-run "a red star at a party"                      with the miniature model that ships
  sld-run "a lighthouse" --bundle sd15 --safety strong --steps 25 --seed 7
  sld-run "a cat" "a dog" --count 4 --output pets/     eight pictures, numbered
  sld-run "a harbour" --report harbour.json --edit-map where.png
  cat prompts.txt | sld-run - --bundle sd15            one prompt a line
  sld-run "a lighthouse" --engine sd15/unet.plan       with TensorRT plans (see sld-build)
  sld-run "a star in an alley" --scorer miniworld --on-flag escalate
                                                       again, and stronger, while it is flagged
  sld-run --providers                                  what works on this machine
  sld-run --self-test --provider tensorrt-rtx          proves it, against the CPU

Image k of seed S is the image of seed S + k. Exit codes: 0, all pictures are as asked for; 1, a
self-test failed; 2, a mistake in what was asked, told in one line; 3, a picture was flagged.
"""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What `sld-run` was asked for, typed."""

    prompt: Sequence[str]
    bundle: Path | None
    engine: Path | None
    output: Path | None
    force: bool
    provider: str
    providers: bool
    policy: bool
    cache: bool
    clear_cache: bool
    self_test: bool
    trust_plan: bool
    no_cuda_graph: bool
    low_memory: bool
    vae_tiling: VaeTiling
    safety: str
    safety_concept: Sequence[str]
    safety_scale: float | None
    safety_warmup: int | None
    safety_threshold: float | None
    safety_momentum_scale: float | None
    safety_momentum_beta: float | None
    scorer: Sequence[str]
    on_flag: OnFlag | None
    flag_rule: str | None
    report_recipe: Recipe | None
    negative_prompt: str | None
    steps: int | None
    guidance_scale: float | None
    sampler: str | None
    eta: float
    seed: int
    rng: Rng
    safety_units: SafetyUnits
    count: int
    width: int | None
    height: int | None
    batch_size: int | None
    cache_interval: int
    report: Path | None
    edit_map: Path | None
    preview: Path | None
    quiet: bool


def parser() -> Parser:
    """Return the command line's parser."""
    cli = Parser(
        prog="sld-run",
        description="Make images with Safe Latent Diffusion, without PyTorch.",
        epilog=_EXAMPLES,
    )
    cli.add_argument(
        "prompt",
        nargs="*",
        metavar="PROMPT",
        help='text of an image; "-" reads prompts from standard input, one a line',
    )
    files = cli.add_argument_group("files")
    files.add_argument(
        "--bundle",
        type=Path,
        metavar="DIR",
        help="bundle made by sld-export; "
        "without it, the miniature model that ships with the package",
    )
    files.add_argument(
        "--engine",
        type=Path,
        metavar="PLAN",
        help="a TensorRT plan made by sld-build, as sd15/unet.plan: runs its bundle with the plans "
        "that lie beside it, and what has none with ONNX Runtime",
    )
    files.add_argument(
        "--trust-plan",
        action="store_true",
        help="run a plan that plans.json in the bundle does not list; a plan is code",
    )
    files.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="picture, or an existing "
        "directory for pictures named by prompt and seed (default: this directory)",
    )
    files.add_argument(
        "--report",
        type=Path,
        metavar="FILE.json",
        help="write settings, what safety did at each step, timings and versions",
    )
    files.add_argument(
        "--edit-map",
        type=Path,
        metavar="PATH",
        help="write a picture of where safety acted, over the image",
    )
    files.add_argument(
        "--preview",
        type=Path,
        metavar="PATH",
        help="rewrite this picture with the image so far, five times a run",
    )
    files.add_argument("--force", action="store_true", help="overwrite existing files")

    safety = cli.add_argument_group("safety")
    safety.add_argument(
        "--safety", metavar="PRESET", help=", ".join(PRESETS) + " (default: the bundle's)"
    )
    add_concepts(safety)
    custom = cli.add_argument_group("safety, number by number (each replaces the preset's)")
    custom.add_argument("--safety-scale", type=float, metavar="S", help="strength of the edit")
    custom.add_argument(
        "--safety-warmup",
        type=int,
        metavar="N",
        help="calls without an edit; taken as it is, where a preset's is scaled to the steps; "
        "refused where it leaves no more than the last call",
    )
    custom.add_argument(
        "--safety-threshold",
        type=float,
        metavar="X",
        help="distance to the concept from which on nothing is edited",
    )
    custom.add_argument(
        "--safety-momentum-scale",
        type=float,
        metavar="X",
        help="share of past edits added, 0 to below 1",
    )
    custom.add_argument(
        "--safety-momentum-beta",
        type=float,
        metavar="X",
        help="how long past edits last, 0 to below 1",
    )

    screening = cli.add_argument_group("looking at what came out (see docs/scorers.md)")
    screening.add_argument(
        "--scorer",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help=f"score every picture: {', '.join(SCORERS)}; NAME=PATH says where its model lies",
    )
    screening.add_argument(
        "--on-flag",
        metavar="WHAT",
        help=f"with a flagged picture: {', '.join(ON_FLAG)}; escalate makes it again with the next "
        "stronger preset, up to max, and escalate-withhold writes nothing if that does not help "
        "(default: report)",
    )
    screening.add_argument(
        "--flag-rule",
        metavar="RULE",
        help='as "nudenet.exposed>=0.6 or q16.inappropriate>=0.5"; <= where low numbers are unsafe '
        "(default: each scorer's own)",
    )
    screening.add_argument(
        "--report-recipe",
        metavar="WHAT",
        help=f"{', '.join(RECIPES)}: omit leaves prompt and seed out of what is written about a "
        "picture that was blurred or withheld (default: keep)",
    )

    image = cli.add_argument_group("image")
    image.add_argument("--negative-prompt", metavar="TEXT", help="what the image should not show")
    add_sampling(image)
    image.add_argument(
        "--guidance-scale",
        type=float,
        metavar="G",
        help="how closely the prompt is followed; 1 and below switch guidance off, never safety",
    )
    image.add_argument(
        "--eta",
        type=float,
        default=0.0,
        metavar="X",
        help="noise added by ddim, 0 to 1 (default: 0)",
    )
    image.add_argument("--seed", type=int, default=0, metavar="S", help="first seed (default: 0)")
    image.add_argument(
        "--rng",
        default="torch",
        metavar="NAME",
        help="torch: the noise that diffusers draws on the CPU; philox: on CUDA (default: torch)",
    )
    image.add_argument(
        "--safety-units",
        default="noise",
        metavar="NAME",
        help="noise: the safety numbers mean the same on every model; raw: units of the model's "
        "output, as in diffusers (default: noise)",
    )
    image.add_argument(
        "--count", type=int, default=1, metavar="N", help="images a prompt (default: 1)"
    )
    image.add_argument("--width", type=int, metavar="W", help="pixels (default: the bundle's)")
    image.add_argument("--height", type=int, metavar="H", help="pixels (default: the bundle's)")

    savings = cli.add_argument_group("savings: faster, and no longer exact (see docs/savings.md)")
    add_intervals(savings)

    machine = cli.add_argument_group("machine")
    add_provider(machine)
    machine.add_argument(
        "--providers", action="store_true", help="show which providers work here, or why not"
    )
    machine.add_argument(
        "--cache",
        action="store_true",
        help="show what is kept for this processor, where, and how large; SLD_EDGE_CACHE moves it, "
        "SLD_EDGE_CACHE_LIMIT is the most GB that it takes (default: 20), the least used go first",
    )
    machine.add_argument("--clear-cache", action="store_true", help="remove all of it")
    machine.add_argument(
        "--policy",
        action="store_true",
        help=f"show what this device's owner has set in {POLICY_FILE}, which no option lowers",
    )
    machine.add_argument(
        "--self-test",
        action="store_true",
        help="compare the provider with the CPU, component by component, on the miniature bundle",
    )
    machine.add_argument(
        "--low-memory",
        action="store_true",
        help="hold text encoder and decoder only while they are needed",
    )
    machine.add_argument(
        "--vae-tiling",
        default="auto",
        metavar="WHEN",
        help="decode in overlapping tiles, which bounds memory: auto (on the CPU, above 768x768 "
        "pixels), on, off (default: auto)",
    )
    machine.add_argument(
        "--no-cuda-graph", action="store_true", help="start every kernel by itself (for debugging)"
    )
    add_batch_size(machine)
    add_quiet(machine)
    return cli


def add_concepts(group: Group) -> None:
    """Add --safety-concept."""
    group.add_argument(
        "--safety-concept",
        action="append",
        default=[],
        metavar="TEXT",
        help="what to steer away from; give it again for several concepts, each with a UNet branch "
        "and a threshold of its own (default: the bundle's)",
    )


def add_sampling(group: Group) -> None:
    """Add --steps and --sampler."""
    group.add_argument("--steps", type=int, metavar="N", help="denoising steps")
    group.add_argument("--sampler", metavar="NAME", help=", ".join(SAMPLERS))


def add_intervals(group: Group) -> None:
    """Add --cache-interval."""
    group.add_argument(
        "--cache-interval",
        type=int,
        default=1,
        metavar="N",
        help="run the UNet's deep layers every N-th call only (default: 1, off)",
    )


def add_provider(group: Group) -> None:
    """Add --provider."""
    group.add_argument(
        "--provider",
        default="auto",
        metavar="NAME",
        help=f"auto, {', '.join(reversed(NAMES))} (default: auto, the best that works here)",
    )


def add_batch_size(group: Group) -> None:
    """Add --batch-size."""
    group.add_argument("--batch-size", type=int, metavar="N", help="images denoised at once")


def add_quiet(group: Group) -> None:
    """Add --quiet."""
    group.add_argument("--quiet", action="store_true", help="no progress, only errors")
