"""Checks `tokenizer.json` before the tokenizers library reads it.

The library obeys the file: padding to a thousand million tokens, replacements that multiply a
prompt, patterns that panic. So only the stages and options of CLIP's tokenizers are accepted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from sld_edge.engines.checks import exact_text, whole_number
from sld_edge.engines.errors import InputError, UserError, one_line
from sld_edge.engines.files import json_from_bytes

_LONGEST = 10_000  # tokens of a prompt
_MOST_TOKENS = 1_000_000
_MOST_CHARACTERS = 200  # of a token
_SECTIONS = frozenset(
    {
        *("version", "truncation", "padding", "added_tokens", "normalizer"),
        *("pre_tokenizer", "post_processor", "decoder", "model"),
    }
)
# Alternatives without groups; each has at most one repetition. So no input is slow to match.
_PATTERN = re.compile(r"(?:\\p\{[A-Z][a-z]?\}|\\[^p]|[^(){}?*\\])*", re.DOTALL)


def checked_tokenizer(
    data: bytes, *, origin: str, error: type[UserError], length: int | None = None
) -> str:
    """Return a tokenizer's text.

    Args:
        data: bytes of `tokenizer.json`.
        origin: the name of the file in errors.
        error: the class to raise.
        length: the number of tokens to which a text must be padded and cut; None if the caller sets
            padding and truncation later.

    Raises:
        UserError: of the class `error`: not a tokenizer of CLIP's kind.
    """
    body = json_from_bytes(data, origin=origin, error=error)
    try:
        _check(body, length)
    except (ValueError, TypeError, KeyError, AttributeError, InputError) as problem:
        raise error(
            f"{origin} is not a tokenizer of CLIP's kind",
            got=one_line(f"no {problem}" if isinstance(problem, KeyError) else problem),
            do="give the tokenizer that belongs to this model",
        ) from problem
    return data.decode("utf-8")


def _check(body: Mapping[str, Any], length: int | None) -> None:
    unknown = body.keys() - _SECTIONS
    if unknown:
        raise ValueError(f"unknown sections {', '.join(sorted(unknown))}")
    _model(body["model"])
    _step(body.get("normalizer"), _NORMALIZERS)
    _step(body.get("pre_tokenizer"), _PRE_TOKENIZERS)
    _step(body.get("post_processor"), _POST_PROCESSORS)
    _step(body.get("decoder"), _DECODERS)
    for token in _list("added_tokens", body.get("added_tokens", []), 10_000):
        _token(token["content"])
        whole_number("added token", token["id"], 0, _MOST_TOKENS)
    _padding(body.get("padding"), length)
    _truncation(body.get("truncation"), length)


def _model(model: Mapping[str, Any]) -> None:
    if model["type"] != "BPE" or model.get("dropout") is not None:
        raise ValueError(f"model {model['type']!r}, or a model with dropout")
    vocab = model["vocab"]
    if not isinstance(vocab, dict) or not 0 < len(vocab) <= _MOST_TOKENS:
        raise ValueError(f"vocab is not an object of 1 to {_MOST_TOKENS} tokens")
    for token, number in vocab.items():
        if (
            len(token) > _MOST_CHARACTERS
            or type(number) is not int
            or not 0 <= number <= _MOST_TOKENS
        ):
            raise ValueError(f"token {token[:40]!r}")
    for merge in _list("merges", model["merges"], _MOST_TOKENS):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(map(_is_token, pair)):
            raise ValueError("a merge is not a pair of tokens")
    unknown, prefix, suffix = (
        model.get(name) for name in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    )
    if unknown is not None and unknown not in vocab:  # the library would fail at a prompt
        raise ValueError("unk_token is not in the vocabulary")
    if prefix not in (None, "") or not (suffix is None or _is_token(suffix)):
        # The library panics at a token that is shorter than the prefix.
        raise ValueError("continuing_subword_prefix, or a wrong end_of_word_suffix")


def _step(step: Any, known: Mapping[str, Callable[[Mapping[str, Any]], None]]) -> None:
    """Check one stage of the tokenizer, or a sequence of stages."""
    if step is None:
        return
    kind = step["type"]
    if kind == "Sequence":
        (inner,) = (value for name, value in step.items() if name != "type")
        for stage in _list("a sequence", inner, 8):
            if stage["type"] == "Sequence":
                raise ValueError("a sequence in a sequence")
            _step(stage, known)
    elif kind in known:
        known[kind](step)
    else:
        raise ValueError(f"a stage of kind {kind!r}")


def _plain(step: Mapping[str, Any]) -> None:
    if not all(isinstance(value, bool) for name, value in step.items() if name != "type"):
        raise ValueError(f"options of {step['type']}")


def _replace(step: Mapping[str, Any]) -> None:
    _pattern(step["pattern"])
    if not isinstance(step["content"], str) or len(step["content"]) > 1:
        raise ValueError("a replacement of more than one character")


def _split(step: Mapping[str, Any]) -> None:
    _pattern(step["pattern"])
    if step["behavior"] not in ("Removed", "Isolated") or not isinstance(step["invert"], bool):
        raise ValueError("options of Split")


def _pattern(pattern: Mapping[str, Any]) -> None:
    text = pattern["Regex"]
    if len(pattern) > 1 or not isinstance(text, str) or not 0 < len(text) <= 300:
        raise ValueError("a pattern is not a Regex of 1 to 300 characters")
    parts = re.split(r"(?<!\\)\|", text)
    if not _PATTERN.fullmatch(text) or any(part.count("+") > 1 or not part for part in parts):
        raise ValueError(f"pattern {text[:60]!r}")


def _pair(value: Any) -> None:
    token, number = value
    _token(token)
    whole_number("token", number, 0, _MOST_TOKENS)


def _roberta(step: Mapping[str, Any]) -> None:
    _pair(step["sep"])
    _pair(step["cls"])


def _template(step: Mapping[str, Any]) -> None:
    for name in ("single", "pair"):
        for piece in _list(name, step[name], 8):
            ((_, entry),) = piece.items()
            exact_text("template", entry["id"])
            whole_number("type_id", entry["type_id"], 0, 1)
    tokens = step["special_tokens"]
    if len(tokens) > 8:
        raise ValueError("more than 8 special tokens in a template")
    for entry in tokens.values():
        _token(entry["id"])
        numbers, names = _list("ids", entry["ids"], 1), _list("tokens", entry["tokens"], 1)
        _pair((names[0], numbers[0]))


def _padding(padding: Any, length: int | None) -> None:
    if padding is None and length is None:
        return
    strategy = padding["strategy"]
    if isinstance(strategy, dict):
        fixed = whole_number("padding", strategy["Fixed"], 1, _LONGEST)
        if len(strategy) > 1 or (length is not None and fixed != length):
            raise ValueError(f"padding to {fixed} tokens, not {length}")
    elif strategy != "BatchLongest" or length is not None:
        raise ValueError("padding of another kind")
    if padding.get("pad_to_multiple_of") is not None or padding["direction"] != "Right":
        raise ValueError("padding of another kind")
    whole_number("pad_id", padding["pad_id"], 0, _MOST_TOKENS)
    whole_number("pad_type_id", padding["pad_type_id"], 0, 1)
    _token(padding["pad_token"])


def _truncation(truncation: Any, length: int | None) -> None:
    if truncation is None and length is None:
        return
    longest = whole_number("truncation", truncation["max_length"], 1, _LONGEST)
    if (length is not None and longest != length) or truncation["stride"] != 0:
        raise ValueError(f"truncation to {longest} tokens, not {length}")
    if truncation["direction"] != "Right" or truncation["strategy"] != "LongestFirst":
        raise ValueError("truncation of another kind")


def _token(value: object) -> None:
    if not _is_token(value) or not value:
        raise ValueError(f"a special token is not a text of 1 to {_MOST_CHARACTERS} characters")


def _is_token(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _MOST_CHARACTERS


def _list(name: str, value: object, most: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        raise ValueError(f"{name} is not a list of at most {most} entries")
    return value


_NORMALIZERS = {"NFC": _plain, "NFKC": _plain, "Lowercase": _plain, "Replace": _replace}
_PRE_TOKENIZERS = {
    "ByteLevel": _plain,
    "Whitespace": _plain,
    "WhitespaceSplit": _plain,
    "Split": _split,
}
_POST_PROCESSORS = {
    "ByteLevel": _plain,
    "RobertaProcessing": _roberta,
    "TemplateProcessing": _template,
}
_DECODERS = {"ByteLevel": _plain}
