"""The tables of report.md and report.html, and the sentences that explain them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from sld_edge.benchmarks.evaluation.probe import is_probe
from sld_edge.benchmarks.evaluation.results import PLAIN, Results, SettingResults, Summary
from sld_edge.benchmarks.evaluation.statistics import Estimate, Spread
from sld_edge.benchmarks.tables import Cell, Row, Table
from sld_edge.engines.errors import InputError
from sld_edge.runtime.scorers import rule_from_text

SHARE, NUMBER = ".1%", ".3f"  # forms of an estimate
_SHORT = (  # columns of the table for a README
    *("setting", "unsafe, all prompts", "unsafe, hard prompts", "adherence", "pixel change", "p"),
)
_MANY_CATEGORIES = 12  # more categories, as a probe's words, are sorted by the first setting

MEANING = (
    "A detector is a program that judges pictures, and it errs both ways. These figures compare "
    "settings that one detector judged; a person may judge a single picture otherwise.",
    "The figures are those of these prompts. Lists such as I2P are chosen to provoke a model: "
    "ordinary prompts give fewer unsafe pictures, and someone who tries hard may get more.",
    "Unsafe is the share of pictures that the rule flags (the paper's inappropriate probability). "
    "In brackets or in small type stands its 95 % interval: how far chance in the choice of "
    "prompts could move the figure. The interval says nothing of faults of the detector or of "
    "prompts that are not in the list: zero of a hundred is not never.",
    "“Worst of 25 prompts” (the paper's expected maximum) asks how bad it gets: draw 25 prompts, "
    "take the largest percentage of unsafe pictures among them; mean ± standard deviation of "
    "10,000 draws.",
    "The difference to plain is taken picture by picture, same prompt and same starting noise; p "
    "is the exact McNemar test's, the chance to see so large a difference if there were none.",
    "Adherence is the share of pictures that show what the prompt names or, without a judge of "
    "it, CLIP's score. Pixel change is the mean difference to the picture that is made without "
    "safety, 0 to 1. Both are the price of safety.",
    "Best trade: no other setting is both safer and more adherent.",
)
_SUITE_NOTE = (
    "Hidden: nobody asks for anything unsafe; the share of pictures still flagged, of those whose "
    "plain picture is flagged. Open: the prompt asks for it. Undo: a negative prompt works against "
    "safety. Concept: the prompt is the safety concept. Adversarial: prompts that a search found. "
    "Of these four, the share that is flagged. Neutral and neighbours: harmless prompts, which "
    "safety should leave as they are. Price: UNet branches relative to plain. Intervals are 95 %, "
    "over prompts."
)
_PROBE_NOTE = (
    " No prompt asks for anything unsafe: the words differ, and with them what the model "
    "associates with them."
)


def overall_table(results: Results) -> Table:
    """Return the figures of all pictures, a row a setting."""
    paper = results.published
    rows: list[Row] = []
    for setting in results.settings:
        overall, name = setting.overall, setting.name
        theirs = None if paper is None else paper.overall.get(name)
        worst = None if paper is None else paper.expected_maximum.get(name)
        maximum = overall.expected_maximum
        rows.append(
            {
                "setting": name,
                "unsafe, all prompts": cell(overall.flagged, SHARE, strong=True),
                "unsafe, hard prompts": cell(
                    None if setting.hard is None else setting.hard.flagged, SHARE, strong=True
                ),
                "unsafe, paper": Cell() if theirs is None else Cell(f"{theirs:.0%}", value=theirs),
                "worst of 25 prompts, %": Cell(
                    _spread(maximum),
                    () if worst is None else (f"paper: {_spread(worst)}",),
                    value=maximum.mean,
                ),
                "difference to plain, points": cell(overall.difference, "+.1f", unit=0.01),
                "p": Cell() if overall.p is None else Cell(_p_value(overall.p), value=overall.p),
                "adherence": _adherence(overall),
                "pixel change": cell(None if name == PLAIN else overall.change, NUMBER),
                "seconds a picture": _seconds(overall),
                "pictures": Cell(str(overall.pictures), value=overall.pictures),
                "best trade": "yes" if setting.on_front else "",
            }
        )
    return Table(title="All settings, overall", rows=rows)


def suite_table(results: Results) -> Table | None:
    """Return the figures of each suite, a row a setting; None for a run without suites."""
    if not results.suites:
        return None
    rows = [_suite_row(setting) for setting in results.settings]
    return Table(title="By suite", rows=rows, note=_SUITE_NOTE)


def _suite_row(setting: SettingResults) -> Row:
    by_suite, overall, plain = setting.categories, setting.overall, setting.name == PLAIN

    def measured(suite: str, get: Callable[[Summary], Cell]) -> Cell:
        return get(by_suite[suite]) if suite in by_suite else Cell()

    row: dict[str, Cell | str] = {
        "setting": setting.name,
        "hidden: unsafe left": measured("hidden", lambda s: _left(s, plain=plain)),
    }
    for suite in ("open", "undo", "concept", "adversarial"):
        row[f"{suite}: unsafe"] = measured(suite, lambda s: cell(s.flagged, SHARE, strong=True))
    for suite in ("neutral", "neighbours"):
        row[f"{suite}: adherence"] = measured(suite, _adherence)
        row[f"{suite}: pixel change"] = measured(
            suite, lambda s: cell(None if plain else s.change, NUMBER)
        )
    row["price"] = cell(overall.price, ".2f")
    row["seconds a picture"] = cell(overall.seconds, ".2f")
    return row


def short_table(results: Results) -> Table:
    """Return a short table for a README, a row a setting; a run with suites has theirs."""
    by_suite = suite_table(results)
    if by_suite is not None:
        return by_suite
    first = results.settings[0]
    legend = f"{first.overall.prompts} prompts, {first.overall.pictures} pictures a setting"
    if first.hard is not None:
        legend += f"; hard prompts, as the list marks them: {first.hard.prompts}"
    return Table(
        title="In short",
        rows=[{name: row[name] for name in _SHORT} for row in overall_table(results).rows],
        note=f"{legend}. Intervals are 95 %, over prompts; p is the exact McNemar test's, all "
        "prompts, against the first row.",
    )


def category_names(results: Results) -> list[str]:
    """Return the categories in the list's order; many are sorted, the most unsafe first."""
    names = list(results.categories)
    if len(names) > _MANY_CATEGORIES:
        first = results.settings[0].categories
        names.sort(key=lambda name: -first[name].flagged.value if name in first else 0.0)
    return names


def category_table(results: Results) -> Table | None:
    """Return the unsafe share of each category and setting; None without categories."""
    note = "Share of pictures that are flagged, with 95 % intervals."
    note += _PROBE_NOTE if is_probe(results) else ""
    return _flagged_table(results, category_names(results), "Unsafe, by category", note)


def open_table(results: Results) -> Table | None:
    """Return the unsafe share of each kind of the suite open; None without kinds."""
    kinds = [name for name in results.categories if name.startswith("open: ")]
    note = "Share of pictures that are flagged, by the way in which a prompt asks."
    return _flagged_table(results, kinds if "open" in results.suites else [], "Open, by kind", note)


def _flagged_table(results: Results, names: Sequence[str], title: str, note: str) -> Table | None:
    rows: list[Row] = []
    for name in names:
        by_setting = {s.name: s.categories.get(name) for s in results.settings}
        theirs = {} if results.published is None else results.published.categories.get(name, {})
        row: dict[str, Cell | str] = {
            "category": name,
            "prompts": str(max(s.prompts for s in by_setting.values() if s is not None)),
        }
        for setting, summary in by_setting.items():
            beside = [f"paper: {theirs[setting]:.0%}"] if setting in theirs else []
            row[setting] = cell(summary.flagged if summary else None, SHARE, *beside)
        rows.append(row)
    return Table(title=title, rows=rows, note=note) if rows else None


def paper_note(results: Results) -> str:
    """Return the source of the paper's figures; empty where they are not comparable."""
    paper = results.published
    if paper is None:
        return ""
    return (
        f"The paper's figures ({paper.source}) are for {paper.model}, measured with Q16 and "
        "NudeNet 2 on all of I2P, 10 pictures a prompt: another detector, other prompts or another "
        "model give other figures."
    )


def concept_table(results: Results) -> Table | None:
    """Return the strength of the edit by concept and setting; None for one concept or none."""
    acting = [setting for setting in results.settings if setting.overall.concepts]
    names = list(dict.fromkeys(name for s in acting for name in s.overall.concepts))
    if len(names) < 2:
        return None
    rows: list[Row] = []
    for name in names:
        row: dict[str, Cell | str] = {"concept": name}
        for setting in acting:
            summary = setting.overall.concepts.get(name)
            row[setting.name] = Cell()
            if summary is not None:
                most = f"strongest in {summary.strongest:.0%}"
                row[setting.name] = cell(summary.strength, NUMBER, most)
        rows.append(row)
    note = (
        "How strongly each setting steered away from each concept, on average over its pictures "
        "and their steps, and in how many of the pictures no other concept weighed more."
    )
    return Table(title="Strength of the edit, by concept", rows=rows, note=note)


def score_table(results: Results) -> Table | None:
    """Return the mean of each score, a row a setting; None without scores."""
    names = sorted({name for setting in results.settings for name in setting.overall.scores})
    if not names:
        return None
    heads = {name: name + _unsafe_side(results, name) for name in names}
    rows: list[Row] = [
        {
            "setting": setting.name,
            **{heads[name]: cell(setting.overall.scores.get(name), NUMBER) for name in names},
        }
        for setting in results.settings
    ]
    return Table(title="Mean scores", rows=rows)


def comparison_table(runs: Mapping[str, Results]) -> Table:
    """Return several runs in one table, a row a run and setting; see `compare_results`."""
    rows: list[Row] = [
        {
            "run": label,
            "model": results.model,
            "setting": setting.name,
            "unsafe, all prompts": cell(setting.overall.flagged, SHARE),
            "worst of 25 prompts, %": _spread(setting.overall.expected_maximum),
            "adherence": _adherence(setting.overall),
            "seconds a picture": _seconds(setting.overall),
        }
        for label, results in runs.items()
        for setting in results.settings
    ]
    return Table(title="Runs side by side", rows=rows)


def cell(
    estimate: Estimate | None, form: str, *more: str, unit: float = 1.0, strong: bool = False
) -> Cell:
    """Return an estimate with its interval, in `unit`s; an empty cell for None."""
    if estimate is None:
        return Cell()
    value, low, high = (f"{x / unit:{form}}" for x in (estimate.value, estimate.low, estimate.high))
    return Cell(value, (f"{low} to {high}", *more), value=estimate.value, strong=strong)


def _adherence(summary: Summary) -> Cell:
    """Adherence is a share, CLIP's score is a number."""
    return cell(summary.gain, NUMBER if summary.adherence is None else SHARE)


def _seconds(summary: Summary) -> Cell:
    return Cell(f"{summary.seconds.value:.2f}", value=summary.seconds.value)


def _left(summary: Summary, *, plain: bool) -> Cell:
    of = f"of {summary.left_of}"
    if plain:  # by definition, so without an interval
        return Cell(f"{1:{SHARE}}", (of,), value=1.0)
    return cell(summary.left, SHARE, of, strong=True)


def _spread(spread: Spread) -> str:
    return f"{spread.mean:.1f} ± {spread.deviation:.1f}"


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _unsafe_side(results: Results, score: str) -> str:
    """Return the flagged range of a score, as " (unsafe: 0.5 and above)"; empty if it has none."""
    try:
        rule = rule_from_text(results.rule)
    except InputError:  # a rule of another version
        return ""
    sides = [
        f"{condition.threshold:g} and {'above' if condition.sign == '>=' else 'below'}"
        for condition in rule
        if condition.score == score
    ]
    return f" (unsafe: {', '.join(sides)})" if sides else ""
