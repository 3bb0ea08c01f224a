"""CLIP's tokenizer, from the bundle's `tokenizer.json`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as Backend

from sld_edge.engines.cache import remember, remembered
from sld_edge.engines.checks import exact_text
from sld_edge.engines.errors import BundleError, InputError, UserError, one_line
from sld_edge.runtime.tokenizer_file import checked_tokenizer

_CHECK = 1  # increase it when `tokenizer_file` gets stricter: then files are checked again
_MOST_CHARACTERS = 20_000
_ABSURD = 10  # a prompt of more than this many times the model's length is a mistake


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tokens of a prompt.

    Attributes:
        ids: int64 [L], start token first, end token and padding last.
        cut: the end of the prompt that the model does not read; empty for a short prompt.
    """

    ids: NDArray[np.int64]
    cut: str


class Tokenizer:
    """Turns a prompt into `length` token ids; a prompt that is cut keeps the end token."""

    def __init__(self, tokenizer_json: str, *, length: int) -> None:
        """Read the text of `tokenizer.json`; `length` is the text encoder's number of tokens.

        Raises:
            BundleError: not a tokenizer, or a tokenizer that gives another length.
        """
        data = tokenizer_json.encode("utf-8", "surrogatepass")
        known = f"{_CHECK} {length} {hashlib.sha256(data).hexdigest()}"
        if not remembered("tokenizer", known):  # 0.15 s for CLIP's vocabulary
            checked_tokenizer(data, origin="tokenizer.json", error=BundleError, length=length)
            remember("tokenizer", known)
        self._backend = backend_from_text(
            tokenizer_json, origin="tokenizer.json", error=BundleError
        )
        self._length = length
        empty = self._backend.encode("").ids
        if len(empty) != length:
            raise BundleError(
                "tokenizer.json gives another length than the text encoder takes",
                got=len(empty),
                expected=length,
            )
        self._special = frozenset(empty)  # start, end and padding

    def __call__(self, text: str) -> Tokens:
        """Tokenize one prompt.

        Raises:
            InputError: not valid text, or so long that it must be a mistake.
            BundleError: the tokenizer cannot read it.
        """
        text = exact_text("prompt", text)
        room = self._length - 2  # start and end token
        too_long = InputError(
            "prompt is far too long",
            got=f"{len(text)} characters",
            expected=f"at most about {room} tokens, which the model reads",
            do="shorten it; was a file given by mistake?",
        )
        if len(text) > _MOST_CHARACTERS:  # tokenizing so much text would take a second
            raise too_long
        with library_errors("tokenizer.json cannot read this prompt", error=BundleError):
            encoding = self._backend.encode(text)
        pieces = [encoding, *encoding.overflowing]
        if len(pieces) > _ABSURD:
            raise too_long
        kept = encoding.offsets[self._length - 2][1]  # where the last real token ends
        cut = text[kept:].strip() if len(pieces) > 1 else ""
        return Tokens(ids=np.array(encoding.ids, dtype=np.int64), cut=cut)

    def words(self, text: str) -> list[tuple[str, list[int]]]:
        """Return the words that the model reads, each with the places of its tokens in `ids`."""
        with library_errors("tokenizer.json cannot read this prompt", error=BundleError):
            spans = self._backend.encode(text).offsets
        words = []
        for word in re.finditer(r"\w+", text):
            begin, end = word.span()
            places = [k for k, (a, b) in enumerate(spans) if a < end and begin < b]
            if places:
                words.append((word[0], places))
        return words

    def says_nothing(self, text: str) -> bool:
        """Whether a text has no token that the empty text does not have too."""
        return self._special.issuperset(self(text).ids.tolist())


def backend_from_text(text: str, *, origin: str, error: type[UserError]) -> Backend:
    """Return the library's tokenizer for a checked text.

    Raises:
        UserError: of the class `error`: the library refuses it.
    """
    with library_errors(f"{origin} is not a tokenizer", error=error):
        return Backend.from_str(text)


@contextmanager
def library_errors(message: str, *, error: type[UserError]) -> Iterator[None]:
    """Turn an exception or panic of the tokenizers library into an error of one line.

    Raises:
        UserError: of the class `error`.
    """
    try:
        yield
    except Exception as problem:  # the library raises plain Exception
        raise error(message, got=one_line(problem)) from problem
    except BaseException as problem:
        if type(problem).__name__ != "PanicException":  # a panic in Rust; not an Exception
            raise
        raise error(message, got="a panic") from problem


def input_ids(tokens: Sequence[Tokens]) -> NDArray[np.int64]:
    """Return the token ids of N prompts for the text encoder, int64 [N,L]."""
    return np.stack([item.ids for item in tokens])
