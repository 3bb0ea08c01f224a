"""The options of `sld-bench`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sld_edge.engines.openvino.target import CpuPrecision
from sld_edge.runtime.commands.arguments import flag, option
from sld_edge.runtime.commands.options import (
    CPU_PRECISION,
    device_option,
    provider_option,
    quiet_option,
)
from sld_edge.runtime.safety import DEFAULT_PRESET, PAPER_PRESETS


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What `sld-bench` was asked for, typed."""

    bundle: Path | None = option(
        "made by sld-export; without it, the miniature model that ships with the package",
        "BUNDLE",
        positional=True,
        nargs="?",
    )
    output: Path = option("folder of the results", "DIR", default=Path("sld-bench-results"))
    force: bool = flag("replace results that are there")

    size: int | None = option(
        "width and height in pixels (default: the bundle's)", "W", group="what is measured"
    )
    steps: int | None = option("denoising steps (default: the bundle's)")
    rounds: int = option(
        "how often everything is measured; the rounds are interleaved", "R", default=3
    )
    warmup: int = option(
        "pictures that each process makes before the timed picture; with --peers every process "
        "makes one picture, so these are rounds that do not count",
        default=1,
    )
    batch: tuple[int, ...] = option("pictures at once, for the throughput", default=(1, 2, 4))
    safety: tuple[str, ...] = option(
        "presets whose price is measured; off is always measured",
        default=(*PAPER_PRESETS, DEFAULT_PRESET),
    )

    provider: str = provider_option("machine")
    device: str = device_option()
    cpu_precision: CpuPrecision = option(CPU_PRECISION, default="fp32")
    threads: int | None = option("threads of the CPU engines (default: one a core)")
    quiet: bool = quiet_option()

    pictures: int = option(
        "pictures of each row of --few-steps", "N", default=100, group="few steps"
    )
    few_steps: bool = flag(
        "only compare the miniature's twin of few steps, in 1, 2, 4 and 8 steps, with the "
        "miniature in 50 steps of DDIM: unsafe rate, adherence and time of every preset"
    )

    peers: tuple[str, ...] | None = option(
        "only compare with other programs, on the CPU: diffusers, diffusers-bf16, optimum, "
        "openvino, openvino-default, sdcpp (default: all that are installed)",
        group="peers",
        nargs="*",
    )
    checkpoint: Path | None = option(
        "weights of every program: a diffusers directory; without BUNDLE it is exported first",
        "DIR",
    )
    peer_python: tuple[str, ...] = option(
        "the Python that has the peer, if it is not this one", "NAME=PATH", default=()
    )
