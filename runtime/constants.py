"""A bundle's stored embeddings, held against the text encoder once.

A run takes the empty prompt and the bundle's safety concepts from `embeddings.npy`. A bundle could
store something else under their names, and safety would steer away from nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sld_edge.engines.errors import BundleError
from sld_edge.runtime.bundle import Bundle
from sld_edge.runtime.safety import empty_concept

Floats = NDArray[np.float32]

# Of the norm. Providers differ by rounding, other texts by 0.3 and more with
# CLIP; the miniature's weakest words differ by 0.003, so its FP32 encoder is held to less.
_SAME = {"fp32": 0.002, "fp16": 0.02}
_EMPTY = 1e-4


def check_constants(bundle: Bundle, encode: Callable[[str], Floats]) -> None:
    """Compare every stored embedding with what the text encoder gives for its text.

    Args:
        bundle: whose embeddings.
        encode: gives a text's embedding, float32 [L,C], from the bundle's text encoder.

    Raises:
        BundleError: one that differs.
    """
    precision = bundle.manifest.components["text_encoder"].precision
    most = _SAME.get(precision, _SAME["fp32"])
    for text, stored in bundle.embeddings().items():
        wanted = encode(text)
        if not distance(stored, wanted) <= most:
            raise BundleError(
                f"the stored embedding of {text[:60]!r} is not what the text encoder gives",
                got=f"a distance of {distance(stored, wanted):.2g}",
                expected=f"at most {most}",
                do="do not run this bundle; export it again",
            )


def refuse_empty(concept: str, embedding: Floats, empty: Floats) -> None:
    """Refuse a safety concept that the text encoder takes for the empty prompt.

    Raises:
        InputError: safety could not act with it.
    """
    if not distance(embedding, empty) > _EMPTY:
        raise empty_concept(concept)


def distance(one: Floats, other: Floats) -> float:
    """Return the norm of the difference relative to the norm of `other`; NaN where one is none."""
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))
