"""`sld-export`: a Stable Diffusion checkpoint in, a bundle out."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from sld_edge.engines.errors import InputError
from sld_edge.export.build_plans import require_buildable
from sld_edge.export.checkpoints.sources import ALIASES, PREDICTION_TYPES
from sld_edge.export.commands.build import add_build_arguments, build_and_show, take_build_options
from sld_edge.export.scorers import SCORERS, ScorerSettings, export_scorer
from sld_edge.export.sign import sign_bundle, signing_key
from sld_edge.export.write_bundle import ExportSettings, Watch, export_bundle
from sld_edge.runtime.commands.console import Parser, peak_memory, run_command
from sld_edge.runtime.safety import PAPER_CONCEPT, PRESETS

_EXAMPLES = """\
examples:
  sld-export --model sd-1.5 --output bundles/sd15
  sld-export --model ./my-finetune --output bundles/mine --precision fp32      for a CPU
  sld-export --model v1-5.safetensors --tokenizer ./clip-tokenizer --output bundles/sd15
  sld-export --model sd-2.1 --variant fp16 --output bundles/sd21               half the download
  sld-export --model sd-1.5 --output bundles/sd15 --engine tensorrt-rtx        and its plans
  sld-export --scorer sd-checker --model ./sd15 --output scorers/checker       see docs/scorers.md

Needs no PyTorch, but for --verify and --via torch. Exit code 2 is a mistake in what was asked.
"""


def parser() -> Parser:
    """Return the command line's parser."""
    cli = Parser(
        prog="sld-export",
        description="Turn a Stable Diffusion checkpoint into a bundle that runs without PyTorch.",
        epilog=_EXAMPLES,
    )
    cli.add_argument(
        "--model",
        metavar="MODEL",
        help=f"{', '.join(ALIASES)}; a Hub id (owner/name or owner/name@revision); a diffusers "
        "directory; or a .safetensors file in the original layout",
    )
    cli.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="the bundle's directory"
    )
    cli.add_argument("--name", metavar="TEXT", help="what the bundle calls the model")
    cli.add_argument(
        "--force",
        action="store_true",
        help="replace an existing bundle or scorer; files in its folder that it does not list stay",
    )
    cli.add_argument(
        "--sign",
        type=Path,
        metavar="KEY.pem",
        help="sign the bundle with an Ed25519 key, for devices whose policy names its signers; "
        "without --model, sign the bundle at --output (docs/policy.md)",
    )

    graphs = cli.add_argument_group("graphs")
    graphs.add_argument(
        "--precision",
        metavar="NAME",
        help="arithmetic inside the graphs: fp16 for a GPU, fp32 for a CPU, where it is faster "
        "(default: fp16; guidance and scorers are always fp32)",
    )
    graphs.add_argument(
        "--fp32-components",
        nargs="+",
        default=(),
        metavar="NAME",
        help="these in fp32 all the same; vae_decoder, where its activations pass the largest fp16 "
        "number, 65504, as SDXL's do: such a run ends in NaN (text_encoder, unet, vae_decoder, "
        "vae_encoder)",
    )
    graphs.add_argument(
        "--storage",
        metavar="NAME",
        help="weights on disk: fp16 with --precision fp32, or with --fp32-components, is half the "
        "size (default: as the arithmetic)",
    )
    graphs.add_argument(
        "--attention",
        default="op",
        metavar="NAME",
        help="op: ONNX's Attention, opset 23; decomposed: plain products, opset 20, for TensorRT "
        "before 10.13 and for fp32 plans (default: op)",
    )
    graphs.add_argument(
        "--via",
        default="builder",
        metavar="NAME",
        help="builder: write the graphs directly; torch: torch.onnx.export of diffusers' modules, "
        "for architectures that the builder does not know (default: builder)",
    )
    graphs.add_argument(
        "--verify", action="store_true", help="compare every graph with diffusers (needs torch)"
    )

    checkpoint = cli.add_argument_group("checkpoint")
    checkpoint.add_argument(
        "--variant", metavar="NAME", help="fp16: take the half-size weight files"
    )
    checkpoint.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="CLIP's tokenizer for a single file: a directory (vocab.json, merges.txt) or a "
        "tokenizer.json",
    )
    checkpoint.add_argument(
        "--prediction-type",
        metavar="NAME",
        help=f"what the UNet predicts: {', '.join(PREDICTION_TYPES)} (default: what the scheduler "
        "says; a single file of SD 2.x does not say)",
    )

    defaults = cli.add_argument_group("what a run uses where it does not say")
    defaults.add_argument("--width", type=int, metavar="W", help="pixels (default: the model's)")
    defaults.add_argument("--height", type=int, metavar="H", help="pixels (default: the model's)")
    defaults.add_argument(
        "--safety-concept",
        action="append",
        metavar="TEXT",
        help="what to steer away from; give it again for several concepts, each with a UNet branch "
        "of its own (default: the paper's 20 items as one)",
    )
    defaults.add_argument(
        "--preset",
        default="medium",
        metavar="NAME",
        help=f"how strongly: {', '.join(PRESETS)} (default: medium)",
    )
    scorers = cli.add_argument_group("a scorer instead of a bundle (see docs/scorers.md)")
    scorers.add_argument(
        "--scorer",
        metavar="NAME",
        help=f"{', '.join(SCORERS)}: from a CLIP model or safety checker in the directory --model",
    )
    scorers.add_argument(
        "--q16-prompts",
        type=Path,
        metavar="FILE",
        help="Q16's prompts as .npy, see docs/scorers.md (default: prompts.npy in the model's "
        "directory)",
    )
    add_build_arguments(cli, required=False)
    cli.add_argument("--quiet", action="store_true", help="no progress, only errors")
    return cli


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `sld-export`; return its exit code."""
    return run_command(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> None:
    options = vars(parser().parse_args(arguments))
    key = signing_key(options["sign"]) if options["sign"] is not None else None
    if options["model"] is None:
        _sign_only(options, key)
        return
    if options["scorer"] is not None:
        _export_scorer(options)
        return
    quiet = options.pop("quiet")
    del options["scorer"], options["sign"]
    if options.pop("q16_prompts") is not None:
        raise InputError("--q16-prompts is for --scorer q16")
    if options["precision"] is None:
        del options["precision"]
    options["fp32_components"] = tuple(options["fp32_components"])
    options["safety_concept"] = tuple(options["safety_concept"] or (PAPER_CONCEPT,))
    plans = take_build_options(options)
    settings = ExportSettings(**options)
    if plans is not None:
        require_buildable(plans)
    start = time.perf_counter()
    with _progress(quiet=quiet) as (bar, watch):
        path = export_bundle(
            settings, say=None if quiet else lambda line: _tell(bar, line), watch=watch
        )
    if not quiet:
        _show(path, time.perf_counter() - start)
    if key is not None:
        print(f"signed by {sign_bundle(path, key)}")
    if plans is not None:
        build_and_show(path, plans, force=False, quiet=quiet)


def _sign_only(options: dict[str, Any], key: object | None) -> None:
    """Sign a bundle that is there."""
    unset = vars(parser().parse_args(["--output", ""]))
    given = [name for name, value in options.items() if value != unset[name]]
    if key is None or set(given) - {"output", "sign", "quiet"}:
        raise InputError("no --model given", do="see sld-export --help")
    print(f"signed by {sign_bundle(options['output'], key)}")


def _export_scorer(options: dict[str, Any]) -> None:
    """Write a scorer; what only a bundle has is refused."""
    quiet = options.pop("quiet")
    names = ScorerSettings.__dataclass_fields__
    unset = vars(parser().parse_args(["--output", ""]))
    for name, value in options.items():
        if name not in names and value != unset[name]:
            raise InputError(f"--{name.replace('_', '-')} does not apply to --scorer")
    settings = ScorerSettings(
        **{name: value for name, value in options.items() if name in names}
        | {"model": Path(options["model"])}
    )
    start = time.perf_counter()
    path = export_scorer(settings, say=None if quiet else lambda line: print(line, file=sys.stderr))
    if not quiet:
        _show(path, time.perf_counter() - start)


def _show(path: Path, seconds: float) -> None:
    size = sum(file.stat().st_size for file in path.iterdir())
    peak = peak_memory()
    print(
        f"{path}: {size / 1e6:.1f} MB in {seconds:.1f} s"
        + (f", peak memory {peak / 2**30:.2f} GiB" if peak is not None else "")
    )


@contextmanager
def _progress(*, quiet: bool) -> Iterator[tuple[tqdm[NoReturn], Watch]]:
    """Give a bar over the bytes of weights, and what moves it."""
    with tqdm(
        unit="B", unit_scale=True, disable=quiet or None, leave=False, file=sys.stderr
    ) as bar:

        def watch(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield bar, watch


def _tell(bar: tqdm[NoReturn], line: str) -> None:
    bar.clear()  # a bar on a terminal would be left standing above the line
    print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
