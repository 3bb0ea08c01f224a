"""`bundle.json`, the contract between export and run: its records. `manifest_file` reads it.

docs/bundle.md has the format. The manifest carries a model's inputs as data, so that the runtime
knows no model family.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sld_edge.engines.base import TensorSpec

FORMAT = "sld-edge-bundle"
FORMAT_VERSION = 3
MANIFEST = "bundle.json"
SHALLOW = "unet_shallow"  # the component that feature caching needs
PREVIEW_DECODER = "preview_decoder"  # a small decoder, for pictures of a run that goes on
# SHA-256 of the package's own guidance graph, which every bundle has a copy of.
OWN_GRAPHS: Mapping[str, str] = {
    "guidance": "0eb26a10fc2c3a73ed76aa52cdc1119067054690c9e6052fb6d6790332914666",
}
SIZE, GUIDANCE = "size", "guidance"  # sources of a condition beside text encoders' outputs
TIME_IDS = 6  # numbers of SIZE

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
    """What was exported: the name the user gave, and where it came from."""

    id: str
    source: str


@dataclass(frozen=True, kw_only=True)
class LatentInfo:
    """Latents: channels, pixels a latent cell in one direction, and the VAE's scaling factor."""

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
    """A UNet input beside latents and timestep, and where its values come from.

    Attributes:
        per: "branch", [K*B,...], branch-major; or "image", [B,...].
        sources: of a branch input, outputs of text encoders ("COMPONENT.OUTPUT"), joined on the
            last axis; of an image input, "size" (height and width of the original, top and left of
            the crop, height and width of the target) or "guidance" (the guidance scale).
        absent: the unconditional branch where no negative prompt is given: the empty text's
            embedding, or zeros.
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
    """What a run uses where the caller does not say."""

    sampler: str
    steps: int
    guidance_scale: float
    safety: str


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """Constant embeddings of the empty prompt and the safety concepts.

    Attributes:
        texts: the texts.
        arrays: for each condition per branch a file, float32 [texts,...].
    """

    texts: tuple[str, ...]
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

    @property
    def safety_concept(self) -> str:
        """The concepts as one text."""
        return ", ".join(self.safety_concepts)

    def to_json(self) -> str:
        """Write as `bundle.json`."""
        body = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps(body, indent=1, ensure_ascii=False) + "\n"

    def files(self) -> list[File]:
        """Every file of the bundle; plans have a list of their own (`plan_list`)."""
        parts = [text.tokenizer for text in self.texts.values()]
        parts += self.embeddings.arrays.values()
        parts += [file for part in self.components.values() for file in part.files]
        return list(dict.fromkeys(parts))  # the two graphs of a UNet share their weights

    @property
    def text_length(self) -> int:
        """Tokens of a prompt, L of the conditioning per branch."""
        return next(iter(self.texts.values())).length


def file_entry(path: Path) -> File:
    """Return the manifest's entry of a file that lies beside it."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return File(path=path.name, sha256=digest, bytes=path.stat().st_size)
