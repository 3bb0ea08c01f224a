"""`scorer.json`: the folder that `sld-export --scorer` makes, with the hash of each file."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sld_edge.engines.checks import exact_text, whole_number
from sld_edge.engines.errors import EngineError, InputError, one_line, shortened
from sld_edge.engines.files import json_from_file, read_limited
from sld_edge.engines.onnx_files import GRAPH_LIMIT
from sld_edge.engines.onnxruntime.engine import OrtEngine
from sld_edge.runtime.bundle import require_own_weights
from sld_edge.runtime.manifest import File
from sld_edge.runtime.scorers.base import check_model, load_checked

MANIFEST = "scorer.json"
FORMAT, FORMAT_VERSION = "sld-edge-scorer", 1
IMAGE_ENCODER, HEAD = "image_encoder.onnx", "head.onnx"
TEXT_ENCODER, TOKENIZER = "text_encoder.onnx", "tokenizer.json"
_SHA256 = re.compile("[0-9a-f]{64}")
_MOST, _MOST_FILES = 4096, 64


@dataclass(frozen=True, kw_only=True)
class ScorerManifest:
    """The contents of a scorer's folder.

    Attributes:
        scorer: "q16", "sd-checker" or "clip-score".
        source: name of the folder with the original weights.
        created_by: "sld-edge" and its version.
        image_size: side of the image encoder's square input, in pixels.
        text_length: tokens that the text encoder reads; 0 without a text encoder.
        files: all files in the folder but `scorer.json`.
    """

    scorer: str
    source: str
    created_by: str
    image_size: int
    text_length: int
    files: tuple[File, ...]

    def to_json(self) -> str:
        """Return the text of `scorer.json`."""
        body = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps(body, indent=1, ensure_ascii=False) + "\n"


class ScorerFolder:
    """An opened folder of a scorer. A file is checked when it is used.

    Attributes:
        manifest: the contents of `scorer.json`.
        sha256: SHA-256 over the hashes of its files; it does not depend on who made them or when.
    """

    def __init__(self, path: Path, scorer: str) -> None:
        """Open the folder of a scorer.

        Raises:
            EngineError: no scorer there, another scorer, or a damaged `scorer.json`.
        """
        self._path, self._scorer = path, scorer
        self._do = (
            f"make it with: sld-export --scorer {scorer} --model DIR --output {shortened(path, 60)}"
        )
        self.manifest = self._read()
        self._files = {file.path: file for file in self.manifest.files}
        self.sha256 = self._sha256(tuple(self._files))

    def engine(self, name: str) -> OrtEngine:
        """Hash a graph and its file of weights, and load the graph.

        Raises:
            EngineError: a file is missing or altered, or the graph reads another file.
        """
        parts = self._parts(name)
        seen = {
            self._path / part: check_model(
                self._path / part, self._files[part].sha256, scorer=self._scorer, do=self._do
            )
            for part in parts
        }
        require_own_weights(
            self.read(name, GRAPH_LIMIT),
            path=name,
            sizes={part: seen[self._path / part].size for part in parts[1:]},
            manifest=MANIFEST,
            error=EngineError,
        )
        return load_checked(self._path / name, seen, do=self._do)

    def read(self, name: str, limit: int) -> bytes:
        """Return a file's bytes after checking their hash.

        Raises:
            EngineError: the file was altered, or is larger than `limit` bytes.
        """
        path, file = self._path / name, self._files[self._parts(name)[0]]
        data = read_limited(path, limit, error=EngineError, do=self._do)
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise EngineError(f"scorer {self._scorer}: {path} was altered", do=self._do)
        return data

    def sha256_of(self, name: str) -> str:
        """Return the hash of a graph and its weights together, without reading them."""
        return self._sha256(self._parts(name))

    def _parts(self, name: str) -> tuple[str, ...]:
        parts = tuple(part for part in (name, f"{name}.data") if part in self._files)
        if name not in parts:
            raise EngineError(f"the scorer at {self._path} has no {name}", do=self._do)
        return parts

    def _sha256(self, names: tuple[str, ...]) -> str:
        lines = "".join(f"{self._files[name].sha256} {name}\n" for name in sorted(names))
        return hashlib.sha256(lines.encode()).hexdigest()

    def _read(self) -> ScorerManifest:
        file = self._path / MANIFEST
        if not os.path.exists(file):  # also without the right to read the folder
            raise EngineError(f"no scorer at {self._path}", got=f"no {MANIFEST}", do=self._do)
        body = json_from_file(file, error=EngineError, do=self._do)
        try:
            manifest = _manifest(body)
        except (ValueError, TypeError, KeyError, AttributeError, InputError) as error:
            raise EngineError(
                f"{file} does not describe a scorer", got=one_line(error), do=self._do
            ) from error
        if manifest.scorer != self._scorer:
            raise EngineError(
                f"the scorer at {self._path}",
                got=manifest.scorer,
                expected=self._scorer,
                do=self._do,
            )
        return manifest


def _manifest(body: dict[str, Any]) -> ScorerManifest:
    if (body["format"], body["format_version"]) != (FORMAT, FORMAT_VERSION):
        raise ValueError(f"{body['format']} {body['format_version']}, not {FORMAT_VERSION}")
    if not isinstance(body["files"], list) or not 0 < len(body["files"]) <= _MOST_FILES:
        raise ValueError(f"files is not a list of 1 to {_MOST_FILES}")
    return ScorerManifest(
        scorer=exact_text("scorer", body["scorer"]),
        source=exact_text("source", body["source"]),
        created_by=exact_text("created_by", body["created_by"]),
        image_size=whole_number("image_size", body["image_size"], 1, _MOST),
        text_length=whole_number("text_length", body["text_length"], 0, _MOST),
        files=tuple(map(_file, body["files"])),
    )


def _file(entry: dict[str, Any]) -> File:
    path, sha256 = exact_text("path", entry["path"]), exact_text("sha256", entry["sha256"])
    if path != PurePosixPath(path).name or path in ("", ".", "..") or "\\" in path:
        raise ValueError(f"a file outside the folder: {path!r}")
    if not _SHA256.fullmatch(sha256):
        raise ValueError(f"sha256 of {path}")
    return File(path=path, sha256=sha256, bytes=whole_number("bytes", entry["bytes"], 0, 1 << 50))
