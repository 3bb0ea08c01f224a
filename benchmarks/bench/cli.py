"""`sld-bench`: how fast is a bundle, how much memory does it take, and what does safety cost?"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from sld_edge.benchmarks.bench.comparison import compare_peers
from sld_edge.benchmarks.bench.few_steps import measure_few_steps
from sld_edge.benchmarks.bench.figures import figures
from sld_edge.benchmarks.bench.options import BenchOptions
from sld_edge.benchmarks.bench.report import RESULTS, Report, bundle_report, write_report
from sld_edge.benchmarks.bench.runs import PROMPT, BenchSettings, cells, measure
from sld_edge.engines.errors import InputError, OutputError
from sld_edge.engines.providers import ON_HOST
from sld_edge.engines.settings import cache_folder
from sld_edge.runtime.commands.arguments import add_options, parsed
from sld_edge.runtime.commands.console import Parser, run_command
from sld_edge.runtime.conditions import busy, conditions
from sld_edge.runtime.pipeline import Pipeline
from sld_edge.runtime.request import Request, Sampling

_EXAMPLES = """\
examples:
  sld-bench                                        the miniature model, in about two minutes
  sld-bench sd15 --steps 10 --rounds 3             a bundle, on the best provider here
  sld-bench sd15 --provider cpu --size 256 --safety off max --batch 1
  sld-bench --peers --checkpoint sd15-diffusers    beside every peer that is installed
  sld-bench sd15 --peers diffusers openvino --checkpoint sd15-diffusers --size 256 --steps 3
  sld-bench --few-steps                            few steps and safety: speed, unsafe rate
  sld-bench --peers optimum --peer-python optimum=venv/bin/python --checkpoint sd15-diffusers

Every measured run is a process of its own. Raw samples are kept in results.json. A mistake in what
was asked: one line, exit code 2.
"""


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
    _check(options)
    of_a_bundle = options.peers is None and not options.few_steps
    settings = bench_settings(options) if of_a_bundle else None
    machine = conditions(settings.provider if settings else "cpu", threads=options.threads)
    warning = busy(machine)
    if warning is not None:
        print(f"note: {warning}", file=sys.stderr)
    report = _measured(options, settings)
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    notes = [*([warning] if warning is not None else []), *report.notes]
    write_report(replace(report, notes=notes), options.output, machine)


def _measured(options: BenchOptions, settings: BenchSettings | None) -> Report:
    """Measure what was asked for; `settings` are a bundle's."""
    if options.few_steps:
        return measure_few_steps(options, say=lambda line: print(line, file=sys.stderr))
    progress = tqdm(unit="run", disable=options.quiet or None, leave=False, file=sys.stderr)
    with progress as bar:

        def watch(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        if settings is not None:
            bar.reset(total=1 + len(cells(settings)) * settings.rounds)
            options.output.mkdir(parents=True, exist_ok=True)
            with _own_cache(options) as environment:
                first, runs = measure(settings, environment, watch)
            measured = figures(settings, first, runs)
            return bundle_report(settings, measured, first, runs)
        return compare_peers(options, watch=watch, expect=lambda n: bar.reset(total=n))


def _check(options: BenchOptions) -> None:
    """Refuse wrong options, and a folder that has results, before hours of work."""
    folder = options.output
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is not a directory", do="choose another name")
    if (folder / RESULTS).exists() and not options.force:
        raise OutputError(f"{folder / RESULTS} exists", do="choose another name, or add --force")
    for name, value, least in (
        ("--rounds", options.rounds, 1),
        ("--warmup", options.warmup, 0),
        ("--threads", options.threads, 1),
    ):
        if value is not None and value < least:
            raise InputError(name, got=value, expected=f"{least} or more")
    if options.few_steps and (options.peers is not None or options.bundle is not None):
        other = "--peers" if options.peers is not None else str(options.bundle)
        raise InputError(
            "--few-steps", got=f"{other} too", expected="nothing more: it has its own models"
        )
    if options.peers is None:
        for name, given in (
            ("--checkpoint", options.checkpoint),
            ("--peer-python", options.peer_python),
        ):
            if given:
                raise InputError(f"{name} is for --peers", do="add --peers, or leave it out")
    elif options.provider not in ("auto", *ON_HOST):
        expected = ", ".join(ON_HOST)
        raise InputError("--peers", got=f"--provider {options.provider}", expected=expected)


def bench_settings(options: BenchOptions) -> BenchSettings:
    """Return the settings of a measurement, every default resolved against the bundle.

    Raises:
        InputError: an option that cannot be honoured.
    """
    with Pipeline.load(
        options.bundle,
        provider=options.provider,
        device=options.device,
        cpu_precision=options.cpu_precision,
        evaluation=True,
    ) as pipeline:
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
        if min(options.batch) < 1:
            raise InputError("--batch", got=min(options.batch), expected="1 or more")
        default = manifest.defaults.safety
        return BenchSettings(
            bundle=options.bundle,
            provider=pipeline.provider,
            device=options.device,
            cpu_precision=options.cpu_precision,
            size=size,
            steps=run.steps,
            rounds=options.rounds,
            warmup=options.warmup,
            batches=tuple(dict.fromkeys(options.batch)),
            safety=safety,
            reference=default if default in safety else safety[-1],
            threads=options.threads,
        )


@contextmanager
def _own_cache(options: BenchOptions) -> Iterator[dict[str, str]]:
    """Give the processes' environment, with an empty cache that is removed at the end.

    The first start then finds nothing prepared, and later starts do. Where the user keeps no
    cache, the processes keep none either.
    """
    environment = {}
    if options.threads is not None:
        environment["SLD_EDGE_THREADS"] = str(options.threads)
    if cache_folder() is None:
        yield environment
        return
    with tempfile.TemporaryDirectory(prefix=".cache-", dir=options.output) as folder:
        yield {**environment, "SLD_EDGE_CACHE": str(Path(folder).resolve())}


if __name__ == "__main__":
    sys.exit(main())
