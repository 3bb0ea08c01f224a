"""The records of `bundle.json`, the contract between export and run. `manifest_file` reads it.

docs/bundle.md describes the format. The manifest describes a model's inputs as data, so the runtime
has no code for a model family.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sld_edge.engines.base import TensorSpec
from sld_edge.engines.files import sha256_of_file

FORMAT = "sld-edge-bundle"
FORMAT_VERSION = 3
MANIFEST = "bundle.json"
SHALLOW = "unet_shallow"  # the component that feature caching needs
DECODER = "vae_decoder"
PREVIEW_DECODER = "preview_decoder"  # a small decoder, for previews and for `--vae tiny`
# SHA-256 of the package's guidance graph; every bundle has a copy of the graph.
OWN_GRAPHS: Mapping[str, str] = {
    "guidance": "0eb26a10fc2c3a73ed76aa52cdc1119067054690c9e6052fb6d6790332914666",
}
SIZE, GUIDANCE = "size", "guidance"  # sources of a condition that are not text encoders
TIME_IDS = 6  # numbers of SIZE: original size, crop, target size

PredictionType = Literal["epsilon", "v_prediction", "sample"]
GuidanceKind = Literal["classifier-free", "embedded"]
Per = Literal["branch", "image"]
Absent = Literal["encode", "zeros"]


@dataclass(frozen=True, kw_only=True)
class File:
    """A file of a bundle: path relative to the bundle, its SHA-256 and its size in bytes."""

    path: str
    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Component:
    """One graph: its files (the graph first, then its external data) and its tensors."""

    files: tuple[File, ...]
    precision: str
    storage: str
    attention: str
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """The exported model: the name that the user gave it, and where it came from."""

    id: str
    source: str


@dataclass(frozen=True, kw_only=True)
class LatentInfo:
    """Latents: channels, pixels along a side of a latent cell, and the VAE's scaling factor."""

    channels: int
    downscale: int
    scaling_factor: float


@dataclass(frozen=True, kw_only=True)
class TextInput:
    """The tokenizer of a text encoder, and how many tokens of a prompt the encoder takes."""

    tokenizer: File
    length: int


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A UNet input other than latents and timestep, and where its values come from.

    Attributes:
        per: "branch", [K*B,...], branch-major; or "image", [B,...].
        sources: for a branch input, outputs of text encoders ("COMPONENT.OUTPUT"), joined on the
            last axis; for an image input, "size" (height and width of the original, top and left of
            the crop, height and width of the target) or "guidance" (the guidance scale).
        absent: the values of the unconditional branch without a negative prompt: the embedding of
            the empty text ("encode"), or zeros.
        offset: added to the guidance scale.
    """

    per: Per
    sources: tuple[str, ...]
    absent: Absent = "encode"
    offset: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Size:
    """A picture's size in pixels."""

    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """The settings of a run that the caller leaves out."""

    sampler: str
    steps: int
    guidance_scale: float
    safety: str


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """Constant embeddings of the empty prompt and the safety concepts.

    Attributes:
        texts: the texts, in the order of the arrays' rows.
        arrays: a file for each condition per branch, float32 [texts,...].
    """

    texts: tuple[str, ...]
    arrays: Mapping[str, File]


@dataclass(frozen=True, kw_only=True)
class StoredFilter:
    """A text filter (`text_filter`) and the texts that determine it.

    Attributes:
        concepts: the words or phrases that it takes out.
        guide: the word that takes their place.
        preserve: a UTF-8 file of the other texts, one a line; the empty text is not in it.
        arrays: a file for each output of a text encoder ("COMPONENT.OUTPUT"), float32 [C,C].
    """

    concepts: tuple[str, ...]
    guide: str
    preserve: File
    arrays: Mapping[str, File]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`bundle.json`, typed."""

    created_by: str
    model: ModelInfo
    prediction_type: PredictionType
    latents: LatentInfo
    size: Size
    scheduler: Mapping[str, Any]
    defaults: Defaults
    safety_concepts: tuple[str, ...]
    guidance: GuidanceKind
    texts: Mapping[str, TextInput]
    conditioning: Mapping[str, Condition]
    embeddings: Embeddings
    components: Mapping[str, Component]
    text_filter: StoredFilter | None = None

    @property
    def safety_concept(self) -> str:
        """The concepts as one text."""
        return ", ".join(self.safety_concepts)

    def to_json(self) -> str:
        """Write as `bundle.json`."""
        body = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps(body, indent=1, ensure_ascii=False) + "\n"

    def files(self) -> list[File]:
        """Return every file of the bundle but the plans, which `plans.json` lists (`plan_list`)."""
        parts = [text.tokenizer for text in self.texts.values()]
        parts += self.embeddings.arrays.values()
        if self.text_filter is not None:
            parts += [self.text_filter.preserve, *self.text_filter.arrays.values()]
        parts += [file for part in self.components.values() for file in part.files]
        return list(dict.fromkeys(parts))  # the two graphs of a UNet share their weights

    @property
    def text_length(self) -> int:
        """The number of tokens of a prompt: L in the shapes of the conditioning."""
        return next(iter(self.texts.values())).length


def file_entry(path: Path) -> File:
    """Return the manifest's entry for a file in the bundle's folder."""
    digest, identity = sha256_of_file(path)
    return File(path=path.name, sha256=digest, bytes=identity.size)
