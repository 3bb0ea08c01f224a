"""A byte-level BPE vocabulary in CLIP's format, in which every word of the world is one token."""

import json
import re
from pathlib import Path
from typing import Final

from tokenizers.models import BPE

from sld_edge.benchmarks.miniworld.captions import PLACES, SCENERY, TAGS
from sld_edge.benchmarks.miniworld.world import COLOURS, SCENES, SHAPES, SIZES

START: Final = "<|startoftext|>"
END: Final = "<|endoftext|>"
WORD_END: Final = "</w>"
EXTRA_WORDS: Final = ("a", "an", "and", "the", "photo", "of", "with", "no", ",")


def byte_symbols() -> list[str]:
    """Return a printable character for each byte, in the order of GPT-2 and CLIP."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(hidden))]


def words_of_world() -> tuple[str, ...]:
    """Return every word that a caption or a prompt can hold, sorted."""
    places = [place for options in PLACES.values() for place in options]
    texts = [*SHAPES, *COLOURS, *SIZES, *SCENES, *places, *SCENERY.values(), *TAGS, *EXTRA_WORDS]
    return tuple(sorted({word for text in texts for word in re.findall(r"\w+|,", text)}))


def merges_for(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return merges that build each word from left to right, each merge once.

    A merge of one word may tear another apart ("an" in "orange"). Merges are ranked, so the list
    is checked by applying it, and a word that fails gets the merges that it lacks.
    """
    merges: list[tuple[str, str]] = []
    for word in sorted(words, key=lambda word: (len(word), word)):
        pieces = split(word, merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = split(word, merges)
    return merges


def split(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """Split a word into tokens: apply the earliest merge that fits until none does."""
    letters = [*word[:-1], word[-1] + WORD_END]
    pieces = [*letters, *(piece for left, right in merges for piece in (left, right, left + right))]
    known = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    model = BPE(vocab=known, merges=merges, end_of_word_suffix=WORD_END)
    return [token.value for token in model.tokenize(word)]


def write_tokenizer(folder: Path, *, tokens: int) -> None:
    """Write the four files that transformers' CLIPTokenizer and other readers of SD expect."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = merges_for(words_of_world())
    symbols = byte_symbols()
    entries = [*symbols, *(symbol + WORD_END for symbol in symbols)]
    entries += [left + right for left, right in merges]
    entries += [START, END]
    vocabulary = {entry: number for number, entry in enumerate(dict.fromkeys(entries))}
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    _write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    _write_json(folder / "special_tokens_map.json", special)
    config = {
        **special,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": tokens,
        "tokenizer_class": "CLIPTokenizer",
    }
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, value: object) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=2)
    path.write_text(text + "\n", encoding="utf-8")
