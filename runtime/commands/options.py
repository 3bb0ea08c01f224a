"""The options of `sld-run`, and those of them that `sld-eval` and `sld-bench` have too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sld_edge.engines.providers import NAMES
from sld_edge.runtime.commands.arguments import add_options, flag, option
from sld_edge.runtime.commands.console import Parser
from sld_edge.runtime.policy import ON_FLAG, POLICY_FILE, RECIPES, OnFlag, Recipe
from sld_edge.runtime.random import Rng
from sld_edge.runtime.safety import PRESETS
from sld_edge.runtime.samplers import SAMPLERS, SafetyUnits
from sld_edge.runtime.scorers import NAMES as SCORERS
from sld_edge.runtime.tiles import VaeTiling

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


def concepts_option() -> Any:
    """Return the option --safety-concept."""
    return option(
        "what to steer away from; give it again for several concepts, each with its own UNet "
        "branch and threshold (default: the bundle's)",
        "TEXT",
        default=(),
        action="append",
    )


def steps_option() -> Any:
    """Return the option --steps."""
    return option("denoising steps")


def sampler_option() -> Any:
    """Return the option --sampler."""
    return option(", ".join(SAMPLERS))


def cache_interval_option(group: str | None = None) -> Any:
    """Return the option --cache-interval."""
    text = "run the UNet's deep layers every N-th call only (default: 1, off)"
    return option(text, default=1, group=group)


def provider_option(group: str) -> Any:
    """Return the option --provider, the first of its group."""
    text = f"auto, {', '.join(reversed(NAMES))} (default: auto, the best that works here)"
    return option(text, default="auto", group=group)


def batch_size_option() -> Any:
    """Return the option --batch-size."""
    return option("images denoised at once")


def quiet_option() -> Any:
    """Return the option --quiet."""
    return flag("no progress, only errors")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What `sld-run` was asked for, typed."""

    prompt: tuple[str, ...] = option(
        'text of an image; "-" reads prompts from standard input, one a line',
        "PROMPT",
        default=(),
        positional=True,
        nargs="*",
    )

    bundle: Path | None = option(
        "bundle made by sld-export; without it, the miniature model that ships with the package",
        "DIR",
        group="files",
    )
    engine: Path | None = option(
        "a TensorRT plan made by sld-build, as sd15/unet.plan: runs its bundle with the plans "
        "beside it; a component without a plan runs with ONNX Runtime",
        "PLAN",
    )
    trust_plan: bool = flag(
        "run a plan that plans.json in the bundle does not list; a plan is code"
    )
    output: Path | None = option(
        "picture, or an existing directory for pictures named by prompt and seed (default: this "
        "directory)"
    )
    report: Path | None = option(
        "write settings, what safety did at each step, timings and versions", "FILE.json"
    )
    edit_map: Path | None = option("write a picture of where safety acted, over the image")
    preview: Path | None = option("rewrite this picture with the image so far, five times a run")
    force: bool = flag("overwrite existing files")

    safety: str | None = option(
        f"{', '.join(PRESETS)} (default: the bundle's)", "PRESET", group="safety"
    )
    safety_concept: tuple[str, ...] = concepts_option()

    safety_scale: float | None = option(
        "strength of the edit",
        "S",
        group="safety, number by number (each replaces the preset's)",
    )
    safety_warmup: int | None = option(
        "UNet calls without an edit, not scaled to the steps as a preset's; at least two calls "
        "must be left"
    )
    safety_threshold: float | None = option("distance to the concept above which nothing is edited")
    safety_momentum_scale: float | None = option("share of past edits added, 0 to below 1")
    safety_momentum_beta: float | None = option("how long past edits last, 0 to below 1")

    scorer: tuple[str, ...] = option(
        f"score every picture: {', '.join(SCORERS)}; NAME=PATH says where its model lies",
        default=(),
        action="extend",
        group="scoring pictures (see docs/scorers.md)",
    )
    on_flag: OnFlag | None = option(
        f"what is done with a flagged picture: {', '.join(ON_FLAG)}; escalate makes it again with "
        "the next stronger preset, up to max, and escalate-withhold writes nothing if that does "
        "not help (default: report)",
        "WHAT",
    )
    flag_rule: str | None = option(
        'as "nudenet.exposed>=0.6 or q16.inappropriate>=0.5"; <= where low numbers are unsafe '
        "(default: each scorer's own)",
        "RULE",
    )
    report_recipe: Recipe | None = option(
        f"{', '.join(RECIPES)}: omit leaves prompt and seed out of what is written about a picture "
        "that was blurred or withheld (default: keep)",
        "WHAT",
    )

    negative_prompt: str | None = option("what the image should not show", "TEXT", group="image")
    steps: int | None = steps_option()
    sampler: str | None = sampler_option()
    guidance_scale: float | None = option(
        "how closely the prompt is followed; 1 and below switch guidance off, never safety", "G"
    )
    eta: float = option("noise added by ddim, 0 to 1", default=0.0)
    seed: int = option("first seed", "S", default=0)
    rng: Rng = option(
        "torch: the noise that diffusers draws on the CPU; philox: on CUDA", default="torch"
    )
    safety_units: SafetyUnits = option(
        "noise: the safety numbers mean the same on every model; raw: units of the model's output, "
        "as in diffusers",
        default="noise",
    )
    count: int = option("images a prompt", default=1)
    width: int | None = option("pixels (default: the bundle's)", "W")
    height: int | None = option("pixels (default: the bundle's)", "H")

    original_size: tuple[int, ...] = option(
        "height and width before a crop, as SDXL is told (default: the picture's)",
        "N",
        default=(),
    )
    crop: tuple[int, ...] = option(
        "top and left of the crop, as SDXL is told (default: 0 0)", "N", default=()
    )
    target_size: tuple[int, ...] = option(
        "height and width of the picture that SDXL is asked for (default: the picture's)",
        "N",
        default=(),
    )

    cache_interval: int = cache_interval_option(
        "savings: faster, and no longer exact (see docs/savings.md)"
    )

    provider: str = provider_option("machine")
    providers: bool = flag("show which providers work here, or why not")
    cache: bool = flag(
        "show the prepared graphs kept for this processor: where they are and how large; "
        "SLD_EDGE_CACHE moves them, SLD_EDGE_CACHE_LIMIT is the most GB kept (default: 20), the "
        "least used go first"
    )
    clear_cache: bool = flag("remove all prepared graphs")
    policy: bool = flag(
        f"show what this device's owner has set in {POLICY_FILE}, which no option lowers"
    )
    self_test: bool = flag(
        "compare the provider with the CPU, component by component, on the miniature bundle"
    )
    low_memory: bool = flag("keep text encoder and decoder in memory only while they run")
    vae_tiling: VaeTiling = option(
        "decode in overlapping tiles, which bounds memory: auto (on the CPU, above 768x768 "
        "pixels), on, off",
        "WHEN",
        default="auto",
    )
    cuda_graph: bool = flag("start every kernel by itself (for debugging)", default=True)
    batch_size: int | None = batch_size_option()
    quiet: bool = quiet_option()


def parser() -> Parser:
    """Return the command line's parser."""
    cli = Parser(
        prog="sld-run",
        description="Make images with Safe Latent Diffusion, without PyTorch.",
        epilog=_EXAMPLES,
    )
    add_options(cli, RunSettings)
    return cli
