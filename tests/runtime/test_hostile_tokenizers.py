"""A tokenizer file is checked before the library sees it: no abort, no panic, no slow prompt."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from sld_edge.engines.errors import BundleError, InputError
from sld_edge.runtime import Pipeline
from sld_edge.runtime.bundle import EMBEDDED
from sld_edge.runtime.tokenizer import Tokenizer, library_errors

TEXT = (EMBEDDED / "tokenizer.json").read_text(encoding="utf-8")
LENGTH = 24
Json = dict[str, Any]


def regex(text: str) -> Callable[[Json], None]:
    return lambda b: b["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=text)


BOMBS: dict[str, Callable[[Json], object]] = {
    "padding to 1e9": lambda b: b["padding"]["strategy"].update(Fixed=10**9),
    "padding to another length": lambda b: b["padding"]["strategy"].update(Fixed=25),
    "padding to a multiple": lambda b: b["padding"].update(pad_to_multiple_of=10**9),
    "no padding": lambda b: b.update(padding=None),
    "no truncation": lambda b: b.update(truncation=None),
    "a stride": lambda b: b["truncation"].update(stride=23),
    "a long replacement": lambda b: b["normalizer"]["normalizers"][1].update(content="x" * 9999),
    "a text that is replaced": lambda b: b["normalizer"]["normalizers"][1].update(
        pattern={"String": ""}
    ),
    "another normalizer": lambda b: b.update(normalizer={"type": "Prepend", "prepend": "x"}),
    "compiled bytes": lambda b: b.update(
        normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    ),
    "a slow pattern": regex("(a+)+$"),
    "a slow alternative": regex("a+a+a+b"),
    "a look behind": regex("(?<=a)b"),
    "an open class": regex("[a"),
    "a broken escape": regex("\\p{Nothing}"),
    "a pattern that ends in a backslash": regex("a\\"),
    "an empty pattern": regex(""),
    "a long pattern": regex("a" * 400),
    "sequences in sequences": lambda b: b.update(
        normalizer={"type": "Sequence", "normalizers": [b["normalizer"]] * 3}
    ),
    "a hundred normalizers": lambda b: b["normalizer"].update(normalizers=[{"type": "NFC"}] * 100),
    "an id that is too large": lambda b: b["model"]["vocab"].update(zzz=10**12),
    "an id below nothing": lambda b: b["model"]["vocab"].update(zzz=-1),
    "an id of text": lambda b: b["model"]["vocab"].update(zzz="1"),
    "a long token": lambda b: b["model"]["vocab"].update({"z" * 999: 5}),
    "merges of three": lambda b: b["model"].update(merges=[["a", "b", "c"]]),
    "merges of nothing known": lambda b: b["model"].update(merges=[["qqq", "zzz"]]),
    "a prefix that panics": lambda b: b["model"].update(continuing_subword_prefix="#" * 99),
    "an unknown token that is not known": lambda b: b["model"].update(unk_token="<unk>"),
    "dropout": lambda b: b["model"].update(dropout=0.5),
    "another model": lambda b: b["model"].update(type="Unigram"),
    "no model": lambda b: b.pop("model"),
    "a section that nobody knows": lambda b: b.update(extra=1),
    "a processor of a million ids": lambda b: b.update(
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "a", "type_id": 0}}],
            "pair": [],
            "special_tokens": {"a": {"id": "a", "ids": [1] * 10**5, "tokens": ["a"] * 10**5}},
        }
    ),
    "an added token of nothing": lambda b: b["added_tokens"].append({"id": 1, "content": ""}),
    "added tokens as text": lambda b: b.update(added_tokens="x"),
}


@pytest.mark.parametrize("name", list(BOMBS))
def test_what_is_not_clips(name: str) -> None:
    body = json.loads(TEXT)
    BOMBS[name](body)
    start = time.perf_counter()
    with pytest.raises(BundleError) as caught:
        Tokenizer(json.dumps(body), length=LENGTH)
    assert len(str(caught.value)) <= 300
    assert time.perf_counter() - start < 2


def test_the_honest_one_is_taken() -> None:
    assert Tokenizer(TEXT, length=LENGTH)("a red star").cut == ""


def test_seeded_mutations() -> None:
    """Any value of the file becomes something else: one error, or a tokenizer that works."""
    rng = random.Random(11)
    values = [None, -1, 10**12, 1.5, "", "x" * 50, [], {}, True, ["a", 1], {"Fixed": 1}]
    for _ in range(150):
        body = json.loads(TEXT)
        place, key = body, rng.choice(list(body))
        while isinstance(place[key], dict | list) and place[key] and rng.random() < 0.8:
            place = place[key]
            key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        place[key] = rng.choice(values)
        refusal = ""
        try:
            tokenizer = Tokenizer(json.dumps(body), length=LENGTH)
            assert len(tokenizer("a red star at a party").ids) == LENGTH
        except BundleError as error:
            refusal = str(error)
        assert len(refusal) <= 300


def test_what_the_library_raises_is_one_line() -> None:
    panic = type("PanicException", (BaseException,), {})  # as pyo3 calls it
    for problem in (Exception("bad"), panic("index out of bounds")):
        with pytest.raises(BundleError), library_errors("the prompt", error=BundleError):
            raise problem
    with pytest.raises(KeyboardInterrupt), library_errors("the prompt", error=BundleError):
        raise KeyboardInterrupt


def test_a_megabyte_of_prompt_is_refused_at_once(miniature: Pipeline) -> None:
    start = time.perf_counter()
    for text in ("a " * 500_000, "é" * 1_000_000, "\u0344" * 300_000):
        with pytest.raises(InputError, match="far too long"):
            miniature(text, steps=1)
    assert time.perf_counter() - start < 1
