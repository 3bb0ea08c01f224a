"""`sld-bench`: how fast is a bundle, how much memory does it take, and what does safety cost?"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sld_edge.benchmarks.bench.comparison import CompareSettings, compare_peers
from sld_edge.benchmarks.bench.conditions import busy, conditions
from sld_edge.benchmarks.bench.figures import figures
from sld_edge.benchmarks.bench.page import bundle_charts, report_page
from sld_edge.benchmarks.bench.runs import PROMPT, BenchSettings, cells, measure, runs_as_json
from sld_edge.benchmarks.bench.tables import bundle_tables, conditions_table, markdown
from sld_edge.engines.errors import InputError, OutputError
from sld_edge.engines.files import write_whole
from sld_edge.engines.settings import cache_folder
from sld_edge.runtime.commands.arguments import add_options, flag, option, parsed
from sld_edge.runtime.commands.console import Parser, run_command
from sld_edge.runtime.commands.options import provider_option, quiet_option
from sld_edge.runtime.pipeline import Pipeline
from sld_edge.runtime.request import Request, Sampling
from sld_edge.runtime.safety import PRESETS

RESULTS, REPORT, PAGE = "results.json", "report.md", "report.html"
_FORMAT, _FORMAT_VERSION = "sld-bench", 1

_EXAMPLES = """\
examples:
  sld-bench                                        the miniature model, in about two minutes
  sld-bench sd15 --steps 10 --rounds 3             a bundle, on the best provider here
  sld-bench sd15 --provider cpu --size 256 --safety off max --batch 1
  sld-bench --peers --checkpoint sd15-diffusers    beside every peer that is installed
  sld-bench sd15 --peers diffusers openvino --checkpoint sd15-diffusers --size 256 --steps 3
  sld-bench --peers optimum --peer-python optimum=venv/bin/python --checkpoint sd15-diffusers

Every measured run is a process of its own. Raw samples are kept in results.json. A mistake in what
was asked: one line, exit code 2.
"""


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
        "presets whose price is measured; off is always measured", default=tuple(PRESETS)
    )

    provider: str = provider_option("machine")
    threads: int | None = option("threads of the CPU engines (default: one a core)")
    quiet: bool = quiet_option()

    peers: tuple[str, ...] | None = option(
        "only compare with other programs, on the CPU: diffusers, optimum, openvino, "
        "sdcpp (default: all that are installed)",
        group="peers",
        nargs="*",
    )
    checkpoint: Path | None = option(
        "weights of every program: a diffusers directory; without BUNDLE it is exported first",
        "DIR",
    )
    peer_python: tuple[str, ...] = option(
        "the Python that has the peer, if it is not this one",
        "NAME=PATH",
        default=(),
    )


def parser() -> Parser:
    """Return the command line's parser."""
    cli = Parser(
        prog="sld-bench",
        description="Measure a bundle: latency, memory, throughput, and what safety costs.",
        epilog=_EXAMPLES,
    )
    add_options(cli, BenchOptions)
    return cli


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `sld-bench`; return its exit code."""
    return run_command(lambda: _run(parsed(parser(), BenchOptions, arguments)))


def _run(options: BenchOptions) -> None:
    _check_output(options.output, force=options.force)
    for name, value, least in (
        ("--rounds", options.rounds, 1),
        ("--warmup", options.warmup, 0),
        ("--threads", options.threads, 1),
    ):
        if value is not None and value < least:
            raise InputError(name, got=value, expected=f"{least} or more")
    if options.peers is not None:
        _run_peers(options, options.peers)
        return
    for name, given in (
        ("--checkpoint", options.checkpoint),
        ("--peer-python", options.peer_python),
    ):
        if given:
            raise InputError(f"{name} is for --peers", do="add --peers, or leave it out")
    settings = bench_settings(options)
    machine = conditions(settings.provider, threads=settings.threads)
    notes = _notes(machine)
    options.output.mkdir(parents=True, exist_ok=True)
    with _own_cache(options) as environment, _progress(options, _count(settings)) as bar:
        first, runs = measure(settings, environment, lambda name: _advance(bar, name))
    measured = figures(settings, first, runs)
    tables = [*bundle_tables(settings, measured), conditions_table(machine)]
    title = f"{_model(settings)}, {settings.size} px, {settings.steps} steps"
    _write(
        options.output,
        {
            "kind": "bundle",
            "settings": {**_plain(asdict(settings)), "prompt": PROMPT},
            "conditions": machine,
            "notes": notes,
            "figures": asdict(measured),
            "first_start": runs_as_json([first])[0],
            "runs": runs_as_json(runs),
        },
        markdown(title, notes, tables),
        report_page(title, notes, bundle_charts(measured), tables),
    )


def bench_settings(options: BenchOptions) -> BenchSettings:
    """Return what is measured, every default resolved against the bundle.

    Raises:
        InputError: an option that cannot be honoured.
    """
    with Pipeline.load(options.bundle, provider=options.provider, evaluation=True) as pipeline:
        manifest = pipeline.bundle.manifest
        safety = tuple(dict.fromkeys(("off", *options.safety)))
        size = options.size if options.size is not None else manifest.size.width
        for name in safety:  # refused now, not in the middle
            request = Request(
                prompts=(PROMPT,),
                safety=name,
                sampling=Sampling(steps=options.steps),
                width=size,
                height=size,
            )
            run = pipeline.resolve(request)
        batches = tuple(dict.fromkeys(options.batch))
        if min(batches) < 1:
            raise InputError("--batch", got=min(batches), expected="1 or more")
        default = manifest.defaults.safety
        return BenchSettings(
            bundle=options.bundle,
            provider=pipeline.provider,
            size=size,
            steps=run.steps,
            rounds=options.rounds,
            warmup=options.warmup,
            batches=batches,
            safety=safety,
            reference=default if default in safety else safety[-1],
            threads=options.threads,
        )


def _run_peers(options: BenchOptions, peers: Sequence[str]) -> None:
    if options.provider not in ("auto", "cpu"):
        raise InputError("--peers", got=f"--provider {options.provider}", expected="cpu")
    if options.checkpoint is None:
        raise InputError("--peers needs the weights", do="add --checkpoint DIR")
    settings = CompareSettings(
        checkpoint=options.checkpoint,
        bundle=options.bundle,
        folder=options.output,
        peers=tuple(dict.fromkeys(peers)),
        pythons=options.peer_python,
        size=options.size,
        steps=options.steps,
        rounds=options.rounds,
        warmup=options.warmup,
        threads=options.threads if options.threads is not None else os.cpu_count() or 1,
    )
    machine = conditions("cpu", threads=settings.threads)
    notes = _notes(machine)
    with _progress(options, None) as bar:
        comparison = compare_peers(
            settings,
            watch=lambda name: _advance(bar, name),
            expect=lambda count: bar.reset(total=count),
        )
    notes += comparison.notes
    for note in comparison.notes:
        print(f"note: {note}", file=sys.stderr)
    machine["versions"] = {**machine["versions"], **comparison.versions}
    tables = [*comparison.tables, conditions_table(machine)]
    _write(
        options.output,
        {"kind": "peers", "conditions": machine, "notes": notes, **comparison.body},
        markdown(comparison.title, notes, tables),
        report_page(comparison.title, notes, comparison.charts, tables),
    )


def _write(folder: Path, body: Mapping[str, Any], report: str, html: str) -> None:
    whole = {"format": _FORMAT, "format_version": _FORMAT_VERSION, **body}
    text = json.dumps(whole, indent=1, ensure_ascii=False) + "\n"
    for name, data in ((RESULTS, text), (REPORT, report), (PAGE, html)):
        write_whole(folder / name, data.encode())
    print(report)
    for name in (RESULTS, REPORT, PAGE):
        print(folder / name)


def _check_output(folder: Path, *, force: bool) -> None:
    """Refuse a folder that has results, before hours of work."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is not a directory", do="choose another name")
    if (folder / RESULTS).exists() and not force:
        raise OutputError(f"{folder / RESULTS} exists", do="choose another name, or add --force")


@contextmanager
def _own_cache(options: BenchOptions) -> Iterator[dict[str, str]]:
    """Give the processes' environment, with an empty cache that is removed in the end.

    So a first start is one, and the others are not. Where the user keeps no cache, neither is kept.
    """
    environment = {}
    if options.threads is not None:
        environment["SLD_EDGE_THREADS"] = str(options.threads)
    if cache_folder() is None:
        yield environment
        return
    with tempfile.TemporaryDirectory(prefix=".cache-", dir=options.output) as folder:
        yield {**environment, "SLD_EDGE_CACHE": str(Path(folder).resolve())}


@contextmanager
def _progress(options: BenchOptions, total: int | None) -> Iterator[tqdm[Any]]:
    with tqdm(
        total=total, unit="run", disable=options.quiet or None, leave=False, file=sys.stderr
    ) as bar:
        yield bar


def _advance(bar: tqdm[Any], name: str) -> None:
    bar.set_postfix_str(name, refresh=False)
    bar.update()


def _count(settings: BenchSettings) -> int:
    return 1 + len(cells(settings)) * settings.rounds


def _notes(machine: dict[str, Any]) -> list[str]:
    """Warn of a busy machine, now and in the report."""
    warning = busy(machine)
    if warning is None:
        return []
    print(f"note: {warning}", file=sys.stderr)
    return [warning]


def _model(settings: BenchSettings) -> str:
    return settings.bundle.name if settings.bundle is not None else "the miniature"


def _plain(body: Mapping[str, Any]) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in body.items()}


if __name__ == "__main__":
    sys.exit(main())
