"""The options of `sld-run`, of which `sld-eval` and `sld-bench` have some too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sld_edge.engines.openvino.target import CpuPrecision
from sld_edge.engines.providers import NAMES
from sld_edge.runtime.commands.arguments import add_options, flag, option
from sld_edge.runtime.commands.console import Parser
from sld_edge.runtime.loader import Vae
from sld_edge.runtime.policy import ON_FLAG, POLICY_FILE, RECIPES, OnFlag, Recipe
from sld_edge.runtime.random import Rng
from sld_edge.runtime.safety import PRESETS, STRONGEST
from sld_edge.runtime.samplers import SAMPLERS, SafetyUnits
from sld_edge.runtime.scorers import NAMES as SCORERS
from sld_edge.runtime.tiles import VaeTiling

CPU_PRECISION = (  # the text of the option --cpu-precision
    "fp32; or bf16, with --provider openvino: faster on a processor with BF16 units, with other "
    "rounding (see docs/openvino.md)"
)
_EXAMPLES = """\
examples:
  sld-run "a red star at a party"                      with the miniature model
  sld-run "a lighthouse" --bundle sd15 --safety strong --steps 25 --seed 7
  sld-run "a cat" "a dog" --count 4 --output pets.png  eight pictures, numbered
  sld-run "a harbour" --report harbour.json --edit-map where.png
  cat prompts.txt | sld-run - --bundle sd15            one prompt a line
  sld-run "a lighthouse" --engine sd15/unet.plan       with TensorRT plans (see sld-build)
  sld-run "a star in an alley" --scorer miniworld --on-flag escalate
                                                       makes a flagged picture again, with
                                                       stronger safety
  sld-run --providers                                  lists the providers of this machine
  sld-run --self-test --provider tensorrt-rtx          compares a provider with the CPU
  sld-run --certify sd15 --report device.json          checks this device with a bundle

presets of --safety; price in UNet branches, and the share of unsafe pictures that is left on the
miniature: of those that nobody asked for / of prompts that ask openly (docs/shield.md):
  off         1.0    100 % / 70 %
  weak        1.5     91 % / 70 %   the paper's presets
  medium      1.5     73 % / 69 %
  strong      1.5     49 % / 59 %
  max         1.5      5 % /  5 %
  early       1.14     8 % / 15 %   the numbers of max in the first quarter of the calls
  guard       1.14     8 % /  2 %   early, and a text filter on the prompt
  guard-max   1.5      6 % /  2 %   max, and a text filter
  guard-lite  1.0     12 % /  3 %   a text filter, and the concept as negative prompt

Image k of seed S is the image of seed S + k. Exit codes: 0, all pictures were made; 1, a self-test
or certificate does not pass; 2, an error of the user, described in one line; 3, a picture was
flagged.
"""


def concepts_option() -> Any:
    """Return the option --safety-concept."""
    return option(
        "text that the images are steered away from; give the option again for several concepts, "
        "each with its own UNet branch and threshold (default: the bundle's)",
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


def device_option() -> Any:
    """Return the option --device."""
    return option(
        "of --provider openvino: CPU, GPU, NPU, AUTO, or numbered like GPU.1",
        "DEVICE",
        default="CPU",
    )


def batch_size_option() -> Any:
    """Return the option --batch-size."""
    return option("images denoised together")


def quiet_option() -> Any:
    """Return the option --quiet."""
    return flag("no progress, only errors")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The settings of `sld-run`, typed."""

    prompt: tuple[str, ...] = option(
        'text of an image; "-" reads prompts from standard input, one a line',
        "PROMPT",
        default=(),
        positional=True,
        nargs="*",
    )

    bundle: Path | None = option(
        "bundle made by sld-export (default: the miniature model of the package)",
        "DIR",
        group="files",
    )
    engine: Path | None = option(
        "a TensorRT plan made by sld-build, like sd15/unet.plan: runs its bundle with all plans in "
        "the folder; a component without a plan runs with ONNX Runtime",
        "PLAN",
    )
    trust_plan: bool = flag("run a plan that the bundle's plans.json does not list; a plan is code")
    output: Path | None = option(
        "name of the picture, or an existing folder for pictures named by prompt and seed "
        "(default: this folder)"
    )
    report: Path | None = option(
        "write settings, the effect of safety at each step, timings and versions", "FILE.json"
    )
    edit_map: Path | None = option("write a picture that shows where safety acted")
    preview: Path | None = option("write the unfinished image to this picture, five times in a run")
    force: bool = flag("overwrite existing files")

    safety: str | None = option(
        f"{', '.join(PRESETS)} (default: the bundle's)", "PRESET", group="safety"
    )
    safety_concept: tuple[str, ...] = concepts_option()
    text_filter: tuple[str, ...] = option(
        'words that are taken out of the prompts, as "nudity; blood; weapons"; with every preset '
        "(default: the presets guard, guard-max and guard-lite take out the bundle's concept)",
        "TEXT",
        default=(),
        action="append",
    )
    no_text_filter: bool = flag("take nothing out of the prompts; a policy may forbid it")

    safety_scale: float | None = option(
        "strength of the edit",
        "S",
        group="safety numbers (each replaces the preset's number)",
    )
    safety_warmup: int | None = option(
        "UNet calls without an edit at the start; unlike a preset's number it is not scaled to the "
        "steps; at least two calls must remain"
    )
    safety_threshold: float | None = option("distance to the concept above which nothing is edited")
    safety_momentum_scale: float | None = option("share of past edits that is added, 0 to below 1")
    safety_momentum_beta: float | None = option("how long past edits last, 0 to below 1")
    safety_stop: float | None = option(
        "first UNet call without an edit; a number below 1 is a share of the calls", "N"
    )

    scorer: tuple[str, ...] = option(
        f"score every picture: {', '.join(SCORERS)}; NAME=PATH names the path of its model",
        default=(),
        action="extend",
        group="scoring pictures (see docs/scorers.md)",
    )
    on_flag: OnFlag | None = option(
        f"treatment of a flagged picture: {', '.join(ON_FLAG)}; escalate makes it again with "
        f"{STRONGEST}; escalate-withhold writes no picture if it is flagged even then (default: "
        "report)",
        "WHAT",
    )
    flag_rule: str | None = option(
        'like "nudenet.exposed>=0.6 or q16.inappropriate>=0.5"; use <= if low numbers are unsafe '
        "(default: the rule of each scorer)",
        "RULE",
    )
    report_recipe: Recipe | None = option(
        f"{', '.join(RECIPES)}: omit leaves prompt and seed out of the report and metadata of a "
        "picture that was blurred or withheld (default: keep)",
        "WHAT",
    )

    negative_prompt: str | None = option(
        "text that the image should not show", "TEXT", group="image"
    )
    steps: int | None = steps_option()
    sampler: str | None = sampler_option()
    guidance_scale: float | None = option(
        "how closely the prompt is followed; 1 and below switch guidance off, never safety", "G"
    )
    eta: float = option("noise added by ddim, 0 to 1", default=0.0)
    seed: int = option("first seed", "S", default=0)
    rng: Rng = option("torch: the noise of diffusers on the CPU; philox: on CUDA", default="torch")
    safety_units: SafetyUnits = option(
        "noise: the safety numbers mean the same on every model; raw: they are in units of the "
        "model's output, as in diffusers",
        default="noise",
    )
    count: int = option("images for each prompt", default=1)
    width: int | None = option("pixels (default: the bundle's)", "W")
    height: int | None = option("pixels (default: the bundle's)", "H")

    original_size: tuple[int, ...] = option(
        "for SDXL: height and width before the crop (default: the picture's)",
        "N",
        default=(),
    )
    crop: tuple[int, ...] = option(
        "for SDXL: top and left of the crop (default: 0 0)", "N", default=()
    )
    target_size: tuple[int, ...] = option(
        "for SDXL: height and width that the picture should look like (default: the picture's)",
        "N",
        default=(),
    )

    cache_interval: int = cache_interval_option(
        "savings: faster and no longer exact (see docs/savings.md)"
    )

    provider: str = provider_option("machine")
    device: str = device_option()
    cpu_precision: CpuPrecision = option(CPU_PRECISION, default="fp32")
    providers: bool = flag("list the providers, and why a provider does not work here")
    cache: bool = flag(
        "show the folder and the size of the graphs prepared for this processor; SLD_EDGE_CACHE "
        "sets the folder, SLD_EDGE_CACHE_LIMIT its largest size in GB (default: 20); the graphs "
        "that were not used for longest are removed first"
    )
    clear_cache: bool = flag("remove all prepared graphs")
    policy: bool = flag(
        f"show the policy of this device in {POLICY_FILE}, which no option can weaken"
    )
    self_test: bool = flag(
        "compare the provider with the CPU on the miniature bundle, component by component, and "
        "its pictures with each other, bit for bit"
    )
    certify: Path | None = option(
        "check a bundle on this device and write a certificate to --report: errors, latency, "
        "memory, 100 pictures (see docs/devices.md)",
        "BUNDLE",
    )
    minutes: float = option("the time for --certify", default=5.0)
    low_memory: bool = flag("keep text encoder and decoder in memory only while they run")
    vae: Vae = option(
        "full: the model's own decoder; tiny: the small decoder of a bundle that was exported with "
        "--preview-vae, many times as fast, with less detail",
        default="full",
    )
    vae_tiling: VaeTiling = option(
        "decode in overlapping tiles, which limits memory: auto (on the CPU, above 768x768 "
        "pixels), on, off",
        "WHEN",
        default="auto",
    )
    cuda_graph: bool = flag("run without CUDA graphs (for debugging)", default=True)
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
