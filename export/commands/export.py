"""`sld-export`: a Stable Diffusion checkpoint in, a bundle out."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from sld_edge.engines.errors import InputError
from sld_edge.export.build_plans import require_buildable
from sld_edge.export.checkpoints.sources import ALIASES, PREDICTION_TYPES
from sld_edge.export.commands.build import (
    PlanOptions,
    build_and_show,
    build_settings,
    peak_text,
)
from sld_edge.export.scorers import SCORERS, ScorerSettings, export_scorer
from sld_edge.export.settings import ExportSettings
from sld_edge.export.shape import Say
from sld_edge.export.sign import sign_bundle, signing_key
from sld_edge.export.write_bundle import Watch, export_bundle
from sld_edge.runtime.commands.arguments import (
    REQUIRED,
    add_options,
    flag,
    option,
    settings_from_options,
)
from sld_edge.runtime.commands.console import Parser, run_command
from sld_edge.runtime.commands.options import quiet_option
from sld_edge.runtime.safety import DEFAULT_PRESET, PRESETS
from sld_edge.runtime.samplers import SAMPLERS

_EXAMPLES = """\
examples:
  sld-export --model sd-1.5 --output bundles/sd15
  sld-export --model ./my-finetune --output bundles/mine --precision fp32      for a CPU
  sld-export --model v1-5.safetensors --tokenizer ./clip-tokenizer --output bundles/sd15
  sld-export --model sd-2.1 --variant fp16 --output bundles/sd21               half the download
  sld-export --model sd-1.5 --output bundles/sd15 --engine tensorrt-rtx        and its plans
  sld-export --scorer sd-checker --model ./sd15 --output scorers/checker       see docs/scorers.md

Only --verify and --via torch need PyTorch. Exit code 2 is a mistake in the options or files.
"""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The options of `sld-export` without those of plans; most are in `ExportSettings`, too."""

    model: str | None = option(
        f"{', '.join(ALIASES)}; a Hub id (owner/name or owner/name@revision); a diffusers "
        "directory; or a .safetensors file in the original layout",
        "MODEL",
    )
    output: Path = option("the bundle's directory", "DIR", default=REQUIRED)
    name: str | None = option("name of the model in the bundle", "TEXT")
    force: bool = flag("replace an existing bundle or scorer; other files in its folder stay")
    sign: Path | None = option(
        "sign the bundle with an Ed25519 key, for devices whose policy lists signers; without "
        "--model, sign the bundle at --output (docs/policy.md)",
        "KEY.pem",
    )
    quiet: bool = quiet_option()

    precision: Literal["fp16", "fp32"] | None = option(
        "arithmetic inside the graphs: fp16 for a GPU, fp32 for a CPU, where it is faster "
        "(default: fp16; guidance and scorers are always fp32)",
        group="graphs",
    )
    fp32_components: tuple[str, ...] = option(
        "components in fp32 although --precision is fp16: text_encoder, unet, vae_decoder; "
        "vae_decoder needs it where its activations exceed the largest fp16 number, 65504, and "
        "runs end in NaN (SDXL's decoder is in fp32 by default)",
        default=(),
    )
    storage: Literal["fp16", "fp32"] | None = option(
        "weights on disk; fp16 halves the size of components with fp32 arithmetic (default: the "
        "precision of the arithmetic)"
    )
    attention: Literal["op", "decomposed"] = option(
        "op: ONNX's Attention, opset 23; decomposed: plain products, opset 20, for programs that "
        "do not have the operator; sld-build takes both",
        default="op",
    )
    via: Literal["builder", "torch"] = option(
        "builder: write the graphs directly; torch: torch.onnx.export of diffusers' modules, for "
        "architectures that the builder does not know",
        default="builder",
    )
    verify: bool = flag("compare every graph with diffusers (needs torch)")

    variant: str | None = option("fp16: take the half-size weight files", group="checkpoint")
    tokenizer: Path | None = option(
        "CLIP's tokenizer for a single file: a directory (vocab.json, merges.txt) or a "
        "tokenizer.json"
    )
    prediction_type: str | None = option(
        f"the UNet's prediction: {', '.join(PREDICTION_TYPES)} (default: from the scheduler's "
        "config; required for a single file of SD 2.x)"
    )
    vae: Path | None = option(
        "folder of another VAE, diffusers' AutoencoderKL or AutoencoderTiny, as decoder"
    )
    preview_vae: Path | None = option(
        "folder of a VAE as a second decoder, for sld-run --vae tiny and --preview"
    )

    sampler: str | None = option(
        f"{', '.join(SAMPLERS)} (default: the checkpoint's)", group="defaults of a run"
    )
    steps: int | None = option("denoising steps; 1 to 4 for SD-Turbo, SDXL-Turbo and Lightning")
    guidance_scale: float | None = option(
        "0 for models that were distilled to need no guidance, for example Turbo", "G"
    )
    timestep_spacing: str | None = option(
        "leading, trailing or linspace, instead of the scheduler's; Lightning needs trailing"
    )
    width: int | None = option("pixels (default: the model's)", "W")
    height: int | None = option("pixels (default: the model's)", "H")
    safety_concept: tuple[str, ...] = option(
        "the concept to steer away from; give the option again for several concepts, each with its "
        "own UNet branch (default: the paper's 20 items as one concept)",
        "TEXT",
        default=(),
        action="append",
    )
    preset: str = option(f"strength of safety: {', '.join(PRESETS)}", default=DEFAULT_PRESET)
    text_filter: tuple[str, ...] = option(
        'words that a text filter in the bundle takes out of prompts, as "nudity; blood; weapons" '
        "(default: those of the safety concept, if the preset has a filter)",
        "TEXT",
        default=(),
        action="append",
    )

    scorer: str | None = option(
        f"{', '.join(SCORERS)}: from a CLIP model or safety checker in the directory --model",
        group="a scorer instead of a bundle (see docs/scorers.md)",
    )
    q16_prompts: Path | None = option(
        "Q16's prompts as .npy, see docs/scorers.md (default: prompts.npy in the model's "
        "directory)",
        "FILE",
    )


def parser() -> Parser:
    """Return the command line's parser."""
    cli = Parser(
        prog="sld-export",
        description="Turn a Stable Diffusion checkpoint into a bundle that runs without PyTorch.",
        epilog=_EXAMPLES,
    )
    add_options(cli, ExportOptions)
    add_options(cli, PlanOptions)
    return cli


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `sld-export`; return its exit code."""
    return run_command(lambda: _run(vars(parser().parse_args(arguments))))


def _run(given: Mapping[str, Any]) -> None:
    """Run the command; `given` holds the options of the command line, by name."""
    options = settings_from_options(ExportOptions, given)
    key = signing_key(options.sign) if options.sign is not None else None
    if options.model is None:
        if key is None or given.keys() - {"output", "sign", "quiet"}:
            raise InputError("no --model given", do="see sld-export --help")
        print(f"signed by {sign_bundle(options.output, key)}")
        return
    if options.scorer is not None:
        _export_scorer(options, given)
        return
    if options.q16_prompts is not None:
        raise InputError("--q16-prompts is for --scorer q16")
    plans = build_settings(settings_from_options(PlanOptions, given))
    settings = settings_from_options(ExportSettings, given)
    if plans is not None:
        require_buildable(plans)
    start = time.perf_counter()
    with _progress(quiet=options.quiet) as (say, watch):
        path = export_bundle(settings, say=say, watch=watch)
    if not options.quiet:
        _show(path, time.perf_counter() - start)
    if key is not None:
        print(f"signed by {sign_bundle(path, key)}")
    if plans is not None:
        build_and_show(path, plans, force=False, quiet=options.quiet)


def _export_scorer(options: ExportOptions, given: Mapping[str, Any]) -> None:
    """Write a scorer; refuse options that only a bundle has."""
    for name in given.keys() - {setting.name for setting in fields(ScorerSettings)} - {"quiet"}:
        raise InputError(f"--{name.replace('_', '-')} does not apply to --scorer")
    settings = settings_from_options(ScorerSettings, {**given, "model": Path(given["model"])})
    start = time.perf_counter()

    def say(line: str) -> None:
        if not options.quiet:
            print(line, file=sys.stderr)

    path = export_scorer(settings, say=say)
    if not options.quiet:
        _show(path, time.perf_counter() - start)


def _show(path: Path, seconds: float) -> None:
    size = sum(file.stat().st_size for file in path.iterdir())
    print(f"{path}: {size / 1e6:.1f} MB in {seconds:.1f} s{peak_text()}")


@contextmanager
def _progress(*, quiet: bool) -> Iterator[tuple[Say, Watch]]:
    """Give a function that prints a line, and one that moves a bar over the bytes of weights."""
    with tqdm(
        unit="B", unit_scale=True, disable=quiet or None, leave=False, file=sys.stderr
    ) as bar:

        def say(line: str) -> None:
            if not quiet:
                bar.clear()  # on a terminal the bar would stay above the line
                print(line, file=sys.stderr)

        def watch(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield say, watch


if __name__ == "__main__":
    sys.exit(main())
