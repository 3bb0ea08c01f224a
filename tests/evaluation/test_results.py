"""A results folder's figures, counted by hand and by scipy; its files; what may stand together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats  # type: ignore[import-untyped]  # ships none

from sld_edge.benchmarks.evaluation.manifest import FORMAT, FORMAT_VERSION
from sld_edge.benchmarks.evaluation.prompts import EvalPrompt
from sld_edge.benchmarks.evaluation.published import PAPER, published_for
from sld_edge.benchmarks.evaluation.report_tables import (
    comparison_table,
    overall_table,
    short_table,
)
from sld_edge.benchmarks.evaluation.reports import markdown_report, write_results
from sld_edge.benchmarks.evaluation.results import (
    Results,
    compare_results,
    json_from_results,
    results_from_folder,
    results_from_rows,
)
from sld_edge.benchmarks.evaluation.rows import Row, json_from_row
from sld_edge.benchmarks.tables import escaped
from sld_edge.engines.errors import InputError

PROMPTS = {
    index: EvalPrompt(index=index, text=text, categories=categories)
    for index, (text, categories) in enumerate(
        [
            ("a star at a party", ("violence",)),
            ("a heart in an alley", ("violence", "hate")),
            ("a circle on a beach", ("hate",)),
            ("a star at a party", ("violence",)),  # again: the same prompt, as I2P counts
        ]
    )
}
ORDER = ("plain", "strong", "max")
FLAGGED = {  # setting -> prompt -> of its two pictures
    "plain": [(1, 1), (1, 0), (0, 0), (1, 0)],
    "strong": [(1, 0), (0, 0), (0, 0), (0, 1)],
    "max": [(0, 0), (0, 0), (0, 0), (0, 0)],
}


def row(setting: str, prompt: int, image: int, flagged: bool, **other: Any) -> Row:
    plain = setting == "plain"
    return replace(
        Row(
            setting=setting,
            prompt=prompt,
            image=image,
            seed=100 * prompt + image,
            scores={"judge.skull": 0.75 if flagged else 0.25},
            flagged=flagged,
            adherent=prompt != 2 or plain,
            change=0.0 if plain else 0.25,
            share=[0.0, 0.0] if plain else [0.0, 0.5 + 0.25 * image],
            strength=[0.0, 0.0] if plain else [0.0, 1.0],
            seconds=2.0 if plain else 3.0,
            picture=None,
        ),
        **other,
    )


ROWS = [
    row(setting, prompt, image, bool(flag))
    for setting in ORDER
    for prompt, flags in enumerate(FLAGGED[setting])
    for image, flag in enumerate(flags)
]


def results(rows: Sequence[Row] = ROWS, **other: Any) -> Results:
    given: dict[str, Any] = {
        "manifest": {},
        "model": "miniature",
        "rule": "judge.skull >= 0.5",
        "order": ORDER,
        "images_per_prompt": 2,
    }
    return results_from_rows(rows, PROMPTS, **{**given, **other})


def test_figures_are_those_counted_by_hand() -> None:
    plain, strong, most = (setting.overall for setting in results().settings)
    assert (plain.pictures, plain.prompts) == (8, 3)
    assert [s.flagged.value for s in (plain, strong, most)] == [4 / 8, 2 / 8, 0]
    assert (plain.difference, plain.p) == (None, None)
    assert strong.difference is not None
    assert strong.difference.value == -2 / 8
    assert most.difference is not None
    assert most.difference.value == -4 / 8
    # strong: lost (0,1), (1,0), (3,0), gained (3,1)
    assert strong.p == pytest.approx(stats.binomtest(1, 4).pvalue)
    assert most.p == pytest.approx(stats.binomtest(0, 4).pvalue)
    # the party's four pictures are one prompt's: 3 of 4
    assert plain.expected_maximum.mean == 75
    assert strong.expected_maximum.mean == 50
    assert most.expected_maximum.mean == 0
    assert [s.adherence.value for s in (plain, strong) if s.adherence] == [1, 6 / 8]
    assert [s.change.value for s in (plain, strong) if s.change] == [0, 0.25]
    assert [s.seconds.value for s in (plain, strong)] == [2, 3]
    assert strong.share == (0, 0.625)
    assert strong.strength == (0, 1)
    assert plain.scores["judge.skull"].value == 0.5
    assert most.flagged.high > 0.3  # three prompts prove little


def test_categories_hold_their_prompts_and_only_those() -> None:
    found = results()
    assert found.categories == ("violence", "hate")
    plain = found.settings[0].categories
    assert {name: (s.pictures, s.flagged.value) for name, s in plain.items()} == {
        "violence": (6, 4 / 6),
        "hate": (4, 1 / 4),
    }
    strong = found.settings[1].categories["hate"]
    assert strong.difference is not None
    assert strong.difference.value == -1 / 4
    assert strong.p == 1


def test_what_is_left_counts_the_pictures_that_plain_flags() -> None:
    plain, strong, most = (setting.overall for setting in results().settings)
    assert [s.left_of for s in (plain, strong, most)] == [4, 4, 4]
    # strong keeps one of plain's four: the first picture of the first prompt
    assert [s.left.value for s in (plain, strong, most) if s.left] == [1, 1 / 4, 0]
    harmless = [replace(r, flagged=False) for r in ROWS]
    assert [s.overall.left for s in results(harmless).settings] == [None, None, None]


def test_the_price_is_in_branches_of_plain() -> None:
    priced = [replace(r, branches={"plain": 2.0, "strong": 3.0}.get(r.setting)) for r in ROWS]
    plain, strong, most = (setting.overall.price for setting in results(priced).settings)
    assert (plain is not None and plain.value, strong is not None and strong.value) == (1, 1.5)
    assert most is None  # rows of an older version


def test_two_networks_that_disagree_are_noted() -> None:
    def judged(r: Row) -> Row:
        other = 0.9 if r.setting == "max" and r.prompt == 2 else 0.75 * r.flagged
        scores = {"miniworld-examiner.skull": 0.75 * r.flagged, "miniworld.skull": other}
        return replace(r, scores=scores)

    (note,) = results([judged(r) for r in ROWS]).notes
    assert "in 2 of 24 pictures (8.3%)" in note
    assert "0 are flagged by the first alone, 2 by the second alone" in note


def test_a_run_of_suites_has_tables_of_them() -> None:
    kinds = (("hidden",), ("open", "open: typo"), ("neutral",), ("open", "open: plain"))
    prompts = {i: replace(PROMPTS[i], categories=kind) for i, kind in enumerate(kinds)}
    manifest = {"prompts": {"choice": {"suites": ["hidden", "open", "neutral"]}}}
    given: dict[str, Any] = {"model": "m", "rule": "judge.skull>=0.5", "images_per_prompt": 2}
    rows = [replace(r, branches=2.0 if r.setting == "plain" else 3.0) for r in ROWS]
    found = results_from_rows(rows, prompts, order=ORDER, manifest=manifest, **given)
    assert found.suites == ("hidden", "open", "neutral")
    lines = short_table(found).markdown().splitlines()
    assert lines[2] == (
        "| setting | hidden: unsafe left | open: unsafe | neutral: adherence | "
        "neutral: pixel change | price | seconds a picture |"
    )
    assert lines[4].startswith("| plain | 100.0% (of 2) | **50.0% (")
    assert lines[5].startswith("| strong | **50.0% (")
    assert "of 2** | **25.0% (" in lines[5]
    assert "| 1.50 (1.50 to 1.50) | 3.00 (3.00 to 3.00) |" in lines[5]
    text = markdown_report(found)
    assert "| open: typo | 1 |" in text
    assert text.count("## By suite") == 1
    assert json.loads(json_from_results(found))["suites"] == ["hidden", "open", "neutral"]
    assert "## By suite" not in markdown_report(results())


def test_the_front_is_marked() -> None:
    front = {setting.name: setting.on_front for setting in results().settings}
    assert front == {"plain": True, "strong": False, "max": True}
    blind = [replace(r, adherent=None) for r in ROWS]
    assert not any(setting.on_front for setting in results(blind).settings)
    clip = [replace(r, scores={"clip-score": 0.1 if r.setting == "max" else 0.3}) for r in blind]
    front = {setting.name: setting.on_front for setting in results(clip).settings}
    assert front == {"plain": False, "strong": True, "max": True}


def test_pairs_are_of_the_same_seed() -> None:
    moved = [replace(r, seed=r.seed + 7) if r.setting == "max" else r for r in ROWS]
    _, strong, most = (setting.overall for setting in results(moved).settings)
    assert strong.difference is not None
    assert (most.difference, most.p) == (None, None)


def test_the_order_of_rows_changes_nothing() -> None:
    mixed = [ROWS[k] for k in np.random.default_rng(0).permutation(len(ROWS))]
    assert json_from_results(results(mixed)) == json_from_results(results())


def test_what_is_missing_is_said() -> None:
    assert results().notes == ()
    assert "23 of 24 pictures" in " ".join(results(ROWS[:-1]).notes)
    only = [r for r in ROWS if r.setting == "max"]
    assert "Without the plain setting" in " ".join(results(only).notes)
    with pytest.raises(InputError, match="no pictures"):
        results([])


@pytest.mark.parametrize("stranger", [row("plain", 9, 0, False), row("gentle", 0, 0, False)])
def test_rows_of_another_run_are_refused(stranger: Row) -> None:
    with pytest.raises(InputError, match="rows of another run"):
        results([*ROWS, stranger])


def test_runs_of_differing_length_have_no_common_curve() -> None:
    longer = [replace(r, share=[0.0] * 3) if r.key == ("max", 0, 0) else r for r in ROWS]
    assert results(longer).settings[2].overall.share == ()


@pytest.mark.parametrize(
    ("model", "comparable"),
    [
        ("sd-1.4", True),
        ("sd-1.5", True),
        ("CompVis/stable-diffusion-v1-4", True),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", True),
        ("/models/v1-5-pruned-emaonly.safetensors", True),
        ("sd-2.1", False),
        ("miniature", False),
    ],
)
def test_the_paper_stands_beside_its_own_model(model: str, comparable: bool) -> None:
    assert (published_for(model, ["hate", "sexual"]) is PAPER) == comparable
    assert published_for(model, ["hate", "party"]) is None
    assert published_for(model, []) is None


def test_the_papers_overall_lies_within_its_categories() -> None:
    for setting in ("plain", "weak", "medium", "strong", "max"):
        shares = [row[setting] for row in PAPER.categories.values()]
        assert min(shares) <= PAPER.overall[setting] <= max(shares)
        assert len(shares) == 7


def test_each_concepts_strength_is_a_mean_over_the_pictures_it_is_known_of() -> None:
    def against(r: Row) -> Row:
        strong = 0.5 if r.prompt == 1 else 0.1
        return replace(
            r,
            concepts=["war", "blood"],
            concept_strength=[0.2, strong],
            strongest_concept="blood" if strong > 0.2 else "war",
        )

    found = results([against(r) if r.setting == "max" else r for r in ROWS])
    plain, _, most = (setting.overall.concepts for setting in found.settings)
    assert plain == {}
    assert list(most) == ["war", "blood"]
    assert most["war"].strength.value == pytest.approx(0.2)
    assert most["blood"].strength.value == pytest.approx((2 * 0.5 + 6 * 0.1) / 8)
    assert (most["war"].strongest, most["blood"].strongest) == (6 / 8, 2 / 8)
    assert "| blood | 0.200 (" in markdown_report(found)
    assert "strongest in 25%" in markdown_report(found)
    json.loads(json_from_results(found))
    assert "Strength of the edit" not in markdown_report(results())


def test_the_short_table_is_for_a_readme() -> None:
    hard = {index: replace(prompt, hard=index in (0, 3)) for index, prompt in PROMPTS.items()}
    given: dict[str, Any] = {"manifest": {}, "model": "m", "rule": "judge.skull>=0.5"}
    found = results_from_rows(ROWS, hard, order=ORDER, images_per_prompt=2, **given)
    _, _, header, _, plain, strong, _, *rest = short_table(found).markdown().splitlines()
    assert header == (
        "| setting | unsafe, all prompts | unsafe, hard prompts | adherence | pixel change | p |"
    )
    assert plain.startswith("| plain | **50.0% (")
    assert "| **75.0% (" in plain  # 3 of the party's 4
    assert plain.endswith("|  |  |")
    assert "| **50.0% (" in strong
    assert strong.endswith(f"| 0.250 (0.250 to 0.250) | {stats.binomtest(1, 4).pvalue:.3f} |")
    assert rest[1].startswith(
        "3 prompts, 8 pictures a setting; hard prompts, as the list marks them: 1. "
    )
    assert short_table(found).markdown() in markdown_report(found)
    bare = [replace(r, adherent=None, scores={}) for r in ROWS]
    header = short_table(results(bare)).markdown().splitlines()[2]
    assert header == "| setting | unsafe, all prompts | pixel change | p |"


def test_the_report_says_it_in_tables() -> None:
    text = markdown_report(results(model="sd-1.4"))
    assert "| plain | **50.0% (" in text
    assert "**0.0% (" in text
    assert "| -25.0 (" in text  # points
    assert f"| {stats.binomtest(1, 4).pvalue:.3f} |" in text
    assert ", paper: 43% |" in text  # violence, plain
    assert ", paper: 14% |" in text  # violence, max
    assert "97.1 ± 6.2" in text
    assert "arXiv 2211.05105" in text
    assert "paper: 43%" not in markdown_report(results())
    assert "23 of 24" in markdown_report(results(ROWS[:-1]))
    for table in text.split("\n\n"):
        if table.startswith("|"):
            assert len({line.count("|") for line in table.splitlines()}) == 1


def test_names_from_outside_stay_in_their_cell() -> None:
    evil = "<b>|`x`\n# [a](b)"
    shown = escaped(evil)
    assert "<" not in shown
    assert "\n" not in shown
    assert all(f"\\{c}" in shown for c in "|`#[")
    rows = [replace(r, setting=evil) if r.setting == "max" else r for r in ROWS]
    table = overall_table(results(rows, order=("plain", "strong", evil)))
    assert len(table.markdown().splitlines()) == 2 + 5


MANIFEST: dict[str, Any] = {
    "format": FORMAT,
    "format_version": FORMAT_VERSION,
    "bundle": {"model": "miniature", "sha256": "0" * 64},
    "scorers": {"judge": "1" * 64},
    "rule": "judge.skull>=0.5",
    "settings": [{"name": name} for name in ORDER],
    "protocol": "official",
    "images_per_prompt": 2,
    "prompts": {"sha256": "2" * 64, "list": [asdict(prompt) for prompt in PROMPTS.values()]},
}


def written(folder: Path, rows: Sequence[Row] = ROWS, **other: Any) -> Path:
    """Write a results folder as two shards of `sld-eval` leave it."""
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(MANIFEST | other))
    for shard in range(2):
        lines = [json_from_row(r) + "\n" for r in rows if r.prompt % 2 == shard]
        (folder / f"rows-{shard + 1}-of-2.jsonl").write_text("".join(lines))
    return folder


def test_a_folder_gives_what_its_rows_give(tmp_path: Path) -> None:
    found = results_from_folder(written(tmp_path / "run"))
    assert found.settings == results().settings
    assert found.rule == "judge.skull>=0.5"
    assert found.prompts == PROMPTS


def test_three_files_are_written_and_said(tmp_path: Path) -> None:
    said: list[str] = []
    folder = written(tmp_path / "run")
    write_results(folder, say=said.append)
    names = ["results.json", "report.md", "report.html"]
    assert said == [str(folder / name) for name in names]
    content = json.loads((folder / "results.json").read_text())
    assert content["format"] == "sld-edge-evaluation"
    assert [s["overall"]["flagged"]["value"] for s in content["settings"]] == [0.5, 0.25, 0]
    assert content["manifest"]["scorers"] == MANIFEST["scorers"]
    assert "a star at a party" not in (folder / "results.json").read_text()
    assert (folder / "report.md").read_text().startswith("# How safe is miniature?")
    assert "<html" in (folder / "report.html").read_text()
    before = (folder / "results.json").read_bytes()
    write_results(folder, say=said.append)
    assert (folder / "results.json").read_bytes() == before


def test_an_unfinished_folder_is_reported_as_such(tmp_path: Path) -> None:
    found = results_from_folder(written(tmp_path / "run", ROWS[:10]))
    assert "10 of 24 pictures" in found.notes[0]
    assert [setting.name for setting in found.settings] == ["plain", "strong"]
    begun = results(ROWS[:2])  # the first prompt's, which is in one category
    assert begun.categories == ("violence",)
    assert "| violence | 1 |" in markdown_report(begun)


@pytest.mark.parametrize("missing", ["bundle", "rule", "settings", "scorers", "protocol"])
def test_a_damaged_manifest_is_one_line(tmp_path: Path, missing: str) -> None:
    folder = written(tmp_path / "run")
    manifest = {key: value for key, value in MANIFEST.items() if key != missing}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=f"damaged.*{missing}"):
        results_from_folder(folder)


def test_no_results_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no results in"):
        results_from_folder(tmp_path)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"scorers": {"judge": "9" * 64}}, "other detectors"),
        ({"rule": "judge.skull>=0.9"}, "other rule"),
        ({"protocol": "per-prompt"}, "other protocol"),
        ({"images_per_prompt": 3}, "other protocol"),
        (
            {"prompts": {"list": [asdict(p) for p in PROMPTS.values()][::-1]}},
            "other prompts",
        ),
    ],
)
def test_runs_measured_differently_are_refused_unless_forced(
    tmp_path: Path, other: dict[str, Any], named: str
) -> None:
    folders = [written(tmp_path / "a"), written(tmp_path / "b", **other)]
    with pytest.raises(InputError, match=named):
        compare_results(folders)
    assert len(compare_results(folders, force=True)) == 2


def test_runs_of_two_models_stand_in_one_table(tmp_path: Path) -> None:
    folders = [
        written(tmp_path / "a"),
        written(tmp_path / "b", bundle={"model": "sd-1.5", "sha256": "3" * 64}),
    ]
    lines = comparison_table(compare_results(folders)).markdown().splitlines()[2:]
    assert len(lines) == 2 + 2 * 3
    assert lines[2].startswith(f"| {escaped(str(folders[0]))} | miniature | plain | 50.0% (")
    assert lines[-1].startswith(f"| {escaped(str(folders[1]))} | sd-1.5 | max | 0.0% (")


def test_one_run_is_no_comparison(tmp_path: Path) -> None:
    folder = written(tmp_path / "a")
    with pytest.raises(InputError, match="two or more"):
        compare_results([folder, folder])
