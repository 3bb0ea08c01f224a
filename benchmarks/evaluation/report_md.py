"""report.md: the figures as Markdown tables, with the paper's beside ours where comparable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sld_edge.benchmarks.evaluation.probe import Bar, is_probe, probe_bars
from sld_edge.benchmarks.evaluation.published import Published
from sld_edge.benchmarks.evaluation.results import Results, Summary
from sld_edge.benchmarks.evaluation.statistics import Estimate
from sld_edge.engines.errors import InputError
from sld_edge.runtime.scorers import rule_from_text


def markdown_report(results: Results) -> str:
    """Return the whole report."""
    first = results.settings[0].overall
    parts = [
        f"# How safe is {escaped(results.model)}?",
        f"{first.prompts} prompts, {len(results.rows)} pictures. A picture is flagged when "
        f"{escaped(results.rule)}. Intervals are 95 %, over prompts.",
        *(f"**{escaped(note)}**" for note in results.notes),
        "## In short",
        short_table(results),
        "## Overall",
        overall_table(results),
        *_by_category(results),
        *_published(results),
        *(("## Against which concept", concept_table(results)) if concepts(results) else ()),
        *(("## Scores", score_table(results)) if _scored(results) else ()),
        "## What the columns mean",
        _MEANING,
    ]
    return "\n\n".join(parts) + "\n"


_MEANING = """\
- flagged: share of pictures that the rule flags (the paper's inappropriate probability).
- expected maximum: the highest percentage of flagged pictures among 25 prompts drawn at random, mean ± standard deviation of 10,000 draws.
- difference to plain: on the same prompts and seeds; p by the exact McNemar test, picture by picture.
- against which concept: mean strength of each concept's own edit, and in how many of the pictures it was the strongest.
- adherence: share of pictures that show what was asked for or, without a judge of it, CLIP's score.
- pixel change: mean difference to plain's picture of the same prompt and seed, 0 to 1.
- Pareto: no other setting is both flagged less and more adherent."""  # noqa: E501  a list item is a line


_PROBE = (
    "No prompt asks for anything unsafe: what differs from word to word is what the model "
    "associates with it. Intervals of this table are Wilson's, over pictures."
)


def short_table(results: Results) -> str:
    """Return a short table for a README, a row a setting.

    Columns that no setting fills are left out.
    """
    first = results.settings[0]
    lines = []
    for setting in results.settings:
        overall = setting.overall
        lines.append(
            {
                "setting": escaped(setting.name),
                "unsafe, all prompts": f"**{percent(overall.flagged)}**",
                "unsafe, hard prompts": ""
                if setting.hard is None
                else f"**{percent(setting.hard.flagged)}**",
                "adherence": _gain(overall),
                "pixel change": ""
                if overall.change is None or setting is first
                else number(overall.change),
                "p": "" if overall.p is None else p_value(overall.p),
            }
        )
    header = [name for name in lines[0] if any(line[name] for line in lines)]
    legend = f"{first.overall.prompts} prompts, {first.overall.pictures} pictures a setting"
    if first.hard is not None:
        legend += f"; hard prompts, as the list marks them: {first.hard.prompts}"
    return (
        markdown_table(header, [[line[name] for name in header] for line in lines])
        + f"\n\n{legend}. Intervals are 95 %, over prompts; p is the exact McNemar test's, all "
        "prompts, against the first row."
    )


def overall_table(results: Results) -> str:
    """Return all of the overall figures, a row a setting."""
    header = [
        "setting",
        "flagged",
        "expected maximum",
        "difference to plain",
        "p",
        "adherence",
        "pixel change",
        "seconds a picture",
        "Pareto",
    ]
    lines = []
    for setting in results.settings:
        overall = setting.overall
        maximum = overall.expected_maximum
        lines.append(
            [
                escaped(setting.name),
                f"**{percent(overall.flagged)}**",
                f"{maximum.mean:.1f} ± {maximum.deviation:.1f}",
                "" if overall.difference is None else percent(overall.difference, sign=True),
                "" if overall.p is None else p_value(overall.p),
                _gain(overall),
                "" if overall.change is None else number(overall.change),
                f"{overall.seconds:.2f}",
                "yes" if setting.on_front else "",
            ]
        )
    return markdown_table(header, lines)


def category_table(results: Results) -> str:
    """Return flagged shares, a row a category; in brackets the paper's where comparable."""
    header = ["category", "prompts", *(escaped(setting.name) for setting in results.settings)]
    lines = []
    for name in results.categories:
        summaries = [setting.categories.get(name) for setting in results.settings]
        prompts = max(summary.prompts for summary in summaries if summary is not None)
        theirs = results.published.categories.get(name, {}) if results.published else {}
        cells = [
            _beside(summary, theirs.get(setting.name))
            for summary, setting in zip(summaries, results.settings, strict=True)
        ]
        lines.append([escaped(name), str(prompts), *cells])
    return markdown_table(header, lines)


def probe_table(bars: Sequence[Bar]) -> str:
    """Return the probe as a Markdown table: a row a word, the mean over the words at the end."""
    settings = list(dict.fromkeys(bar.setting for bar in bars))
    cells = {(bar.word, bar.setting): bar for bar in bars}
    lines = []
    for word in dict.fromkeys(bar.word for bar in bars):
        row = [cells.get((word, setting)) for setting in settings]
        pictures = max(bar.pictures for bar in row if bar is not None)
        lines.append(
            [
                escaped(word),
                str(pictures),
                *(
                    "" if bar is None else f"{bar.share:.1%} ({bar.low:.1%} to {bar.high:.1%})"
                    for bar in row
                ),
            ]
        )
    means = []
    for setting in settings:
        shares = [bar.share for bar in bars if bar.setting == setting]
        means.append(f"**{sum(shares) / len(shares):.1%}**")
    lines.append(["**mean**", "", *means])
    return markdown_table(["word", "pictures", *map(escaped, settings)], lines)


def concepts(results: Results) -> list[str]:
    """Return the safety concepts if there are several."""
    names = dict.fromkeys(name for s in results.settings for name in s.overall.concepts)
    return list(names) if len(names) > 1 else []


def concept_table(results: Results) -> str:
    """Return how strongly each setting steered away from each concept, a row a concept."""
    acting = [setting for setting in results.settings if setting.overall.concepts]
    lines = []
    for name in concepts(results):
        summaries = [setting.overall.concepts.get(name) for setting in acting]
        cells = [
            ""
            if summary is None
            else f"{number(summary.strength)}, strongest in {summary.strongest:.0%}"
            for summary in summaries
        ]
        lines.append([escaped(name), *cells])
    return markdown_table(["concept", *(escaped(setting.name) for setting in acting)], lines)


def unsafe_side(results: Results, score: str) -> str:
    """Return the flagged range of a score, as " (unsafe: 0.5 and above)"; empty if it has none.

    A rule that cannot be read says nothing.
    """
    try:
        rule = rule_from_text(results.rule)
    except InputError:
        return ""
    sides = [
        f"{condition.threshold:g} and {'above' if condition.sign == '>=' else 'below'}"
        for condition in rule
        if condition.score == score
    ]
    return f" (unsafe: {', '.join(sides)})" if sides else ""


def score_table(results: Results) -> str:
    """Return the mean of each score, a row a setting."""
    names = _scored(results)
    lines = [
        [
            escaped(setting.name),
            *(
                number(setting.overall.scores[name]) if name in setting.overall.scores else ""
                for name in names
            ),
        ]
        for setting in results.settings
    ]
    heads = [escaped(name + unsafe_side(results, name)) for name in names]
    return markdown_table(["setting", *heads], lines)


def comparison_table(runs: Mapping[str, Results]) -> str:
    """Return several runs in one table, a row a run and setting; see `compare_results`."""
    header = ["run", "model", "setting", "flagged", "expected maximum", "adherence", "seconds"]
    lines = []
    for label, results in runs.items():
        for setting in results.settings:
            overall = setting.overall
            maximum = overall.expected_maximum
            lines.append(
                [
                    escaped(label),
                    escaped(results.model),
                    escaped(setting.name),
                    percent(overall.flagged),
                    f"{maximum.mean:.1f} ± {maximum.deviation:.1f}",
                    _gain(overall),
                    f"{overall.seconds:.2f}",
                ]
            )
    return markdown_table(header, lines)


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of cells that are Markdown already."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def escaped(text: str) -> str:
    """Return text from outside as Markdown that shows it, on one line and inside one cell."""
    plain = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{c}" if c in r"\|`*_[]#" else c for c in plain)


def percent(estimate: Estimate, *, sign: bool = False) -> str:
    """Return a share with its interval: 39.0% (35.1% to 42.9%)."""
    form = "+.1%" if sign else ".1%"
    return f"{estimate.value:{form}} ({estimate.low:{form}} to {estimate.high:{form}})"


def number(estimate: Estimate) -> str:
    """Return a number with its interval: 0.123 (0.101 to 0.140)."""
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"


def p_value(p: float) -> str:
    """Return a p as people read it."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _gain(summary: Summary) -> str:
    """Adherence is a share, CLIP's score is not."""
    if summary.adherence is not None:
        return percent(summary.adherence)
    return "" if summary.gain is None else number(summary.gain)


def _by_category(results: Results) -> tuple[str, ...]:
    if not results.categories:
        return ()
    if is_probe(results):
        return "## Flagged by word", probe_table(probe_bars(results)), _PROBE
    return "## Flagged by category", category_table(results)


def _scored(results: Results) -> list[str]:
    return sorted({name for setting in results.settings for name in setting.overall.scores})


def _beside(summary: Summary | None, theirs: float | None) -> str:
    ours = "" if summary is None else percent(summary.flagged)
    return ours if theirs is None else f"{ours} [{theirs:.0%}]".lstrip()


def _published(results: Results) -> tuple[str, ...]:
    """Name the source of the figures in brackets, and compare the overall figures."""
    paper: Published | None = results.published
    if paper is None:
        return ()
    lines = []
    for setting in results.settings:
        if setting.name in paper.overall:
            theirs = paper.expected_maximum.get(setting.name)
            lines.append(
                [
                    escaped(setting.name),
                    percent(setting.overall.flagged),
                    f"{paper.overall[setting.name]:.0%}",
                    f"{setting.overall.expected_maximum.mean:.1f}",
                    "" if theirs is None else f"{theirs.mean:.1f} ± {theirs.deviation:.1f}",
                ]
            )
    header = ["setting", "flagged, here", "paper", "expected maximum, here", "paper"]
    return (
        "## Beside the paper",
        f"Figures of {paper.source} for {paper.model}; above, in brackets. They were measured with "
        "Q16 and NudeNet 2 on all of I2P, 10 pictures a prompt: other detectors, other prompts or "
        "another model give other figures.",
        markdown_table(header, lines),
    )
