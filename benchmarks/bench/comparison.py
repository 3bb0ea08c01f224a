"""Comparison with the peers: same weights, prompt, size, steps and threads, a process each."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sld_edge.benchmarks.bench.child import run_child
from sld_edge.benchmarks.bench.page import ratio_chart
from sld_edge.benchmarks.bench.peers import (
    Installed,
    find_peers,
    fingerprint,
    prepared,
    pythons_from_options,
)
from sld_edge.benchmarks.bench.runs import (
    OUR_WORKER,
    PROMPT,
    Run,
    interleaved,
    run_from_outcome,
    runs_as_json,
)
from sld_edge.benchmarks.bench.summary import Ratio, digits, median_of_rounds, ratio
from sld_edge.benchmarks.bench.tables import Table, counted, ratio_text
from sld_edge.benchmarks.bench.worker import Task
from sld_edge.benchmarks.html import Html
from sld_edge.engines.errors import InputError
from sld_edge.engines.files import write_whole
from sld_edge.runtime.bundle import Bundle
from sld_edge.runtime.manifest import LatentInfo
from sld_edge.runtime.random import noise_source
from sld_edge.runtime.safety import safety_from_preset

SEED = 7
_MODELS, _PICTURES, _NOISE = "models", "pictures", "noise.npy"
_LEAST_STEPS = 2  # the first ends with what only a first step does, and is not counted
_GIB = 2**30

# What is compared: its name, the samples of a run, and what turns them into the printed number.
FIGURES: Mapping[str, Callable[[Run], Sequence[float]]] = {
    "process start to ready, s": lambda run: [run.ready_s],
    "a step, s": lambda run: run.steps_s,
    "a picture, s": lambda run: [run.image_s],
    "a picture, CPU s": lambda run: [run.image_cpu_s],
    "process start to picture, s": lambda run: [run.first_image_s],
    "peak memory, GiB": lambda run: [run.peak / _GIB] if run.peak is not None else [],
    "of it anonymous, GiB": lambda run: [run.anonymous / _GIB] if run.anonymous is not None else [],
}


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """Settings of a comparison; `folder` holds pictures and the converted weights."""

    checkpoint: Path
    bundle: Path | None
    folder: Path
    peers: tuple[str, ...]
    pythons: Sequence[str]
    size: int | None
    steps: int | None
    rounds: int
    warmup: int
    threads: int


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One side of the comparison: ours if `peer` is None; `safety` is a preset."""

    peer: Installed | None
    safety: str

    @property
    def name(self) -> str:
        """Program and preset."""
        who = self.peer.name if self.peer is not None else "ours"
        return f"{who}, {self.safety}"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far a peer's picture is from ours, of 255: the worst value, and on average."""

    highest: int
    mean: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Results of a comparison, ready to be written."""

    title: str
    notes: list[str]
    versions: Mapping[str, str]
    tables: Sequence[Table]
    charts: Sequence[tuple[str, Html]]
    body: Mapping[str, Any]


def compare_peers(
    settings: CompareSettings,
    *,
    watch: Callable[[str], object],
    expect: Callable[[int], object],
) -> Comparison:
    """Measure ours beside the peers.

    Args:
        settings: of the comparison.
        watch: is told the name of what has been measured.
        expect: is told how many runs there will be.

    Raises:
        InputError: no such checkpoint or peer, or a setting that cannot be honoured.
        EngineError: a process ended without an answer.
    """
    if not (settings.checkpoint / "model_index.json").is_file():
        raise InputError("--checkpoint", got=settings.checkpoint, expected="a diffusers directory")
    peers, missing = find_peers(settings.peers, pythons_from_options(settings.pythons))
    steps = settings.steps if settings.steps is not None else _LEAST_STEPS + 1
    if steps < _LEAST_STEPS:
        raise InputError("--steps", got=steps, expected=f"{_LEAST_STEPS} or more with --peers")
    settings.folder.mkdir(parents=True, exist_ok=True)
    bundle = settings.bundle if settings.bundle is not None else _exported(settings)
    manifest = Bundle.open(bundle).manifest
    size = settings.size if settings.size is not None else manifest.size.width
    runner = _Runner(
        settings=settings,
        bundle=bundle,
        models={
            peer.name: prepared(
                peer, settings.checkpoint.resolve(), settings.folder / _MODELS, _environment(1)
            )
            for peer in peers
            if peer.peer.prepared
        },
        concept=manifest.safety_concept,
        size=size,
        steps=steps,
        noise=_noise(settings.folder, manifest.latents, size),
    )
    sides = contenders(peers)
    expect(len(sides) * (settings.rounds + settings.warmup))
    runs = []
    for number, side in interleaved(sides, settings.warmup + settings.rounds):
        run = runner.run(side, number - settings.warmup)
        watch(side.name)
        if run.round >= 0:
            runs.append(run)
    pairs = [(our_side(side), side) for side in sides if side.peer is not None]
    ratios = {
        f"{theirs.name}: {figure}": one
        for ours, theirs in pairs
        for figure, one in ratios_of(runs, ours, theirs).items()
    }
    pictures = {
        theirs.name: difference(runner.picture(ours), runner.picture(theirs))
        for ours, theirs in pairs
        if theirs.peer is not None and theirs.peer.peer.same_noise
    }
    return Comparison(
        title=f"{manifest.model.id} beside its peers, {size} px, {steps} steps",
        notes=list(missing.values()),
        versions={key: one for peer in peers for key, one in _versions(peer).items()},
        tables=[
            *(peer_table(runs, ours, theirs, settings.rounds) for ours, theirs in pairs),
            *([_pictures_table(pictures)] if pictures else []),
        ],
        charts=[
            (f"{figure}: ours to theirs", ratio_chart("ours to theirs", named))
            for figure in FIGURES
            if (named := _ratios_named(ratios, figure))
        ],
        body={
            "settings": {
                "checkpoint": str(settings.checkpoint),
                "bundle": str(bundle),
                "prompt": PROMPT,
                "seed": SEED,
                "size": size,
                "steps": steps,
                "rounds": settings.rounds,
                "warmup": settings.warmup,
                "threads": settings.threads,
                "sampler": "ddim",
            },
            "ratios": {name: asdict(one) for name, one in ratios.items()},
            "pictures": {name: asdict(one) for name, one in pictures.items()},
            "runs": runs_as_json(runs),
        },
    )


def contenders(peers: Sequence[Installed]) -> tuple[Contender, ...]:
    """Return every side, ours first: once for each preset that a peer is measured with."""
    theirs = [Contender(peer=peer, safety=name) for peer in peers for name in peer.peer.settings]
    ours = dict.fromkeys(our_side(side) for side in theirs)
    return (*ours, *theirs)


def our_side(side: Contender) -> Contender:
    """Return our side with the same preset as a peer's."""
    return Contender(peer=None, safety=side.safety)


def ratios_of(runs: Sequence[Run], ours: Contender, theirs: Contender) -> dict[str, Ratio]:
    """Return ours / theirs of every figure that both sides have."""
    ratios = {}
    for name, samples in FIGURES.items():
        sides = [[samples(run) for run in runs if run.name == side.name] for side in (ours, theirs)]
        if all(one for side in sides for one in side):
            ratios[name] = ratio(*sides)
    return ratios


def peer_table(runs: Sequence[Run], ours: Contender, theirs: Contender, rounds: int) -> Table:
    """Return the table of one peer; a printed ratio is the quotient of the printed medians."""
    rows = []
    for name, one in ratios_of(runs, ours, theirs).items():
        cells = [
            digits(median_of_rounds([FIGURES[name](run) for run in runs if run.name == side.name]))
            for side in (ours, theirs)
        ]
        rows.append([name, *cells, ratio_text(one)])
    return Table(
        title=f"Beside {theirs.name}",
        head=("", ours.name, theirs.name, "ratio (lowest to highest)"),
        rows=rows,
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
    settings: CompareSettings
    bundle: Path
    models: Mapping[str, Path]
    concept: str
    size: int
    steps: int
    noise: Path

    def picture(self, side: Contender) -> Path:
        """Return where a side's picture lies."""
        return self.settings.folder / _PICTURES / f"{side.name.replace(', ', '-')}.png"

    def run(self, side: Contender, number: int) -> Run:
        """Measure a side in a process of its own."""
        picture = self.picture(side)
        picture.parent.mkdir(exist_ok=True)
        picture.unlink(missing_ok=True)
        return self._ours(side, number) if side.peer is None else self._theirs(side, number)

    def _ours(self, side: Contender, number: int) -> Run:
        task = Task(
            bundle=str(self.bundle),
            provider="cpu",
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
        outcome = run_child(
            [sys.executable, "-m", OUR_WORKER],
            asdict(task),
            name=side.name,
            environment=_environment(self.settings.threads),
        )
        run = run_from_outcome(outcome, name=side.name, batch=1, number=number)
        # As the peers' are: from the end of a step to the end of the next.
        ends = pairwise(outcome.answer["step_ends"])
        return replace(run, steps_s=[after - before for before, after in ends])

    def _theirs(self, side: Contender, number: int) -> Run:
        assert side.peer is not None
        numbers = safety_from_preset(side.safety, calls=self.steps)
        task = {
            "model": str(self.settings.checkpoint),
            "prepared": str(self.models.get(side.peer.name, "")),
            "prompt": PROMPT,
            "safety": {**asdict(numbers), "concept": self.concept} if numbers.acts else None,
            "steps": self.steps,
            "size": self.size,
            "seed": SEED,
            "noise": str(self.noise),
            "threads": self.settings.threads,
            "picture": str(self.picture(side)),
        }
        outcome = side.peer.call("run", task, _environment(self.settings.threads))
        return run_from_outcome(outcome, name=side.name, batch=1, number=number)


def _exported(settings: CompareSettings) -> Path:
    """Return our bundle of the checkpoint, from the folder or exported now."""
    from sld_edge.export import ExportSettings, export_bundle

    name = f"bundle-{fingerprint(settings.checkpoint)[:12]}"
    bundle = settings.folder / _MODELS / name
    if not bundle.exists():
        bundle.parent.mkdir(exist_ok=True)
        export_bundle(
            ExportSettings(model=str(settings.checkpoint), output=bundle, precision="fp32")
        )
    return bundle


def _noise(folder: Path, latents: LatentInfo, size: int) -> Path:
    """Write the noise that torch draws, float32 [1,4,h,w], for peers that draw another."""
    cells = size // latents.downscale
    noise = noise_source("torch", SEED).normal((1, latents.channels, cells, cells))
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


def _ratios_named(ratios: Mapping[str, Ratio], figure: str) -> list[tuple[str, Ratio]]:
    ending = f": {figure}"
    return [
        (name.removesuffix(ending), one) for name, one in ratios.items() if name.endswith(ending)
    ]


def _pictures_table(pictures: Mapping[str, Difference]) -> Table:
    return Table(
        title="The same picture?",
        head=("ours beside", "largest difference of 255", "mean difference"),
        rows=[[name, str(one.highest), f"{one.mean:.4f}"] for name, one in pictures.items()],
        note="Same weights, noise and settings: what differs is rounding. Peers with noise of "
        "their own are left out.",
    )
