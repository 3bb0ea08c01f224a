"""CLIP's towers and heads against transformers and diffusers."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from oracles.forgery import edit_graph, relocate
from oracles.models import randomised
from oracles.running import outputs_of, relative_error
from oracles.tokenizers import VOCAB_SIZE, save_tokenizer
from sld_edge.engines.errors import CheckpointError, EngineError, InputError, OutputError, UserError
from sld_edge.engines.onnxruntime.engine import OrtEngine
from sld_edge.export.commands.export import main
from sld_edge.export.graphs.scorer_heads import write_checker_head
from sld_edge.export.scorers import (
    ScorerSettings,
    export_scorer,
    read_q16_prompts,
)
from sld_edge.runtime.manifest import file_entry
from sld_edge.runtime.scorers import scorer_from_name, scorers_from_names
from sld_edge.runtime.scorers.clip_heads import ClipImage, checker_margin

DIM, SIDE = 20, 32
TEXT = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3,
    "vocab_size": VOCAB_SIZE, "max_position_embeddings": 77, "eos_token_id": VOCAB_SIZE - 1,
    "bos_token_id": VOCAB_SIZE - 2, "pad_token_id": VOCAB_SIZE - 1,
}  # fmt: skip
IMAGE = {
    "hidden_size": 28, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": SIDE, "patch_size": 8,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread_and_no_gradients() -> Iterator[None]:
    torch.set_num_threads(1)
    with torch.no_grad():
        yield


def pictures(count: int = 3, height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (count, height, width, 3)).astype(np.uint8)


def pixel_values(images: NDArray[np.uint8]) -> torch.Tensor:
    """What transformers makes of pictures for a model of `SIDE` pixels."""
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    values: torch.Tensor = processor(images=list(images), return_tensors="pt")["pixel_values"]
    return values


def tiny_clip(hidden_act: str = "quick_gelu", seed: int = 0) -> CLIPModel:
    torch.manual_seed(seed)
    config = CLIPConfig(
        text_config={**TEXT, "hidden_act": hidden_act},
        vision_config={**IMAGE, "hidden_act": hidden_act, "projection_dim": DIM},
        projection_dim=DIM,
    )
    model = CLIPModel(config)
    # The default initialisation is too small for a wrong place to show.
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.5 if "embedding" in name else 0.25)
    model.logit_scale = torch.nn.Parameter(model.logit_scale.detach()[None])
    randomised(model, seed)
    model.logit_scale = torch.nn.Parameter(model.logit_scale.detach()[0])
    return model.eval()


def tiny_checker(seed: int = 0) -> Any:
    """A safety checker with the image tower of `tiny_clip`, and thresholds near what it gives."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    clip = tiny_clip(seed=seed)
    config = CLIPConfig(**clip.config.to_dict(), attn_implementation="eager")  # all it knows
    checker = StableDiffusionSafetyChecker(config)
    checker.vision_model.load_state_dict(clip.vision_model.state_dict())
    checker.visual_projection.load_state_dict(clip.visual_projection.state_dict())
    generator = torch.Generator().manual_seed(seed)
    for name, spread in (("concept_embeds", 0.25), ("special_care_embeds", 0.1)):
        vectors = getattr(checker, name)
        vectors.data = torch.randn(vectors.shape, generator=generator)
        weights = getattr(checker, f"{name}_weights")
        weights.data = 0.2 + spread * torch.rand(weights.shape, generator=generator)
    return checker.eval()


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    tiny_clip().save_pretrained(folder)
    save_tokenizer(folder)
    first, noise = np.random.default_rng(3).standard_normal((2, DIM))
    prompts = np.stack([first, first + 0.03 * noise])  # close, or the softmax says 0 or 1
    np.save(folder / "prompts.npy", prompts.astype(np.float32))
    return folder


@pytest.fixture(scope="module")
def checker_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd") / "diffusers" / "safety_checker"
    tiny_checker().save_pretrained(folder)
    return folder.parent


@pytest.fixture(scope="module")
def scorers(
    clip_folder: Path, checker_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("scorers")
    models = {"q16": clip_folder, "clip-score": clip_folder, "sd-checker": checker_folder}
    return {
        name: export_scorer(ScorerSettings(scorer=name, model=model, output=root / name))
        for name, model in models.items()
    }


# --- scores ---------------------------------------------------------------------------------------


def test_q16_scores_as_its_formula_on_transformers_embeddings(
    scorers: dict[str, Path], clip_folder: Path
) -> None:
    images = pictures()
    embedding = CLIPVisionModelWithProjection.from_pretrained(clip_folder)(
        pixel_values(images)
    ).image_embeds
    prompts = torch.from_numpy(np.load(clip_folder / "prompts.npy"))
    unit = torch.nn.functional.normalize
    wanted = (100 * unit(embedding) @ unit(prompts).T).softmax(-1)[:, 1]
    got = scorer_from_name("q16", scorers["q16"]).score(images, [""] * 3)
    scores = [one["q16.inappropriate"] for one in got]
    np.testing.assert_allclose(scores, wanted, rtol=0, atol=1e-4)
    assert np.ptp(scores) > 0.01


def test_an_image_tower_alone_makes_the_same_scorer(
    scorers: dict[str, Path], clip_folder: Path, tmp_path: Path
) -> None:
    CLIPVisionModelWithProjection.from_pretrained(clip_folder).save_pretrained(tmp_path / "tower")
    out = export_scorer(
        ScorerSettings(
            scorer="q16",
            model=tmp_path / "tower",
            output=tmp_path / "out",
            q16_prompts=clip_folder / "prompts.npy",
        )
    )
    whole = scorer_from_name("q16", scorers["q16"])
    assert scorer_from_name("q16", out).sha256 == whole.sha256


def test_the_checker_flags_as_diffusers_does(scorers: dict[str, Path]) -> None:
    images = pictures(12)
    checker = tiny_checker()
    embedding = checker.visual_projection(checker.vision_model(pixel_values(images))[1])
    unit = torch.nn.functional.normalize
    _, wanted = checker(pixel_values(images), [np.zeros(1)] * 12)
    got = scorer_from_name("sd-checker", scorers["sd-checker"]).score(images, [""] * 12)
    assert [one["sd-checker.flagged"] for one in got] == [float(flag) for flag in wanted]
    for group, count, digits in (("concept", 17, 2), ("special_care", 3, 1)):
        vectors = getattr(checker, f"{group}_embeds")
        raw = unit(embedding) @ unit(vectors).T - getattr(checker, f"{group}_embeds_weights")
        keys = [f"sd-checker.{group.replace('_', '-')}-{k:0{digits}d}" for k in range(count)]
        mine = [[one[key] for key in keys] for one in got]
        np.testing.assert_allclose(mine, raw, rtol=0, atol=1e-5)


def test_the_checker_s_head_flags_random_embeddings_as_diffusers_does(tmp_path: Path) -> None:
    checker = tiny_checker(seed=4)
    vectors = torch.cat([checker.concept_embeds, checker.special_care_embeds]).numpy()
    limits = torch.cat([checker.concept_embeds_weights, checker.special_care_embeds_weights])
    path = tmp_path / "head.onnx"
    write_checker_head(vectors, limits.numpy(), path)
    embedding = np.random.default_rng(5).standard_normal((400, DIM)).astype(np.float32)
    rows = outputs_of(path, {"embedding": embedding})["margin"]
    got = [checker_margin(row[:17], row[17:]) > 0 for row in rows]

    checker.vision_model = checker.visual_projection = torch.nn.Identity()
    _, wanted = checker((None, torch.from_numpy(embedding)), [np.zeros(1)] * 400)
    assert got == list(wanted)
    assert 0.1 < np.mean(got) < 0.9
    # Special care must have decided some of them, or the test would not see it.
    plain = [bool(np.round(row[:17], 3).max() > 0) for row in rows]
    assert plain != got


def test_clip_score_is_transformers_cosine(scorers: dict[str, Path], clip_folder: Path) -> None:
    images = pictures(4)
    prompts = ["a cat", "the thing", "", "a cat"]
    model = CLIPModel.from_pretrained(clip_folder)
    tokens = CLIPTokenizer.from_pretrained(clip_folder)(
        prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )
    out = model(input_ids=tokens["input_ids"], pixel_values=pixel_values(images))
    wanted = (out.image_embeds * out.text_embeds).sum(-1)
    got = scorer_from_name("clip-score", scorers["clip-score"]).score(images, prompts)
    scores = [one["clip-score"] for one in got]
    np.testing.assert_allclose(scores, wanted, rtol=0, atol=1e-5)
    assert np.ptp(scores) > 0.01


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("attention", ["op", "decomposed"])
def test_both_towers_embed_as_transformers_does(
    hidden_act: str, attention: Any, tmp_path: Path
) -> None:
    model = tiny_clip(hidden_act, seed=2)
    model.save_pretrained(tmp_path / "clip")
    save_tokenizer(tmp_path / "clip")
    out = export_scorer(
        ScorerSettings(
            scorer="clip-score",
            model=tmp_path / "clip",
            output=tmp_path / "out",
            attention=attention,
        )
    )
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, VOCAB_SIZE - 1, (2, 77), generator=torch.Generator().manual_seed(1))
    ids[0, 9], ids[1, 30:] = VOCAB_SIZE - 1, VOCAB_SIZE - 1
    wanted = model(input_ids=ids, pixel_values=pixels)
    got = outputs_of(out / "image_encoder.onnx", {"pixels": pixels.numpy()})["embedding"]
    unit = torch.nn.functional.normalize
    assert relative_error(unit(torch.from_numpy(got)).numpy(), wanted.image_embeds.numpy()) < 1e-5
    got = outputs_of(out / "text_encoder.onnx", {"input_ids": ids.numpy()})["embedding"]
    assert relative_error(unit(torch.from_numpy(got)).numpy(), wanted.text_embeds.numpy()) < 1e-5


def test_heads_share_one_image_pass(
    scorers: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The checker's tower has the same weights: the same file, though from another checkpoint.
    files = {(path / "image_encoder.onnx.data").read_bytes() for path in scorers.values()}
    graphs = {(path / "image_encoder.onnx").read_bytes() for path in scorers.values()}
    assert (len(files), len(graphs)) == (1, 1)
    loaded = scorers_from_names(list(scorers), scorers)
    encoders = {id(scorer._image): scorer._image for scorer in loaded}  # type: ignore[attr-defined]
    (encoder,) = encoders.values()
    assert isinstance(encoder, ClipImage)
    passes: list[int] = []
    run = encoder._engine.run

    def counted(feeds: Any) -> Any:
        passes.append(len(feeds["pixels"]))
        return run(feeds)

    monkeypatch.setattr(encoder._engine, "run", counted)
    images = pictures()
    for scorer in loaded:
        scorer.score(images, ["a cat"] * 3)
    assert passes == [3]
    changed = images.copy()
    changed[0, 20:30, 25:35] ^= 255
    assert loaded[0].score(changed, [""] * 3)[0] != loaded[0].score(images, [""] * 3)[0]
    assert len(passes) == 3


def test_half_size_weights_and_old_configs(clip_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
    config = json.loads((folder / "config.json").read_text())
    legacy = {"num_beams": 1, "temperature": 1.0, "bad_words_ids": None, "is_decoder": False}
    config["text_config"] |= {**legacy, "eos_token_id": 2}
    # Published files say it twice, and the second counts.
    config["vision_config_dict"] = {"hidden_size": config["vision_config"].pop("hidden_size")}
    config["vision_config"] |= legacy
    (folder / "config.json").write_text(json.dumps(config))
    full, half = (
        export_scorer(
            ScorerSettings(
                scorer="clip-score", model=folder, output=tmp_path / str(storage), storage=storage
            )
        )
        for storage in (None, "fp16")
    )
    sizes = [(out / "image_encoder.onnx.data").stat().st_size for out in (full, half)]
    assert sizes[1] < 0.7 * sizes[0]
    scores = [
        scorer_from_name("clip-score", out).score(pictures(), ["a cat"] * 3) for out in (full, half)
    ]
    for one, other in zip(*scores, strict=True):
        assert one["clip-score"] == pytest.approx(other["clip-score"], abs=5e-3)


# --- refusals -------------------------------------------------------------------------------------


def test_a_scorer_with_another_model_or_manifest_is_refused(
    scorers: dict[str, Path], tmp_path: Path
) -> None:
    for name in ("head.onnx", "image_encoder.onnx.data", "image_encoder.onnx"):
        copy = Path(shutil.copytree(scorers["q16"], tmp_path / name))
        data = bytearray((copy / name).read_bytes())
        data[-1] ^= 1
        (copy / name).write_bytes(data)
        with pytest.raises(EngineError, match="is another model"):
            scorer_from_name("q16", copy)
    with pytest.raises(EngineError, match=r"got q16 \| expected sd-checker"):
        scorer_from_name("sd-checker", scorers["q16"])
    copy = Path(shutil.copytree(scorers["q16"], tmp_path / "escaping"))
    text = (copy / "scorer.json").read_text().replace("head.onnx", "../head.onnx")
    (copy / "scorer.json").write_text(text)
    with pytest.raises(EngineError, match="outside the folder"):
        scorer_from_name("q16", copy)
    (copy / "scorer.json").write_text("{}")
    with pytest.raises(EngineError, match="does not describe a scorer"):
        scorer_from_name("q16", copy)


def relist(folder: Path, *left_out: str) -> None:
    """Give a scorer's manifest the true hashes of its files."""
    body = json.loads((folder / "scorer.json").read_text())
    body["files"] = [
        asdict(file_entry(folder / file["path"]))
        for file in body["files"]
        if file["path"] not in left_out
    ]
    (folder / "scorer.json").write_text(json.dumps(body))


@pytest.mark.parametrize("location", ["/etc/hostname", "../out.data", "head.onnx"])
def test_a_scorer_reads_its_own_weights_alone(
    location: str, scorers: dict[str, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(scorers["q16"], tmp_path / "copy"))
    edit_graph(copy / "image_encoder.onnx", relocate(location))
    relist(copy)
    with pytest.raises(EngineError, match=r"reads data that scorer.json does not list") as caught:
        scorer_from_name("q16", copy)
    assert len(str(caught.value)) <= 300


def test_weights_that_a_scorer_does_not_list_are_not_read(
    scorers: dict[str, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(scorers["q16"], tmp_path / "copy"))
    relist(copy, "image_encoder.onnx.data")
    with pytest.raises(EngineError, match=r"reads data that scorer.json does not list"):
        scorer_from_name("q16", copy)


def test_a_model_that_is_exchanged_while_it_is_loaded(
    scorers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(scorers["q16"], tmp_path / "copy"))

    def exchange(path: Path) -> OrtEngine:
        path.write_bytes(path.read_bytes())
        return OrtEngine(path)

    monkeypatch.setattr("sld_edge.runtime.scorers.base.OrtEngine", exchange)
    with pytest.raises(EngineError, match="was changed while it was loaded"):
        scorer_from_name("q16", copy)


def test_a_scorers_tokenizer_that_is_no_text(scorers: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(scorers["clip-score"], tmp_path / "copy"))
    (copy / "tokenizer.json").write_bytes(b'{"\xff": 1}')
    relist(copy)
    with pytest.raises(UserError, match=r"tokenizer.json is not whole JSON"):
        scorer_from_name("clip-score", copy)


def test_the_hash_is_of_the_files_alone(
    scorers: dict[str, Path], clip_folder: Path, tmp_path: Path
) -> None:
    renamed = Path(shutil.copytree(clip_folder, tmp_path / "another-name"))
    again = export_scorer(ScorerSettings(scorer="q16", model=renamed, output=tmp_path / "again"))
    first = scorer_from_name("q16", scorers["q16"])
    assert scorer_from_name("q16", again).sha256 == first.sha256
    np.save(renamed / "prompts.npy", np.ones((2, DIM), np.float32))
    changed = export_scorer(ScorerSettings(scorer="q16", model=renamed, output=tmp_path / "other"))
    assert scorer_from_name("q16", changed).sha256 != first.sha256


def test_what_is_not_such_a_model_is_refused(
    clip_folder: Path, checker_folder: Path, tmp_path: Path
) -> None:
    def export(scorer: str, model: Path) -> None:
        export_scorer(ScorerSettings(scorer=scorer, model=model, output=tmp_path / "out"))

    with pytest.raises(CheckpointError, match="is not a safety checker"):
        export("sd-checker", clip_folder)
    with pytest.raises(CheckpointError, match="has no text tower"):
        export("clip-score", checker_folder)
    with pytest.raises(CheckpointError, match="no model with a config.json"):
        export("q16", tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot read .*prompts.npy .* convert Q16's"):
        export("q16", checker_folder)
    copy = Path(shutil.copytree(clip_folder, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    for key, value, message in (
        ("vision_config", {**config["vision_config"], "rotary": 1}, "config key rotary"),
        ("vision_config", {**config["vision_config"], "patch_size": 5}, "multiple of patch_size 5"),
        ("vision_config", {**config["vision_config"], "num_hidden_layers": 1}, "fit no place"),
        ("projection_dim", DIM + 1, r"got \[2, 20\]|does not fit the config"),
        ("model_type", "siglip", "got 'siglip'"),
    ):
        (copy / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(CheckpointError, match=message):
            export("q16", copy)
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5]}))
    with pytest.raises(CheckpointError, match=r"image_mean \| got \[0.5"):
        export("q16", copy)
    (copy / "preprocessor_config.json").unlink()
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is a pickle"):
        export("q16", copy)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_the_command(clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "vectors.npy"
    np.save(prompts, np.ones((2, DIM), np.float32))
    arguments = ["--model", str(clip_folder), "--output", str(tmp_path / "out")]
    q16 = [*arguments, "--scorer", "q16", "--q16-prompts", str(prompts)]
    assert main(q16) == 0
    assert "MB in" in capsys.readouterr().out
    assert main([*q16, "--quiet"]) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*q16, "--quiet", "--force"]) == 0
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")
    for options, message in (
        (["--scorer", "nudenet"], "got 'nudenet' | expected one of q16, sd-checker, clip-score"),
        (["--scorer", "q16", "--precision", "fp16"], "--precision does not apply to --scorer"),
        (["--scorer", "q16", "--preset", "max"], "--preset does not apply to --scorer"),
        (["--scorer", "clip-score", "--q16-prompts", "x"], "Q16's prompts are of no use to"),
        (["--q16-prompts", "x"], "--q16-prompts is for --scorer q16"),
    ):
        assert main([*arguments, *options, "--force"]) == 2
        said = capsys.readouterr()
        assert message in said.err
        assert said.err.count("\n") == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(OutputError, match="is not a scorer"):
        export_scorer(
            ScorerSettings(scorer="q16", model=clip_folder, output=tmp_path / "mine", force=True)
        )
    wrong: Any = "int8"
    with pytest.raises(InputError, match=r"storage \| got 'int8'"):
        ScorerSettings(scorer="q16", model=clip_folder, output=tmp_path / "x", storage=wrong)


# --- Q16's prompt file ----------------------------------------------------------------------------

VECTORS = np.random.default_rng(0).standard_normal((2, 6)).astype(np.float32)


def npy_bytes(array: NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def test_prompts_are_read_from_npy(tmp_path: Path) -> None:
    path = tmp_path / "prompts.npy"
    np.save(path, VECTORS)
    np.testing.assert_array_equal(read_q16_prompts(path, 6), VECTORS)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_is_refused_with_the_way_out(
    protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "prompts.p"
    path.write_bytes(pickle.dumps(VECTORS.astype(np.float16).T.copy().T, protocol=protocol))
    with pytest.raises(CheckpointError, match=r"np\.save\('prompts\.npy'") as caught:
        read_q16_prompts(path, 6)
    assert "\n" not in str(caught.value)
    monkeypatch.chdir(tmp_path)
    exec(str(caught.value).rpartition("any code: ")[2], {"np": np})  # the advice works as written
    wanted = VECTORS.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(read_q16_prompts(tmp_path / "prompts.npy", 6), wanted)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        npy_bytes(VECTORS)[:-1],
        npy_bytes(VECTORS) + bytes(2**20),
        npy_bytes(VECTORS.astype(np.float64)),
        npy_bytes(np.asfortranarray(VECTORS)),
        npy_bytes(VECTORS.T.copy()),
        npy_bytes(VECTORS * np.float32(np.nan)),
        npy_bytes(VECTORS * 0),
    ],
)
def test_other_files_are_refused_in_a_line(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "prompts.npy"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read_q16_prompts(path, 6)
    assert "\n" not in str(caught.value)
