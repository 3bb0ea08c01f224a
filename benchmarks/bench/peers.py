"""The peers, the packages that they need, and which peers are installed here."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from sld_edge.benchmarks.bench import peer_worker
from sld_edge.benchmarks.bench.child import Outcome, run_child
from sld_edge.engines.errors import EngineError, InputError, OutputError
from sld_edge.engines.staging import part_folder

_SOURCE = "source.json"  # beside prepared weights: names their checkpoint


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A peer.

    Attributes:
        packages: needed packages; the peer's own is last.
        install: how to get the peer.
        settings: presets of its measurements; "off" is plain classifier-free guidance.
        same_noise: whether it can start from torch's noise; then its picture should be ours.
        prepared: whether it needs the checkpoint in a form of its own.
        loader: its function in `peer_worker`; "" is the peer's name.
        precision: of its arithmetic: "fp32", "bf16", or "default", the program's own choice.
    """

    packages: tuple[str, ...]
    install: str
    settings: tuple[str, ...] = ("off",)
    same_noise: bool = False
    prepared: bool = False
    loader: str = ""
    precision: Literal["fp32", "bf16", "default"] = "fp32"


_DIFFUSERS = Peer(
    packages=("torch", "transformers", "diffusers"),
    install='pip install "sld-edge[torch]"',
    settings=("strong", "off"),
    same_noise=True,
    loader="diffusers",
)
_OPENVINO = Peer(
    packages=("torch", "diffusers", "openvino", "openvino-tokenizers", "openvino-genai"),
    install="pip install openvino-genai torch diffusers, in an environment of its own",
    same_noise=True,
    prepared=True,
    loader="openvino",
)
PEERS: Mapping[str, Peer] = {
    "diffusers": _DIFFUSERS,
    "diffusers-bf16": replace(_DIFFUSERS, precision="bf16"),
    "optimum": Peer(
        packages=("torch", "transformers", "diffusers", "onnxruntime", "optimum-onnx"),
        install='pip install "optimum-onnx[onnxruntime]", in an environment of its own',
        same_noise=True,
        prepared=True,
    ),
    "openvino": _OPENVINO,
    "openvino-default": replace(_OPENVINO, precision="default"),
    "sdcpp": Peer(
        packages=("stable-diffusion-cpp-python",),
        install="pip install stable-diffusion-cpp-python, which compiles it",
        prepared=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Installed:
    """A peer that can run here: its name, its Python, and its packages' versions."""

    name: str
    python: str
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def peer(self) -> Peer:
        """The peer's description."""
        return PEERS[self.name]

    @property
    def loader(self) -> str:
        """The peer's function in `peer_worker`, and the name of its form of the weights."""
        return self.peer.loader or self.name

    def call(self, action: str, task: Mapping[str, Any], environment: Mapping[str, str]) -> Outcome:
        """Run an action in a process of the peer.

        Raises:
            EngineError: the process ended without an answer.
        """
        command = [self.python, str(Path(peer_worker.__file__).resolve()), action]
        whole = {**task, "peer": self.loader, "precision": self.peer.precision}
        return run_child(command, whole, name=self.name, environment=environment)


def pythons_from_options(words: Sequence[str]) -> dict[str, str]:
    """Read NAME=PATH for each peer that has a Python of its own.

    Raises:
        InputError: no such peer or file.
    """
    pythons = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals:
            raise InputError("--peer-python", got=repr(word), expected="NAME=PATH")
        _require_known(name)
        if not Path(path).is_file():
            raise InputError(f"--peer-python {name}", got=path, expected="a Python's path")
        pythons[name] = path
    return pythons


def find_peers(
    names: Sequence[str], pythons: Mapping[str, str]
) -> tuple[list[Installed], dict[str, str]]:
    """Return the peers to measure, and why others are missing; without names, all peers.

    Raises:
        InputError: an unknown peer, a named peer that is not installed, or no peer at all.
    """
    for name in names:
        _require_known(name)
    installed, missing = [], {}
    for name, peer in PEERS.items():
        if names and name not in names:
            continue
        python = pythons.get(name, sys.executable)
        probe = Installed(name=name, python=python)
        versions = probe.call("versions", {"packages": peer.packages}, {}).answer
        absent = [package for package in peer.packages if versions[package] is None]
        if not absent:
            installed.append(Installed(name=name, python=python, versions=dict(versions)))
            continue
        missing[name] = (
            f"{name} is not measured: {', '.join(absent)} not installed for {python} "
            f"| {peer.install}, then --peer-python {name}=PATH"
        )
    if names and missing:
        raise InputError(next(iter(missing.values())))
    if not installed:
        raise InputError("no peer is installed", do=PEERS["diffusers"].install)
    return installed, missing


def prepared(
    peer: Installed, checkpoint: Path, folder: Path, environment: Mapping[str, str]
) -> Path:
    """Return the checkpoint in a peer's own form, from `folder` or made there now.

    Raises:
        EngineError: the peer cannot convert it.
        OutputError: no room.
    """
    source = {"checkpoint": fingerprint(checkpoint), "versions": dict(peer.versions)}
    target = folder / peer.loader
    if (target / _SOURCE).is_file() and json.loads((target / _SOURCE).read_text()) == source:
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with part_folder(target) as part:
            task = {"model": str(checkpoint), "prepared": str(part)}
            try:
                peer.call("prepare", task, environment)
            except EngineError as error:
                raise EngineError(f"{peer.name} cannot convert the checkpoint: {error}") from error
            (part / _SOURCE).write_text(json.dumps(source), encoding="utf-8")
            shutil.rmtree(target, ignore_errors=True)
            part.rename(target)
    except OSError as error:
        raise OutputError(f"cannot write {target}", got=error.strerror, do="make room") from error
    return target


def fingerprint(checkpoint: Path) -> str:
    """Return a digest of the names, sizes and times of a directory's files."""
    files = [
        (str(file.relative_to(checkpoint)), file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(checkpoint.rglob("*"))
        if file.is_file()
    ]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _require_known(name: str) -> None:
    if name not in PEERS:
        raise InputError("peer", got=repr(name), expected=f"one of {', '.join(PEERS)}")
