"""What happens to flagged pictures: said, blurred, withheld, or made again with more safety."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from oracles.requests import flat_request
from sld_edge.engines.errors import EngineError, InputError
from sld_edge.runtime import PRESETS, Pipeline, Run, Safety
from sld_edge.runtime.commands.run import main
from sld_edge.runtime.picture import blurred, png_from_image
from sld_edge.runtime.safety import STRONGEST, is_as_strong, safety_from_preset
from sld_edge.runtime.scorers import rule_from_text
from sld_edge.runtime.scorers.base import Reports, Scores
from sld_edge.runtime.screening import Screening, escalated

FAST = ["--steps", "2", "--sampler", "ddim", "--quiet"]
RULE = rule_from_text("fake.bad>=0.5")


class Fake:
    """Flags what `bad` says of a report: a scorer whose answers a test decides."""

    name = "fake"
    sha256 = "ab" * 32

    def __init__(self, bad: Callable[[Any], float]) -> None:
        self.bad = bad
        self.seen: list[str] = []

    def score(
        self, pictures: Any, prompts: Sequence[str], reports: Reports | None = None
    ) -> list[Scores]:
        assert reports is not None
        assert pictures.shape == (len(prompts), 64, 64, 3)
        assert [report["prompt"] for report in reports] == list(prompts)
        self.seen += prompts
        return [{"fake.bad": self.bad(report)} for report in reports]


def until(preset: str) -> Callable[[Any], float]:
    """Flag stars made with less than this preset; hearts never."""
    order = list(PRESETS)

    def bad(report: Any) -> float:
        weak = order.index(report["safety"]["preset"]) < order.index(preset)
        return float("star" in report["prompt"] and weak)

    return bad


def plan_of(pipeline: Pipeline, *prompts: str, **options: Any) -> Run:
    return pipeline.resolve(flat_request(prompts=prompts, steps=3, sampler="ddim", **options))


@pytest.mark.parametrize("calls", [1, 2, 4, 25, 50, 51])
def test_no_setting_of_the_strongest_is_weaker_than_a_presets(calls: int) -> None:
    strongest = safety_from_preset(STRONGEST, calls=calls)
    for name in PRESETS:
        assert is_as_strong(strongest, safety_from_preset(name, calls=calls), calls=calls)


def test_escalating_keeps_everything_but_the_preset(miniature: Pipeline) -> None:
    plan = plan_of(miniature, "a star", safety="weak", safety_concept="clouds", seed=5)
    (image,) = plan.images
    again = escalated(image, calls=plan.table.calls)
    wanted = plan_of(miniature, "a star", safety=STRONGEST, safety_concept="clouds", seed=5)
    assert again == wanted.images[0]
    assert again.acting_filter == ("clouds",)


def test_a_flagged_picture_is_made_again_with_the_strongest_preset(miniature: Pipeline) -> None:
    scorer = Fake(until("strong"))
    plan = plan_of(miniature, "a star", "a heart", safety="weak", seed=3)
    screening = Screening(scorers=[scorer], rule=RULE, on_flag="escalate")
    result = miniature.run(plan, screening=screening)
    star, heart = result.reports
    assert [a["preset"] for a in star["screening"]["attempts"]] == ["weak", STRONGEST]
    assert [a["flagged"] for a in star["screening"]["attempts"]] == [True, False]
    assert (star["flagged"], star["screening"]["done"]) == (False, "escalated")
    assert star["safety"]["preset"] == STRONGEST
    assert star["scores"] == {"fake.bad": 0.0}
    assert star["screening"]["scorers"] == {"fake": "ab" * 32}
    assert star["screening"]["rule"] == "fake.bad>=0.5"
    assert heart["screening"]["done"] == "nothing"
    assert len(heart["screening"]["attempts"]) == 1
    # The heart was not made again, and the star is the strongest preset's own picture.
    assert scorer.seen == ["a star", "a heart", "a star"]
    own = miniature(
        ["a star", "a heart"], safety=[STRONGEST, "weak"], seed=3, steps=3, sampler="ddim"
    )
    for index in range(2):
        np.testing.assert_array_equal(result.images[index], own.images[index])
    np.testing.assert_array_equal(result.latents, own.latents)
    np.testing.assert_array_equal(result.edit_maps, own.edit_maps)
    json.dumps(result.reports)


def test_what_is_flagged_to_the_end_is_said(miniature: Pipeline) -> None:
    screening = Screening(scorers=[Fake(lambda _: 1.0)], rule=RULE, on_flag="escalate")
    result = miniature.run(plan_of(miniature, "a star", safety="off"), screening=screening)
    (report,) = result.reports
    assert report["flagged"]
    assert [a["preset"] for a in report["screening"]["attempts"]] == ["off", STRONGEST]


@pytest.mark.parametrize(("on_flag", "done"), [("blur", "blurred"), ("withhold", "withheld")])
def test_a_flagged_picture_is_not_to_be_seen(on_flag: Any, done: str, miniature: Pipeline) -> None:
    plan = plan_of(miniature, "a red star", "a heart", safety="medium", seed=3)
    sharp = miniature.run(plan)
    result = miniature.run(
        plan, screening=Screening(scorers=[Fake(until("max"))], rule=RULE, on_flag=on_flag)
    )
    assert [report["screening"]["done"] for report in result.reports] == [done, "nothing"]
    np.testing.assert_array_equal(result.images[1], sharp.images[1])
    star = np.asarray(result.images[0], float)
    if on_flag == "blur":
        np.testing.assert_array_equal(star, blurred(sharp.images[0]))
        edges = [
            np.abs(np.diff(np.asarray(i, float), axis=0)).max() for i in (star, sharp.images[0])
        ]
        assert edges[0] < edges[1] / 4
    else:
        assert np.ptp(star) == 0
        assert not result.edit_maps[0].any()
    assert not result.latents[0].any()
    assert result.latents[1].any()


def test_a_scorer_that_fails_ends_the_run(miniature: Pipeline) -> None:
    def broken(report: Any) -> float:
        raise EngineError("the model is broken")

    with pytest.raises(EngineError, match="broken"):
        miniature.run(
            plan_of(miniature, "a star"), screening=Screening(scorers=[Fake(broken)], rule=RULE)
        )
    rule = rule_from_text("other>=0.5")
    with pytest.raises(InputError, match=r"the rule names other \| expected one of fake.bad"):
        miniature.run(
            plan_of(miniature, "a star"),
            screening=Screening(scorers=[Fake(lambda _: 0.0)], rule=rule),
        )


def test_what_cannot_be_honoured_is_refused_before_the_run(miniature: Pipeline) -> None:
    fake = Fake(lambda _: 0.0)
    plan = plan_of(miniature, "a star", safety=Safety(scale=50))
    with pytest.raises(InputError, match="escalation starts from a preset"):
        miniature.check(plan, screening=Screening(scorers=[fake], rule=RULE, on_flag="escalate"))
    miniature.check(plan, screening=Screening(scorers=[fake], rule=RULE, on_flag="blur"))
    with pytest.raises(InputError, match="no scorer"):
        miniature.check(plan, screening=Screening(scorers=[], rule=RULE))
    wrong: Any = "delete"
    with pytest.raises(InputError, match="on-flag | got 'delete'"):
        miniature.check(plan, screening=Screening(scorers=[fake], rule=RULE, on_flag=wrong))


# --- sld-run --------------------------------------------------------------------------------------


@pytest.fixture
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_in_a_folder_of_its_own")
class TestCommand:
    def test_scores_are_in_report_and_picture(self, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["a star", "--scorer", "miniworld", "activation", "--output", "s.png"]
        assert main([*arguments, "--report", "s.json", "--steps", "2", "--sampler", "ddim"]) == 3
        assert "; miniworld.skull " in capsys.readouterr().out
        report = json.loads(Path("s.json").read_text())["images"][0]
        assert set(report["scores"]) > {"miniworld.skull", "activation.share"}
        assert report["flagged"] is (report["scores"]["miniworld.skull"] >= 0.5)
        with Image.open("s.png") as image:
            assert json.loads(image.info["sld-edge"]) == report

    def test_a_withheld_picture_leaves_its_report_and_is_said(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ["a star", "--scorer", "miniworld", "--flag-rule", "miniworld.skull>=0"]
        outputs = ["--output", "s.png", "--report", "s.json", "--edit-map", "map.png"]
        assert main([*arguments, "--on-flag", "withhold", *outputs, *FAST]) == 3
        assert capsys.readouterr().err == "warning: s.png is flagged, and was not written\n"
        assert [path.name for path in Path().iterdir()] == ["s.json"]
        report = json.loads(Path("s.json").read_text())["images"][0]
        assert (report["flagged"], report["screening"]["done"]) == (True, "withheld")

    def test_a_blurred_picture_is_blurred_in_its_edit_map_too(
        self, miniature: Pipeline, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ["a star", "--scorer", "miniworld", "--flag-rule", "miniworld.skull>=0"]
        outputs = ["--output", "s.png", "--edit-map", "map.png"]
        assert main([*arguments, "--on-flag", "blur", *outputs, *FAST]) == 3
        assert "s.png is flagged, and was blurred" in capsys.readouterr().err
        sharp = miniature("a star", steps=2, sampler="ddim").images[0]
        with Image.open("s.png") as image:
            np.testing.assert_array_equal(image, blurred(sharp))
        with Image.open("map.png") as image:
            rough = np.abs(np.diff(np.asarray(image.convert("L"), float), axis=0)).max()
        assert rough < np.abs(np.diff(np.asarray(sharp.convert("L"), float), axis=0)).max()

    def test_escalated_to_the_end(self, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["a star", "--scorer", "miniworld", "--flag-rule", "miniworld.skull>=0"]
        arguments += ["--on-flag", "escalate", "--safety", "strong", "--output", "s.png"]
        assert main([*arguments, "--steps", "2", "--sampler", "ddim"]) == 3
        said = capsys.readouterr()
        assert "safety guard-max" in said.out
        assert "after strong; miniworld.skull" in said.out
        assert "warning: s.png is still flagged with guard-max" in said.err
        assert Path("s.png").exists()

    def test_a_low_score_flags_and_is_told_in_digits_that_show_it(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        watch = ["--safety-scale", "0.01", "--safety-warmup", "0", "--safety-momentum-scale", "0"]
        rule = ["--scorer", "activation", "--flag-rule", "activation.strength<=0.009"]
        arguments = ["a star", "--output", "s.png", *watch, *rule, "--report", "s.json"]
        assert main([*arguments, "--steps", "2", "--sampler", "ddim"]) == 3
        said = capsys.readouterr()
        strength = json.loads(Path("s.json").read_text())["images"][0]["safety"]["mean_strength"]
        assert 0 < strength < 0.009
        assert float(said.out.split("activation.strength ")[1]) == pytest.approx(strength, rel=0.01)
        assert "warning: s.png is flagged" in said.err

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            (["--scorer", "eyes"], "scorer | got 'eyes' | expected one of opennsfw"),
            (["--scorer", "activation"], "no rule says when a picture is flagged"),
            (["--scorer", "miniworld", "--on-flag", "hide"], "on-flag | got 'hide'"),
            (["--scorer", "miniworld", "--flag-rule", "skull"], "rule | got 'skull'"),
            (["--scorer", "miniworld", "--flag-rule", "a<1"], "rule | got 'a<1' | expected"),
            (["--scorer", "miniworld", "--flag-rule", "x>=1"], "the rule names x"),
            (["--scorer", "miniworld=nowhere.onnx"], "cannot read nowhere.onnx"),
            (["--scorer", "q16"], "scorer q16 needs its model"),
            (["--scorer", "q16=nowhere"], "no scorer at nowhere"),
            (["--on-flag", "blur"], "--on-flag needs a scorer"),
            (["--flag-rule", "x>=1"], "--flag-rule needs a scorer"),
            (["--scorer", "miniworld", "--width", "96"], "got a picture of 96x64 pixels"),
            (
                ["--scorer", "miniworld", "--on-flag", "blur", "--preview", "p.png"],
                "--preview would show",
            ),
            (
                ["--scorer", "miniworld", "--on-flag", "escalate", "--safety-scale", "9"],
                "escalation starts from a preset",
            ),
            (
                ["--scorer", "miniworld", "activation", "--safety", "off"],
                "nothing to read without an edit",
            ),
        ],
    )
    def test_a_mistake_is_one_line_and_no_picture(
        self, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["a star", *options, *FAST]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert says in said.err
        assert said.err.count("\n") == 1
        assert list(Path().iterdir()) == []


def test_a_report_with_a_screening_still_makes_a_png(miniature: Pipeline) -> None:
    screening = Screening(scorers=[Fake(lambda _: 0.0)], rule=RULE)
    result = miniature.run(plan_of(miniature, "a star"), screening=screening)
    assert png_from_image(result.images[0], result.reports[0]).startswith(b"\x89PNG")
