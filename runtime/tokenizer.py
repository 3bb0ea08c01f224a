"""CLIP's tokenizer, from the bundle's `tokenizer.json`."""

from __future__ import annotations

import hashlib
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

_CHECK = 1  # raise when `tokenizer_file` refuses more
_MOST_CHARACTERS = 20_000
_ABSURD = 10  # a prompt of this many times the model's length is a mistake, not a prompt


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A prompt as the model reads it.

    Attributes:
        ids: int64 [L], start token first, end token and padding last.
        cut: the end of the prompt that the model does not see; empty where all of it fits.
    """

    ids: NDArray[np.int64]
    cut: str


class Tokenizer:
    """Turns prompts into token ids of the model's length; over-long prompts keep the end token."""

    def __init__(self, tokenizer_json: str, *, length: int) -> None:
        """Read the `tokenizer.json` text; `length` is what the text encoder takes.

        Raises:
            BundleError: not a tokenizer, or one that gives another length.
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
        self._nothing = frozenset(empty)  # start, end and padding

    def __call__(self, text: str) -> Tokens:
        """Tokenize one prompt.

        Raises:
            InputError: no valid text, or so long that it must be a mistake.
            BundleError: the tokenizer cannot read it.
        """
        text = exact_text("prompt", text)
        room = self._length - 2  # start and end token
        too_long = InputError(
            "prompt is far too long",
            got=f"{len(text)} characters",
            expected=f"at most about {room} tokens, which is what the model reads",
            do="shorten it; was a file given by mistake?",
        )
        if len(text) > _MOST_CHARACTERS:  # before a second is spent on them
            raise too_long
        with library_errors("tokenizer.json cannot read this prompt", error=BundleError):
            encoding = self._backend.encode(text)
        pieces = [encoding, *encoding.overflowing]
        if len(pieces) > _ABSURD:
            raise too_long
        kept = encoding.offsets[self._length - 2][1]  # where the last real token ends
        cut = text[kept:].strip() if len(pieces) > 1 else ""
        return Tokens(ids=np.array(encoding.ids, dtype=np.int64), cut=cut)

    def says_nothing(self, text: str) -> bool:
        """Whether a text is spaces and special tokens alone, which the empty text has too."""
        return self._nothing.issuperset(self(text).ids.tolist())


def backend_from_text(text: str, *, origin: str, error: type[UserError]) -> Backend:
    """Return the library's tokenizer of a text that was checked.

    Raises:
        UserError: of the class `error`: the library does not take it.
    """
    with library_errors(f"{origin} is not a tokenizer", error=error):
        return Backend.from_str(text)


@contextmanager
def library_errors(what: str, *, error: type[UserError]) -> Iterator[None]:
    """Turn what the tokenizers library raises, its panics included, into one line.

    Raises:
        UserError: of the class `error`.
    """
    try:
        yield
    except Exception as problem:  # the library raises plain Exception
        raise error(what, got=one_line(problem)) from problem
    except BaseException as problem:
        if type(problem).__name__ != "PanicException":  # of Rust, no Exception to Python
            raise
        raise error(what, got="a panic") from problem


def input_ids(tokens: Sequence[Tokens]) -> NDArray[np.int64]:
    """Stack prompts as the text encoder takes them, int64 [N,L]."""
    return np.stack([item.ids for item in tokens])
