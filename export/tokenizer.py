"""The tokenizer of a bundle: CLIP's, as one `tokenizer.json` that cuts and pads by itself.

Ids are those of transformers' CLIPTokenizer (5.x), special tokens inside a prompt included.
"""

from __future__ import annotations

import json
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

from sld_edge.engines.errors import CheckpointError
from sld_edge.engines.files import JSON_LIMIT, read_limited
from sld_edge.runtime.tokenizer import backend_from_text
from sld_edge.runtime.tokenizer_file import checked_tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
OPENCLIP_PAD = "!"  # id 0, which OpenCLIP's text encoder (SD 2.x) was trained with
_DEFAULTS = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}

# How CLIP splits text into words before byte-level BPE (Radford et al. 2021; simple_tokenizer.py).
_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


def tokenizer_json_from_path(
    path: Path, *, length: int, vocab_size: int, pad_token: str | None = None
) -> str:
    """Return a `tokenizer.json` that gives exactly L ids a prompt, start and end token included.

    Args:
        path: a directory with `tokenizer.json`, or `vocab.json` and `merges.txt`; or the
            `tokenizer.json` itself.
        length: L, the text encoder's positions; a smaller `model_max_length` of the tokenizer wins.
        vocab_size: rows of the text encoder's token embedding.
        pad_token: instead of the tokenizer's own.

    Raises:
        CheckpointError: files missing or malformed, or ids that the text encoder has no row for.
    """
    root = path if path.is_dir() else path.parent
    file = root / "tokenizer.json" if path.is_dir() else path
    config = _config(root)
    if pad_token is not None:
        config["pad_token"] = pad_token
    if file.is_file():
        tokenizer = _tokenizer_from_json(file, config)
    else:
        tokenizer = _tokenizer_from_vocab(root, config)
    pad, pad_id = _numbered(tokenizer, config["pad_token"])
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if largest >= vocab_size:
        raise CheckpointError(
            f"{root} does not fit the text encoder",
            got=f"token id {largest}",
            expected=f"ids below {vocab_size}",
            do="give the tokenizer that belongs to this model",
        )
    wanted = config.get("model_max_length")
    length = min(length, int(wanted)) if isinstance(wanted, int | float) else length
    tokenizer.enable_truncation(max_length=length)
    tokenizer.enable_padding(length=length, pad_id=pad_id, pad_token=pad)
    return str(tokenizer.to_str())


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
        if not (root / name).is_file():
            raise CheckpointError(
                f"no tokenizer in {root}",
                expected="tokenizer.json, or vocab.json and merges.txt",
                do="complete the download, or give one with --tokenizer",
            )
    for name, token in _DEFAULTS.items():
        config.setdefault(name, token)
    lines = _text(root / "merges.txt").splitlines()
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    try:
        model = models.BPE(
            vocab=json.loads(_text(root / "vocab.json")),
            merges=[(first, second) for first, second in pairs],
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=_content(config["unk_token"]),
        )
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(
            f"{root}: vocab.json and merges.txt do not fit together", got=error
        ) from error
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
    """Mark the special tokens, so that a prompt which spells one gets its id, as transformers does.

    Flags come from `added_tokens_decoder`, else from the token's own entry; a bare string is not
    normalized; of two entries for one token the later one counts.
    """
    declared = config.get("added_tokens_decoder", {})
    known = {entry["content"]: entry for entry in declared.values()}
    extra = [known[content] for content in known if tokenizer.token_to_id(content) is None]
    if extra or (root / "added_tokens.json").is_file():
        names = ", ".join(repr(entry["content"]) for entry in extra) or "see added_tokens.json"
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
    flags = ("lstrip", "rstrip", "single_word", "normalized")
    chosen = {flag: fields[flag] for flag in flags if flag in fields}
    return AddedToken(_content(token), special=True, **chosen)


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _config(root: Path) -> dict[str, Any]:
    config = _object(root / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config |= _object(root / "special_tokens_map.json")
    return {key: value for key, value in config.items() if value is not None}


def _object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        body = json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file} is not whole JSON", got=error) from error
    if not isinstance(body, dict):
        raise CheckpointError(f"{file}", got=type(body).__name__, expected="a JSON object")
    return body


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {file}", got=error) from error
