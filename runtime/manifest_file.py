"""Reads `bundle.json`, a file from outside, and checks every entry."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, get_args

from sld_edge.engines.base import TensorSpec
from sld_edge.engines.checks import exact_text, finite_number, whole_number
from sld_edge.engines.errors import BundleError, InputError, one_line
from sld_edge.engines.files import json_from_bytes
from sld_edge.runtime.manifest import (
    FORMAT,
    FORMAT_VERSION,
    GUIDANCE,
    MANIFEST,
    OWN_GRAPHS,
    SIZE,
    Absent,
    Component,
    Condition,
    Defaults,
    Embeddings,
    File,
    GuidanceKind,
    LatentInfo,
    Manifest,
    ModelInfo,
    Per,
    PredictionType,
    Size,
    StoredFilter,
    TextInput,
)

_REQUIRED = ("unet", "guidance", "vae_decoder")
_AGAIN = "copy or export the bundle again"
_SHA256 = re.compile("[0-9a-f]{64}")
_DTYPES = ("float32", "float16", "float64", "int64", "int32", "uint8", "bool")
_MOST = 1 << 20  # largest size, count or dimension in a manifest


def manifest_from_json(data: bytes, *, origin: str) -> Manifest:
    """Read the bytes of `bundle.json`; `origin` is the path that error messages name.

    Raises:
        BundleError: not JSON, not a bundle, another format version, a missing or wrong entry, a
            path that leaves the bundle, or a guidance graph that is not the package's.
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
    components = {_name(name): _component(part) for name, part in _items(body["components"])}
    for name in _REQUIRED:
        components[name]  # a KeyError names the missing component
    for name, sha256 in OWN_GRAPHS.items():
        if name in components and [file.sha256 for file in components[name].files] != [sha256]:
            raise BundleError(
                f"the {name} graph of this bundle is not the {name} graph of sld-edge",
                do="export the bundle again with this version",
            )
    latents, size, defaults, embeddings = (
        body[key] for key in ("latents", "size", "defaults", "embeddings")
    )
    manifest = Manifest(
        created_by=exact_text("created_by", body["created_by"]),
        model=ModelInfo(
            id=exact_text("model id", body["model"]["id"]),
            source=exact_text("model source", body["model"]["source"]),
        ),
        prediction_type=_one_of("prediction_type", body["prediction_type"], PredictionType),
        latents=LatentInfo(
            channels=_count(latents["channels"]),
            downscale=_count(latents["downscale"]),
            scaling_factor=finite_number("scaling_factor", latents["scaling_factor"], 1e-6, 1e6),
        ),
        size=Size(width=_count(size["width"]), height=_count(size["height"])),
        scheduler=dict(_items(body["scheduler"])),
        defaults=Defaults(
            sampler=exact_text("sampler", defaults["sampler"]),
            steps=_count(defaults["steps"]),
            guidance_scale=finite_number("guidance_scale", defaults["guidance_scale"], 0, 100),
            safety=exact_text("safety", defaults["safety"]),
        ),
        safety_concepts=_texts("safety concepts", body["safety_concepts"]),
        guidance=_one_of("guidance", body["guidance"], GuidanceKind),
        texts={
            _name(name): TextInput(
                tokenizer=file_from_json(text["tokenizer"]), length=_count(text["length"])
            )
            for name, text in _items(body["texts"])
        },
        conditioning={
            _name(name): _condition(name, item) for name, item in _items(body["conditioning"])
        },
        embeddings=Embeddings(
            texts=_texts("texts", embeddings["texts"]),
            arrays={
                _name(name): file_from_json(file) for name, file in _items(embeddings["arrays"])
            },
        ),
        components=components,
        text_filter=None if body.get("text_filter") is None else _filter(body["text_filter"]),
    )
    _check_inputs(manifest)
    return manifest


def _filter(item: Mapping[str, Any]) -> StoredFilter:
    return StoredFilter(
        concepts=_texts("concepts of the text filter", item["concepts"]),
        guide=exact_text("guide", item["guide"]),
        preserve=file_from_json(item["preserve"]),
        arrays={source: file_from_json(file) for source, file in _items(item["arrays"])},
    )


def _condition(name: str, item: Mapping[str, Any]) -> Condition:
    sources = _texts("sources", item["sources"])
    per = _one_of("per", item["per"], Per)
    if per == "image" and (len(sources) != 1 or sources[0] not in (SIZE, GUIDANCE)):
        raise ValueError(f"{name} has no single source for each image")
    return Condition(
        per=per,
        sources=sources,
        absent=_one_of("absent", item["absent"], Absent),
        offset=finite_number("offset", item["offset"], -1e6, 1e6),
    )


def _check_inputs(manifest: Manifest) -> None:
    """Compare the conditioning with the text encoders' outputs and the UNet's inputs.

    Raises:
        ValueError: an input of the UNet without a source, a source that is no graph's output, or
            lengths and embeddings that do not fit.
    """
    components, conditioning = manifest.components, manifest.conditioning
    inputs = {spec.name for spec in components["unet"].inputs} - {"latents", "timestep"}
    if inputs != set(conditioning):
        raise ValueError(f"the UNet's inputs {sorted(inputs)} and conditioning differ")
    branch = {name for name, item in conditioning.items() if item.per == "branch"}
    if not branch or branch != set(manifest.embeddings.arrays):
        raise ValueError("embeddings without an array for each condition per branch")
    if "" not in manifest.embeddings.texts:
        raise ValueError("embeddings without the empty text")
    if not manifest.texts or len({text.length for text in manifest.texts.values()}) > 1:
        raise ValueError("no text encoder, or text encoders of different lengths")
    for name in branch:
        for source in conditioning[name].sources:
            component, _, output = source.partition(".")
            encoders = manifest.texts.keys() & components.keys()
            if component not in encoders or output not in {
                spec.name for spec in components[component].outputs
            }:
                raise ValueError(f"{name} comes from {source!r}, which is no text encoder's output")
    sources = {source for name in branch for source in conditioning[name].sources}
    if manifest.text_filter is not None and manifest.text_filter.arrays.keys() != sources:
        raise ValueError("a text filter without an array for each output of the text encoders")
    embedded = any(GUIDANCE in item.sources for item in conditioning.values())
    if embedded != (manifest.guidance == "embedded"):
        raise ValueError("guidance and conditioning contradict each other")


def _one_of(name: str, value: object, choices: Any) -> Any:
    if not isinstance(value, str) or value not in get_args(choices):
        raise ValueError(f"{name} {value!r}")
    return value


def _items(value: object) -> list[tuple[str, Any]]:
    if not isinstance(value, dict) or len(value) > 64:
        raise ValueError(f"{type(value).__name__}, not an object of at most 64 entries")
    return list(value.items())


def _texts(kind: str, texts: object) -> tuple[str, ...]:
    if not isinstance(texts, list) or not 0 < len(texts) <= 64:
        raise ValueError(f"not a list of {kind}, 1 to 64")
    if len(set(map(str, texts))) < len(texts):
        raise ValueError(f"the same text twice in {kind}")
    return tuple(exact_text(kind, text) for text in texts)


def _name(name: str) -> str:
    if not re.fullmatch("[a-z0-9_]{1,40}", name):
        raise ValueError(f"{name!r} is not a name of 1 to 40 letters a-z, digits and _")
    return name


def _component(part: Mapping[str, Any]) -> Component:
    if not isinstance(part["files"], list) or not 0 < len(part["files"]) <= 64:
        raise ValueError("a component without a list of 1 to 64 files")
    files = tuple(file_from_json(file) for file in part["files"])
    if not files[0].path.endswith(".onnx"):  # by another ending, ONNX Runtime reads another format
        raise ValueError(f"{files[0].path!r} is not an .onnx file")
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
        KeyError, TypeError, ValueError, InputError: not an entry of a file.
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
