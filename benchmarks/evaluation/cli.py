"""`sld-eval`: how safe is a bundle? Prompts in, figures with intervals and a report out."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from sld_edge.benchmarks.evaluation.options import (
    MINIATURE_IMAGES,
    MINIATURE_SUITE_STEPS,
    OFFICIAL_IMAGES,
    EvalOptions,
)
from sld_edge.benchmarks.evaluation.probe import probe_list
from sld_edge.benchmarks.evaluation.prompts import PromptList, chosen, fitted_sizes, read_prompts
from sld_edge.benchmarks.evaluation.rows import Row, read_rows
from sld_edge.benchmarks.evaluation.settings import (
    DEFAULT_SAFETY,
    MINIATURE_SCORERS,
    OFFICIAL_GUIDANCE_SCALE,
    OFFICIAL_STEPS,
    EvalSettings,
    Protocol,
    Setting,
    settings_from_names,
    sweep_settings,
)
from sld_edge.benchmarks.evaluation.suites import suite_list, suites_of_words
from sld_edge.benchmarks.miniworld.prompt_list import PATH as MINIATURE_LIST
from sld_edge.engines.errors import InputError
from sld_edge.runtime.bundle import Bundle
from sld_edge.runtime.commands.arguments import add_options, parsed
from sld_edge.runtime.commands.console import Parser, run_command
from sld_edge.runtime.manifest import Manifest
from sld_edge.runtime.safety import NO_EFFECT_BELOW
from sld_edge.runtime.samplers import sampler_table
from sld_edge.runtime.scorers import Rule, rule_for, rule_from_text, split_paths, text_from_rule

_EXAMPLES = """\
examples:
  sld-eval                                           the miniature model on its own prompts
  sld-eval sd15 --prompts i2p.csv --output results   I2P: plain, medium and guard
  sld-eval sd15 --prompts i2p.csv --category violence hate --sample 100
  sld-eval sd15 --prompts mine.txt --safety off negative medium max --scorer opennsfw
  sld-eval sd15 --prompts mine.txt --safety-concept violence --safety-concept nudity
  sld-eval sd15 --prompts i2p.csv --sweep scale=500,2000 threshold=0.01,0.1
  sld-eval --suite hidden open undo neutral neighbours --safety negative strong max
  sld-eval sd15 --suite i2p=i2p.csv geneval=geneval.jsonl
  sld-eval sd15 --prompts i2p.csv --shard 2/8        one machine of eight; they share --output
  sld-eval sd15 --prompts i2p.csv --ray auto         on a Ray cluster
  sld-eval --compare results other                   two runs in one table

Stopped, it goes on where it was when it is started again. A mistake in what was asked: one line,
exit code 2.
"""


def parser() -> Parser:
    """Return the command line's parser."""
    cli = Parser(
        prog="sld-eval",
        description="Measure how often a bundle shows what it should not, with safety and without.",
        epilog=_EXAMPLES,
    )
    add_options(cli, EvalOptions)
    return cli


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `sld-eval`; return its exit code."""
    return run_command(lambda: _run(parsed(parser(), EvalOptions, arguments)))


def _run(options: EvalOptions) -> None:
    if options.compare is not None:
        from sld_edge.benchmarks.evaluation.report_tables import comparison_table
        from sld_edge.benchmarks.evaluation.results import compare_results

        runs = compare_results(options.compare, force=options.force_compare)
        print(comparison_table(runs).markdown())
        return
    from sld_edge.benchmarks.evaluation.reports import write_results
    from sld_edge.benchmarks.evaluation.run import Work, run

    def say(line: str) -> None:
        if not options.quiet:
            print(line, file=sys.stderr)

    manifest = Bundle.open(options.bundle).manifest
    settings = eval_settings(options, manifest)
    prompts, choice = prompts_from_options(options, manifest)
    for note in prompts.notes:
        say(f"note: {note}")
    shard, shards = _shard(options.shard)
    work = Work(
        folder=options.output,
        shard=shard,
        shards=shards,
        processes=options.processes,
        ray=options.ray,
        quiet=options.quiet,
    )
    complete = run(settings, prompts, work, choice=choice, say=say)
    rows = read_rows(options.output)
    for line in _without_effect(settings, rows):
        print(f"warning: {line}", file=sys.stderr)
    if not complete:
        say(f"shard {shard} of {shards} is done; the last one to end writes the report")
        return
    write_results(options.output, say=print)


def _without_effect(settings: EvalSettings, rows: Sequence[Row]) -> Iterator[str]:
    """Say which settings left pictures on which safety had no effect; also with --quiet."""
    for setting in settings.settings:
        acting = [row for row in rows if row.setting == setting.name and setting.edits]
        without = sum(max(row.strength) < NO_EFFECT_BELOW for row in acting)
        if without:
            yield f"{setting.name}: safety had no effect on {without} of {len(acting)} pictures"


def eval_settings(options: EvalOptions, manifest: Manifest) -> EvalSettings:
    """Return a run's settings, every default resolved against the bundle.

    Raises:
        InputError: an option that cannot be honoured.
    """
    protocol = _protocol(options)
    official = protocol == "official"
    defaults = manifest.defaults
    steps = options.steps
    if steps is None and options.suite is not None and options.bundle is None:
        steps = MINIATURE_SUITE_STEPS
    if steps is None:
        steps = OFFICIAL_STEPS if official else defaults.steps
    sampler = options.sampler if options.sampler is not None else defaults.sampler
    words = options.scorer
    if words is None:
        words = MINIATURE_SCORERS if options.bundle is None else ("opennsfw",)
    scorers, paths = split_paths(words)
    images = options.images_per_prompt
    if images is None:
        miniature = options.bundle is None and options.prompts is None and options.probe is None
        images = MINIATURE_IMAGES if miniature else OFFICIAL_IMAGES
        images = images if options.suite is None else 1
    settings = _compared(options, manifest, steps, sampler)
    if options.safety_concept and not any(s.uses_concept or s.negative_prompt for s in settings):
        raise InputError(
            "--safety-concept does nothing with safety off", do="add a preset to --safety"
        )
    if options.text_filter and not any(setting.filters for setting in settings):
        raise InputError(
            "--text-filter does nothing with these settings", do="add guard to --safety"
        )
    return EvalSettings(
        bundle=options.bundle,
        provider=options.provider,
        device=options.device,
        cpu_precision=options.cpu_precision,
        settings=settings,
        concepts=tuple(dict.fromkeys(options.safety_concept)),
        text_filter=options.text_filter,
        scorers=scorers,
        scorer_paths=paths,
        rule=_rule(options, scorers if options.scorer is not None else scorers[:1]),
        images_per_prompt=images,
        guidance_scale=OFFICIAL_GUIDANCE_SCALE if official else defaults.guidance_scale,
        steps=steps,
        sampler=sampler,
        cache_interval=options.cache_interval,
        protocol=protocol,
        images=options.images,
        batch_size=options.batch_size,
    )


def prompts_from_options(
    options: EvalOptions, manifest: Manifest
) -> tuple[PromptList, dict[str, Any]]:
    """Return the prompts of a run, and how they were chosen.

    Raises:
        InputError: no list, one that cannot be read, or nothing left of it.
    """
    listed = _listed(options)
    picked = chosen(
        listed.prompts,
        categories=options.category,
        hard=options.hard,
        sample=options.sample,
        sample_seed=options.sample_seed,
    )
    notes = listed.notes
    if _protocol(options) == "per-prompt":
        multiple = manifest.latents.downscale
        picked, changed = fitted_sizes(picked, multiple=multiple, strict=options.strict_sizes)
        if changed:
            notes += (f"the sizes of {changed} prompts are rounded to multiples of {multiple}",)
    choice = {
        "category": tuple(dict.fromkeys(options.category)),
        "hard": options.hard,
        "sample": options.sample,
        "sample_seed": options.sample_seed if options.sample is not None else None,
    }
    if options.suite is not None:
        choice["suites"] = suites_of_words(options.suite)
    return replace(listed, prompts=picked, notes=notes), choice


def _protocol(options: EvalOptions) -> Protocol:
    """Suites have seeds of their own, so they are made by their lists."""
    if options.protocol is not None:
        return options.protocol
    return "official" if options.suite is None else "per-prompt"


def _listed(options: EvalOptions) -> PromptList:
    if options.suite is not None:
        for name, value in (("--prompts", options.prompts), ("--probe", options.probe)):
            if value is not None:
                raise InputError("--suite", got=f"{name} too", do="give one of them")
        return suite_list(options.suite, miniature=options.bundle is None)
    if options.probe is not None:
        if options.prompts is not None:
            raise InputError("--probe", got="--prompts too", do="give one of them")
        return probe_list(options.probe)
    if options.prompts is not None:
        return read_prompts(options.prompts)
    if options.bundle is not None:
        raise InputError(
            "no prompts given", do="add --prompts FILE, --suite NAME=FILE, or --probe countries"
        )
    return read_prompts(MINIATURE_LIST)


def _compared(
    options: EvalOptions, manifest: Manifest, steps: int, sampler: str
) -> tuple[Setting, ...]:
    """Settings by name, then the sweep's."""
    names = options.safety
    if names is None:
        names = ("off",) if options.sweep else DEFAULT_SAFETY
    scheduler = {**manifest.scheduler, "prediction_type": manifest.prediction_type}
    calls = sampler_table(sampler, scheduler, steps).calls
    settings = (*settings_from_names(names), *sweep_settings(options.sweep, calls=calls))
    return tuple(dict.fromkeys(settings))


def _rule(options: EvalOptions, scorers: Sequence[str]) -> Rule:
    if options.rule is None:
        return rule_for(scorers)
    rule = rule_from_text(options.rule)
    for condition in rule:
        if condition.sign == "<=" and condition.score.startswith("activation."):
            raise InputError(
                "--rule: without safety there is no activation, so every plain picture would be "
                "flagged",
                got=repr(text_from_rule((condition,))),
                do="flag by high activation, or by another score",
            )
    return rule


def _shard(text: str) -> tuple[int, int]:
    shard, slash, shards = text.partition("/")
    if not (slash and shard.isdecimal() and shards.isdecimal()):
        raise InputError("--shard", got=repr(text), expected="I/N, as 2/8")
    return int(shard), int(shards)


if __name__ == "__main__":
    sys.exit(main())
