"""The text filters of a bundle: stored in it, kept in the cache, or made here."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from sld_edge.engines.cache import (
    FILTERS,
    entry_name,
    make_room,
    private_folder,
    remember,
    remembered,
)
from sld_edge.engines.errors import BundleError, InputError, OutputError
from sld_edge.engines.files import floats_from_npy, npy_from_floats, read_limited, write_whole
from sld_edge.runtime.bundle import Bundle
from sld_edge.runtime.text_filter import (
    GUIDE,
    METHOD,
    FilterTexts,
    Floats,
    Outputs,
    TextFilter,
    everyday_texts,
    fitted_filter,
    require_progress,
)

_MOST = 16  # filters in memory
_LIMIT = 1 << 28  # bytes of a kept filter
_DIGEST = 32  # bytes of SHA-256, before the array


class FilterStore:
    """Gives the filter for some concepts; each is made once."""

    def __init__(
        self,
        bundle: Bundle,
        outputs: Callable[[str], Outputs],
        ids: Callable[[str, str], tuple[int, ...]],
        *,
        identity: Callable[[], str],
        say: Callable[[str], None],
    ) -> None:
        """Load nothing yet.

        Args:
            bundle: the bundle.
            outputs: returns the text encoders' outputs for a text.
            ids: returns the token ids of a text for a text encoder.
            identity: returns a text that is the same only if the text encoders' outputs are.
            say: called with a line for the user before a filter is made.
        """
        self._bundle, self._outputs, self._ids, self._identity = bundle, outputs, ids, identity
        self._say = say
        self._made: dict[tuple[str, ...], TextFilter] = {}

    def filter_for(self, concepts: tuple[str, ...]) -> TextFilter:
        """Return the filter that takes `concepts` out of a prompt.

        Raises:
            BundleError: the stored filter does not do what its texts say.
            InputError: concepts that cannot be taken out.
        """
        if concepts not in self._made:
            text_filter = self._stored(concepts) or self._kept(concepts)
            if len(self._made) >= _MOST:
                self._made.pop(next(iter(self._made)))  # the oldest
            self._made[concepts] = text_filter
        return self._made[concepts]

    def _stored(self, concepts: tuple[str, ...]) -> TextFilter | None:
        entry = self._bundle.manifest.text_filter
        if entry is None or set(entry.concepts) != set(concepts):
            return None
        stored = self._bundle.text_filter()
        assert stored is not None  # the manifest has an entry
        texts, text_filter = stored
        known = self._identity()
        if not remembered("text-filter", known):
            require_progress(text_filter, texts, self._outputs, self._ids, error=BundleError)
            remember("text-filter", known)
        return text_filter

    def _kept(self, concepts: tuple[str, ...]) -> TextFilter:
        """Return the filter from the cache, or make it and keep it there."""
        texts = self._texts(concepts)
        path = self._path(texts)
        text_filter = None if path is None else self._read(path, concepts)
        if text_filter is None:
            self._say(f"making a text filter, once for these words: {'; '.join(concepts)}")
            text_filter = fitted_filter(texts, self._outputs, self._ids)
            require_progress(text_filter, texts, self._outputs, self._ids, error=InputError)
            data = _bytes(text_filter)
            if path is not None and make_room(len(data)):
                with suppress(OutputError):  # then it is made again at the next start
                    write_whole(path, data)
        return text_filter

    def _texts(self, concepts: tuple[str, ...]) -> FilterTexts:
        stored = self._bundle.text_filter()
        guide, preserve = GUIDE, everyday_texts()
        if stored is not None:
            guide, preserve = stored[0].guide, stored[0].preserve
        return FilterTexts(concepts=concepts, guide=guide, preserve=preserve)

    def _path(self, texts: FilterTexts) -> Path | None:
        folder = private_folder(FILTERS)
        if folder is None:
            return None
        facts = (str(METHOD), self._identity(), repr(texts))
        return folder / entry_name(*facts)

    def _read(self, path: Path, concepts: tuple[str, ...]) -> TextFilter | None:
        """Return a kept filter; None if there is none, or if the file is damaged."""
        if not path.exists():
            return None
        sizes = {source: rows.shape[-1] for source, rows in self._outputs("").items()}
        try:
            data = read_limited(path, _LIMIT, error=BundleError)
            if hashlib.sha256(data[_DIGEST:]).digest() != data[:_DIGEST]:
                return None
            numbers = floats_from_npy(data[_DIGEST:])
        except (BundleError, ValueError):
            return None
        if numbers.shape != (sum(size**2 for size in sizes.values()),):
            return None
        matrices: dict[str, Floats] = {}
        for source, size in sizes.items():
            matrices[source], numbers = numbers[: size**2].reshape(size, size), numbers[size**2 :]
        return TextFilter(concepts=concepts, matrices=matrices)


def _bytes(text_filter: TextFilter) -> bytes:
    """Return a file with all matrices, one after another, and their SHA-256 before them."""
    numbers = [matrix.ravel() for matrix in text_filter.matrices.values()]
    data = npy_from_floats(np.concatenate(numbers))
    return hashlib.sha256(data).digest() + data
