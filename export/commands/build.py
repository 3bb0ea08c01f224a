"""`sld-build`: TensorRT plans for a bundle, on a build server or on the device."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from sld_edge.engines.errors import InputError
from sld_edge.engines.tensorrt.build_settings import BATCH, BuildSettings, span_from_numbers
from sld_edge.engines.tensorrt.plan_info import FLAVOURS, PlanInfo
from sld_edge.export.build_plans import build_plans
from sld_edge.runtime.commands.console import EXIT_OK, Parser, peak_memory, run_command

_EXAMPLES = """\
examples:
  sld-build sd15 --engine tensorrt-rtx                                     for this GPU, or for all
  sld-build sd15 --engine tensorrt-rtx --compute-capability 8.6 8.9 12.0 --size 256 512 768
  sld-build sd15 --engine tensorrt --batch 1 --workspace 1024              on a Jetson of 8 GB
  sld-build sd15 --engine tensorrt --components unet vae_decoder

Needs no PyTorch, and for TensorRT-RTX no GPU. The plans move into the bundle when the last is
built; before that it stays as it was. A build with the same answers is skipped. Exit code 2: a
mistake in what was asked.
"""
OPTIONS = (
    "engine",
    "compute_capability",
    "batch",
    "concepts",
    "size",
    "components",
    "workspace",
    "optimization_level",
    "version_compatible",
    "hardware_compatible",
    "strip_weights",
)


def add_build_arguments(cli: argparse.ArgumentParser, *, required: bool) -> None:
    """Add the options of building plans; without `required` no engine means no plans."""
    group = cli.add_argument_group("plans")
    group.add_argument(
        "--engine",
        required=required,
        metavar="NAME",
        help=f"{' or '.join(FLAVOURS)}: RTX cards, built anywhere; Jetson and servers, built on "
        "the device" + ("" if required else " (default: no plans)"),
    )
    group.add_argument(
        "--compute-capability",
        nargs="+",
        metavar="X.Y",
        help="of the devices that one plan is for, 8.6 8.9 12.0 for RTX 30, 40 and 50; "
        "tensorrt-rtx (default: the device's own, and where there is none all that it takes)",
    )
    group.add_argument(
        "--batch",
        nargs="+",
        type=int,
        metavar="N",
        help="images at once: MIN OPT MAX, or one number for all three "
        f"(default: {BATCH.min} {BATCH.opt} {BATCH.max})",
    )
    group.add_argument(
        "--concepts",
        type=int,
        metavar="N",
        help="most safety concepts at once, each of them a UNet branch (default: the bundle's)",
    )
    group.add_argument(
        "--size",
        nargs="+",
        type=int,
        metavar="N",
        help="pixels of width and height: MIN OPT MAX, or one number; a fixed size runs fastest "
        "(default: the bundle's own size, fixed)",
    )
    group.add_argument(
        "--components", nargs="+", metavar="NAME", help="only these (default: all in the bundle)"
    )
    group.add_argument(
        "--workspace",
        type=int,
        metavar="MiB",
        help="that kernels may use beside their tensors; less for 8 GB boards; tensorrt",
    )
    group.add_argument(
        "--optimization-level",
        type=int,
        metavar="N",
        help="0, a fast build, to 5, a fast plan (default: TensorRT's own)",
    )
    group.add_argument(
        "--version-compatible",
        action="store_true",
        help="later versions of TensorRT take the plan too; tensorrt",
    )
    group.add_argument(
        "--hardware-compatible",
        action="store_true",
        help="every device of compute capability 8.0 and later takes it, but no Jetson; tensorrt",
    )
    group.add_argument(
        "--strip-weights",
        action="store_true",
        help="a small plan, filled from the bundle's ONNX files when it loads; tensorrt",
    )


def settings_from_options(options: Mapping[str, Any]) -> BuildSettings | None:
    """Return the settings that the command line asks for; None where it names no engine.

    Raises:
        InputError: an option that the engine does not have, or one without an engine.
    """
    given = {
        name: options[name]
        for name in OPTIONS
        if options[name] is not None and options[name] is not False
    }
    if "engine" not in given:
        if given:
            name = next(iter(given)).replace("_", "-")
            raise InputError(f"--{name} without --engine", expected=" or ".join(FLAVOURS))
        return None
    spans = {
        name: span_from_numbers(tuple(given[name]), what=f"--{name}")
        for name in ("batch", "size")
        if name in given
    }
    workspace = options["workspace"]
    return BuildSettings(
        engine=options["engine"],
        compute_capabilities=tuple(given.get("compute_capability", ())),
        batch=spans.get("batch", BATCH),
        concepts=options["concepts"],
        size=spans.get("size"),
        components=tuple(given.get("components", ())),
        workspace=workspace * 2**20 if workspace is not None else None,
        optimization_level=options["optimization_level"],
        version_compatible=options["version_compatible"],
        hardware_compatible=options["hardware_compatible"],
        strip_weights=options["strip_weights"],
    )


def take_build_options(options: dict[str, Any]) -> BuildSettings | None:
    """Take the options of building plans out of `options` and return the settings they ask for."""
    return settings_from_options({name: options.pop(name) for name in OPTIONS})


def parser() -> Parser:
    """Return the command line's parser."""
    cli = Parser(
        prog="sld-build",
        description="Build TensorRT plans for a bundle, and put them into it.",
        epilog=_EXAMPLES,
    )
    cli.add_argument("bundle", type=Path, metavar="BUNDLE", help="a bundle, as sld-export makes it")
    add_build_arguments(cli, required=True)
    cli.add_argument("--force", action="store_true", help="build also what is there already")
    cli.add_argument("--quiet", action="store_true", help="no progress, only errors")
    return cli


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `sld-build`; return its exit code."""
    return run_command(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    options = vars(parser().parse_args(arguments))
    settings = take_build_options(options)
    if settings is None:  # argparse takes an empty --engine
        raise InputError("--engine", got="nothing", expected=" or ".join(FLAVOURS))
    build_and_show(options["bundle"], settings, force=options["force"], quiet=options["quiet"])
    return EXIT_OK


def build_and_show(
    bundle: Path, settings: BuildSettings, *, force: bool, quiet: bool
) -> list[PlanInfo]:
    """Build a bundle's plans with progress on stderr and a table on stdout."""
    start = time.perf_counter()
    if quiet:
        return build_plans(bundle, settings, force=force)
    with _Progress() as progress:
        infos = build_plans(bundle, settings, say=progress.say, watch=progress.watch, force=force)
    print(table(infos))
    peak = peak_memory()
    print(
        f"{time.perf_counter() - start:.1f} s in all"
        + (f", peak memory {peak / 2**30:.2f} GiB" if peak is not None else "")
    )
    return infos


def table(infos: Sequence[PlanInfo]) -> str:
    """Return component, build time and size of each plan, a line each."""
    lines = [f"{'component':<14} {'seconds':>8} {'MB':>9}"]
    lines += [
        f"{info.component:<14} {info.seconds:>8.1f} {info.bytes / 1e6:>9.1f}" for info in infos
    ]
    return "\n".join(lines)


class _Progress:
    """One line that says what is being done and for how long; plain lines where no one watches.

    It writes to a copy of stderr, since native code's own stderr is silenced meanwhile.
    """

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._doing: tuple[str, float] | None = None

    def __enter__(self) -> Self:
        if self._live:
            self._terminal = os.fdopen(os.dup(sys.stderr.fileno()), "w")
            self._thread = threading.Thread(target=self._tick, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        if self._live:
            self._thread.join()
            self._write("")
            self._terminal.close()

    def say(self, line: str) -> None:
        """Print a line that stays."""
        if self._live:
            self._write(f"{line}\n")
        else:
            print(line, file=sys.stderr)

    def watch(self, component: str, stage: str) -> None:
        """Show what is being done now."""
        self._doing = (f"{component}: {stage}", time.perf_counter()) if stage != "done" else None
        if not self._live:
            print(f"{component}: {stage}", file=sys.stderr)

    def _tick(self) -> None:
        while not self._done.wait(0.5):
            doing = self._doing
            if doing is not None:
                self._write(f"{doing[0]} ({time.perf_counter() - doing[1]:.0f} s)")

    def _write(self, text: str) -> None:
        with self._lock:
            self._terminal.write(f"\r\x1b[K{text}")  # over the line before
            self._terminal.flush()


if __name__ == "__main__":
    sys.exit(main())
