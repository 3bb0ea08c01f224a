"""`sld-eval`: how safe is a bundle? Prompts in, figures with intervals and a report out."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sld_edge.benchmarks.evaluation.prompts import (
    EvalPrompt,
    PromptList,
    chosen,
    fitted_sizes,
    read_prompts,
)
from sld_edge.benchmarks.evaluation.rows import Row, read_rows, require_parquet, write_parquet
from sld_edge.benchmarks.evaluation.settings import (
    DEFAULT_SAFETY,
    OFFICIAL_GUIDANCE_SCALE,
    OFFICIAL_STEPS,
    EvalSettings,
    Images,
    Protocol,
    Setting,
    settings_from_names,
    sweep_settings,
)
from sld_edge.benchmarks.miniworld.prompt_list import PATH as MINIATURE_LIST
from sld_edge.engines.errors import InputError
from sld_edge.runtime.bundle import Bundle
from sld_edge.runtime.commands.arguments import add_options, flag, option, parsed
from sld_edge.runtime.commands.console import Parser, run_command
from sld_edge.runtime.commands.options import (
    batch_size_option,
    cache_interval_option,
    concepts_option,
    provider_option,
    quiet_option,
    sampler_option,
    steps_option,
)
from sld_edge.runtime.manifest import Manifest
from sld_edge.runtime.safety import NO_EFFECT_BELOW, PRESETS
from sld_edge.runtime.samplers import sampler_table
from sld_edge.runtime.scorers import NAMES as SCORERS
from sld_edge.runtime.scorers import (
    Rule,
    rule_for,
    rule_from_text,
    split_paths,
    text_from_rule,
)

PARQUET = "rows.parquet"
_OFFICIAL_IMAGES, _MINIATURE_IMAGES = 10, 2  # a prompt; the latter in minutes on two cores

_EXAMPLES = """\
examples:
  sld-eval                                           the miniature model on its own prompts
  sld-eval sd15 --prompts i2p.csv --output results   I2P: plain, medium and strong
  sld-eval sd15 --prompts i2p.csv --category violence hate --sample 100
  sld-eval sd15 --prompts mine.txt --safety off negative medium max --scorer opennsfw
  sld-eval sd15 --prompts mine.txt --safety-concept violence --safety-concept nudity
  sld-eval sd15 --prompts i2p.csv --sweep scale=500,2000 threshold=0.01,0.1
  sld-eval sd15 --prompts i2p.csv --shard 2/8        one machine of eight; they share --output
  sld-eval sd15 --prompts i2p.csv --ray auto         on a Ray cluster
  sld-eval --compare results other                   two runs in one table

Stopped, it goes on where it was when it is started again. A mistake in what was asked: one line,
exit code 2.
"""


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What `sld-eval` was asked for, typed."""

    bundle: Path | None = option(
        "made by sld-export; without it, the miniature model that ships with the package",
        "BUNDLE",
        positional=True,
        nargs="?",
    )
    output: Path = option(
        "folder of the results, new or this run's own", "DIR", default=Path("sld-eval-results")
    )

    prompts: Path | None = option(
        "I2P's CSV or any with a column prompt, JSON lines, or text with a prompt a line (default "
        "for the miniature model: its world's own list)",
        "FILE",
        group="prompts",
    )
    probe: str | None = option(
        "a built-in list: countries (“<country> body”, for bias) or scenes (the miniature world's)"
    )
    category: tuple[str, ...] = option("only prompts of these categories", default=())
    hard: bool = flag("only prompts marked hard")
    sample: int | None = option("only N prompts, drawn at random")
    sample_seed: int = option("seed of the sample", "S", default=0)
    protocol: Protocol = option(
        "official: every prompt with the bundle's size, 50 steps, guidance 7.5 and our seeds; "
        "per-prompt: the sizes, guidance scales and seeds of the list",
        default="official",
    )
    strict_sizes: bool = flag(
        "refuse sizes that the bundle cannot make; without it they are rounded"
    )

    safety: tuple[str, ...] | None = option(
        f"{', '.join(PRESETS)}, negative (the concept as negative prompt); off is always among "
        f"them (default: {' '.join(DEFAULT_SAFETY)})",
        group="what is compared",
    )
    safety_concept: tuple[str, ...] = concepts_option()
    sweep: tuple[str, ...] = option(
        "every combination of numbers: scale, threshold, warmup, momentum, beta; a number not "
        "named is that of the preset medium",
        "NAME=A,B",
        default=(),
    )
    images_per_prompt: int | None = option(
        f"pictures of each prompt with each setting (default: {_OFFICIAL_IMAGES}; "
        f"{_MINIATURE_IMAGES} with the miniature world's list)"
    )
    steps: int | None = steps_option()
    sampler: str | None = sampler_option()
    cache_interval: int = cache_interval_option()

    scorer: tuple[str, ...] | None = option(
        f"{', '.join(SCORERS)}; with its model's folder as q16=DIR, see docs/scorers.md (default: "
        "opennsfw; miniworld for the miniature model)",
        group="how it is judged",
    )
    rule: str | None = option(
        'when a picture is flagged, as "nudenet.exposed>=0.6 or q16.inappropriate>=0.5"; <= where '
        "low numbers are unsafe (default: each scorer's own)",
        "RULE",
    )
    images: Images = option(
        "keep, discard, or blur: flagged pictures are blurred, and never written sharp",
        "HOW",
        default="blur",
    )
    parquet: bool = flag(f"write {PARQUET} too (extra: eval)")

    provider: str = provider_option("machine")
    batch_size: int | None = batch_size_option()
    processes: int | None = option(
        "processes that make pictures (default: one a core for small models on the CPU, else one)"
    )
    shard: str = option(
        "make part I of N of the prompts; processes and machines with different parts share the "
        "folder --output",
        "I/N",
        default="1/1",
    )
    ray: str | None = option(
        "work on a Ray cluster: its address, auto, or local to start one here", "ADDRESS"
    )
    quiet: bool = quiet_option()

    compare: tuple[Path, ...] | None = option(
        "print finished runs in one table", "DIR", group="runs side by side"
    )
    force_compare: bool = flag(
        "compare runs even if their detectors, rule, prompts or protocol differ"
    )


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
        _compare(options.compare, force=options.force_compare)
        return
    from sld_edge.benchmarks.evaluation.run import Work, run
    from sld_edge.benchmarks.evaluation.write import write_results

    if options.parquet:  # now, not after hours
        require_parquet()

    def say(line: str) -> None:
        if not options.quiet:
            print(line, file=sys.stderr)

    manifest = Bundle.open(options.bundle).manifest
    settings = eval_settings(options, manifest)
    prompts, choice = prompts_from_options(options, manifest)
    for note in prompts.notes:
        say(f"note: {note}")
    shard, shards = _shard(options.shard)
    complete = run(
        settings,
        prompts,
        Work(
            folder=options.output,
            shard=shard,
            shards=shards,
            processes=options.processes,
            ray=options.ray,
            quiet=options.quiet,
        ),
        choice=choice,
        say=say,
    )
    for line in _without_effect(settings, read_rows(options.output)):
        print(f"warning: {line}", file=sys.stderr)
    if complete:
        write_results(options.output, say=print)
        if options.parquet:
            write_parquet(read_rows(options.output), options.output / PARQUET)
            print(options.output / PARQUET)
    else:
        say(f"shard {shard} of {shards} is done; the last one to end writes the report")


def _without_effect(settings: EvalSettings, rows: Sequence[Row]) -> Iterator[str]:
    """Say which settings left pictures on which safety had no effect; also with --quiet."""
    for setting in settings.settings:
        acting = [row for row in rows if row.setting == setting.name and setting.acts]
        without = sum(max(row.strength) < NO_EFFECT_BELOW for row in acting)
        if without:
            yield f"{setting.name}: safety had no effect on {without} of {len(acting)} pictures"


def eval_settings(options: EvalOptions, manifest: Manifest) -> EvalSettings:
    """Return a run's settings, every default resolved against the bundle.

    Raises:
        InputError: an option that cannot be honoured.
    """
    official = options.protocol == "official"
    steps = options.steps
    if steps is None:
        steps = OFFICIAL_STEPS if official else manifest.defaults.steps
    sampler = options.sampler if options.sampler is not None else manifest.defaults.sampler
    scorers, paths = split_paths(
        options.scorer if options.scorer is not None else [_scorer(options)]
    )
    images = options.images_per_prompt
    if images is None:
        images = _MINIATURE_IMAGES if _is_miniature(options) else _OFFICIAL_IMAGES
    settings = _compared(options, manifest, steps, sampler)
    if options.safety_concept and not any(s.acts or s.negative_prompt for s in settings):
        raise InputError(
            "--safety-concept does nothing with safety off", do="add a preset to --safety"
        )
    return EvalSettings(
        bundle=options.bundle,
        provider=options.provider,
        settings=settings,
        concepts=_unique(options.safety_concept),
        scorers=scorers,
        scorer_paths=paths,
        rule=_rule(options, scorers),
        images_per_prompt=images,
        guidance_scale=OFFICIAL_GUIDANCE_SCALE if official else manifest.defaults.guidance_scale,
        steps=steps,
        sampler=sampler,
        cache_interval=options.cache_interval,
        protocol=options.protocol,
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
    choice: Mapping[str, Any] = {
        "category": _unique(options.category),
        "hard": options.hard,
        "sample": options.sample,
        "sample_seed": options.sample_seed if options.sample is not None else None,
    }
    picked = chosen(
        listed.prompts,
        categories=options.category,
        hard=options.hard,
        sample=options.sample,
        sample_seed=options.sample_seed,
    )
    notes = list(listed.notes)
    if options.protocol == "per-prompt":
        multiple = manifest.latents.downscale
        picked, changed = fitted_sizes(picked, multiple=multiple, strict=options.strict_sizes)
        if changed:
            notes.append(f"the sizes of {changed} prompts are rounded to multiples of {multiple}")
    return replace(listed, prompts=picked, notes=tuple(notes)), dict(choice)


def _listed(options: EvalOptions) -> PromptList:
    if options.probe is not None:
        if options.prompts is not None:
            raise InputError("--probe", got="--prompts too", do="give one of them")
        from sld_edge.benchmarks.evaluation.probe import probe_prompts

        return list_from_prompts(probe_prompts(options.probe), source=f"probe {options.probe}")
    if options.prompts is not None:
        return read_prompts(options.prompts)
    if options.bundle is not None:
        raise InputError("no prompts given", do="add --prompts FILE, or --probe countries")
    return read_prompts(MINIATURE_LIST)


def list_from_prompts(prompts: Sequence[EvalPrompt], *, source: str) -> PromptList:
    """Return prompts that no file holds as a list, with a hash of their own."""
    text = json.dumps([asdict(prompt) for prompt in prompts], ensure_ascii=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return PromptList(prompts=tuple(prompts), sha256=digest, source=source)


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


def _compare(folders: Sequence[Path], *, force: bool) -> None:
    from sld_edge.benchmarks.evaluation.report_tables import comparison_table
    from sld_edge.benchmarks.evaluation.results import compare_results

    print(comparison_table(compare_results(folders, force=force)).markdown())


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


def _scorer(options: EvalOptions) -> str:
    return "miniworld" if options.bundle is None else "opennsfw"


def _is_miniature(options: EvalOptions) -> bool:
    return options.bundle is None and options.prompts is None and options.probe is None


def _shard(text: str) -> tuple[int, int]:
    shard, slash, shards = text.partition("/")
    if not (slash and shard.isdecimal() and shards.isdecimal()):
        raise InputError("--shard", got=repr(text), expected="I/N, as 2/8")
    return int(shard), int(shards)


def _unique(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


if __name__ == "__main__":
    sys.exit(main())
