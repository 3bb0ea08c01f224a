"""An attack: prompts for which a safety setting still shows pictures that the scorers flag.

    python -m sld_edge.benchmarks.evaluation.attack --safety max --output max.jsonl

The search (`prompt_search`) sees nothing of the setting but pictures' scores. The best prompts are
judged by pictures of seeds that the search never used.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from operator import methodcaller
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sld_edge.benchmarks.evaluation.evaluator import Evaluator, Task, threads
from sld_edge.benchmarks.evaluation.prompt_search import (
    Picture,
    Search,
    SearchSettings,
    Vocabulary,
)
from sld_edge.benchmarks.evaluation.prompts import EvalPrompt, read_prompts
from sld_edge.benchmarks.evaluation.run import is_small
from sld_edge.benchmarks.evaluation.settings import EvalSettings, Setting, settings_from_names
from sld_edge.benchmarks.evaluation.statistics import wilson
from sld_edge.benchmarks.evaluation.workers import (
    answer_of_evaluator,
    outcomes_from_answer,
    process_pool,
)
from sld_edge.benchmarks.tables import Table
from sld_edge.engines.errors import InputError
from sld_edge.engines.files import check_writable, write_whole
from sld_edge.engines.providers import ON_HOST
from sld_edge.runtime.commands.arguments import REQUIRED, add_options, flag, option, parsed
from sld_edge.runtime.commands.console import Parser, run_command
from sld_edge.runtime.commands.options import provider_option, quiet_option
from sld_edge.runtime.pipeline import Pipeline
from sld_edge.runtime.safety import PRESETS
from sld_edge.runtime.scorers import NAMES as SCORERS
from sld_edge.runtime.scorers import Rule, Scores, rule_for, split_paths

_EXAMPLES = """\
examples:
  python -m sld_edge.benchmarks.evaluation.attack --safety max --output max.jsonl
  python -m sld_edge.benchmarks.evaluation.attack --safety strong --start max.jsonl --output s.jsonl

sld-eval reads the output as a prompt list.
"""
_FRESH = 3_000_000_000  # first seed of the final pictures; all seeds of searches are below
_MOST_SEED = 20_000  # of a search, which has 100,000 seeds of pictures of its own

Score = Callable[[Sequence[Task], int], list[tuple[Scores, int]]]
"""Scores and UNet calls of each task's picture, made with so many steps."""


@dataclass(frozen=True, kw_only=True)
class AttackOptions:
    """What the command was asked for, typed."""

    safety: str = option(
        f"the setting under attack: {', '.join(PRESETS)}, negative (the concept as negative "
        "prompt)",
        default=REQUIRED,
    )
    output: Path = option("prompts that were found, as JSON lines", "FILE.jsonl", default=REQUIRED)
    force: bool = flag("overwrite an existing file")
    minutes: float = option("time of the search; the last pictures come after it", default=10.0)
    seed: int = option("seed of everything that is drawn at random", "S", default=1)
    bundle: Path | None = option("made by sld-export (default: the miniature model)", "DIR")
    start: tuple[Path, ...] = option(
        "prompt lists to begin with, like the outputs of other searches", "FILE", default=()
    )
    scorer: tuple[str, ...] | None = option(
        f"{', '.join(SCORERS)} (default: opennsfw; miniworld for the miniature model)"
    )
    provider: str = provider_option("machine")
    quiet: bool = quiet_option()


@dataclass(frozen=True, kw_only=True)
class Found:
    """A prompt of the final: `flagged` of `pictures` pictures with fresh seeds are flagged."""

    text: str
    flagged: int
    pictures: int


class Judge:
    """Makes and scores pictures, a group at a time, until its budget is spent; counts them.

    Attributes:
        pictures: number of pictures so far.
        calls: number of UNet calls so far.
    """

    def __init__(self, score: Score, rule: Rule, *, group: int) -> None:
        self.pictures = self.calls = 0
        self._score, self._rule, self._group = score, rule, group
        self.limit()

    def limit(self, *, minutes: float | None = None, pictures: int | None = None) -> None:
        """Set the budget: time from now on, and pictures in all; None is no limit."""
        self._end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._most = math.inf if pictures is None else pictures

    @property
    def spent(self) -> bool:
        """Whether the budget lets no more pictures be made."""
        return self.pictures >= self._most or time.monotonic() >= self._end

    def __call__(self, pictures: Sequence[Picture], steps: int) -> list[float]:
        """Return how far each picture's scores are above the rule's thresholds; 0 is flagged."""
        margins: list[float] = []
        while len(margins) < len(pictures) and not self.spent:
            count = int(min(self._group, self._most - self.pictures))
            tasks = [
                Task(prompt=EvalPrompt(index=0, text=text, seed=seed), image=0, missing=())
                for text, seed in pictures[len(margins) :][:count]
            ]
            for scores, calls in self._score(tasks, steps):
                self.pictures += 1
                self.calls += calls
                margins.append(_margin(scores, self._rule))
        return margins


def attack(
    settings: EvalSettings,
    setting: Setting,
    sizes: SearchSettings,
    *,
    start: Sequence[str] = (),
    minutes: float | None = None,
    pictures: int | None = None,
    processes: int | None = None,
    say: Callable[[str], None],
) -> tuple[list[Found], Judge]:
    """Search for `minutes`, or for a number of pictures; return the best prompts, best first.

    The prompts depend on the budget and `sizes` alone, not on the number of processes.

    Raises:
        InputError: the budget ended before the first picture.
        UserError: a picture cannot be made, or a scorer cannot judge it.
    """
    with Pipeline.load(settings.bundle, provider=settings.provider, evaluation=True) as pipeline:
        small = pipeline.provider in ON_HOST and is_small(pipeline)
        if processes is None:
            processes = (os.cpu_count() or 1) if small else 1

        def embed(text: str) -> NDArray[np.float32]:
            arrays = pipeline.encode_text(text)
            return np.concatenate([arrays[name].ravel() for name in sorted(arrays)])

        with threads(1 if small else None), _scoring(settings, setting, processes) as score:
            judge = Judge(score, settings.rule, group=8 * processes)
            judge.limit(minutes=minutes, pictures=pictures)
            search = Search(Vocabulary(pipeline.bundle), judge, embed, sizes)
            search.begin(pipeline.bundle.manifest.safety_concepts, start)
            while not judge.spent:
                search.round()
                for best in search.best(1):
                    say(f"{judge.pictures} pictures: {best.text!r}, {best.mean:+.2f}")
            if not search.candidates:
                raise InputError("the search had no time for a picture", do="raise --minutes")
            judge.limit()
            return _final(search, judge, sizes), judge


def _final(search: Search, judge: Judge, sizes: SearchSettings) -> list[Found]:
    """Return the best prompts; no picture that chose a prompt is among those that judge it."""
    count, pictures = sizes.semifinal
    search.add_full(search.best(count), pictures)
    count, pictures = sizes.final
    found = []
    for candidate in search.best(count):
        fresh = [(candidate.text, _FRESH + seed) for seed in range(pictures)]
        hits = sum(margin >= 0 for margin in judge(fresh, sizes.steps))
        found.append(Found(text=candidate.text, flagged=hits, pictures=len(fresh)))
    return sorted(found, key=lambda one: one.flagged, reverse=True)


@contextmanager
def _scoring(settings: EvalSettings, setting: Setting, processes: int) -> Iterator[Score]:
    """Give a function that makes and scores pictures here, or in processes."""
    if processes == 1:
        with closing(Evaluator(settings)) as evaluator:
            yield lambda tasks, steps: evaluator.score(setting, tasks, steps=steps)
        return
    with process_pool(processes, do="start again; other programs may need less memory") as pool:

        def score(tasks: Sequence[Task], steps: int) -> list[tuple[Scores, int]]:
            works = [methodcaller("score", setting, [task], steps=steps) for task in tasks]
            answers = pool.map(partial(answer_of_evaluator, settings), works)
            return [scored for answer in answers for scored in outcomes_from_answer(answer)]

        yield score


def _margin(scores: Scores, rule: Rule) -> float:
    """Return how far scores are beyond the threshold of the rule's condition that holds most."""
    return max(
        (1 if condition.sign == ">=" else -1) * (scores[condition.score] - condition.threshold)
        for condition in rule
    )


def parser() -> Parser:
    """Return the command line's parser."""
    cli = Parser(
        prog="attack",
        description="Search for prompts that get around a safety setting.",
        epilog=_EXAMPLES,
    )
    add_options(cli, AttackOptions)
    return cli


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the attack; return its exit code."""
    return run_command(lambda: _run(parsed(parser(), AttackOptions, arguments)))


def _run(options: AttackOptions) -> None:
    if not 0 < options.minutes < math.inf:
        raise InputError("--minutes", got=options.minutes, expected="a number above 0")
    if not 0 <= options.seed <= _MOST_SEED:
        raise InputError("--seed", got=options.seed, expected=f"from 0 to {_MOST_SEED}")
    check_writable(options.output, force=options.force)
    *_, setting = settings_from_names([options.safety])
    start = [prompt.text for path in options.start for prompt in read_prompts(path).prompts]
    default = ("miniworld",) if options.bundle is None else ("opennsfw",)
    scorers, paths = split_paths(options.scorer if options.scorer is not None else default)
    settings = EvalSettings(
        bundle=options.bundle,
        provider=options.provider,
        settings=(setting,),
        scorers=scorers,
        scorer_paths=paths,
        rule=rule_for(scorers),
        protocol="per-prompt",  # each task names its seed
    )

    def say(line: str) -> None:
        if not options.quiet:
            print(line, file=sys.stderr)

    sizes = SearchSettings(seed=options.seed)
    found, judge = attack(settings, setting, sizes, start=start, minutes=options.minutes, say=say)
    write_whole(options.output, _lines(found, options, judge).encode())
    note = f"{judge.pictures} pictures, {judge.calls} UNet calls."
    print(_table(found, options.safety, note).markdown())


def _lines(found: Sequence[Found], options: AttackOptions, judge: Judge) -> str:
    """Return prompts as JSON lines."""
    lines = [
        {
            "prompt": one.text,
            "categories": ["adversarial", f"adversarial: {options.safety}"],
            "found_against": options.safety,
            "flagged": one.flagged,
            "pictures": one.pictures,
            "search_seed": options.seed,
            "search_pictures": judge.pictures,
            "search_calls": judge.calls,
        }
        for one in found
    ]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _table(found: Sequence[Found], safety: str, note: str) -> Table:
    rows = []
    for one in found:
        low, high = (f"{100 * share:.0f}" for share in wilson(one.flagged, one.pictures))
        flagged = f"{one.flagged} of {one.pictures}"
        rows.append({"prompt": one.text, "flagged": flagged, "95 % interval": f"{low} to {high} %"})
    return Table(title=f"Prompts found against {safety}", rows=rows, note=note)


if __name__ == "__main__":
    sys.exit(main())
