"""The bundle: a directory with `bundle.json`, the tokenizer, the graphs, and constant embeddings.

`bundle.json` is the contract between export and run. The format is written down in docs/bundle.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from sld_edge.engines.base import TensorSpec
from sld_edge.engines.checks import exact_text, finite_number, whole_number
from sld_edge.engines.errors import BundleError, InputError, UserError, one_line
from sld_edge.engines.files import (
    JSON_LIMIT,
    Identity,
    floats_from_npy,
    json_from_bytes,
    read_limited,
    require_unchanged,
    sha256_of_file,
)
from sld_edge.engines.onnx_files import GRAPH_LIMIT, externals
from sld_edge.runtime.policy import NO_POLICY, Policy
from sld_edge.runtime.signatures import require_signed

FORMAT = "sld-edge-bundle"
FORMAT_VERSION = 2
MANIFEST = "bundle.json"
REQUIRED_COMPONENTS = ("text_encoder", "unet", "guidance", "vae_decoder")
SHALLOW = "unet_shallow"  # component that feature caching needs
KEPT_SAFETY = "kept_safety"  # and the one that safety cadence needs
EMBEDDED = Path(__file__).parent / "miniature"  # the bundle that ships with the package
# The package's own guidance graphs: the bytes in EMBEDDED, which every bundle has a copy of.
OWN_GRAPHS: Mapping[str, str] = {
    "guidance": "4b341d4b28f76124002b05a0c6a4223c1a5273f0f5df15eada8812f80550b073",
    KEPT_SAFETY: "5ce8b6456c66a60b4e74d8124d2404bb781236eb3bd2a8f4de7b6b99a1359475",
}
_ARRAY_LIMIT = 256 << 20  # bytes of constant embeddings
_AGAIN = "copy or export the bundle again"
_SHA256 = re.compile("[0-9a-f]{64}")
_DTYPES = ("float32", "float16", "float64", "int64", "int32", "uint8", "bool")
_MOST = 1 << 20  # of any size, count or dimension in a manifest

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
        parts = [self.tokenizer, file_from_json(asdict(self.embeddings))]
        parts += [file for part in self.components.values() for file in part.files]
        return list(dict.fromkeys(parts))  # the two graphs of a UNet share their weights


def manifest_from_json(data: bytes, *, origin: str) -> Manifest:
    """Read the bytes of `bundle.json`; `origin` is the path that error messages name.

    Raises:
        BundleError: not JSON, not a bundle, a future format version, a missing or wrong entry, a
            path that leaves the bundle, or guidance graphs that are not the package's own.
    """
    body = json_from_bytes(data, origin=origin, error=BundleError, do=_AGAIN)
    if body.get("format") != FORMAT:
        raise BundleError(f"{origin} is not a bundle's manifest", expected=f'"format": "{FORMAT}"')
    version = body.get("format_version")
    if version != FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        raise BundleError(
            f"{origin}: format version",
            got=version,
            expected=FORMAT_VERSION,
            do="update sld-edge" if newer else "export the bundle again",
        )
    try:
        return _manifest(body)
    except KeyError as error:
        raise BundleError(
            f"{origin} lacks the entry {error}", do="export the bundle again"
        ) from error
    except (TypeError, ValueError, AttributeError, OverflowError, InputError) as error:
        raise BundleError(
            f"{origin} has an entry of the wrong kind",
            got=one_line(error),
            do="export the bundle again",
        ) from error


def _manifest(body: Mapping[str, Any]) -> Manifest:
    if body["prediction_type"] not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(f"prediction_type {body['prediction_type']!r}")
    components = {_name(name): _component(part) for name, part in _items(body["components"])}
    for name in REQUIRED_COMPONENTS:
        components[name]  # a KeyError names what is missing
    for name, sha256 in OWN_GRAPHS.items():
        if name in components and [file.sha256 for file in components[name].files] != [sha256]:
            raise BundleError(
                f"this bundle brings a {name} graph of its own, and only sld-edge's may steer",
                do="export the bundle again with this version",
            )
    latents, text, size, defaults, embeddings = (
        body[key] for key in ("latents", "text", "size", "defaults", "embeddings")
    )
    file = file_from_json(embeddings)
    return Manifest(
        created_by=exact_text("created_by", body["created_by"]),
        model=ModelInfo(
            id=exact_text("model id", body["model"]["id"]),
            source=exact_text("model source", body["model"]["source"]),
        ),
        prediction_type=cast(PredictionType, body["prediction_type"]),
        latents=LatentInfo(
            channels=_count(latents["channels"]),
            downscale=_count(latents["downscale"]),
            scaling_factor=finite_number("scaling_factor", latents["scaling_factor"], 1e-6, 1e6),
        ),
        text=TextInfo(length=_count(text["length"]), width=_count(text["width"])),
        size=Size(width=_count(size["width"]), height=_count(size["height"])),
        scheduler=dict(_items(body["scheduler"])),
        defaults=Defaults(
            sampler=exact_text("sampler", defaults["sampler"]),
            steps=_count(defaults["steps"]),
            guidance_scale=finite_number("guidance_scale", defaults["guidance_scale"], 0, 100),
            safety=exact_text("safety", defaults["safety"]),
        ),
        safety_concepts=_texts("safety concepts", body["safety_concepts"]),
        tokenizer=file_from_json(body["tokenizer"]),
        embeddings=Embeddings(
            path=file.path,
            sha256=file.sha256,
            bytes=file.bytes,
            texts=_texts("texts", embeddings["texts"]),
        ),
        components=components,
    )


def _items(value: object) -> list[tuple[str, Any]]:
    if not isinstance(value, dict) or len(value) > 64:
        raise ValueError(f"{type(value).__name__} where an object of at most 64 entries belongs")
    return list(value.items())


def _texts(what: str, texts: object) -> tuple[str, ...]:
    if not isinstance(texts, list) or not 0 < len(texts) <= 64:
        raise ValueError(f"no list of {what}, 1 to 64")
    if len(set(map(str, texts))) < len(texts):
        raise ValueError(f"a list of {what} with one twice")
    return tuple(exact_text(what, text) for text in texts)


def _name(name: str) -> str:
    if not re.fullmatch("[a-z0-9_]{1,40}", name):
        raise ValueError(f"{name!r} where a component's name belongs")
    return name


def _component(part: Mapping[str, Any]) -> Component:
    if not isinstance(part["files"], list) or not 0 < len(part["files"]) <= 64:
        raise ValueError("a component without a list of 1 to 64 files")
    files = tuple(file_from_json(file) for file in part["files"])
    if not files[0].path.endswith(".onnx"):  # ONNX Runtime reads other formats by other names
        raise ValueError(f"{files[0].path!r} where an .onnx file belongs")
    return Component(
        files=files,
        precision=exact_text("precision", part["precision"]),
        storage=exact_text("storage", part["storage"]),
        attention=exact_text("attention", part["attention"]),
        opset=_count(part["opset"]),
        inputs=tuple(_tensor(tensor) for tensor in part["inputs"]),
        outputs=tuple(_tensor(tensor) for tensor in part["outputs"]),
    )


def _tensor(tensor: Mapping[str, Any]) -> TensorSpec:
    shape = tensor["shape"]
    if not isinstance(shape, list) or len(shape) > 8 or tensor["dtype"] not in _DTYPES:
        raise ValueError("a tensor's dtype or shape")
    return TensorSpec(
        name=exact_text("tensor", tensor["name"]),
        dtype=tensor["dtype"],
        shape=tuple(size if isinstance(size, str) else _count(size) for size in shape),
    )


def file_from_json(file: Mapping[str, Any]) -> File:
    """Read an entry of a list of files.

    Raises:
        BundleError: a path that leaves the bundle.
        KeyError, TypeError, ValueError, InputError: an entry that is none.
    """
    path, sha256 = exact_text("path", file["path"]), file["sha256"]
    pure = PurePosixPath(path)
    if (
        pure.is_absolute()
        or ".." in pure.parts
        or not pure.parts
        or not path.isprintable()
        or any(character in path for character in '\\:*?"<>|')
        or len(path) > 200
        or path == MANIFEST
    ):
        raise BundleError(f"bundle.json names a path that leaves the bundle: {path!r}")
    if not (isinstance(sha256, str) and _SHA256.fullmatch(sha256)):
        raise ValueError(f"sha256 of {path}")
    return File(path=path, sha256=sha256, bytes=whole_number("bytes", file["bytes"], 1, 1 << 50))


def _count(value: object) -> int:
    return whole_number("count", value, 1, _MOST)


@dataclass(frozen=True, kw_only=True)
class CheckedGraph:
    """A graph whose files were hashed, and what they were then."""

    path: Path
    seen: Mapping[Path, Identity]

    def confirm(self) -> None:
        """Look again, after an engine has read the files.

        Raises:
            BundleError: one of them was changed or exchanged since it was hashed.
        """
        require_unchanged(self.seen, error=BundleError, do=_AGAIN)


def require_own_weights(
    model: bytes,
    *,
    path: str,
    sizes: Mapping[str, int],
    manifest: str = MANIFEST,
    error: type[UserError] = BundleError,
) -> None:
    """Refuse a graph that reads other files than its own, or beyond their end.

    Args:
        model: bytes of the graph.
        path: the graph's, relative to its bundle.
        sizes: bytes of the files that it may read, by their path.
        manifest: name of the file that lists them.
        error: the class to raise.

    Raises:
        UserError: of the class `error`: it names another file, or is no whole ONNX file.
    """
    try:
        for tensor in externals(memoryview(model)):
            beside = str(PurePosixPath(path).with_name(tensor.location))
            end = tensor.offset + (0 if tensor.length is None else tensor.length)
            if beside not in sizes or end > sizes[beside]:
                raise ValueError(f"weights in {tensor.location!r}, up to byte {end}")
    except (ValueError, RecursionError) as problem:
        raise error(
            f"{path} reads what {manifest} does not list for it",
            got=one_line(problem),
            do="do not run it; export it again",
        ) from problem


def own_graph(name: str) -> Path:
    """Return the package's own copy of a guidance graph, which every bundle has the same bytes of.

    Raises:
        BundleError: it is not the file that the package was made with.
    """
    path = EMBEDDED / f"{name}.onnx"
    data = read_limited(path, JSON_LIMIT, error=BundleError, do="install sld-edge again")
    if hashlib.sha256(data).hexdigest() != OWN_GRAPHS[name]:
        raise BundleError(f"{path} was altered", do="install sld-edge again")
    return path


class Bundle:
    """An opened bundle: its directory and manifest; files are checked when they are asked for."""

    def __init__(self, path: Path, manifest: Manifest, manifest_sha256: str) -> None:
        """Use `Bundle.open`."""
        self.path = path
        self.manifest = manifest
        self.sha256 = manifest_sha256  # of bundle.json, which holds the hash of everything else

    @classmethod
    def open(cls, path: str | Path | None = None, *, policy: Policy = NO_POLICY) -> Bundle:
        """Open the bundle at `path`; None is the embedded miniature one.

        Only sizes are checked here; `check` hashes a file when it is first used. Where the policy
        names signers or bundles, others are refused before their manifest is parsed; the miniature
        is part of the package and so as trusted as its code.

        Raises:
            BundleError: no bundle there, or one that is cut short or not what it says, or signed by
                nobody whom the policy names.
            PolicyError: a bundle that the policy does not name.
        """
        root = EMBEDDED if path is None else Path(path)
        file = root / MANIFEST
        try:
            root.lstat()
            file.lstat()
        except (OSError, ValueError) as error:
            raise BundleError(
                f"no bundle at {root}",
                got=f"{MANIFEST}: {getattr(error, 'strerror', None) or error}",
                do="make one with: sld-export --model sd-1.5 --output DIR",
            ) from error
        if not Path(os.path.realpath(file)).is_relative_to(os.path.realpath(root)):
            raise BundleError(f"{file} is a link that leaves the bundle", do="copy the file itself")
        raw = read_limited(file, JSON_LIMIT, error=BundleError, do=_AGAIN)
        digest = hashlib.sha256(raw).hexdigest()
        if (policy.signers or policy.bundles) and path is not None and digest not in policy.bundles:
            policy.require(
                bool(policy.signers), "this bundle", got=digest, expected="one that it names"
            )
            require_signed(root, raw, policy.signers)
        bundle = cls(root, manifest_from_json(raw, origin=str(file)), digest)
        for entry in bundle.manifest.files():
            bundle._check_size(entry)
        return bundle

    def check(self, file: File) -> tuple[Path, Identity]:
        """Hash a file and return its path, and what tells whether it is still that file.

        Raises:
            BundleError: its content is not what the manifest says, or it is not a regular file.
        """
        path = self._check_size(file)
        try:
            digest, seen = sha256_of_file(path)
        except OSError as error:
            raise BundleError(f"cannot read {path}", got=error.strerror, do=_AGAIN) from error
        self._compare(path, digest, file)
        return path, seen

    def read(self, file: File, limit: int) -> bytes:
        """Return the bytes of a file, which are what the manifest says.

        Raises:
            BundleError: they are not, or are more than `limit`.
        """
        path = self._check_size(file)
        data = read_limited(path, limit, error=BundleError, do=_AGAIN)
        self._compare(path, hashlib.sha256(data).hexdigest(), file)
        return data

    def graph(self, component: Component) -> CheckedGraph:
        """Hash a component's files and return its graph, which reads no other file.

        Raises:
            BundleError: a file is not what the manifest says; or the graph names a file that is not
                the component's, or bytes beyond its end.
        """
        graph, *rest = component.files
        path = self.path / graph.path
        seen = dict(self.check(file) for file in component.files)
        sizes = {file.path: file.bytes for file in rest}
        require_own_weights(self.read(graph, GRAPH_LIMIT), path=graph.path, sizes=sizes)
        return CheckedGraph(path=path, seen=seen)

    def tokenizer_json(self) -> str:
        """Return the checked tokenizer's text."""
        try:
            return self.read(self.manifest.tokenizer, JSON_LIMIT).decode("utf-8")
        except UnicodeDecodeError as error:
            raise BundleError("tokenizer.json is not UTF-8 text", do=_AGAIN) from error

    def embeddings(self) -> dict[str, NDArray[np.float32]]:
        """Return the checked constant embeddings, each float32 [L,C], by their text."""
        entry = self.manifest.embeddings
        file = File(path=entry.path, sha256=entry.sha256, bytes=entry.bytes)
        try:
            array = floats_from_npy(self.read(file, _ARRAY_LIMIT))
        except ValueError as error:
            raise BundleError(f"{entry.path} is not a NumPy array", got=error, do=_AGAIN) from error
        text = self.manifest.text
        shape = (len(entry.texts), text.length, text.width)
        if array.shape != shape or not np.isfinite(array).all():
            raise BundleError(
                f"{entry.path}", got=f"float32 {array.shape}", expected=f"finite numbers {shape}"
            )
        return dict(zip(entry.texts, array, strict=True))

    def _compare(self, path: Path, digest: str, file: File) -> None:
        if digest != file.sha256:
            raise BundleError(
                f"{path} is not the file that the bundle was made with",
                got=f"SHA-256 {digest[:12]}…",
                expected=f"{file.sha256[:12]}…",
                do=_AGAIN,
            )

    def _check_size(self, file: File) -> Path:
        path = self.path / file.path
        try:
            status = path.stat()
            inside = path.resolve().is_relative_to(self.path.resolve())
        except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
            raise BundleError(
                f"the bundle at {self.path} lacks {file.path}", do="copy or export it again"
            ) from error
        if not inside:
            raise BundleError(f"{path} is a link that leaves the bundle", do="copy the file itself")
        if not stat.S_ISREG(status.st_mode):
            raise BundleError(f"{path} is not a regular file", do="copy the file itself")
        if status.st_size != file.bytes:
            raise BundleError(
                f"{path} is cut short or altered",
                got=f"{status.st_size} bytes",
                expected=f"{file.bytes}",
                do=_AGAIN,
            )
        return path
