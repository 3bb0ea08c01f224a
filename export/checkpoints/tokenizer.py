"""The tokenizer of a bundle: CLIP's, as one `tokenizer.json` that cuts and pads by itself.

It gives the ids of transformers' CLIPTokenizer (5.x), also for special tokens inside a prompt.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from sld_edge.engines.errors import CheckpointError, one_line
from sld_edge.engines.files import JSON_LIMIT, json_from_file, read_limited
from sld_edge.export.refuse import refusing
from sld_edge.runtime.tokenizer import backend_from_text
from sld_edge.runtime.tokenizer_file import checked_tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
OPENCLIP_PAD = "!"  # id 0: OpenCLIP's text encoder (SD 2.x) was trained with it
_AGAIN = "download it again"
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
_MOST_TOKENS = 10_000  # tokens that a config declares besides the vocabulary
_LEAST = 2  # tokens of a prompt: start and end
_TRIAL = "A photo of the cat's 2 hats, émigré \U0001f600 " * 20
_DEFAULTS = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}

# CLIP's words before byte-level BPE (Radford et al. 2021; simple_tokenizer.py).
_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


def tokenizer_json_from_path(
    path: Path, *, length: int, vocab_size: int, pad_token: str | None = None
) -> str:
    """Return a `tokenizer.json` that gives exactly L ids per prompt, with start and end token.

    Args:
        path: a directory with `tokenizer.json`, or `vocab.json` and `merges.txt`; or the
            `tokenizer.json` itself.
        length: L, the text encoder's positions; a smaller `model_max_length` of the tokenizer wins.
        vocab_size: rows of the text encoder's token embedding.
        pad_token: instead of the tokenizer's.

    Raises:
        CheckpointError: files missing or malformed, or ids that the text encoder has no row for.
    """
    with refusing(f"{path} is not a tokenizer", Exception, panics=True, do=_AGAIN):
        return _tokenizer_json(path, length, vocab_size, pad_token)


def _tokenizer_json(path: Path, length: int, vocab_size: int, pad_token: str | None) -> str:
    root = path if path.is_dir() else path.parent
    file = root / "tokenizer.json" if path.is_dir() else path
    config = _config(root)
    if pad_token is not None:
        config["pad_token"] = pad_token
    if os.path.lexists(file):
        tokenizer = _tokenizer_from_json(file, config)
    else:
        tokenizer = _tokenizer_from_vocab(root, config)
    pad, pad_id = _numbered(tokenizer, config["pad_token"])
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= vocab_size:
        raise CheckpointError(
            f"{root} does not fit the text encoder",
            got=f"token id {largest}",
            expected=f"ids below {vocab_size}",
            do="give the tokenizer that belongs to this model",
        )
    length = _length(root, config, length)
    tokenizer.enable_truncation(max_length=length)
    tokenizer.enable_padding(length=length, pad_id=pad_id, pad_token=pad)
    for text in ("", _TRIAL):
        count = len(tokenizer.encode(text))
        if count != length:
            raise CheckpointError(f"{root}", got=f"{count} tokens", expected=f"{length} per prompt")
    return str(tokenizer.to_str())


def _length(root: Path, config: Mapping[str, Any], most: int) -> int:
    """Return the tokens of a prompt; transformers writes 10**30 for no limit."""
    limit = config.get("model_max_length", most)
    if not isinstance(limit, int | float) or isinstance(limit, bool) or not limit >= _LEAST:
        raise CheckpointError(
            f"{root}: model_max_length", got=repr(limit), expected=f"a number from {_LEAST}"
        )
    return int(min(most, limit))


def _tokenizer_from_json(file: Path, config: dict[str, Any]) -> Tokenizer:
    data = read_limited(file, JSON_LIMIT, error=CheckpointError)
    text = checked_tokenizer(data, origin=str(file), error=CheckpointError)
    tokenizer = backend_from_text(text, origin=str(file), error=CheckpointError)
    padding = tokenizer.padding or {}
    config.setdefault("pad_token", padding.get("pad_token", END))
    pad = config["pad_token"]
    if _content(pad) not in {
        token.content for token in tokenizer.get_added_tokens_decoder().values()
    }:
        tokenizer.add_special_tokens([_added(pad)])
    return tokenizer


def _tokenizer_from_vocab(root: Path, config: dict[str, Any]) -> Tokenizer:
    for name in ("vocab.json", "merges.txt"):
        if not os.path.lexists(root / name):
            raise CheckpointError(
                f"no tokenizer in {root}",
                expected="tokenizer.json, or vocab.json and merges.txt",
                do="complete the download, or give one with --tokenizer",
            )
    for name, token in _DEFAULTS.items():
        config.setdefault(name, token)
    lines = _text(root / "merges.txt").splitlines()
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    with refusing(f"{root}: vocab.json and merges.txt do not fit together", Exception, panics=True):
        model = models.BPE(
            vocab=_vocab(root / "vocab.json"),
            merges=[(first, second) for first, second in pairs],
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=_content(config["unk_token"]),
        )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _add_special_tokens(tokenizer, config, root)
    tokenizer.post_processor = processors.RobertaProcessing(
        _numbered(tokenizer, config["eos_token"]),
        _numbered(tokenizer, config["bos_token"]),
        trim_offsets=False,
        add_prefix_space=False,
    )
    return tokenizer


def _numbered(tokenizer: Tokenizer, token: str | Mapping[str, Any]) -> tuple[str, int]:
    content = _content(token)
    number = tokenizer.token_to_id(content)
    if number is None:
        raise CheckpointError(f"the tokenizer's vocabulary lacks {content!r}")
    return content, number


def _add_special_tokens(tokenizer: Tokenizer, config: Mapping[str, Any], root: Path) -> None:
    """Mark the special tokens: as in transformers, a prompt that spells a token gets its id.

    Flags come from `added_tokens_decoder`, or else from the token's own entry. A token without
    flags is not normalized. Of two entries for a token the later entry counts.
    """
    declared = config.get("added_tokens_decoder", {})
    known = {_content(entry): entry for entry in declared.values()}
    extra = [known[content] for content in known if tokenizer.token_to_id(content) is None]
    if extra or os.path.lexists(root / "added_tokens.json"):
        names = ", ".join(map(repr, map(_content, extra[:3]))) or "see added_tokens.json"
        raise CheckpointError(
            f"{root}: tokens beyond vocab.json are not supported ({names})",
            do="save the tokenizer with transformers 5, which writes a tokenizer.json",
        )
    named = [config[name] for name in _DEFAULTS]
    tokenizer.add_special_tokens(
        [_added(known.get(_content(token), token)) for token in [*known.values(), *named]]
    )


def _added(token: str | Mapping[str, Any]) -> AddedToken:
    fields = {"normalized": False} if isinstance(token, str) else token
    chosen = {flag: fields[flag] for flag in _FLAGS if flag in fields}
    return AddedToken(_content(token), special=True, **chosen)


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _config(root: Path) -> dict[str, Any]:
    config = _object(root / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config |= _object(root / "special_tokens_map.json")
    config = {key: value for key, value in config.items() if value is not None}
    for name in _DEFAULTS:
        if name in config:
            _check_token(root, name, config[name])
    declared = config.get("added_tokens_decoder", {})
    if not isinstance(declared, dict) or len(declared) > _MOST_TOKENS:
        raise CheckpointError(
            f"{root}: added_tokens_decoder", got=type(declared).__name__, expected="an object"
        )
    for entry in declared.values():
        _check_token(root, "added_tokens_decoder", entry)
    return config


def _check_token(root: Path, name: str, token: object) -> None:
    """Refuse a value that is neither a token's text nor an object with its text and flags."""
    fields = {"content": token} if isinstance(token, str) else token
    if (
        not isinstance(fields, dict)
        or not isinstance(fields.get("content"), str)
        or not fields["content"]
        or not all(isinstance(fields.get(flag, False), bool) for flag in _FLAGS)
    ):
        raise CheckpointError(f"{root}: {name}", got=repr(token), expected="a token")


def _vocab(file: Path) -> dict[str, int]:
    """Return a vocabulary; each word has a different number."""
    vocab = json_from_file(file, error=CheckpointError, do=_AGAIN)
    numbers = vocab.values()
    if not all(type(number) is int and 0 <= number < 1 << 32 for number in numbers):
        raise CheckpointError(f"{file}", got="another kind of value", expected="whole numbers")
    if len(set(numbers)) < len(vocab):
        raise CheckpointError(f"{file} gives two words the same number", do=_AGAIN)
    return vocab


def _object(file: Path) -> dict[str, Any]:
    """Read a JSON object; return an empty object for a missing file."""
    if not os.path.lexists(file):
        return {}
    return json_from_file(file, error=CheckpointError, do=_AGAIN)


def _text(file: Path) -> str:
    try:
        data = read_limited(file, JSON_LIMIT, error=CheckpointError, do=_AGAIN)
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file} is not text", got=one_line(error), do=_AGAIN) from error
