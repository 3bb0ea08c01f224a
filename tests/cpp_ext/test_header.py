"""The C header against the contract of the guidance graph, and as a compiler reads it."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

from c_library import ABI_VERSION, CPP, CStep, run
from sld_edge.runtime.contract import HISTORY, INPUTS, OUTPUTS, ROW, SAFETY, Axes

HEADER = (CPP / "include" / "sld_edge.h").read_text(encoding="utf-8")
LIMITS = {"MAX_CONCEPTS", "MAX_THREADS"}  # of the library alone; tests/safe_step.cpp tries them


def test_the_numbers() -> None:
    defined = re.findall(r"#define SLD_EDGE_(\w+) (\d+)u?\n", HEADER)
    assert {name: int(number) for name, number in defined if name not in LIMITS} == {
        "ABI_VERSION": ABI_VERSION,
        "CHANNELS": INPUTS["latents"][1],
        "HISTORY": HISTORY,
        "ROW_COLUMNS": len(ROW),
        "SAFETY_COLUMNS": len(SAFETY),
    }


def test_the_version_of_the_library_is_the_interfaces() -> None:
    cmake = (CPP / "CMakeLists.txt").read_text(encoding="utf-8")
    assert re.findall(r"\b(?:SO)?VERSION (\d+)[ )]", cmake) == [str(ABI_VERSION)] * 2


def test_sizes_and_offsets_are_those_of_the_tests_struct(c_compiler: str, tmp_path: Path) -> None:
    names = [name for name, *_ in CStep._fields_]
    numbers = ["sizeof(sld_edge_step)", *(f"offsetof(sld_edge_step, {name})" for name in names)]
    numbers += ["SLD_EDGE_FP32", "SLD_EDGE_FP16"]
    prints = "".join(f'printf("%zu ", (size_t){number});' for number in numbers)
    source, program = tmp_path / "offsets.c", tmp_path / "offsets"
    source.write_text(f'#include <stdio.h>\n#include "sld_edge.h"\nint main(void) {{{prints}}}\n')
    run(c_compiler, "-std=c11", f"-I{CPP / 'include'}", source, "-o", program)
    offsets = [getattr(CStep, name).offset for name in names]
    assert [int(number) for number in run(program).split()] == [
        *(ctypes.sizeof(CStep), *offsets),
        *(0, 1),
    ]


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
