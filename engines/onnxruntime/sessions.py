"""Graphs prepared for this processor: optimized once, later loaded at once with mapped weights.

A prepared graph computes attention block by block and keeps its memory from call to call
(docs/memory.md has the gains).

FP16 weights of an FP32 graph may stay FP16: they stay mapped, and each weight is cast where it is
used and dropped after. That halves the memory and costs some time (docs/memory.md).

A prepared file holds weight layouts for one processor and one ONNX Runtime, so both are facts of
its recipe. `engines.prepared` keeps and checks the files.
"""

from __future__ import annotations

import contextlib
import platform
from functools import cache, partial
from pathlib import Path

from sld_edge.engines.onnxruntime.edit import flash_attention, weights_first
from sld_edge.engines.onnxruntime.engine import (
    OrtEngine,
    create_session,
    onnxruntime,
    session_options,
)
from sld_edge.engines.prepared import Recipe

_LAYOUT = 4  # raise when the preparation changes
_GRAPH, _WEIGHTS = "model.onnx", "model.onnx.data"
# The optimizers that compute casts of weights beforehand.
_FOLDING = "ConstantFolding;FuseFp16InitializerToFp32NodeTransformer"


def recipe(*, keep_fp16: bool = False) -> Recipe[OrtEngine]:
    """Return how ONNX Runtime prepares a graph for this processor.

    An unprepared graph has its weights in the arithmetic's precision.

    Args:
        keep_fp16: keep FP16 weights and cast them at every use.
    """
    return Recipe(
        facts=(_LAYOUT, keep_fp16, _processor(), onnxruntime().__version__),
        files=(_GRAPH, _WEIGHTS),
        write=partial(_optimize, keep_fp16=keep_fp16),
        load=lambda path, lock: OrtEngine(path, prepared=True, lock=lock),
        load_source=OrtEngine,
    )


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


def _optimize(path: Path, part: Path, *, keep_fp16: bool) -> None:
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
