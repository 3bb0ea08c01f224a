"""The text filter: its least squares, its equality with an edit of the weights, where it acts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray

from oracles.families import model_of
from oracles.forgery import edit_manifest, rehash
from oracles.requests import flat_request
from sld_edge.engines import cache
from sld_edge.engines.errors import BundleError, InputError
from sld_edge.runtime import PRESETS, Pipeline, Safety
from sld_edge.runtime import text_filter as filters
from sld_edge.runtime.commands.run import main
from sld_edge.runtime.report import safety_words
from sld_edge.runtime.text_filter import FilterTexts, concepts_from_texts, everyday_texts

CHECKPOINT = Path(__file__).parents[2] / "benchmarks" / "miniworld" / "checkpoint"
SOURCE = "text_encoder.hidden_states"
CONCEPTS = ("skull", "death", "horror")
FAST: dict[str, Any] = {"steps": 3, "sampler": "ddim", "seed": 4}
ONLY_FILTER = Safety(scale=0, text_filter=True)
Floats = NDArray[np.float32]


def rows_of(pipeline: Pipeline, **settings: Any) -> Floats:
    """Return the context of a run's images, [K*B,L,C]."""
    run = pipeline.resolve(flat_request(**{"prompts": ("a red star and a skull",), **settings}))
    conditioner = pipeline._executor.conditioner
    return conditioner.conditioning(run.images, run.time_ids).branch["context"]


def matrix_of(pipeline: Pipeline) -> Floats:
    stored = pipeline.bundle.text_filter()
    assert stored is not None
    return stored[1].matrices[SOURCE]


class TestArithmetic:
    def test_is_an_edit_of_every_key_and_value(self, miniature: Pipeline) -> None:
        """UCE's edited weights W R with the prompt's embedding c, against W with c R."""
        context = rows_of(miniature, safety="off")[1:2]
        matrix = matrix_of(miniature)
        unet = UNet2DConditionModel.from_pretrained(CHECKPOINT / "unet").float().eval()
        latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))

        def predicted(text: Floats) -> Floats:
            with torch.no_grad():
                out = unet(latents, torch.tensor([500]), torch.from_numpy(text)).sample
            return np.asarray(out)

        plain, filtered = predicted(context), predicted(context @ matrix)
        edited = 0
        for name, layer in unet.named_modules():
            if name.endswith(("attn2.to_k", "attn2.to_v")):
                layer.weight.data = layer.weight.data @ torch.from_numpy(matrix).T
                edited += 1
        assert edited >= 8
        moved = np.abs(filtered - plain).max()
        assert moved > 0.1
        assert np.abs(predicted(context) - filtered).max() < 1e-5 * moved + 1e-5

    def test_is_the_least_squares_solution(self) -> None:
        rng = np.random.default_rng(3)
        moved = [(rng.normal(size=(5, 12)), rng.normal(size=(5, 12)), rng.uniform(0.1, 1, 5))]
        kept = [(p := rng.normal(size=(9, 12)), p, rng.uniform(0.1, 1, 9))]
        (c, t, w), (p, _, v) = moved[0], kept[0]
        ridge = filters._RIDGE * np.mean(p**2)
        rows = [
            np.sqrt(w / w.sum())[:, None] * c,
            np.sqrt(filters._PRESERVE * v / v.sum())[:, None] * p,
            np.sqrt(ridge) * np.eye(12),
        ]
        wanted = [np.sqrt(w / w.sum())[:, None] * t, rows[1], rows[2]]
        solution = np.linalg.lstsq(np.concatenate(rows), np.concatenate(wanted))[0]
        np.testing.assert_allclose(filters._matrix(moved, kept), solution, atol=1e-6)

    @pytest.mark.parametrize(
        ("text", "target", "places"),
        [
            ("a skull in snow", "a meadow in snow", [(2, 2), (3, 3), (4, 4), (5, 5)]),
            ("a sk ull now", "a meadow now", [(2, 2), (3, 2), (4, 3), (5, 4)]),
            ("skull", "green meadow", [(1, 1), (2, 3)]),
            ("a skull, skull", "a meadow, meadow", [(2, 2), (3, 3), (4, 4)]),
        ],
    )
    def test_a_concepts_tokens_become_the_guides(
        self, text: str, target: str, places: list[tuple[int, int]]
    ) -> None:
        length = 8

        def ids(words: str, _encoder: str) -> list[int]:
            tokens = [1, *(3 + sum(map(ord, word)) for word in words.split()), 2]
            return tokens + [2] * (length - len(tokens))

        tokens = [filters._tokens(each, ids=ids, encoder="") for each in (text, target)]
        numbers = np.arange(length, dtype=np.float32)[:, None]
        rows, wanted, weights = filters._moved_rows(numbers, numbers, *tokens)
        pairs = list(zip(rows[:, 0].tolist(), wanted[:, 0].tolist(), strict=True))
        assert pairs[: len(places)] == places
        assert all(a == b for a, b in pairs[len(places) :])  # padding
        assert weights[: len(places)].tolist() == [1] * len(places)
        assert weights[len(places) :].sum() == pytest.approx(1)

    def test_texts_to_preserve_name_no_concept(self) -> None:
        texts = FilterTexts(
            concepts=("star", "red hat"), guide="x", preserve=("", "a Star", "stars", "a red hat")
        )
        assert filters._without_concepts(texts) == ["", "stars"]

    def test_everyday_texts(self) -> None:
        texts = everyday_texts()
        assert texts[0] == ""
        assert len(set(texts)) == len(texts) > 50
        assert all(text.strip() == text for text in texts)

    @pytest.mark.parametrize(
        ("texts", "concepts"),
        [
            (("nudity; blood, weapons",), ("nudity", "blood", "weapons")),
            (("a skull", "The Sea", "an egg; egg"), ("skull", "Sea", "egg")),
            (("another; theft",), ("another", "theft")),
        ],
    )
    def test_concepts(self, texts: tuple[str, ...], concepts: tuple[str, ...]) -> None:
        assert concepts_from_texts(texts) == concepts

    def test_no_concept(self) -> None:
        assert concepts_from_texts(("", " ; ,")) == ()


class TestWhereItActs:
    def test_only_on_the_prompts_branch(self, miniature: Pipeline) -> None:
        settings: dict[str, Any] = {
            "prompts": ("a red star and a skull", "a skull"),
            "negative_prompt": ("death", None),
        }
        plain = rows_of(miniature, safety="max", **settings)
        filtered = rows_of(miniature, safety="guard-max", **settings)
        for branch in (slice(0, 2), slice(4, 6)):
            np.testing.assert_array_equal(plain[branch], filtered[branch])
        wanted = plain[2:4].astype(np.float64) @ matrix_of(miniature)
        np.testing.assert_allclose(filtered[2:4], wanted, atol=1e-5)
        assert np.abs(filtered[2:4] - plain[2:4]).max() > 1

    def test_per_image(self, miniature: Pipeline) -> None:
        prompts = ("a skull", "a skull")
        rows = rows_of(miniature, prompts=prompts, safety=["off", "guard"])
        alone = rows_of(miniature, prompts=("a skull",), safety="guard")
        np.testing.assert_array_equal(
            rows[2], rows_of(miniature, prompts=("a skull",), safety="off")[1]
        )
        np.testing.assert_array_equal(rows[3], alone[1])

    def test_a_prompt_without_a_word_stays(self, miniature: Pipeline) -> None:
        wanted, got = (miniature("", safety=safety, **FAST) for safety in ("off", ONLY_FILTER))
        np.testing.assert_array_equal(got.latents, wanted.latents)
        assert not got.reports[0]["safety"]["acted"]

    def test_a_long_prompt(self, miniature: Pipeline) -> None:
        report = miniature("a red star and " * 9 + "a skull", safety="guard", **FAST).reports[0]
        assert report["cut_from_prompts"]
        assert report["safety"]["text_filter"]["taken_out"] == []

    def test_what_it_did_is_reported(self, miniature: Pipeline) -> None:
        result = miniature(["a red star and a skull", "a red star"], safety="guard", **FAST)
        skull, star = (report["safety"]["text_filter"] for report in result.reports)
        assert skull["concepts"] == list(CONCEPTS)
        assert skull["taken_out"] == ["skull"]
        assert [entry["word"] for entry in skull["words"]] == [
            "a",
            "red",
            "star",
            "and",
            "a",
            "skull",
        ]
        assert skull["words"][5]["moved"] > 0.5 > 10 * skull["words"][2]["moved"]
        assert (star["taken_out"], star["moved"] < 0.05 < skull["moved"]) == ([], True)
        assert "“skull” taken out of the prompt" in safety_words(result.reports[0])
        assert "no word taken out" in safety_words(result.reports[1])

    def test_neutral_captions_hardly_move(self, miniature: Pipeline) -> None:
        for prompt in ("a blue heart in the snow", "a small green circle", "a beach"):
            before = rows_of(miniature, prompts=(prompt,), safety="off")[1]
            after = before @ matrix_of(miniature)
            assert np.linalg.norm(after - before) < 0.05 * np.linalg.norm(before)


class TestPresets:
    def test_guard_is_the_filter_and_early(self) -> None:
        assert replace(PRESETS["guard"], text_filter=False) == PRESETS["early"]
        assert replace(PRESETS["guard-max"], text_filter=False) == PRESETS["max"]
        assert replace(PRESETS["early"], stop_step=None) == PRESETS["max"]

    @pytest.mark.parametrize("negative", [None, "a beach"])
    def test_guard_lite_is_the_filter_and_a_negative_prompt(
        self, miniature: Pipeline, negative: str | None
    ) -> None:
        """The caller's negative prompt is joined to the concept, never put in its place."""
        joined = ", ".join(("skull, death, horror", *filter(None, (negative,))))
        lite = miniature("a star", safety="guard-lite", negative_prompt=negative, **FAST)
        wanted = miniature("a star", safety=ONLY_FILTER, negative_prompt=joined, **FAST)
        np.testing.assert_array_equal(lite.latents, wanted.latents)
        report = lite.reports[0]
        assert report["negative_prompt"] == negative
        assert report["safety"]["concept"] == "skull, death, horror"
        assert {call["branches"] for call in report["calls"]} == {2}
        assert "the concept is the negative prompt" in safety_words(report)

    def test_guard_lite_needs_guidance(self, miniature: Pipeline) -> None:
        with pytest.raises(InputError, match=r"guard-lite: a negative prompt has no effect"):
            miniature("a star", safety="guard-lite", guidance_scale=1.0, **FAST)

    def test_a_filter_makes_another_preset(self, miniature: Pipeline) -> None:
        def preset(**settings: Any) -> str:
            request = flat_request(prompts=("a star",), **settings)
            return miniature.resolve(request).images[0].preset

        assert preset(safety="max", text_filter=True) == "guard-max"
        assert preset(safety="guard", text_filter=False) == "early"
        assert preset(safety="guard-max", text_filter=False) == "max"
        assert preset(safety="medium", text_filter="blood") == "custom"
        assert preset(safety="off", text_filter=False) == "off"
        assert preset(safety="off", text_filter=True) == "custom"
        assert preset(safety="guard", text_filter=True) == "guard"


class TestTexts:
    def chosen(self, pipeline: Pipeline, **settings: Any) -> tuple[str, ...]:
        request = flat_request(prompts=("a star",), **{"safety": "guard", **settings})
        return pipeline.resolve(request).images[0].acting_filter

    def test_which_words_are_taken_out(self, miniature: Pipeline, bundle_copy: Path) -> None:
        assert self.chosen(miniature) == CONCEPTS
        assert self.chosen(miniature, safety="max") == ()
        assert self.chosen(miniature, text_filter="a star; red") == ("star", "red")
        assert self.chosen(miniature, text_filter=("a star", "red")) == ("star", "red")
        assert self.chosen(miniature, safety_concept="the snow, star") == ("snow", "star")
        assert self.chosen(miniature, safety_concept=("star", "red")) == ("star", "red")
        edit_manifest(bundle_copy, lambda body: body.pop("text_filter"))
        with Pipeline.load(bundle_copy, provider="cpu") as bare:
            assert self.chosen(bare) == CONCEPTS  # of the safety concept

    @pytest.mark.parametrize(
        ("value", "says"),
        [
            ("", "text filter"),
            (3, "a text or a tuple of texts"),
            ("<|endoftext|>", "says nothing"),
            ("meadow", "does not take 'meadow' out"),
            ("; ".join(f"word{k}" for k in range(65)), "1 to 64"),
        ],
    )
    def test_texts_that_cannot_be_taken_out(
        self, miniature: Pipeline, value: Any, says: str
    ) -> None:
        with pytest.raises(InputError, match=says):
            miniature("a star", safety="guard", text_filter=value, **FAST)

    def test_another_word_is_taken_out_here_and_kept(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("SLD_EDGE_CACHE", str(tmp_path))
        with Pipeline.load(provider="cpu") as first:
            made = first("a red star", safety="guard", text_filter="star", **FAST)
        assert made.reports[0]["safety"]["text_filter"]["taken_out"] == ["star"]
        (kept,) = (tmp_path / cache.FILTERS).iterdir()
        assert any(entry.path == kept for entry in cache.entries())

        def no_fit(*_: object) -> None:
            raise AssertionError("fitted again")

        with monkeypatch.context() as patch, Pipeline.load(provider="cpu") as second:
            patch.setattr("sld_edge.runtime.filter_store.fitted_filter", no_fit)
            again = second("a red star", safety="guard", text_filter="star", **FAST)
        np.testing.assert_array_equal(again.latents, made.latents)
        data = bytearray(kept.read_bytes())
        data[-1] ^= 1
        for damaged in (bytes(data), b"", data[:40]):  # a damaged file is made again
            kept.write_bytes(damaged)
            with Pipeline.load(provider="cpu") as third:
                third_made = third("a red star", safety="guard", text_filter="star", **FAST)
            np.testing.assert_array_equal(third_made.latents, made.latents)
        assert cache.clear()[0] >= 1
        assert not kept.exists()

    def test_without_a_cache(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SLD_EDGE_CACHE", "off")
        with Pipeline.load(provider="cpu") as pipeline:
            made = pipeline("a red heart", safety="guard", text_filter="heart", **FAST)
        assert made.reports[0]["safety"]["text_filter"]["taken_out"] == ["heart"]


class TestSeveralEncoders:
    @pytest.fixture(scope="class")
    def sdxl(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
        preserve = ("a red heart in the snow", "a blue circle", "a big green star on a beach")
        export = {"text_filter": "skull; party", "filter_preserve": preserve}
        model = model_of(tmp_path_factory.mktemp("sdxl"), "sdxl", export=export)
        with model.ours as pipeline:
            yield pipeline

    def test_each_output_has_a_matrix_of_its_own(self, sdxl: Pipeline) -> None:
        stored = sdxl.bundle.text_filter()
        assert stored is not None
        matrices = stored[1].matrices
        request = flat_request(prompts=("a skull",), safety=ONLY_FILTER)
        conditioner = sdxl._executor.conditioner
        outputs = conditioner._outputs("a skull")
        assert list(outputs) == list(matrices)
        run = sdxl.resolve(request)
        branch = conditioner.conditioning(run.images, run.time_ids).branch
        first, second = "text_encoder.hidden_states", "text_encoder_2.hidden_states"
        wanted = [outputs[source] @ matrices[source] for source in (first, second)]
        np.testing.assert_allclose(branch["context"][1], np.concatenate(wanted, axis=-1), atol=1e-5)
        pooled = "text_encoder_2.pooled"
        np.testing.assert_allclose(
            branch["pooled"][1], outputs[pooled] @ matrices[pooled], atol=1e-5
        )
        for source, matrix in matrices.items():
            moved = np.linalg.norm(outputs[source] @ matrix - outputs[source])
            assert moved > 0.05 * np.linalg.norm(outputs[source])

    def test_made_on_the_device(self, sdxl: Pipeline) -> None:
        made = sdxl("a red star", safety="guard", text_filter="star", **FAST)
        assert "star" in made.reports[0]["safety"]["text_filter"]["taken_out"]


def npy(array: NDArray[Any], path: Path) -> None:
    with path.open("wb") as stream:
        np.save(stream, array)


class TestFilesThatLie:
    """A stored filter that does nothing, or another thing, is refused before the first picture."""

    MATRIX = f"text_filter.{SOURCE}.npy"

    def refused(self, bundle: Path, says: str) -> None:
        rehash(bundle)
        with (
            pytest.raises(BundleError, match=says),
            Pipeline.load(bundle, provider="cpu") as pipeline,
        ):
            pipeline("a star", safety="guard", **FAST)

    @pytest.mark.parametrize(
        ("forge", "says"),
        [
            (lambda m: np.eye(len(m), dtype=np.float32), "does not take 'skull' out"),
            (lambda m: (2 * np.eye(len(m)) - m).astype(np.float32), "does not take 'skull' out"),
            (lambda m: np.zeros_like(m) + np.nan, r"finite \(96, 96\)"),
            (lambda m: m[:48], r"finite \(96, 96\)"),
            (lambda m: m.astype(np.float64), "not a NumPy array"),
        ],
        ids=["nothing", "the other way", "NaN", "half", "another type"],
    )
    def test_a_matrix(
        self, bundle_copy: Path, forge: Callable[[Floats], NDArray[Any]], says: str
    ) -> None:
        path = bundle_copy / self.MATRIX
        npy(forge(np.load(path)), path)
        self.refused(bundle_copy, says)

    def test_another_hash(self, bundle_copy: Path) -> None:
        path = bundle_copy / self.MATRIX
        npy(np.eye(96, dtype=np.float32), path)
        with (
            Pipeline.load(bundle_copy, provider="cpu") as pipeline,
            pytest.raises(BundleError, match="is not the file that the bundle was made with"),
        ):
            pipeline("a star", safety="guard", **FAST)

    def test_texts_that_are_no_text(self, bundle_copy: Path) -> None:
        (bundle_copy / "text_filter.txt").write_bytes(b"\xff\xfe")
        self.refused(bundle_copy, "not UTF-8 text")

    @pytest.mark.parametrize(
        ("edit", "says"),
        [
            (lambda entry: entry["arrays"].clear(), "without an array for each output"),
            (lambda entry: entry["arrays"].update(x=entry["preserve"]), "without an array"),
            (lambda entry: entry["concepts"].clear(), "not a list of concepts"),
            (lambda entry: entry.pop("guide"), "lacks the entry 'guide'"),
            (lambda entry: entry["preserve"].update(path="../x"), "leaves the bundle"),
        ],
    )
    def test_an_entry(self, bundle_copy: Path, edit: Callable[[Any], object], says: str) -> None:
        edit_manifest(bundle_copy, lambda body: edit(body["text_filter"]))
        with pytest.raises(BundleError, match=says):
            Pipeline.load(bundle_copy, provider="cpu")


class TestCommand:
    @pytest.fixture(autouse=True)
    def _here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)

    def run(self, *words: str) -> Any:
        options = ["--steps", "2", "--sampler", "ddim", "--output", "s.png", "--force"]
        assert main([*words, *options, "--report", "s.json"]) == 0
        return json.loads(Path("s.json").read_text())["images"][0]["safety"]

    def test_the_users_words(self, capsys: pytest.CaptureFixture[str]) -> None:
        safety = self.run("a red star", "--safety", "strong", "--text-filter", "star; red")
        assert (safety["preset"], safety["scale"]) == ("custom", 2000)
        assert safety["text_filter"]["concepts"] == ["star", "red"]
        assert "“red”, “star” taken out of the prompt" in capsys.readouterr().out

    def test_none(self) -> None:
        safety = self.run("a skull", "--safety", "guard", "--no-text-filter")
        assert (safety["preset"], safety["text_filter"]) == ("early", None)

    def test_stop(self) -> None:
        assert self.run("a skull", "--safety", "max", "--safety-stop", "1")["stop_step"] == 1
        assert self.run("a skull", "--safety", "max", "--safety-stop", "0.3")["stop_step"] == 1

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            (["--text-filter", "x", "--no-text-filter"], "both --text-filter and"),
            (["--text-filter", ";"], "text filter"),
            (["--safety-stop", "0"], "stop_step"),
            (["--safety-stop", "1.5"], "stop_step"),
            (["--safety-stop", "nan"], "stop_step"),
            (["--safety", "off", "--safety-stop", "3"], "nothing with safety off"),
            (["--safety", "weak", "--safety-stop", "1", "--steps", "9"], "stops before it begins"),
        ],
    )
    def test_refused_in_one_line(
        self, words: list[str], says: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["a star", "--output", "s.png", *words]) == 2
        error = capsys.readouterr().err.strip()
        assert says in error
        assert len(error.splitlines()) == 1
        assert not Path("s.png").exists()
