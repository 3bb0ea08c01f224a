"""Running a graph on the CPU in one thread, after ONNX's own checks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray


def outputs_of(path: Path, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Check the graph, infer its shapes strictly, run it once; every output by name."""
    onnx.checker.check_model(str(path))
    onnx.shape_inference.infer_shapes(
        onnx.load(path, load_external_data=False),
        check_type=True,
        strict_mode=True,
        data_prop=True,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def relative_error(got: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Return ||got - wanted|| / ||wanted|| in float64."""
    difference = got.astype(np.float64) - wanted.astype(np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(wanted.astype(np.float64)))
