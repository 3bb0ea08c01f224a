"""The small heads of scorers, on CLIP's image embedding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sld_edge.export.graphs.builder import GraphBuilder, GraphOptions, Value


def write_q16_head(prompts: NDArray[np.float32], path: Path) -> None:
    """Write Q16's head: embedding f32 [B,D] -> probability f32 [B,2], appropriate first.

    `prompts` are float32 [2,D]. Source: ml-research/Q16; softmax of 100 times the cosines.
    """
    with GraphBuilder(path, GraphOptions(), inline=True) as b:
        cosines = _cosines(b, prompts)
        logits = b.node("Mul", cosines, b.scalar(100), name="logits")
        out = b.node("Softmax", logits, name="softmax", axis=-1)
        b.output(out, "probability", np.float32, ["B", 2])


def write_checker_head(
    vectors: NDArray[np.float32], thresholds: NDArray[np.float32], path: Path
) -> None:
    """Write the checker's head: embedding f32 [B,D] -> margin f32 [B,20], cosine minus threshold.

    `vectors` are float32 [20,D], first the 17 concepts, then the 3 of special care; `thresholds`
    [20]. Source: diffusers, pipelines/stable_diffusion/safety_checker.py.
    """
    with GraphBuilder(path, GraphOptions(), inline=True) as b:
        cosines = _cosines(b, vectors)
        limits = b.constant(thresholds, "thresholds")
        out = b.node("Sub", cosines, limits, name="less_threshold")
        b.output(out, "margin", np.float32, ["B", len(thresholds)])


def _cosines(b: GraphBuilder, vectors: NDArray[np.float32]) -> Value:
    """Declare the input `embedding` and return its cosines to M vectors [M,D], as [B,M]."""
    tiny = np.float32(1e-12)  # as torch's normalize
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = (vectors / np.maximum(length, tiny)).astype(np.float32)
    x = b.input("embedding", np.float32, ["B", vectors.shape[1]])
    norm = b.node("ReduceL2", x, b.ints(-1), name="norm", rank=2, keepdims=1)
    norm = b.node("Max", norm, b.scalar(1e-12), name="norm/positive")
    x = b.node("Div", x, norm, name="unit")
    return b.node("MatMul", x, b.constant(np.ascontiguousarray(unit.T), "vectors"), name="cosines")
