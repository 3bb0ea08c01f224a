"""The C header against the contract of the guidance graph."""

from __future__ import annotations

import re
from pathlib import Path

from sld_edge.cpp_ext.arguments import MAX_CONCEPTS, MAX_THREADS
from sld_edge.runtime.contract import HISTORY, INPUTS, OUTPUTS, ROW, SAFETY, Axes

HEADER = (Path(__file__).parents[2] / "cpp_ext/include/sld_edge.h").read_text(encoding="utf-8")


def test_the_numbers() -> None:
    defined = re.findall(r"#define SLD_EDGE_(\w+) (\d+)u?\n", HEADER)
    assert {name: int(number) for name, number in defined} == {
        "ABI_VERSION": 2,
        "CHANNELS": INPUTS["latents"][1],
        "HISTORY": HISTORY,
        "ROW_COLUMNS": len(ROW),
        "SAFETY_COLUMNS": len(SAFETY),
        "MAX_CONCEPTS": MAX_CONCEPTS,
        "MAX_THREADS": MAX_THREADS,
    }


def test_the_arrays_and_their_shapes() -> None:
    arrays = re.findall(r"(const )?(void|float) \*(\w+); +/\* \[(.*?)\]", HEADER)
    half = {name for _, kind, name, _ in arrays if kind == "void"}
    assert half == {name for name in INPUTS if name.startswith("noise_pred")}
    for given, expected in (("const ", INPUTS), ("", OUTPUTS)):
        shapes = [(name, axes_of(text)) for const, _, name, text in arrays if const == given]
        assert shapes == list(expected.items())


def test_the_columns() -> None:
    row = ", ".join(ROW).replace("b0, b1, b2, b3, b4", "b0 to b4")
    assert f"/* [{len(ROW)}]: {row} */" in HEADER
    assert f"/* [B,{len(SAFETY)}]: {', '.join(SAFETY)} (0, 1) */" in HEADER


def axes_of(text: str) -> Axes:
    return tuple(int(axis) if axis.isdigit() else axis for axis in text.split(","))
