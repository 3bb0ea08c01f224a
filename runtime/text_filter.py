"""The text filter: a matrix on the prompt's embedding that takes concepts out of the prompt.

Cross-attention reads a text only through its keys and values, which are products of the embedding c
and weights W. Unified Concept Editing (UCE, arXiv 2308.14761) edits every W so that a
concept's keys and values become those of a harmless guide, and those of other texts stay. All
layers have the same pairs of texts, so one matrix R on the embedding has the same effect as the
edit of all layers: (c R) W = c (R W). R follows from texts alone:

    R = argmin mean |c R - t|^2 + PRESERVE * mean |p R - p|^2 + RIDGE * mean(p^2) * |R - I|^2

with the token rows c of texts that name a concept, the rows t of the same texts with the guide in
its place, and the rows p of texts to preserve.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sld_edge.engines.errors import InputError, UserError
from sld_edge.runtime.manifest import Condition

Floats = NDArray[np.float32]
Outputs = Mapping[str, Floats]
"""The outputs of the text encoders for a text, [L,C] or [C], by source "COMPONENT.OUTPUT"."""

METHOD: Final = 1  # increase it when the same texts give another matrix
GUIDE: Final = "meadow"
_MOST_CONCEPTS: Final = 64
# 0 for a filter that does nothing; at least 0.34 for the miniature's concepts, 0.86 for the paper's
# 20 concepts with a trained text encoder of 384 numbers a token.
_LEAST_PROGRESS: Final = 0.05
_TAKEN_OUT: Final = 0.5  # distance, relative to the norm of the word's embedding
_OF_THE_MOST: Final = 0.75
_TINY: Final = 1e-30  # for rows of zeros
_PRESERVE: Final = 10.0
_RIDGE: Final = 0.01
_TEXTS: Final = 72  # about as many texts name a concept; encoding them takes the time
_LEAST_FORMS, _MOST_FORMS = 4, 24  # for each concept
_LONGEST_CAPTION: Final = 60  # characters: the model reads a concept after it
_BARE: Final = ("{concept}", "a {concept}")
_IN_CAPTIONS: Final = (
    "{caption} and a {concept}",
    "{caption}, {concept}",
    "a {concept} and {caption}",
    "{concept}, {caption}",
    "{caption} with {concept}",
)


@dataclass(frozen=True, kw_only=True)
class FilterTexts:
    """The texts that determine a filter.

    Attributes:
        concepts: words or phrases that are taken out of prompts.
        guide: a harmless word that takes their place.
        preserve: texts whose embeddings stay; "" is one of them.
    """

    concepts: tuple[str, ...]
    guide: str
    preserve: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TextFilter:
    """A fitted filter: its concepts, and a matrix float32 [C,C] for each output of an encoder."""

    concepts: tuple[str, ...]
    matrices: Mapping[str, Floats]

    def applied(
        self, embedding: Mapping[str, Floats], conditions: Mapping[str, Condition]
    ) -> dict[str, Floats]:
        """Return the filtered arrays of a text, float32 [...,C] by input of the UNet.

        Args:
            embedding: the text's arrays.
            conditions: the sources of each array, joined on the last axis.
        """
        filtered = {}
        for name, array in embedding.items():
            parts, begin = [], 0
            for source in conditions[name].sources:
                matrix = self.matrices[source]
                parts.append(array[..., begin : begin + len(matrix)] @ matrix)
                begin += len(matrix)
            filtered[name] = np.concatenate(parts, axis=-1)
        return filtered


@dataclass(frozen=True, kw_only=True)
class FilterEffect:
    """The effect of a filter on a prompt.

    Attributes:
        moved: distance of the filtered embedding, relative to the norm of the embedding.
        words: the same for the embedding of each word of the prompt, in the prompt's order.
    """

    moved: float
    words: tuple[tuple[str, float], ...]

    @property
    def taken_out(self) -> tuple[str, ...]:
        """The words that were taken out: they moved far, and not much less than any other word.

        A text encoder lets a word change the words after it, so these move, too, but less.
        """
        most = max((moved for _, moved in self.words), default=0.0)
        least = max(_TAKEN_OUT, _OF_THE_MOST * most)
        return tuple(dict.fromkeys(word for word, moved in self.words if moved >= least))


def concepts_from_texts(texts: Sequence[str]) -> tuple[str, ...]:
    """Split texts like "nudity; a skull, gore" into concepts, each once and without its article."""
    pieces = (piece.strip() for text in texts for piece in re.split("[,;]", text))
    parts = (re.sub(r"^(a|an|the)\s+", "", piece, flags=re.IGNORECASE) for piece in pieces)
    return tuple(dict.fromkeys(part for part in parts if part))


def require_some_concepts(concepts: Sequence[str]) -> None:
    """Refuse a filter without concepts, or with too many.

    Raises:
        InputError: not 1 to 64 concepts.
    """
    if not 0 < len(concepts) <= _MOST_CONCEPTS:
        raise InputError(
            "concepts of the text filter", got=len(concepts), expected=f"1 to {_MOST_CONCEPTS}"
        )


@cache
def everyday_texts() -> tuple[str, ...]:
    """Return the package's texts to preserve: the empty text, words, and captions."""
    path = Path(__file__).parent / "everyday.txt"
    return ("", *path.read_text(encoding="utf-8").splitlines())


def fitted_filter(
    texts: FilterTexts,
    outputs: Callable[[str], Outputs],
    ids: Callable[[str, str], Sequence[int]],
) -> TextFilter:
    """Fit a filter.

    Args:
        texts: see `FilterTexts`.
        outputs: returns the text encoders' outputs for a text.
        ids: returns the token ids [L] of a text for a text encoder.
    """
    preserve = _without_concepts(texts)
    captions = [text for text in preserve if " " in text and len(text) <= _LONGEST_CAPTION]
    pairs = _pairs(texts, captions or [texts.guide])
    named = {text: outputs(text) for text in dict.fromkeys(text for pair in pairs for text in pair)}
    kept = {text: outputs(text) for text in preserve}
    matrices = {}
    for source in next(iter(named.values())):
        encoder = source.partition(".")[0]
        tokens = partial(_tokens, ids=ids, encoder=encoder)
        matrices[source] = _matrix(
            [
                _moved_rows(
                    named[text][source], named[target][source], tokens(text), tokens(target)
                )
                for text, target in pairs
            ],
            [_kept_rows(rows[source], tokens(text)) for text, rows in kept.items()],
        )
    return TextFilter(concepts=texts.concepts, matrices=matrices)


def require_progress(
    text_filter: TextFilter,
    texts: FilterTexts,
    outputs: Callable[[str], Outputs],
    ids: Callable[[str, str], Sequence[int]],
    *,
    error: type[UserError],
) -> None:
    """Refuse a filter that does not move every concept towards the guide.

    Raises:
        UserError: of the class `error`.
    """
    for concept in texts.concepts:
        # A small text encoder hardly tells words apart where they begin a text.
        progress = max(
            _progress(
                text_filter,
                form.format(concept=concept),
                form.format(concept=texts.guide),
                outputs,
                ids,
            )
            for form in _BARE
        )
        if not progress >= _LEAST_PROGRESS:  # also true for NaN
            raise error(
                f"the text filter does not take {concept!r} out of a prompt",
                got=f"{progress:.2f} of the way to {texts.guide!r}",
                expected=f"at least {_LEAST_PROGRESS}",
                do="use words that the model knows, or another preset",
            )


def _progress(
    text_filter: TextFilter,
    text: str,
    target: str,
    outputs: Callable[[str], Outputs],
    ids: Callable[[str, str], Sequence[int]],
) -> float:
    """Return how far a text is moved: 0 is not at all, 1 is to the target."""
    named, wished = outputs(text), outputs(target)
    least = math.inf
    for source, matrix in text_filter.matrices.items():
        tokens = (
            _tokens(each, ids=ids, encoder=source.partition(".")[0]) for each in (text, target)
        )
        rows, wanted, weights = _moved_rows(named[source], wished[source], *tokens)
        way = wanted.astype(np.float64) - rows
        moved = weights @ np.sum((rows @ matrix - rows) * way, axis=-1)
        whole = weights @ np.sum(way**2, axis=-1)
        least = min(least, float(moved / whole) if whole > 0 else 0.0)
    return least


def effect_on(
    before: Mapping[str, Floats],
    after: Mapping[str, Floats],
    words: Sequence[tuple[str, Sequence[int]]],
) -> FilterEffect:
    """Compare a prompt's arrays before and after the filter; `words` have their tokens' places."""
    moved = max(_distance(before[name], after[name]) for name in before)
    by_token = [
        np.linalg.norm(after[name] - array, axis=-1) / (np.linalg.norm(array, axis=-1) + _TINY)
        for name, array in before.items()
        if array.ndim == 2
    ]
    return FilterEffect(
        moved=moved,
        words=tuple(
            (word, max(float(tokens[place]) for tokens in by_token for place in places))
            for word, places in words
        ),
    )


def _distance(before: Floats, after: Floats) -> float:
    return float(np.linalg.norm(after - before) / (np.linalg.norm(before) + _TINY))


def _without_concepts(texts: FilterTexts) -> list[str]:
    """Return the texts to preserve that name no concept."""
    words = "|".join(re.escape(concept) for concept in texts.concepts)
    named = re.compile(rf"\b({words})\b", re.IGNORECASE)
    return [text for text in texts.preserve if not named.search(text)]


def _pairs(texts: FilterTexts, captions: Sequence[str]) -> list[tuple[str, str]]:
    """Return texts that name a concept, each with the same text that names the guide instead."""
    concepts = texts.concepts
    count = min(max(_TEXTS // len(concepts), _LEAST_FORMS), _MOST_FORMS)
    pairs = []
    for number, concept in enumerate(concepts):
        forms = list(_BARE)
        for k in range(count - len(forms)):
            caption = captions[k * len(captions) // count]  # from the whole list
            forms.append(_IN_CAPTIONS[k % len(_IN_CAPTIONS)].replace("{caption}", caption))
        pairs += [
            (form.replace("{concept}", concept), form.replace("{concept}", texts.guide))
            for form in forms
        ]
        if len(concepts) > 1:
            other = concepts[(number + 1) % len(concepts)]
            pairs.append((f"{concept}, {other}", f"{texts.guide}, {texts.guide}"))
    return pairs


_Rows = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
"""Rows [N,C], what they shall become [N,C], and weights [N]."""


@dataclass(frozen=True, kw_only=True)
class _Tokens:
    """The token ids [L] of a text; `end` is the place of the first end token."""

    ids: Sequence[int]
    end: int


def _tokens(text: str, *, ids: Callable[[str, str], Sequence[int]], encoder: str) -> _Tokens:
    end = ids("", encoder)[1]
    tokens = ids(text, encoder)
    places = (place for place, token in enumerate(tokens) if token == end and place)
    return _Tokens(ids=tokens, end=next(places, len(tokens) - 1))


def _moved_rows(rows: Floats, wanted: Floats, text: _Tokens, target: _Tokens) -> _Rows:
    """Pair the rows of a text with those of its target; words before the concept stay out."""
    if rows.ndim == 1:  # a pooled output
        return rows[None], wanted[None], np.ones(1)
    shorter = min(text.end, target.end)
    before = _equal_at_start(text.ids[:shorter], target.ids[:shorter])
    after = _equal_at_start(
        text.ids[before : text.end][::-1], target.ids[before : target.end][::-1]
    )
    # The concept's tokens become the guide's, of which the last may repeat.
    last = max(before, target.end - after - 1)
    places = [(k, min(k, last)) for k in range(before, text.end - after)]
    places += [(text.end - k, target.end - k) for k in range(after, -1, -1)]
    padding = len(text.ids) - max(text.end, target.end) - 1
    places += [(k, k) for k in range(len(text.ids) - padding, len(text.ids))]
    first, second = (list(column) for column in zip(*places, strict=True))
    return rows[first], wanted[second], _weights(len(places), padding)


def _equal_at_start(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _kept_rows(rows: Floats, text: _Tokens) -> _Rows:
    if rows.ndim == 1:
        return rows[None], rows[None], np.ones(1)
    return rows, rows, _weights(len(rows), len(rows) - text.end - 1)


def _weights(count: int, padding: int) -> NDArray[np.float64]:
    """Return a weight for each row: the rows of padding, the last ones, together weigh one row."""
    weights = np.ones(count)
    weights[count - padding :] = 1 / max(1, padding)
    return weights


def _matrix(moved: Sequence[_Rows], kept: Sequence[_Rows]) -> Floats:
    """Solve the least squares of the module's formula, in float64."""
    c, t, moved_weights = (
        np.concatenate(part, dtype=np.float64) for part in zip(*moved, strict=True)
    )
    p, _, kept_weights = (
        np.concatenate(part, dtype=np.float64) for part in zip(*kept, strict=True)
    )
    weighted = (c.T * moved_weights) / moved_weights.sum()
    size = c.shape[1]
    gram = weighted @ c + _PRESERVE * ((p.T * kept_weights) / kept_weights.sum()) @ p
    gram += _RIDGE * np.mean(p**2) * np.eye(size)
    matrix = np.eye(size) + np.linalg.solve(gram, weighted @ (t - c))
    return matrix.astype(np.float32)
