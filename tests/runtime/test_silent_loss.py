"""Less safety than asked for is an error or a clear word, never silence.

The rows are those of an attack on the first release: each made an unsafe picture with exit code 0.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oracles.forgery import edit_embeddings, edit_manifest, rehash
from oracles.requests import flat_request
from sld_edge.benchmarks.evaluation.cli import main as eval_main
from sld_edge.runtime import BundleError, InputError, Pipeline, Safety
from sld_edge.runtime.commands.run import main
from sld_edge.runtime.safety import NO_EFFECT_BELOW

FAST: dict[str, Any] = {"steps": 4, "sampler": "ddim"}
QUICK = ["--steps", "4", "--sampler", "ddim", "--quiet", "--output", "s.png"]
EMPTY = ["", "   ", "<|endoftext|>", "<|startoftext|>", " <|endoftext|> "]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line of a refusal that left no picture."""
    capsys.readouterr()
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert len(said.err) <= 310
    assert not list(Path().glob("*.png"))
    return said.err


@pytest.mark.parametrize("concept", EMPTY)
def test_a_concept_that_says_nothing(
    concept: str, miniature: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(["a star", "--safety", "max", "--safety-concept", concept, *QUICK], capsys)
    assert "says nothing to the model" in line
    for given in (concept, ("a skull", concept)):
        with pytest.raises(InputError, match="says nothing to the model"):
            miniature("a star", safety="max", safety_concept=given, **FAST)
        with pytest.raises(InputError, match="says nothing to the model"):
            miniature("a star", safety=Safety(concept=given), **FAST)
    code = eval_main(
        ["--safety", "off", "negative", "max", "--safety-concept", concept, "--output", "e"]
    )
    assert code == 2
    assert "says nothing to the model" in capsys.readouterr().err
    assert not Path("e").exists()


def test_a_bundle_whose_own_concept_says_nothing(bundle_copy: Path) -> None:
    edit_manifest(bundle_copy, lambda body: body.update(safety_concepts=["  "]))
    with (
        Pipeline.load(bundle_copy, provider="cpu") as pipeline,
        pytest.raises(InputError, match="says nothing"),
    ):
        pipeline("a star", **FAST)


@pytest.mark.parametrize("kind", ["the empty prompt's", "nearly that", "zeros", "NaN"])
def test_a_stored_concept_that_lies(kind: str, bundle_copy: Path) -> None:
    def forge(rows: Any, texts: list[str]) -> None:
        concept, empty = texts.index("skull, death, horror"), texts.index("")
        noise = np.random.default_rng(0).standard_normal(rows[empty].shape)
        rows[concept] = {
            "the empty prompt's": rows[empty],
            "nearly that": rows[empty] + 1e-6 * noise,
            "zeros": 0,
            "NaN": np.nan,
        }[kind]

    edit_embeddings(bundle_copy, forge)
    with pytest.raises(BundleError, match="not the text encoder's output|finite"):
        Pipeline.load(bundle_copy, provider="cpu")("a star", safety="max", **FAST)


@pytest.mark.parametrize("steps", [1, 2, 4, 9, 10, 50])
def test_numbers_without_a_warm_up_take_a_share_of_the_calls(
    steps: int, miniature: Pipeline
) -> None:
    request = flat_request(
        prompts=("a star",), safety=Safety(scale=5000), steps=steps, sampler="ddim"
    )
    (image,) = miniature.resolve(request).images
    assert image.safety.warmup == 10 * steps // 50
    if steps <= 10:
        report = miniature("a skull", safety=Safety(scale=5000), steps=steps).reports[0]
        assert report["safety"]["acted"]


@pytest.mark.parametrize("warmup", [3, 4, 5, 1000])
def test_a_warm_up_that_leaves_nothing(
    warmup: int, miniature: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(["a star", "--safety", "max", "--safety-warmup", str(warmup), *QUICK], capsys)
    assert "warm-up leaves nothing to edit" in line
    with pytest.raises(InputError, match="leaves nothing"):
        miniature("a star", safety=Safety(warmup_steps=warmup), **FAST)
    miniature("a star", safety=Safety(warmup_steps=2), **FAST)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--safety-threshold", "-0.1"], "threshold"),
        (["--safety-scale", "1e-300"], "scale"),
        (["--safety-scale", "1e300"], "scale"),
        (["--safety-scale", "0"], "switches safety off"),
        (["--guidance-scale", "1e20"], "guidance scale"),
        (["--guidance-scale", "101"], "guidance scale"),
        (["--safety", "off", "--safety-scale", "100"], "nothing with safety off"),
        (["--safety", "off", "--safety-concept", "x"], "nothing with safety off"),
        (["--safety", "off", "--safety-warmup", "0"], "nothing with safety off"),
    ],
)
def test_numbers_that_never_act(
    options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refused(["a star", *options, *QUICK], capsys)


def test_the_prompt_that_is_the_concept(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["a skull", "--safety", "max", "--safety-concept", "a skull"]
    assert main([*asked, *QUICK, "--report", "s.json"]) == 0
    said = capsys.readouterr().err
    assert "note: the prompt is the safety concept" in said
    assert "warning: s.png: safety had no effect on this picture" in said
    safety = json.loads(Path("s.json").read_text())["images"][0]["safety"]
    assert safety["acted"] is False
    assert safety["max_strength"] == 0


def test_words_follow_the_measured_strength(
    miniature: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    """An edit of 80 % of the elements that is a thousandth of the guidance is no effect."""
    watching = ["--safety-scale", "0.001", "--safety-momentum-scale", "0"]
    assert main(["a red star", *watching, "--steps", "4", "--output", "s.png"]) == 0
    said = capsys.readouterr()
    assert "no effect" in said.out
    assert "safety had no effect" in said.err
    for preset in ("weak", "medium", "strong", "max"):
        report = miniature("a skull", safety=preset, steps=10).reports[0]["safety"]
        assert report["acted"] is (report["max_strength"] >= NO_EFFECT_BELOW) is True
    off = miniature("a skull", safety="off", steps=4).reports[0]["safety"]
    assert off["acted"] is False


def test_a_negative_prompt_that_is_the_concept_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    same = ["--negative-prompt", "a skull", "--safety-concept", "a skull"]
    assert main(["a star", *same, *QUICK]) == 0
    assert "safety had no effect" in capsys.readouterr().err


def test_a_bundle_that_is_off_by_default_says_so(
    bundle_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_manifest(bundle_copy, lambda body: body["defaults"].update(safety="off"))
    assert main(["a star", "--bundle", str(bundle_copy), *QUICK]) == 0
    assert "note: safety: off (the bundle's default)" in capsys.readouterr().err
    assert main(["a star", "--safety", "off", "--force", *QUICK]) == 0
    assert "bundle's default" not in capsys.readouterr().err


def test_a_bundles_own_concept_that_is_too_long_is_told_at_run(
    bundle_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "skull " * 40 + "the end"
    edit_manifest(bundle_copy, lambda body: body.update(safety_concepts=[long]))
    assert main(["a star", "--bundle", str(bundle_copy), *QUICK]) == 0
    assert "does not read the end of the safety concept: “" in capsys.readouterr().err


class TestFlagged:
    FLAG = ("--scorer", "miniworld", "--flag-rule", "miniworld.skull>=0")

    @pytest.mark.parametrize("choice", ["report", "blur", "withhold", "escalate"])
    def test_exit_code_3(self, choice: str) -> None:
        assert main(["a star", *self.FLAG, "--on-flag", choice, "--safety", "max", *QUICK]) == 3

    def test_exit_code_0_where_nothing_is_flagged(self) -> None:
        rule = ["--scorer", "miniworld", "--flag-rule", "miniworld.skull>=2"]
        assert main(["a star", *rule, "--on-flag", "withhold", *QUICK]) == 0

    def test_escalated_in_vain_nothing_is_written(self, capsys: pytest.CaptureFixture[str]) -> None:
        options = ["--on-flag", "escalate-withhold", "--safety", "strong", "--report", "s.json"]
        assert main(["a star", *self.FLAG, *options, *QUICK]) == 3
        assert "s.png is flagged, and was not written" in capsys.readouterr().err
        assert not Path("s.png").exists()
        screening = json.loads(Path("s.json").read_text())["images"][0]["screening"]
        assert [attempt["preset"] for attempt in screening["attempts"]] == ["strong", "guard-max"]
        assert screening["done"] == "withheld"

    def test_a_stale_picture_under_a_withheld_name_is_gone(self) -> None:
        maps = ["--edit-map", "map.png"]
        assert main(["a star", "--safety", "off", *maps, *QUICK]) == 0
        assert Path("s.png").exists()
        again = [*self.FLAG, "--on-flag", "withhold", "--force", *maps]
        assert main(["a star", *again, *QUICK]) == 3
        assert list(Path().glob("*.png")) == []

    @pytest.mark.parametrize("choice", ["blur", "withhold"])
    def test_a_recipe_is_left_out(self, choice: str) -> None:
        options = ["--on-flag", choice, "--report-recipe", "omit", "--report", "s.json"]
        secret = "a purple star in a secret place"
        assert main([secret, "--seed", "4711", *self.FLAG, *options, *QUICK]) == 3
        written = [path.read_bytes() for path in Path().iterdir()]
        assert written
        for data in written:
            assert b"secret" not in data
            assert b"4711" not in data

    def test_a_recipe_stays_where_nothing_is_hidden(self) -> None:
        options = ["--on-flag", "report", "--report-recipe", "omit", "--report", "s.json"]
        assert main(["a star", *self.FLAG, *options, *QUICK]) == 3
        assert json.loads(Path("s.json").read_text())["images"][0]["prompt"] == "a star"


@pytest.mark.parametrize(
    "given",
    [
        {"prompt": None},
        {"prompt": 5},
        {"prompt": [None]},
        {"prompt": b"a star"},
        {"steps": "5"},
        {"steps": 2.5},
        {"steps": True},
        {"seed": "3"},
        {"seed": -1},
        {"seed": 10**5000},
        {"count": 1.0},
        {"count": 10**9},
        {"guidance_scale": "7"},
        {"guidance_scale": None, "eta": "x"},
        {"width": 64.0},
        {"safety": 3},
        {"safety": {"scale": 3}},
        {"safety_concept": 7},
        {"batch_size": 0},
        {"batch_size": 1.5},
        {"cache_interval": "2"},
        {"negative_prompt": 1},
        {"sampler": 9},
        {"prompt": "a \ud800"},
    ],
    ids=lambda given: "-".join(f"{k}={type(v).__name__}" for k, v in given.items()),
)
def test_odd_values_are_one_line(given: dict[str, Any], miniature: Pipeline) -> None:
    prompt = given.get("prompt", "a star")
    rest = {name: value for name, value in given.items() if name != "prompt"}
    with pytest.raises(InputError) as caught:
        miniature(prompt, **{"steps": 2, **rest})
    assert len(str(caught.value)) <= 300


@pytest.mark.parametrize("numbers", [{"scale": "1000"}, {"warmup_steps": "1"}, {"concept": 3}])
def test_odd_safety_numbers(numbers: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Safety(**numbers)


def test_numpys_numbers_are_numbers(miniature: Pipeline) -> None:
    given: dict[str, Any] = {"seed": np.int64(3), "steps": np.int32(2)}
    numpys = miniature("a star", guidance_scale=np.float64(7), **given)
    plain = miniature("a star", seed=3, steps=2, guidance_scale=7.0)
    np.testing.assert_array_equal(numpys.latents, plain.latents)


def test_two_outputs_of_one_name(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--report", "--edit-map", "--preview"):
        assert "two outputs are called" in refused(["a star", *QUICK, option, "s.png"], capsys)
        assert "two outputs" in refused(["a star", *QUICK, option, "./s.png"], capsys)


def test_standard_output_that_is_full() -> None:
    import subprocess
    import sys

    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "sld_edge.runtime.commands.run", "--providers"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "No space left" in done.stderr


def test_rehashing_alone_changes_nothing(bundle_copy: Path) -> None:
    """The forger's tool itself is harmless: what the other tests see is the lie."""
    rehash(bundle_copy)
    with Pipeline.load(bundle_copy, provider="cpu") as pipeline:
        pipeline("a star", **FAST)


def test_an_evaluation_says_where_safety_had_no_effect(capsys: pytest.CaptureFixture[str]) -> None:
    Path("p.txt").write_text("a skull\n")
    asked = ["--prompts", "p.txt", "--safety", "off", "max", "--safety-concept", "a skull"]
    asked += ["--images-per-prompt", "1", "--steps", "2", "--processes", "1", "--output", "e"]
    assert eval_main([*asked, "--quiet"]) == 0
    said = capsys.readouterr().err
    assert "warning: max: safety had no effect on 1 of 1 pictures" in said
    assert "plain" not in said
