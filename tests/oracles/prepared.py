"""Prepared graphs of ONNX Runtime, as tests ask for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sld_edge.engines import prepared
from sld_edge.engines.onnxruntime.engine import OrtEngine
from sld_edge.engines.onnxruntime.sessions import recipe


def prepared_engine(
    sha256: str, source: Callable[[], Path], *, keep_fp16: bool = False, **settings: Any
) -> OrtEngine:
    """Return ONNX Runtime's engine of a graph, from the cache or prepared now."""
    return prepared.prepared_engine(sha256, source, recipe(keep_fp16=keep_fp16), **settings)
