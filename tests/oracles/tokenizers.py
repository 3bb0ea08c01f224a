"""A tokenizer of CLIP's kind, as small as it can be: single bytes and a few merges."""

from __future__ import annotations

import json
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"
_MERGES = (("t", "h"), ("th", "e</w>"), ("a", "n"), ("i", "n"), ("in", "g</w>"), ("c", "a"))
VOCAB_SIZE = 512 + len(_MERGES) + 2


def byte_letters() -> list[str]:
    """Return the 256 letters that stand for bytes, in the order of CLIP's vocabulary."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(n) for n in shown] + [chr(256 + n) for n in range(256 - len(shown))]


def save_tokenizer(folder: Path, *, pad: str = END, length: int = 77, files: str = "vocab") -> Path:
    """Save it as `vocab.json` and `merges.txt`, or, with files="json", as transformers 5 does."""
    letters = byte_letters()
    words = [*letters, *(f"{c}</w>" for c in letters), *map("".join, _MERGES), START, END]
    save_vocab(folder, words, [" ".join(pair) for pair in _MERGES], pad=pad, length=length)
    if files == "json":
        from transformers import CLIPTokenizer

        tokenizer = CLIPTokenizer.from_pretrained(folder)
        for file in folder.iterdir():
            file.unlink()
        tokenizer.save_pretrained(folder)
    return folder


def save_vocab(
    folder: Path, words: list[str], merges: list[str], *, pad: str = END, length: int = 77
) -> None:
    """Save a vocabulary with the files that Stable Diffusion's checkpoints have."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {word: index for index, word in enumerate(words)}
    named = {
        "bos_token": _token(START),
        "eos_token": _token(END),
        "unk_token": _token(END),
        "pad_token": pad,
    }
    config = {
        **{
            key: {"__type": "AddedToken", **token} if isinstance(token, dict) else token
            for key, token in named.items()
        },
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": length,
        "tokenizer_class": "CLIPTokenizer",
    }
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *merges, ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(named))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _token(content: str) -> dict[str, object]:
    return {
        "content": content,
        "lstrip": False,
        "normalized": True,
        "rstrip": False,
        "single_word": False,
    }
