"""The bundle: a folder with `bundle.json`, tokenizers, graphs and constant embeddings."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from sld_edge.engines.errors import BundleError, UserError, one_line
from sld_edge.engines.files import (
    JSON_LIMIT,
    Identity,
    floats_from_npy,
    read_limited,
    require_unchanged,
    sha256_of_file,
)
from sld_edge.engines.onnx_files import GRAPH_LIMIT, externals
from sld_edge.runtime.manifest import MANIFEST, OWN_GRAPHS, Component, File, Manifest
from sld_edge.runtime.manifest_file import manifest_from_json
from sld_edge.runtime.policy import NO_POLICY, Policy
from sld_edge.runtime.signatures import require_signed
from sld_edge.runtime.text_filter import FilterTexts, TextFilter

EMBEDDED = Path(__file__).parent / "miniature"  # the bundle that ships with the package
# The files of the same in FP16 that differ from `EMBEDDED`, for the self-test.
EMBEDDED_FP16 = Path(__file__).parent / "miniature_fp16"
_ARRAY_LIMIT = 256 << 20  # bytes of constant embeddings
_MOST_TEXTS = 1024  # that a text filter preserves
_AGAIN = "copy or export the bundle again"


@dataclass(frozen=True, kw_only=True)
class CheckedGraph:
    """A graph whose files were hashed; `seen` has the identity of each file at that time."""

    path: Path
    seen: Mapping[Path, Identity]

    def confirm(self) -> None:
        """Check, after an engine has read the files, that they are still the hashed files.

        Raises:
            BundleError: a file was changed or exchanged since it was hashed.
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
    """Refuse a graph that reads a file that is not listed for it, or beyond the end of a file.

    Args:
        model: bytes of the graph.
        path: path of the graph, relative to its bundle.
        sizes: sizes in bytes of the files that the graph may read, by path.
        manifest: name of the file that lists these files.
        error: the class to raise.

    Raises:
        UserError: of the class `error`: the graph reads another file, or is not a whole ONNX file.
    """
    try:
        for tensor in externals(memoryview(model)):
            weights = str(PurePosixPath(path).with_name(tensor.location))
            end = tensor.offset + (0 if tensor.length is None else tensor.length)
            if weights not in sizes or end > sizes[weights]:
                raise ValueError(f"weights in {tensor.location!r}, up to byte {end}")
    except (ValueError, RecursionError) as problem:
        raise error(
            f"{path} reads data that {manifest} does not list for it",
            got=one_line(problem),
            do="do not run it; export it again",
        ) from problem


def own_graph(name: str) -> Path:
    """Return the path of the package's guidance graph; every bundle has a copy with the same bytes.

    Raises:
        BundleError: the file was altered after the package was made.
    """
    path = EMBEDDED / f"{name}.onnx"
    data = read_limited(path, JSON_LIMIT, error=BundleError, do="install sld-edge again")
    if hashlib.sha256(data).hexdigest() != OWN_GRAPHS[name]:
        raise BundleError(f"{path} was altered", do="install sld-edge again")
    return path


@cache
def _own_digests() -> tuple[str, ...]:
    """Return the hashes of the package's manifests, each of which has the hash of every file."""
    return tuple(sha256_of_file(folder / MANIFEST)[0] for folder in (EMBEDDED, EMBEDDED_FP16))


class Bundle:
    """An opened bundle: its folder and manifest. A file is checked when it is first used."""

    def __init__(self, path: Path, manifest: Manifest, manifest_sha256: str) -> None:
        """Use `Bundle.open`."""
        self.path = path
        self.manifest = manifest
        self.sha256 = manifest_sha256  # of bundle.json, which holds the hash of every other file

    @classmethod
    def open(cls, path: str | Path | None = None, *, policy: Policy = NO_POLICY) -> Bundle:
        """Open the bundle at `path`; None is the embedded miniature bundle.

        Only sizes are checked here; `check` hashes a file when it is first used. If the policy
        names signers or bundles, every other bundle is refused before its manifest is parsed. The
        miniature is exempt, in copies too: it is part of the package, so it is trusted as much as
        the code.

        Raises:
            BundleError: no bundle there; or the bundle is cut short, disagrees with its manifest,
                or has no signature of a signer that the policy names.
            PolicyError: the policy names bundles, and this bundle is not one of them.
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
        known = path is None or digest in policy.bundles or digest in _own_digests()
        if (policy.signers or policy.bundles) and not known:
            policy.require(
                bool(policy.signers), "this bundle", got=digest, expected="a bundle that it names"
            )
            require_signed(root, raw, policy.signers)
        bundle = cls(root, manifest_from_json(raw, origin=str(file)), digest)
        for entry in bundle.manifest.files():
            bundle._check_size(entry)
        return bundle

    def check(self, file: File) -> tuple[Path, Identity]:
        """Hash a file; return its path and its identity, which changes if the file is changed.

        Raises:
            BundleError: the hash is not the manifest's, or the path is not a regular file.
        """
        path = self._check_size(file)
        try:
            digest, seen = sha256_of_file(path)
        except OSError as error:
            raise BundleError(f"cannot read {path}", got=error.strerror, do=_AGAIN) from error
        self._compare(path, digest, file)
        return path, seen

    def read(self, file: File, limit: int) -> bytes:
        """Return the bytes of a file after checking their hash.

        Raises:
            BundleError: the hash is not the manifest's, or the file is larger than `limit` bytes.
        """
        path = self._check_size(file)
        data = read_limited(path, limit, error=BundleError, do=_AGAIN)
        self._compare(path, hashlib.sha256(data).hexdigest(), file)
        return data

    def graph(self, component: Component) -> CheckedGraph:
        """Hash a component's files and return its graph, which reads no other file.

        Raises:
            BundleError: a hash is not the manifest's; or the graph reads a file of another
                component, or beyond the end of a file.
        """
        graph, *rest = component.files
        path = self.path / graph.path
        seen = dict(self.check(file) for file in component.files)
        sizes = {file.path: file.bytes for file in rest}
        require_own_weights(self.read(graph, GRAPH_LIMIT), path=graph.path, sizes=sizes)
        return CheckedGraph(path=path, seen=seen)

    def tokenizer_json(self, name: str) -> str:
        """Return the checked text of a text encoder's tokenizer.

        Raises:
            BundleError: the hash is not the manifest's, or the file is not UTF-8 text.
        """
        file = self.manifest.texts[name].tokenizer
        try:
            return self.read(file, JSON_LIMIT).decode("utf-8")
        except UnicodeDecodeError as error:
            raise BundleError(f"{file.path} is not UTF-8 text", do=_AGAIN) from error

    def embeddings(self) -> dict[str, dict[str, NDArray[np.float32]]]:
        """Return the checked constant embeddings: by text, then by condition, float32 [...].

        Raises:
            BundleError: the hash of a file is not the manifest's, or an array has a wrong shape.
        """
        entry, inputs = self.manifest.embeddings, self.manifest.components["unet"].inputs
        stored: dict[str, dict[str, NDArray[np.float32]]] = {text: {} for text in entry.texts}
        for spec in inputs:
            if spec.name not in entry.arrays:
                continue
            file = entry.arrays[spec.name]
            try:
                array = floats_from_npy(self.read(file, _ARRAY_LIMIT))
            except ValueError as error:
                raise BundleError(
                    f"{file.path} is not a NumPy array", got=error, do=_AGAIN
                ) from error
            length = self.manifest.text_length
            sizes = [size if isinstance(size, int) else length for size in spec.shape[1:]]
            shape = (len(entry.texts), *sizes)
            if array.shape != shape or not np.isfinite(array).all():
                raise BundleError(
                    file.path, got=f"float32 {array.shape}", expected=f"finite numbers {shape}"
                )
            for text, row in zip(entry.texts, array, strict=True):
                stored[text][spec.name] = row
        return stored

    def text_filter(self) -> tuple[FilterTexts, TextFilter] | None:
        """Return the checked stored text filter with its texts; None if the bundle has none.

        Raises:
            BundleError: the hash of a file is not the manifest's, or a file has other contents.
        """
        entry = self.manifest.text_filter
        if entry is None:
            return None
        matrices = {}
        for source, file in entry.arrays.items():
            try:
                matrix = floats_from_npy(self.read(file, _ARRAY_LIMIT))
            except ValueError as error:
                raise BundleError(
                    f"{file.path} is not a NumPy array", got=error, do=_AGAIN
                ) from error
            width = self._width(source)
            if matrix.shape != (width, width) or not np.isfinite(matrix).all():
                raise BundleError(
                    file.path, got=f"float32 {matrix.shape}", expected=f"finite ({width}, {width})"
                )
            matrices[source] = matrix
        try:
            lines = self.read(entry.preserve, JSON_LIMIT).decode("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise BundleError(f"{entry.preserve.path} is not UTF-8 text", do=_AGAIN) from error
        if len(lines) > _MOST_TEXTS:  # encoding them would take minutes
            got = f"{len(lines)} lines"
            raise BundleError(entry.preserve.path, got=got, expected=f"at most {_MOST_TEXTS}")
        texts = FilterTexts(concepts=entry.concepts, guide=entry.guide, preserve=("", *lines))
        return texts, TextFilter(concepts=entry.concepts, matrices=matrices)

    def _width(self, source: str) -> int:
        """Return the width of a text encoder's output."""
        component, _, output = source.partition(".")
        specs = {spec.name: spec for spec in self.manifest.components[component].outputs}
        width = specs[output].shape[-1]
        if not isinstance(width, int):
            raise BundleError(f"{source} has no fixed width", do="export the bundle again")
        return width

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
                expected=f"{file.bytes} bytes",
                do=_AGAIN,
            )
        return path
