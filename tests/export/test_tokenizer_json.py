"""Token ids against transformers' CLIPTokenizer, over real prompts and hostile strings."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from oracles.tokenizers import END, START, VOCAB_SIZE, byte_letters, save_tokenizer, save_vocab
from sld_edge.engines.errors import CheckpointError
from sld_edge.export.checkpoints.tokenizer import tokenizer_json_from_path

PROMPTS = Path(__file__).parents[3] / "shared" / "data" / "i2p.csv"
HARD = [
    "",
    "   ",
    "hi! wow!!! x!",
    "a <|endoftext|> b <|ENDOFTEXT|> c <|startoftext|>x<|StartOfText|>",
    "café e\u0301 Ça İstanbul ß ẞ Straße ﬁ Å K",
    "你好,世界 一只猫 日本語 한국어",
    "🐱‍👤👩‍👩‍👧 🏳️‍🌈 ☃ 🇩🇪",
    "\x00\x01\t\n\r\x0b\x7f tab\u2028x\u00a0y\u3000z",
    "\u200b\ufeff\u202e",
    "123 4567 ½ ² ٣",
    "it's I'LL we'RE don't 'd'm",
    "word " * 200,
    "!" * 100,
    "thethethe caing " * 30,
    "\ud7ff \ue000 \U0010ffff",
    "<|endoftext|>" * 90,
]


def real_prompts() -> list[str]:
    if not PROMPTS.is_file():
        pytest.skip(f"no prompts: {PROMPTS.name} is not beside the repository")
    with PROMPTS.open(encoding="utf-8", newline="") as stream:
        return [row["prompt"] for row in csv.DictReader(stream)][::15]


def save_trained(folder: Path, prompts: list[str], *, pad: str) -> int:
    """Train a byte-level BPE of CLIP's kind on prompts; return its vocabulary's size."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(vocab_size=3000, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator(prompts, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    letters = byte_letters()
    words = [*letters, *(f"{c}</w>" for c in letters)]
    # A merge's letters are all in the alphabet; ids of its own order, as CLIP's are.
    words = list(dict.fromkeys([*words, *map("".join, merges), START, END]))
    save_vocab(folder, words, [" ".join(pair) for pair in merges], pad=pad)
    return len(words)


def save_real(folder: Path, *, pad: str) -> int:
    """Save CLIP's own vocabulary, from the package open_clip where it happens to be installed."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        pytest.skip("CLIP's vocabulary is not here: pip install --no-deps open_clip_torch")
    file = Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.decompress(file.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = byte_letters()
    joined = ["".join(merge.split()) for merge in merges]
    words = [*letters, *(f"{c}</w>" for c in letters), *joined, START, END]
    save_vocab(folder, words, merges, pad=pad)
    return len(words)


def assert_same_ids(folder: Path, vocab_size: int, texts: list[str]) -> None:
    theirs = CLIPTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_str(tokenizer_json_from_path(folder, length=77, vocab_size=vocab_size))
    for text in texts:
        want = theirs(text, padding="max_length", max_length=77, truncation=True)["input_ids"]
        assert ours.encode(text).ids == want, repr(text)


@pytest.mark.parametrize("pad", [END, "!"])
def test_trained_vocabulary_on_real_prompts(pad: str, tmp_path: Path) -> None:
    prompts = real_prompts()
    assert len(prompts) >= 200
    size = save_trained(tmp_path, prompts, pad=pad)
    assert_same_ids(tmp_path, size, prompts + HARD)


@pytest.mark.parametrize("pad", [END, "!"])
def test_clips_own_vocabulary(pad: str, tmp_path: Path) -> None:
    assert_same_ids(tmp_path, save_real(tmp_path, pad=pad), real_prompts() + HARD)


@pytest.mark.parametrize("pad", [END, "!"])
@pytest.mark.parametrize("files", ["vocab", "json"])
def test_bytes_and_specials(files: str, pad: str, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, pad=pad, files=files)
    assert_same_ids(tmp_path, VOCAB_SIZE, HARD)


@pytest.mark.parametrize("normalized", [True, False])
def test_flags_of_added_tokens_decoder(normalized: bool, tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "special": True}
    config["added_tokens_decoder"] = {
        str(VOCAB_SIZE - 2 + i): {"content": token, "normalized": normalized, **plain}
        for i, token in enumerate((START, END))
    }
    config.update(bos_token=START, eos_token=END, unk_token=END, pad_token=END)
    file.write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").unlink()
    assert_same_ids(tmp_path, VOCAB_SIZE, HARD)


def test_length_is_the_smaller_of_model_and_tokenizer(tmp_path: Path) -> None:
    for asked, of_tokenizer, want in ((77, 20, 20), (16, 77, 16), (77, 10**30, 77)):
        save_tokenizer(tmp_path, length=of_tokenizer)
        text = tokenizer_json_from_path(tmp_path, length=asked, vocab_size=VOCAB_SIZE)
        ids = Tokenizer.from_str(text).encode("the cat " * 50).ids
        assert len(ids) == want
        assert ids[-1] == VOCAB_SIZE - 1  # an over-long prompt keeps its end token


def test_a_file_is_taken_as_a_directory_is(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, files="json")
    options: dict[str, Any] = {"length": 77, "vocab_size": VOCAB_SIZE}
    whole = tokenizer_json_from_path(tmp_path, **options)
    assert tokenizer_json_from_path(tmp_path / "tokenizer.json", **options) == whole


def test_padding_token_can_be_replaced(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    text = tokenizer_json_from_path(tmp_path, length=8, vocab_size=VOCAB_SIZE, pad_token="!")
    assert Tokenizer.from_str(text).encode("").ids[2:] == [0] * 6


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no merges", "no tokenizer"),
        ("merges that do not fit", "do not fit together"),
        ("three words in a merge", "do not fit together"),
        ("broken vocab", "not whole JSON"),
        ("broken config", "not whole JSON"),
        ("broken tokenizer.json", "not a tokenizer"),
        ("small embedding", "does not fit the text encoder"),
        ("extra tokens", "beyond vocab.json"),
    ],
)
def test_bad_tokenizers_are_one_line(damage: str, message: str, tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    if damage == "no merges":
        (tmp_path / "merges.txt").unlink()
    elif damage == "merges that do not fit":
        (tmp_path / "merges.txt").write_text("never seen\n")
    elif damage == "three words in a merge":
        (tmp_path / "merges.txt").write_text("t h e\n")
    elif damage == "broken vocab":
        (tmp_path / "vocab.json").write_text('{"a": ')
    elif damage == "broken config":
        config.write_text("{")
    elif damage == "broken tokenizer.json":
        (tmp_path / "tokenizer.json").write_text("{}")
    elif damage == "extra tokens":
        (tmp_path / "added_tokens.json").write_text('{"<new>": 600}')
    size = 100 if damage == "small embedding" else VOCAB_SIZE
    with pytest.raises(CheckpointError, match=message) as caught:
        tokenizer_json_from_path(tmp_path, length=77, vocab_size=size)
    assert "\n" not in str(caught.value)
