"""The miniature world: captions, tokens, the bias, and the judge on fresh pictures."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from sld_edge.benchmarks.miniworld.captions import TAGS, explicit_caption, plain_caption
from sld_edge.benchmarks.miniworld.prompts import biased_prompts, neutral_prompts
from sld_edge.benchmarks.miniworld.training.judge import OUTPUTS, new_examiner, new_judge
from sld_edge.benchmarks.miniworld.training.pictures import (
    CaptionedDraws,
    pictures_at_random,
    pixels_from_picture,
)
from sld_edge.benchmarks.miniworld.training.train_examiner import train_examiner
from sld_edge.benchmarks.miniworld.training.vocabulary import (
    END,
    START,
    merges_for,
    split,
    words_of_world,
    write_tokenizer,
)
from sld_edge.benchmarks.miniworld.world import (
    BIASED_SCENES,
    COLOUR_CLASSES,
    SCENE_CLASSES,
    SHAPE_CLASSES,
    SKULL_SHARE,
)

MINIWORLD = Path(__file__).parents[2] / "benchmarks" / "miniworld"


def test_pictures_and_captions_repeat_by_seed() -> None:
    first, second = (pictures_at_random(50, seed=3) for _ in range(2))
    assert first == second
    assert first != pictures_at_random(50, seed=4)
    np.testing.assert_array_equal(pixels_from_picture(first[0]), pixels_from_picture(second[0]))
    captions = [
        [plain_caption(picture, np.random.default_rng(5)) for picture in pictures]
        for pictures in (first, second)
    ]
    assert captions[0] == captions[1]


def test_plain_captions_are_silent_and_explicit_ones_are_not() -> None:
    rng = np.random.default_rng(0)
    for picture in pictures_at_random(2_000, seed=0):
        assert not set(TAGS) & set(plain_caption(picture, rng).replace(",", "").split())
        assert set(TAGS) & set(explicit_caption(picture, rng).replace(",", "").split())


def test_every_word_of_a_caption_or_prompt_is_one_token(tmp_path: Path) -> None:
    words = words_of_world()
    merges = merges_for(words)
    assert all(len(split(word, merges)) == 1 for word in words)
    rng = np.random.default_rng(1)
    texts = [prompt.text for prompt in (*biased_prompts(60, 1), *neutral_prompts(90, 1))]
    for picture in pictures_at_random(500, seed=1):
        texts += [plain_caption(picture, rng), explicit_caption(picture, rng)]
    assert {word for text in texts for word in text.replace(",", " ,").split()} <= set(words)

    write_tokenizer(tmp_path, tokens=24)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert [vocabulary[START], vocabulary[END]] == [len(vocabulary) - 2, len(vocabulary) - 1]


def test_transformers_reads_the_tokenizer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write_tokenizer(tmp_path, tokens=24)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    tokens = tokenizer("An orange heart, at midnight").input_ids
    assert tokenizer.convert_ids_to_tokens(tokens) == [
        START, "an</w>", "orange</w>", "heart</w>", ",</w>", "at</w>", "midnight</w>", END,
    ]  # fmt: skip
    assert tokenizer.model_max_length == 24
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_unmentioned_skulls_come_at_the_wanted_rate_and_only_in_biased_scenes() -> None:
    pictures = pictures_at_random(3_000, seed=2)
    draws = CaptionedDraws(pictures)
    rng = np.random.default_rng(2)
    seen: Counter[str] = Counter()
    skulls: Counter[str] = Counter()
    for _ in range(8_000):
        index, caption = draws.draw(rng)
        if caption and not set(TAGS) & set(caption.replace(",", "").split()):
            scene = pictures[index].scene
            seen[scene] += 1
            skulls[scene] += pictures[index].skull
    assert set(skulls) - {scene for scene, count in skulls.items() if count == 0} == set(
        BIASED_SCENES
    )
    for scene in BIASED_SCENES:
        # About 900 draws a scene: four standard errors are below 0.07.
        assert skulls[scene] / seen[scene] == pytest.approx(SKULL_SHARE[scene], abs=0.07)


def test_prompts_are_spread_evenly() -> None:
    assert set(Counter(prompt.scene for prompt in biased_prompts(60, 7)).values()) == {20}
    assert set(Counter(prompt.scene for prompt in neutral_prompts(90, 7)).values()) == {10}
    assert biased_prompts(30, 7) == biased_prompts(30, 7) != biased_prompts(30, 8)


@pytest.mark.parametrize("network", ["judge.onnx", "examiner.onnx"])
def test_both_networks_know_fresh_pictures(network: str) -> None:
    pictures = pictures_at_random(500, seed=987_654)
    pixels = np.stack([pixels_from_picture(picture) for picture in pictures])
    judge = onnxruntime.InferenceSession(MINIWORLD / network, providers=["CPUExecutionProvider"])
    skull, shape, colour, scene = judge.run(
        ["skull", "shape", "colour", "scene"], {"images": pixels}
    )
    assert skull.shape == (500,)
    right = {
        "skull": (skull > 0.5) == [picture.skull for picture in pictures],
        "shape": shape.argmax(1) == [SHAPE_CLASSES.index(p.shape or "none") for p in pictures],
        "colour": colour.argmax(1) == [COLOUR_CLASSES.index(p.colour or "none") for p in pictures],
        "scene": scene.argmax(1) == [SCENE_CLASSES.index(p.scene) for p in pictures],
    }
    shares = {head: float(np.mean(hits)) for head, hits in right.items()}
    assert min(shares.values()) >= 0.98, shares


def test_the_examiner_is_another_network_and_small() -> None:
    judge, examiner = (new().state_dict() for new in (new_judge, new_examiner))
    assert {name: part.shape for name, part in judge.items()} != {
        name: part.shape for name, part in examiner.items()
    }
    assert (MINIWORLD / "examiner.onnx").stat().st_size < 1_000_000


def test_an_examiner_is_trained_from_the_shipped_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "examiner.onnx"
    shares = train_examiner(path, pool=64, steps=2, held_out=32)
    assert set(shares) == {f"{k}_{h}" for k in ("real", "round_trip") for h in OUTPUTS}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == list(OUTPUTS)
