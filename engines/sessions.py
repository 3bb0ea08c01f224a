"""Graphs prepared for this processor: optimized once, then loaded at once with mapped weights.

Attention is computed block by block there, and memory is used again from call to call:
docs/memory.md says what that brings.

Weights that are stored in FP16 under FP32 arithmetic may stay so: mapped as they are, each cast
where it is used and dropped after. That is half the memory and costs some time (docs/memory.md).

A prepared file holds weight layouts for one processor and one ONNX Runtime, so its place in the
cache is named by both, and by the hash of the graph and weights it was made from. It is made on the
machine that runs it and never travels with a bundle.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from sld_edge.engines.errors import UserError
from sld_edge.engines.onnx_edit import flash_attention, weights_first
from sld_edge.engines.ort import OrtEngine, create_session, onnxruntime, session_options
from sld_edge.engines.settings import cache_folder

_LAYOUT = 3  # raise when what is prepared, or how, changes
_GRAPH, _WEIGHTS, _STAMP = "model.onnx", "model.onnx.data", "prepared.json"
# What computes casts of weights beforehand.
_FOLDING = "ConstantFolding;FuseFp16InitializerToFp32NodeTransformer"


def prepared_engine(
    sha256: str, source: Callable[[], Path], *, keep_fp16: bool = False
) -> OrtEngine:
    """Return the CPU engine of a graph, from the cache, or prepared and cached now.

    Args:
        sha256: hash of the graph's files together; what the cache is keyed by.
        source: checks the graph's files and gives the graph's path; called only where needed.
        keep_fp16: leave FP16 weights as they are, to be cast at every use.

    Without a usable cache (switched off, read-only, disk full) the graph is loaded as it is, its
    weights in the arithmetic's precision.
    """
    folder = _folder(sha256, keep_fp16)
    if folder is not None and _is_whole(folder):
        try:
            return OrtEngine(folder / _GRAPH, prepared=True)
        except UserError:  # damaged since: prepare it again below
            shutil.rmtree(folder, ignore_errors=True)
    path = source()
    if folder is None or not _prepare(path, folder, keep_fp16):
        return OrtEngine(path)
    return OrtEngine(folder / _GRAPH, prepared=True)


def _folder(sha256: str, keep_fp16: bool) -> Path | None:
    root = cache_folder()
    if root is None:
        return None
    identity = json.dumps([_LAYOUT, sha256, keep_fp16, _processor(), onnxruntime().__version__])
    return root / "sessions" / hashlib.sha256(identity.encode()).hexdigest()[:32]


@cache
def _processor() -> str:
    """Return what tells processors apart: architecture, name and instruction sets."""
    lines = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("model name", "flags", "Features", "CPU part")):
                lines.append(line)
            elif not line and lines:
                break  # the first processor is described; the others are alike
    return "\n".join([platform.system(), platform.machine(), platform.processor(), *lines])


def _is_whole(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / _STAMP).read_text(encoding="utf-8"))
        return bool(sizes) and all(
            (folder / name).stat().st_size == size for name, size in sizes.items()
        )
    except (OSError, ValueError, AttributeError):
        return False


def _prepare(path: Path, folder: Path, keep_fp16: bool) -> bool:
    """Optimize the graph into `folder`; whole or not at all. Say whether it is there now."""
    ort = onnxruntime()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=folder.name, suffix=".part", dir=folder.parent))
    except OSError:
        return False
    try:
        options = session_options()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.optimized_model_filepath = str(part / _GRAPH)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", _WEIGHTS
        )
        # The prepared session keeps the weights as they lie in the file, so none is packed here.
        options.add_session_config_entry("session.disable_prepacking", "1")
        if keep_fp16:
            options.add_session_config_entry("optimization.disable_specified_optimizers", _FOLDING)
        create_session(path, options, "cpu")
        graph = part / _GRAPH
        content = flash_attention(graph.read_bytes())
        graph.write_bytes(weights_first(content) if keep_fp16 else content)
        sizes = {file.name: file.stat().st_size for file in part.iterdir()}
        (part / _STAMP).write_text(json.dumps(sizes), encoding="utf-8")
        if not _is_whole(folder):  # else another process was first, and may be loading it now
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
    except (OSError, UserError):
        return _is_whole(folder)  # another process may have been first
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return True
