"""`sld-build`: TensorRT plans for a bundle, on a build server or on the device."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sld_edge.engines.errors import InputError
from sld_edge.engines.tensorrt.build_settings import BATCH, BuildSettings, span_from_numbers
from sld_edge.engines.tensorrt.plan_info import FLAVOURS, Flavour, PlanInfo
from sld_edge.export.build_plans import build_plans
from sld_edge.runtime.commands.arguments import (
    REQUIRED,
    add_options,
    flag,
    option,
    settings_from_options,
)
from sld_edge.runtime.commands.console import EXIT_OK, Parser, peak_memory, run_command
from sld_edge.runtime.commands.options import quiet_option

_EXAMPLES = """\
examples:
  sld-build sd15 --engine tensorrt-rtx                                     for this GPU, or for all
  sld-build sd15 --engine tensorrt-rtx --compute-capability 8.6 8.9 12.0 --size 256 512 768
  sld-build sd15 --engine tensorrt --batch 1 --workspace 1024              on a Jetson of 8 GB
  sld-build sd15 --engine tensorrt --components unet vae_decoder

Needs no PyTorch, and for TensorRT-RTX no GPU. The plans move into the bundle when the last plan is
built; until then the bundle does not change. A plan that exists for the same options is kept. Exit
code 2 is a mistake in the options or files.
"""


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The options of building plans, for `sld-build` and `sld-export`."""

    engine: Flavour | None = option(
        f"{' or '.join(FLAVOURS)}: RTX cards, built anywhere; Jetson and servers, built on the "
        "device; sld-export without it builds no plans",
        group="plans",
    )
    compute_capability: tuple[str, ...] = option(
        "devices that a plan runs on, 8.6 8.9 12.0 for RTX 30, 40 and 50; only tensorrt-rtx "
        "(default: this device; without a device, all that TensorRT-RTX supports)",
        "X.Y",
        default=(),
    )
    batch: tuple[int, ...] | None = option(
        "images in one call: MIN OPT MAX, or one number for all three "
        f"(default: {BATCH.min} {BATCH.opt} {BATCH.max})"
    )
    concepts: int | None = option(
        "most safety concepts in one call; each is a UNet branch (default: the bundle's)"
    )
    size: tuple[int, ...] | None = option(
        "pixels of width and height: MIN OPT MAX, or one number; a fixed size runs fastest "
        "(default: the bundle's size, fixed)"
    )
    static: bool = flag(
        "one size and one batch, known at build: the least memory (default: the bundle's size, and "
        "a batch of 1)"
    )
    components: tuple[str, ...] = option(
        "components to build (default: all in the bundle)", default=()
    )
    workspace: int | None = option(
        "memory that kernels may use besides their tensors; less for 8 GB boards; only tensorrt",
        "MiB",
    )
    optimization_level: int | None = option(
        "from 0, a fast build, to 5, a fast plan (default: TensorRT's)"
    )
    version_compatible: bool = flag(
        "the plan also runs on later versions of TensorRT; only tensorrt"
    )
    hardware_compatible: bool = flag(
        "the plan runs on every device of compute capability 8.0 and later, but on no Jetson; only "
        "tensorrt"
    )
    strip_weights: bool = flag(
        "a small plan; it reads its weights from the bundle's ONNX files at start; only tensorrt"
    )


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """The options that only `sld-build` has."""

    bundle: Path = option(
        "a bundle, as sld-export makes it", "BUNDLE", default=REQUIRED, positional=True
    )
    force: bool = flag("build existing plans again")
    quiet: bool = quiet_option()


def build_settings(options: PlanOptions) -> BuildSettings | None:
    """Return the settings of the command line; None where it names no engine.

    Raises:
        InputError: an option that the engine does not have, or an option without an engine.
    """
    given = {
        name: value for name, value in vars(options).items() if value != getattr(PlanOptions, name)
    }
    if options.engine is None:
        for name in given:
            option_name = name.replace("_", "-")
            raise InputError(f"--{option_name} without --engine", expected=" or ".join(FLAVOURS))
        return None
    static = given.pop("static", False)
    if static:
        given.setdefault("batch", (1,))
    for name in {"batch", "size"} & given.keys():
        if static and len(given[name]) > 1:
            raise InputError(f"--{name}", got=len(given[name]), expected="one number with --static")
        given[name] = span_from_numbers(given[name], what=f"--{name}")
    if options.workspace is not None:
        given["workspace"] = options.workspace * 2**20
    given["compute_capabilities"] = given.pop("compute_capability", ())
    return BuildSettings(**given)


def parser() -> Parser:
    """Return the command line's parser."""
    cli = Parser(
        prog="sld-build",
        description="Build TensorRT plans for a bundle, and put them into it.",
        epilog=_EXAMPLES,
    )
    add_options(cli, BuildOptions)
    add_options(cli, PlanOptions, required=("engine",))
    return cli


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `sld-build`; return its exit code."""
    return run_command(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    given = vars(parser().parse_args(arguments))
    options = settings_from_options(BuildOptions, given)
    settings = build_settings(settings_from_options(PlanOptions, given))
    assert settings is not None  # the parser requires --engine
    build_and_show(options.bundle, settings, force=options.force, quiet=options.quiet)
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
    print(f"{time.perf_counter() - start:.1f} s in all{peak_text()}")
    return infos


def peak_text() -> str:
    """Return the peak memory of this process for the end of a line; empty where unknown."""
    peak = peak_memory()
    return f", peak memory {peak / 2**30:.2f} GiB" if peak is not None else ""


def table(infos: Sequence[PlanInfo]) -> str:
    """Return a line for each plan: build time, size, and what TensorRT made of the graph.

    "fused" counts the attentions that are one kernel, which keeps no matrix of scores; "activation"
    is the memory besides the weights, for the largest size and batch.
    """
    names = f"{'component':<14} {'seconds':>8} {'MB':>9}"
    lines = [f"{names} {'kernels':>8} {'fused':>12} {'activation':>14}"]
    for info in infos:
        line = f"{info.component:<14} {info.seconds:>8.1f} {info.bytes / 1e6:>9.1f}"
        found = info.contents
        if found is not None:
            fused = f"{found.fused_attentions} of {found.attentions}" if found.attentions else "-"
            activation = f"{found.activation_bytes / 1e6:.1f} MB"
            line += f" {found.kernels:>8} {fused:>12} {activation:>14}"
        lines.append(line)
    return "\n".join(lines)


class _Progress:
    """One changing line with the current stage and its time; plain lines without a terminal.

    It writes to a copy of stderr, because a build silences stderr for native code.
    """

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._current: tuple[str, float] | None = None  # stage and its start

    def __enter__(self) -> _Progress:
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
        """Show the current stage."""
        self._current = None if stage == "done" else (f"{component}: {stage}", time.perf_counter())
        if not self._live:
            print(f"{component}: {stage}", file=sys.stderr)

    def _tick(self) -> None:
        while not self._done.wait(0.5):
            current = self._current
            if current is not None:
                self._write(f"{current[0]} ({time.perf_counter() - current[1]:.0f} s)")

    def _write(self, text: str) -> None:
        with self._lock:
            self._terminal.write(f"\r\x1b[K{text}")  # replaces the line before
            self._terminal.flush()


if __name__ == "__main__":
    sys.exit(main())
