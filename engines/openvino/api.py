"""The module openvino: imported late, its errors in one line."""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from sld_edge.engines.errors import EngineError, MissingPackageError, one_line


@cache
def openvino() -> ModuleType:
    """Import OpenVINO without its telemetry, or say how to install it.

    When it is imported, OpenVINO reports that to Google Analytics, unless openvino_telemetry is
    missing.
    """
    name = "openvino_telemetry"
    already = sys.modules.get(name)
    sys.modules[name] = None  # type: ignore[assignment]  # the import system's sign: not there
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise MissingPackageError("openvino", extra="openvino", why="this provider") from error
    except Exception as error:  # of a broken installation, whatever it is
        raise EngineError("openvino does not load", got=one_line(error)) from error
    finally:
        del sys.modules[name]
        if already is not None:
            sys.modules[name] = already
    module: ModuleType = openvino
    return module


def version() -> str:
    """Return OpenVINO's version, like "2026.4.0"."""
    return str(openvino().__version__).partition("-")[0]


@cache
def core() -> Any:
    """Return OpenVINO's core, which finds devices and compiles graphs; one for the process."""
    return openvino().Core()


def read_model(path: Path) -> Any:
    """Read a graph, ONNX or OpenVINO's own; its weights stay mapped.

    Raises:
        EngineError: OpenVINO cannot read the graph.
    """
    try:
        return core().read_model(os.fspath(path))
    except Exception as error:  # OpenVINO's errors share no base class
        raise EngineError(
            f"OpenVINO {version()} cannot read {path}",
            got=one_line(error),
            do="export the bundle again, or update openvino",
        ) from error
