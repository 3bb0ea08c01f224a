"""The bundle: a directory with `bundle.json`, the tokenizer, the graphs, and constant embeddings.

`bundle.json` is the contract between export and run. The format is written down in docs/bundle.md.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from sld_edge.engines.base import TensorSpec
from sld_edge.engines.errors import BundleError

FORMAT = "sld-edge-bundle"
FORMAT_VERSION = 2
MANIFEST = "bundle.json"
REQUIRED_COMPONENTS = ("text_encoder", "unet", "guidance", "vae_decoder")
SHALLOW = "unet_shallow"  # component that feature caching needs
KEPT_SAFETY = "kept_safety"  # and the one that safety cadence needs
EMBEDDED = Path(__file__).parent / "miniature"  # the bundle that ships with the package

PredictionType = Literal["epsilon", "v_prediction", "sample"]


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
class TextInfo:
    """Text: tokens of a prompt and width of an embedding."""

    length: int
    width: int


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
    """Constant text embeddings, float32 [texts,L,C]: the empty prompt and the safety concepts."""

    path: str
    sha256: str
    bytes: int
    texts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`bundle.json`, typed."""

    created_by: str
    model: ModelInfo
    prediction_type: PredictionType
    latents: LatentInfo
    text: TextInfo
    size: Size
    scheduler: Mapping[str, Any]
    defaults: Defaults
    safety_concepts: tuple[str, ...]
    tokenizer: File
    embeddings: Embeddings
    components: Mapping[str, Component]
    plans: Mapping[str, File] = field(default_factory=dict)  # TensorRT plans, by component

    @property
    def safety_concept(self) -> str:
        """The concepts as one text."""
        return ", ".join(self.safety_concepts)

    def to_json(self) -> str:
        """Write as `bundle.json`."""
        body = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps(body, indent=1, ensure_ascii=False) + "\n"

    def files(self) -> list[File]:
        """Every file that a run on the CPU needs; plans are looked at where they are used."""
        parts = [self.tokenizer, _file(asdict(self.embeddings))]
        parts += [file for part in self.components.values() for file in part.files]
        return list(dict.fromkeys(parts))  # the two graphs of a UNet share their weights


def manifest_from_json(text: str, *, origin: str) -> Manifest:
    """Read `bundle.json`; `origin` is the path that error messages name.

    Raises:
        BundleError: not JSON, not a bundle, a future format version, a missing or wrong entry, or a
            path that leaves the bundle.
    """
    try:
        body = json.loads(text)
    except json.JSONDecodeError as error:
        raise BundleError(
            f"{origin} is not whole JSON", got=error, do="export or copy the bundle again"
        ) from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise BundleError(f"{origin} is not a bundle's manifest", expected=f'"format": "{FORMAT}"')
    version = body.get("format_version")
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{origin}: format version",
            got=version,
            expected=FORMAT_VERSION,
            do="update sld-edge"
            if isinstance(version, int) and version > FORMAT_VERSION
            else "export the bundle again",
        )
    try:
        return _manifest(body)
    except KeyError as error:
        raise BundleError(
            f"{origin} lacks the entry {error}", do="export the bundle again"
        ) from error
    except (TypeError, ValueError, AttributeError) as error:
        raise BundleError(
            f"{origin} has an entry of the wrong kind", got=error, do="export the bundle again"
        ) from error


def _manifest(body: Mapping[str, Any]) -> Manifest:
    if body["prediction_type"] not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(f"prediction_type {body['prediction_type']!r}")
    components = {name: _component(part) for name, part in body["components"].items()}
    for name in REQUIRED_COMPONENTS:
        components[name]  # a KeyError names what is missing
    latents, text, size, defaults, embeddings = (
        body[key] for key in ("latents", "text", "size", "defaults", "embeddings")
    )
    _file(embeddings)
    return Manifest(
        created_by=str(body["created_by"]),
        model=ModelInfo(id=str(body["model"]["id"]), source=str(body["model"]["source"])),
        prediction_type=cast(PredictionType, body["prediction_type"]),
        latents=LatentInfo(
            channels=_count(latents["channels"]),
            downscale=_count(latents["downscale"]),
            scaling_factor=float(latents["scaling_factor"]),
        ),
        text=TextInfo(length=_count(text["length"]), width=_count(text["width"])),
        size=Size(width=_count(size["width"]), height=_count(size["height"])),
        scheduler=dict(body["scheduler"]),
        defaults=Defaults(
            sampler=str(defaults["sampler"]),
            steps=_count(defaults["steps"]),
            guidance_scale=float(defaults["guidance_scale"]),
            safety=str(defaults["safety"]),
        ),
        safety_concepts=_concepts(body["safety_concepts"]),
        tokenizer=_file(body["tokenizer"]),
        embeddings=Embeddings(
            path=embeddings["path"],
            sha256=embeddings["sha256"],
            bytes=embeddings["bytes"],
            texts=tuple(map(str, embeddings["texts"])),
        ),
        components=components,
        plans={name: _file(file) for name, file in body.get("plans", {}).items()},
    )


def _concepts(texts: object) -> tuple[str, ...]:
    if not isinstance(texts, list) or not texts:
        raise ValueError(f"{texts!r} where a list of safety concepts belongs")
    return tuple(map(str, texts))


def _component(part: Mapping[str, Any]) -> Component:
    if not part["files"]:
        raise ValueError("a component without files")
    return Component(
        files=tuple(_file(file) for file in part["files"]),
        precision=str(part["precision"]),
        storage=str(part["storage"]),
        attention=str(part["attention"]),
        opset=int(part["opset"]),
        inputs=tuple(_tensor(tensor) for tensor in part["inputs"]),
        outputs=tuple(_tensor(tensor) for tensor in part["outputs"]),
    )


def _tensor(tensor: Mapping[str, Any]) -> TensorSpec:
    shape = tuple(size if isinstance(size, str) else _count(size) for size in tensor["shape"])
    np.dtype(tensor["dtype"])  # a TypeError names an unknown one
    return TensorSpec(name=str(tensor["name"]), dtype=str(tensor["dtype"]), shape=shape)


def _file(file: Mapping[str, Any]) -> File:
    path, sha256, size = file["path"], file["sha256"], file["bytes"]
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or ":" in path or not pure.parts:
        raise BundleError(f"bundle.json names a path that leaves the bundle: {path!r}")
    if not (isinstance(sha256, str) and len(sha256) == 64):
        raise ValueError(f"sha256 of {path}")
    return File(path=path, sha256=sha256, bytes=_count(size))


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{value!r} where a whole number above 0 belongs")
    return value


class Bundle:
    """An opened bundle: its directory and manifest; files are checked when they are asked for."""

    def __init__(self, path: Path, manifest: Manifest, manifest_sha256: str) -> None:
        """Use `Bundle.open`."""
        self.path = path
        self.manifest = manifest
        self.sha256 = manifest_sha256  # of bundle.json, which holds the hash of everything else

    @classmethod
    def open(cls, path: str | Path | None = None) -> Bundle:
        """Open the bundle at `path`; None is the embedded miniature one.

        Only sizes are checked here; `check` hashes a file when it is first used.

        Raises:
            BundleError: no bundle there, or one that is cut short or not what it says.
        """
        root = EMBEDDED if path is None else Path(path)
        file = root / MANIFEST
        try:
            raw = file.read_bytes()
        except OSError as error:
            raise BundleError(
                f"no bundle at {root}",
                got=f"{MANIFEST}: {error.strerror}",
                do="make one with: sld-export --model sd-1.5 --output DIR",
            ) from error
        manifest = manifest_from_json(raw.decode("utf-8", "replace"), origin=str(file))
        bundle = cls(root, manifest, hashlib.sha256(raw).hexdigest())
        for entry in manifest.files():
            bundle._check_size(entry)
        return bundle

    def check(self, file: File) -> Path:
        """Hash a file and return its path.

        Raises:
            BundleError: its content is not what the manifest says.
        """
        path = self._check_size(file)
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != file.sha256:
            raise BundleError(
                f"{path} is not the file that the bundle was made with",
                got=f"SHA-256 {digest[:12]}…",
                expected=f"{file.sha256[:12]}…",
                do="copy or export the bundle again",
            )
        return path

    def tokenizer_json(self) -> str:
        """Return the checked tokenizer's text."""
        return self.check(self.manifest.tokenizer).read_text(encoding="utf-8")

    def embeddings(self) -> dict[str, NDArray[np.float32]]:
        """Return the checked constant embeddings, each float32 [L,C], by their text."""
        entry = self.manifest.embeddings
        path = self.check(File(path=entry.path, sha256=entry.sha256, bytes=entry.bytes))
        try:
            array = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
        except ValueError as error:
            raise BundleError(f"{path} is not a NumPy array", got=error) from error
        text = self.manifest.text
        shape = (len(entry.texts), text.length, text.width)
        if array.shape != shape or array.dtype != np.float32:
            raise BundleError(f"{path}", got=f"{array.dtype} {array.shape}", expected=shape)
        return dict(zip(entry.texts, array, strict=True))

    def _check_size(self, file: File) -> Path:
        path = self.path / file.path
        try:
            size = path.stat().st_size
        except OSError as error:
            raise BundleError(
                f"the bundle at {self.path} lacks {file.path}", do="copy or export it again"
            ) from error
        if not path.resolve().is_relative_to(self.path.resolve()):
            raise BundleError(f"{path} is a link that leaves the bundle", do="copy the file itself")
        if size != file.bytes:
            raise BundleError(
                f"{path} is cut short or altered",
                got=f"{size} bytes",
                expected=f"{file.bytes}",
                do="copy or export the bundle again",
            )
        return path
