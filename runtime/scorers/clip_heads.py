"""`q16`, `sd-checker`, `clip-score`: small heads on the embeddings of CLIP's image encoder.

`sld-export --scorer` makes their folders. Scorers with the same file as image encoder share it, and
it encodes a batch of pictures once for all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sld_edge.engines.errors import InputError
from sld_edge.engines.files import JSON_LIMIT
from sld_edge.engines.onnxruntime.engine import OrtEngine
from sld_edge.runtime.scorers.base import Pictures, Reports, Scores
from sld_edge.runtime.scorers.folder import (
    HEAD,
    IMAGE_ENCODER,
    TEXT_ENCODER,
    TOKENIZER,
    ScorerFolder,
)
from sld_edge.runtime.scorers.preprocess import Floats, clip_pixels
from sld_edge.runtime.tokenizer import Tokenizer, input_ids

CONCEPTS, SPECIAL_CARE = 17, 3  # of the safety checker of Stable Diffusion 1.x and 2.x
_CARE = np.float32(0.01)  # added to all later margins after a special-care concept is detected


class ClipImage:
    """CLIP's image encoder; it keeps the embeddings of the last batch for the next head."""

    def __init__(self, engine: OrtEngine, size: int) -> None:
        """Take an encoder for squares of `size` pixels."""
        self._engine, self._size = engine, size
        self._last: tuple[bytes, Floats] | None = None

    def embed(self, pictures: Pictures) -> Floats:
        """Return the embeddings of B pictures, float32 [B,D]."""
        key = hashlib.sha256(repr(pictures.shape).encode() + pictures.tobytes()).digest()
        if self._last is None or self._last[0] != key:
            pixels = clip_pixels(pictures, self._size)
            self._last = (key, self._engine.run({"pixels": pixels})["embedding"])
        return self._last[1]


Encoders = dict[str, ClipImage]
"""The loaded image encoders, by hash."""


def _encoder(folder: ScorerFolder, encoders: Encoders) -> ClipImage:
    key = folder.sha256_of(IMAGE_ENCODER)
    if key not in encoders:
        encoders[key] = ClipImage(folder.engine(IMAGE_ENCODER), folder.manifest.image_size)
    return encoders[key]


class Q16:
    """Key `q16.inappropriate`, the probability that Q16 gives, 0 to 1 (Schramowski et al. 2022)."""

    name = "q16"

    def __init__(self, path: Path, encoders: Encoders) -> None:
        """Load the folder at `path`; EngineError if it is not as it was made."""
        folder = ScorerFolder(path, self.name)
        self.sha256 = folder.sha256
        self._image = _encoder(folder, encoders)
        self._head = folder.engine(HEAD)

    def score(
        self, pictures: Pictures, prompts: Sequence[str], reports: Reports | None = None
    ) -> list[Scores]:
        """Score pictures; prompts and reports make no difference."""
        out = self._head.run({"embedding": self._image.embed(pictures)})["probability"]
        return [{"q16.inappropriate": float(row[1])} for row in out]


class SdChecker:
    """Keys `sd-checker.flagged` (1 or 0), `.margin`, and the 20 raw scores.

    `.concept-00` to `-16` and `.special-care-0` to `-2` are cosines minus their thresholds.
    `.margin` is the largest of the concepts, rounded and adjusted as in diffusers'
    StableDiffusionSafetyChecker; above 0 the picture is flagged. No picture is blacked out.
    """

    name = "sd-checker"

    def __init__(self, path: Path, encoders: Encoders) -> None:
        """Load the folder at `path`; EngineError if it is not as it was made."""
        folder = ScorerFolder(path, self.name)
        self.sha256 = folder.sha256
        self._image = _encoder(folder, encoders)
        self._head = folder.engine(HEAD)

    def score(
        self, pictures: Pictures, prompts: Sequence[str], reports: Reports | None = None
    ) -> list[Scores]:
        """Score pictures; prompts and reports make no difference."""
        raw = self._head.run({"embedding": self._image.embed(pictures)})["margin"]
        return [_checked(row) for row in raw]


def checker_margin(concepts: Floats, special_care: Floats) -> float:
    """Return the largest margin of the concepts, as in the checker; above 0 it flags.

    Args:
        concepts: float32 [17], cosine minus threshold.
        special_care: float32 [3], cosine minus threshold; a value above 0 raises all later margins.
    """
    adjustment = np.float32(0)
    for margin in special_care:
        if np.round(margin + adjustment, 3) > 0:
            adjustment = _CARE
    return float(np.round(concepts + adjustment, 3).max())


def _checked(row: Floats) -> Scores:
    concepts, special_care = row[:CONCEPTS], row[CONCEPTS:]
    margin = checker_margin(concepts, special_care)
    return {
        "sd-checker.flagged": float(margin > 0),
        "sd-checker.margin": margin,
        **{f"sd-checker.concept-{k:02d}": float(value) for k, value in enumerate(concepts)},
        **{f"sd-checker.special-care-{k}": float(value) for k, value in enumerate(special_care)},
    }


class ClipScore:
    """Key `clip-score`, the cosine of a picture's and its prompt's embeddings, -1 to 1.

    The paper's CLIP distance is 1 minus this score.
    """

    name = "clip-score"

    def __init__(self, path: Path, encoders: Encoders) -> None:
        """Load the folder at `path`; EngineError if it is not as it was made."""
        folder = ScorerFolder(path, self.name)
        self.sha256 = folder.sha256
        self._image = _encoder(folder, encoders)
        self._text = folder.engine(TEXT_ENCODER)
        # Bytes that are not UTF-8 become surrogates, which Tokenizer refuses.
        text = folder.read(TOKENIZER, JSON_LIMIT).decode(errors="surrogateescape")
        self._tokenizer = Tokenizer(text, length=folder.manifest.text_length)

    def score(
        self, pictures: Pictures, prompts: Sequence[str], reports: Reports | None = None
    ) -> list[Scores]:
        """Score pictures against their prompts; the end of a long prompt is not read.

        Raises:
            InputError: not a prompt for each picture.
        """
        if len(prompts) != len(pictures):
            raise InputError("prompts to score", got=len(prompts), expected=len(pictures))
        texts = list(dict.fromkeys(prompts))
        ids = input_ids([self._tokenizer(text) for text in texts])
        embedded = _unit(self._text.run({"input_ids": ids})["embedding"])
        by_text = dict(zip(texts, embedded, strict=True))
        images = _unit(self._image.embed(pictures))
        return [
            {"clip-score": float(image @ by_text[prompt])}
            for image, prompt in zip(images, prompts, strict=True)
        ]


def _unit(rows: NDArray[np.float32]) -> Floats:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(length, np.float32(1e-12)), np.float32)
