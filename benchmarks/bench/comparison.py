"""Comparison with the peers: same weights, prompt, size, steps and threads, a process each."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from sld_edge.benchmarks.bench.figures import Samples, known
from sld_edge.benchmarks.bench.options import BenchOptions
from sld_edge.benchmarks.bench.peers import (
    Installed,
    find_peers,
    fingerprint,
    prepared,
    pythons_from_options,
)
from sld_edge.benchmarks.bench.report import Report, counted, ratio_cell, ratio_chart
from sld_edge.benchmarks.bench.runs import PROMPT, Run, interleaved, run_from_outcome, run_ours
from sld_edge.benchmarks.bench.summary import Ratio, digits, median_of_rounds, ratio
from sld_edge.benchmarks.bench.worker import Task
from sld_edge.benchmarks.tables import Table
from sld_edge.engines.errors import InputError
from sld_edge.engines.files import json_from_file, write_whole
from sld_edge.engines.openvino.target import CpuPrecision, why_no_bf16
from sld_edge.engines.providers import status
from sld_edge.runtime.bundle import Bundle
from sld_edge.runtime.manifest import Manifest
from sld_edge.runtime.random import noise_source
from sld_edge.runtime.safety import safety_from_preset

SEED = 7
_MODELS, _PICTURES, _NOISE = "models", "pictures", "noise.npy"
_LEAST_STEPS = 2  # the first step does work that no later step does, and is not counted
_GIB = 2**30

# Compared figures: the printed name, and the samples of a run.
FIGURES: Mapping[str, Samples] = {
    "process start to ready, s": lambda run: [run.ready_s],
    "a step, s": lambda run: run.steps_s,
    "a picture, s": lambda run: [run.image_s],
    "a picture, CPU s": lambda run: [run.image_cpu_s],
    "process start to picture, s": lambda run: [run.first_image_s],
    "peak memory, GiB": lambda run: [bytes_ / _GIB for bytes_ in known(run.peak)],
    "of it anonymous, GiB": lambda run: [bytes_ / _GIB for bytes_ in known(run.anonymous)],
}


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One side of the comparison: a peer; or ours, by its provider and precision.

    `safety` is a preset.
    """

    peer: Installed | None
    safety: str
    provider: str = "cpu"
    cpu_precision: CpuPrecision = "fp32"

    @property
    def who(self) -> str:
        """The program; ours with what differs from the provider cpu."""
        if self.peer is not None:
            return self.peer.name
        if self.provider == "cpu":
            return "ours"
        return f"ours on {self.provider}" + (" in bf16" if self.cpu_precision == "bf16" else "")

    @property
    def name(self) -> str:
        """Program and preset."""
        return f"{self.who}, {self.safety}"


@dataclass(frozen=True)
class Pair:
    """Ours beside a peer."""

    ours: Contender
    theirs: Contender

    @property
    def name(self) -> str:
        """The peer's name, and ours where it is not the provider cpu."""
        beside = "" if self.ours.provider == "cpu" else f", beside {self.ours.who}"
        return f"{self.theirs.name}{beside}"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far a peer's picture is from ours, of 255: the largest difference, and the mean."""

    highest: int
    mean: float


def compare_peers(
    options: BenchOptions, *, watch: Callable[[str], object], expect: Callable[[int], object]
) -> Report:
    """Measure ours beside the peers.

    Args:
        options: of the command.
        watch: gets the name of each finished measurement.
        expect: gets the number of runs.

    Raises:
        InputError: no such checkpoint or peer, or a setting that cannot be honoured.
        EngineError: a process ended without an answer.
    """
    runner, missing = _runner(options)
    safe = _has_safe_pipeline(runner.checkpoint)
    theirs = [
        Contender(peer=peer, safety=safety)
        for peer in runner.peers
        for safety in peer.peer.settings
        if safe or safety == "off"
    ]
    pairs = [Pair(ours, side) for side in theirs for ours in _ours_beside(side, options)]
    sides = [*dict.fromkeys(pair.ours for pair in pairs), *theirs]
    expect(len(sides) * (options.rounds + options.warmup))
    runs = []
    for number, side in interleaved(sides, options.warmup + options.rounds):
        run = runner.run(side, number - options.warmup)
        watch(side.name)
        if run.round >= 0:
            runs.append(run)
    ratios = {pair.name: _ratios(runs, pair.ours, pair.theirs) for pair in pairs}
    pictures = {
        pair.name: difference(runner.picture(pair.ours), runner.picture(pair.theirs))
        for pair in pairs
        if pair.theirs.peer is not None and pair.theirs.peer.peer.same_noise
    }
    tables = [_peer_table(runs, pair, ratios[pair.name], options.rounds) for pair in pairs]
    charts = []
    for figure in FIGURES:
        measured = {name: by[figure] for name, by in ratios.items() if figure in by}
        if measured:
            charts.append(ratio_chart(f"{figure}: ours to theirs", measured))
    return Report(
        title=f"{runner.manifest.model.id} beside its peers, {runner.size} px, "
        f"{runner.steps} steps",
        notes=missing,
        tables=[*tables, *([_pictures_table(pictures)] if pictures else [])],
        charts=charts,
        body={
            "kind": "peers",
            "settings": {
                "checkpoint": runner.checkpoint,
                "bundle": runner.bundle,
                "prompt": PROMPT,
                "seed": SEED,
                "size": runner.size,
                "steps": runner.steps,
                "rounds": options.rounds,
                "warmup": options.warmup,
                "threads": runner.threads,
                "sampler": "ddim",
            },
            "ratios": {
                f"{name}: {figure}": asdict(one)
                for name, by in ratios.items()
                for figure, one in by.items()
            },
            "pictures": {name: asdict(one) for name, one in pictures.items()},
            "runs": [asdict(run) for run in runs],
        },
        versions={key: one for peer in runner.peers for key, one in _versions(peer).items()},
    )


def _ours_beside(side: Contender, options: BenchOptions) -> list[Contender]:
    """Return ours by each provider that works here, in the peer's kind of precision."""
    assert side.peer is not None
    ours = Contender(peer=None, safety=side.safety)
    on_openvino = replace(ours, provider="openvino")
    if options.provider != "auto":
        return [replace(ours, provider=options.provider, cpu_precision=options.cpu_precision)]
    if not status("openvino").usable:
        return [ours]
    if side.peer.peer.precision != "fp32" and why_no_bf16() is None:
        return [replace(on_openvino, cpu_precision="bf16")]
    return [ours, on_openvino]


def _has_safe_pipeline(checkpoint: Path) -> bool:
    """Whether diffusers has a pipeline with Safe Latent Diffusion for a checkpoint."""
    index = json_from_file(checkpoint / "model_index.json", error=InputError)
    return "XL" not in str(index.get("_class_name"))


def _ratios(runs: Sequence[Run], ours: Contender, theirs: Contender) -> dict[str, Ratio]:
    """Return ours / theirs of every figure that both sides have."""
    ratios = {}
    for name, samples in FIGURES.items():
        sides = [[samples(run) for run in runs if run.name == side.name] for side in (ours, theirs)]
        if all(one for side in sides for one in side):
            ratios[name] = ratio(*sides)
    return ratios


def _peer_table(runs: Sequence[Run], pair: Pair, ratios: Mapping[str, Ratio], rounds: int) -> Table:
    ours, theirs = pair.ours, pair.theirs

    def middle(figure: str, side: Contender) -> str:
        each = [FIGURES[figure](run) for run in runs if run.name == side.name]
        return digits(median_of_rounds(each))

    return Table(
        title=f"Beside {pair.name}",
        rows=[
            {
                "figure": name,
                ours.name: middle(name, ours),
                theirs.name: middle(name, theirs),
                "ratio (lowest to highest)": ratio_cell(one),
            }
            for name, one in ratios.items()
        ],
        note=f"Medians of {counted(rounds, 'interleaved round')}, each run a fresh process that "
        "makes one picture; its first step is not counted.",
    )


def difference(ours: Path, theirs: Path) -> Difference:
    """Compare two pictures.

    Raises:
        InputError: they are of different sizes.
    """
    a, b = (np.asarray(Image.open(path).convert("RGB")).astype(int) for path in (ours, theirs))
    if a.shape != b.shape:
        raise InputError(f"{theirs} is not of our picture's size", got=b.shape, expected=a.shape)
    apart = np.abs(a - b)
    return Difference(highest=int(apart.max()), mean=float(apart.mean()))


@dataclass(frozen=True, kw_only=True)
class _Runner:
    """What every side is measured with; `models` are the peers' own forms of the weights."""

    checkpoint: Path
    folder: Path
    bundle: Path
    manifest: Manifest
    peers: Sequence[Installed]
    models: Mapping[str, Path]
    size: int
    steps: int
    threads: int
    noise: Path

    def picture(self, side: Contender) -> Path:
        """Return where a side's picture lies."""
        return self.folder / _PICTURES / f"{side.name.replace(', ', '-')}.png"

    def run(self, side: Contender, number: int) -> Run:
        """Measure a side in a process of its own."""
        picture = self.picture(side)
        picture.parent.mkdir(exist_ok=True)
        picture.unlink(missing_ok=True)
        return self._ours(side, number) if side.peer is None else self._theirs(side, number)

    def _ours(self, side: Contender, number: int) -> Run:
        task = Task(
            bundle=str(self.bundle),
            provider=side.provider,
            cpu_precision=side.cpu_precision,
            prompt=PROMPT,
            safety=side.safety,
            sampler="ddim",
            steps=self.steps,
            size=self.size,
            batch=1,
            warmup=0,
            seed=SEED,
            picture=str(self.picture(side)),
        )
        outcome = run_ours(task, side.name, _environment(self.threads))
        run = run_from_outcome(outcome, name=side.name, batch=1, number=number)
        # A step of a peer is timed from the end of the step before it; ours too here.
        ends = pairwise(outcome.answer["step_ends"])
        return replace(run, steps_s=[after - before for before, after in ends])

    def _theirs(self, side: Contender, number: int) -> Run:
        assert side.peer is not None
        numbers = safety_from_preset(side.safety, calls=self.steps)
        safety = {**asdict(numbers), "concept": self.manifest.safety_concept}
        task = {
            "model": str(self.checkpoint),
            "prepared": str(self.models.get(side.peer.loader, "")),
            "prompt": PROMPT,
            "safety": safety if numbers.acts else None,
            "steps": self.steps,
            "size": self.size,
            "seed": SEED,
            "noise": str(self.noise),
            "threads": self.threads,
            "picture": str(self.picture(side)),
        }
        outcome = side.peer.call("run", task, _environment(self.threads))
        return run_from_outcome(outcome, name=side.name, batch=1, number=number)


def _runner(options: BenchOptions) -> tuple[_Runner, list[str]]:
    """Resolve the options and prepare weights and noise; also say which peers are missing."""
    checkpoint, folder = options.checkpoint, options.output
    if checkpoint is None:
        raise InputError("--peers needs the weights", do="add --checkpoint DIR")
    if not (checkpoint / "model_index.json").is_file():
        raise InputError("--checkpoint", got=checkpoint, expected="a diffusers directory")
    names = tuple(dict.fromkeys(options.peers if options.peers is not None else ()))
    peers, missing = find_peers(names, pythons_from_options(options.peer_python))
    steps = options.steps if options.steps is not None else _LEAST_STEPS + 1
    if steps < _LEAST_STEPS:
        raise InputError("--steps", got=steps, expected=f"{_LEAST_STEPS} or more with --peers")
    folder.mkdir(parents=True, exist_ok=True)
    bundle = options.bundle
    if bundle is None:
        bundle = _exported(checkpoint, folder / _MODELS)
    manifest = Bundle.open(bundle).manifest
    size = options.size if options.size is not None else manifest.size.width
    models = {
        peer.loader: prepared(peer, checkpoint.resolve(), folder / _MODELS, _environment(1))
        for peer in peers
        if peer.peer.prepared
    }
    runner = _Runner(
        checkpoint=checkpoint,
        folder=folder,
        bundle=bundle,
        manifest=manifest,
        peers=peers,
        models=models,
        size=size,
        steps=steps,
        threads=options.threads if options.threads is not None else os.cpu_count() or 1,
        noise=_noise(folder, manifest, size),
    )
    return runner, list(missing.values())


def _exported(checkpoint: Path, folder: Path) -> Path:
    """Return our bundle of the checkpoint, from the folder or exported now."""
    from sld_edge.export import ExportSettings, export_bundle

    bundle = folder / f"bundle-{fingerprint(checkpoint)[:12]}"
    if not bundle.exists():
        folder.mkdir(exist_ok=True)
        export_bundle(ExportSettings(model=str(checkpoint), output=bundle, precision="fp32"))
    return bundle


def _noise(folder: Path, manifest: Manifest, size: int) -> Path:
    """Write the noise that torch draws, float32 [1,4,h,w], for peers that draw another."""
    cells = size // manifest.latents.downscale
    noise = noise_source("torch", SEED).normal((1, manifest.latents.channels, cells, cells))
    buffer = io.BytesIO()
    np.save(buffer, noise)
    path = folder / _NOISE
    write_whole(path, buffer.getvalue())
    return path


def _environment(threads: int) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": str(threads),
        "SLD_EDGE_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
    }


def _versions(peer: Installed) -> dict[str, str]:
    """Return versions; a peer with its own Python has its name before them."""
    elsewhere = peer.python != sys.executable
    return {f"{peer.name}'s {key}" if elsewhere else key: one for key, one in peer.versions.items()}


def _pictures_table(pictures: Mapping[str, Difference]) -> Table:
    return Table(
        title="The same picture?",
        rows=[
            {
                "ours beside": name,
                "largest difference of 255": str(one.highest),
                "mean difference": f"{one.mean:.4f}",
            }
            for name, one in pictures.items()
        ],
        note="Same weights, noise and settings: the pictures differ by rounding. Peers with noise "
        "of their own are left out.",
    )
