"""Graphs prepared for this processor: optimized once, later loaded at once with mapped weights.

A prepared graph computes attention block by block and keeps its memory from call to call
(docs/memory.md has the gains).

FP16 weights of an FP32 graph may stay FP16: they stay mapped, and each weight is cast where it is
used and dropped after. That halves the memory and costs some time (docs/memory.md).

A prepared file holds weight layouts for one processor and one ONNX Runtime. So both are part of its
name in the cache, and so is the hash of its source graph and weights. It is made on the machine
that runs it, and is never part of a bundle.

Every prepared file is checked by SHA-256 before it runs. Hashing gigabytes takes seconds, so a
large file is hashed again only where its identity (device, inode, size, times) has changed since
the last time. This relies on two facts: only this user can write to the cache, which
`cache.private_folder` checks, and the system sets a file's time of change at every write.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sld_edge.engines.cache import (
    SESSIONS,
    STAMP,
    entry_name,
    make_room,
    private_folder,
    why_not_private,
)
from sld_edge.engines.errors import EngineError, UserError
from sld_edge.engines.files import Identity, identity, json_from_file, sha256_of_file, write_whole
from sld_edge.engines.onnxruntime.edit import flash_attention, weights_first
from sld_edge.engines.onnxruntime.engine import (
    OrtEngine,
    create_session,
    onnxruntime,
    session_options,
)
from sld_edge.engines.staging import hold, part_folder

_LAYOUT = 4  # raise when the preparation changes
_GRAPH, _WEIGHTS = "model.onnx", "model.onnx.data"
_SMALL = 64_000_000  # bytes; graphs up to this size are hashed at every load, in 40 ms
_LARGE = 256_000_000  # bytes; from this size on preparation takes long and is announced
# The optimizers that compute casts of weights beforehand.
_FOLDING = "ConstantFolding;FuseFp16InitializerToFp32NodeTransformer"


def prepared_engine(
    sha256: str,
    source: Callable[[], Path],
    *,
    keep_fp16: bool = False,
    confirm: Callable[[], None] | None = None,
    what: str = "a graph",
    quiet: bool = False,
) -> OrtEngine:
    """Return the CPU engine of a graph, from the cache, or prepared and cached now.

    Without a usable cache (switched off, not private, read-only, disk full) the graph is loaded
    unprepared, its weights in the arithmetic's precision.

    Args:
        sha256: hash of the graph's files together, the key of the cache.
        source: checks the graph's files and returns the graph's path; called only where needed.
        keep_fp16: keep FP16 weights and cast them at every use.
        confirm: raises where the files changed since `source` checked them; called after the files
            were read and before the result is kept.
        what: the graph's name, for people.
        quiet: do not announce on standard error that a large graph is being prepared.
    """
    folder = _folder(sha256, keep_fp16)
    if folder is not None:
        engine = _loaded(folder)
        if engine is not None:
            return engine
    path = source()
    if folder is not None and _prepare(path, folder, keep_fp16, confirm, what, quiet=quiet):
        engine = _loaded(folder)
        if engine is not None:
            return engine
    engine = OrtEngine(path)
    if confirm is not None:
        confirm()
    return engine


def _folder(sha256: str, keep_fp16: bool) -> Path | None:
    root = private_folder(SESSIONS)
    if root is None:
        return None
    parts = [_LAYOUT, sha256, keep_fp16, _processor(), onnxruntime().__version__]
    return root / entry_name(json.dumps(parts))


def _loaded(folder: Path) -> OrtEngine | None:
    """Return the engine of a prepared graph; None where it is not whole or was changed."""
    try:
        if why_not_private(folder) is not None:
            return None  # it is prepared again and replaced
        lock = hold(folder / STAMP, shared=True)
    except OSError:  # it does not exist, or is being removed
        return None
    try:
        seen = _checked(folder)
        engine = OrtEngine(folder / _GRAPH, prepared=True, lock=lock)
        lock = -1  # the engine closes it
        if any(identity((folder / name).stat()) != known for name, known in seen.items()):
            raise EngineError(f"{folder} was changed while it was loaded")
        with contextlib.suppress(OSError):  # read-only
            os.utime(folder / STAMP)
    except (UserError, OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # forged, damaged or incomplete: it is prepared again and replaced
    finally:
        if lock >= 0:
            os.close(lock)
    return engine


def _checked(folder: Path) -> dict[str, Identity]:
    """Compare a prepared graph's files with its stamp; return their identities.

    Raises:
        UserError, OSError, ValueError, TypeError, KeyError: a file differs, or the stamp is wrong.
    """
    stamp = json_from_file(folder / STAMP, error=EngineError)
    files: dict[str, Any] = stamp["files"]
    if not {_GRAPH} <= files.keys() <= {_GRAPH, _WEIGHTS}:
        raise ValueError("other files than a prepared graph has")
    small = sum((folder / name).lstat().st_size for name in files) <= _SMALL
    seen, changed = {}, False
    for name, entry in files.items():
        status = (folder / name).lstat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{name} is not a regular file")
        now = identity(status)
        known = Identity(*entry["identity"])
        if small or now != known:
            digest, now = sha256_of_file(folder / name)
            if digest != entry["sha256"]:
                raise ValueError(f"{name} was altered")
            changed = changed or now != known
            entry["identity"] = list(now)
        seen[name] = now
    if changed:  # copied or restored, with the same content: record the new identity
        with contextlib.suppress(UserError):
            write_whole(folder / STAMP, json.dumps(stamp).encode())
    return seen


@cache
def _processor() -> str:
    """Describe the processor: architecture, name and instruction sets."""
    lines = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("model name", "flags", "Features", "CPU part")):
                lines.append(line)
            elif not line and lines:
                break  # all cores are alike, so the first is enough
    return "\n".join([platform.system(), platform.machine(), platform.processor(), *lines])


def _prepare(
    path: Path,
    folder: Path,
    keep_fp16: bool,
    confirm: Callable[[], None] | None,
    what: str,
    *,
    quiet: bool,
) -> bool:
    """Optimize the graph into `folder`, whole or not at all; return whether `folder` may exist.

    Raises:
        UserError: `confirm` found the source files changed.
    """
    beside = (path, path.with_name(f"{path.name}.data"))
    size = sum(file.stat().st_size for file in beside if file.exists())
    if not make_room(size):
        return False
    try:
        with part_folder(folder) as part, _announced(what, size, part, quiet=quiet):
            _optimize(path, part, keep_fp16)
            if confirm is not None:
                confirm()
            files = {}
            for file in sorted(part.iterdir()):
                digest, seen = sha256_of_file(file)
                files[file.name] = {"sha256": digest, "identity": list(seen)}
            write_whole(part / STAMP, json.dumps({"what": what, "files": files}).encode())
            _move(part, folder)
    except (
        EngineError
    ):  # ONNX Runtime cannot load the graph: the caller loads it next and reports why
        return False
    except OSError:
        return folder.exists()  # another process may have been faster
    return True


def _optimize(path: Path, part: Path, keep_fp16: bool) -> None:
    ort = onnxruntime()
    options = session_options()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(part / _GRAPH)
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_file_name", _WEIGHTS
    )
    # The prepared session maps the weights from the file, so they are not packed here.
    options.add_session_config_entry("session.disable_prepacking", "1")
    if keep_fp16:
        options.add_session_config_entry("optimization.disable_specified_optimizers", _FOLDING)
    create_session(path, options, "cpu")
    graph = part / _GRAPH
    content = flash_attention(graph.read_bytes())
    graph.write_bytes(weights_first(content) if keep_fp16 else content)


def _move(part: Path, folder: Path) -> None:
    """Move a prepared graph to its place unless another process has put a good one there."""
    if folder.exists():
        engine = _loaded(folder)
        if engine is not None:
            engine.close()
            return
        with part_folder(folder) as aside:  # removed in the end, with the old graph
            folder.rename(aside / "old")
            part.rename(folder)
        return
    part.rename(folder)


@contextmanager
def _announced(what: str, size: int, part: Path, *, quiet: bool) -> Iterator[None]:
    """Announce the preparation of a large graph and show the bytes written so far."""
    if size < _LARGE or quiet:
        yield
        return
    root = part.parent
    print(
        f"note: preparing {what} for this processor, once: about {size / 1e9:.1f} GB in {root}, "
        "which sld-run --cache shows",
        file=sys.stderr,
    )
    done = threading.Event()

    def watch(bar: tqdm[Any]) -> None:
        while not done.wait(0.5):
            with contextlib.suppress(OSError):
                bar.update(sum(file.stat().st_size for file in part.iterdir()) - bar.n)

    with tqdm(
        total=size, unit="B", unit_scale=True, leave=False, file=sys.stderr, desc="preparing"
    ) as bar:
        thread = threading.Thread(target=watch, args=(bar,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
