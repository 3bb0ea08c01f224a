"""The safe step three ways: native code, NumPy, and the guidance graph in ONNX Runtime.

python -m sld_edge.benchmarks.studies.native_step [--cells 64 128] [--threads 1 2] [--rounds 15]

Ways take turns; a round's figure is the fastest of its calls, for on a shared machine the others
also wait. Given is the rounds' median; ratios are taken round by round and given as median, lowest
and highest. `copy` moves the least bytes a step can, with NumPy.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper
from onnx.tools.update_model_dims import update_inputs_outputs_dims

from sld_edge.cpp_ext import HAVE_NATIVE, empty_outputs, reference, safe_step
from sld_edge.engines.errors import InputError
from sld_edge.export.graphs.decompose import inferred_tensors
from sld_edge.export.graphs.guidance import write_guidance
from sld_edge.runtime.commands.console import run_command

Feeds = dict[str, NDArray[Any]]
_REPEATS = 20  # calls a round
_VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Identity")  # no bytes of their own


def random_feeds(cells: int) -> Feeds:
    """One image of [4,cells,cells], one concept, every part of the step at work."""
    rng = np.random.default_rng(0)
    image = (1, 4, cells, cells)
    shapes: dict[str, tuple[int, ...]] = {
        **{f"noise_pred_{branch}": image for branch in ("uncond", "text")},
        "noise_pred_safety": (1, *image),
        **dict.fromkeys(("latents", "momentum", "noise"), image),
        "history": (4, *image),
        "edit_map": (1, cells, cells),
        "row": (10,),
    }
    return {
        **{name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()},
        "guidance_scale": np.array([7.5], np.float32),
        "safety": np.array([[2, 0.25, 0.3, 0.4, 1]], np.float32),
    }


def least_bytes(feeds: Feeds) -> int:
    """Every input read once, every output written once: what native code moves."""
    _, _, cells, width = feeds["latents"].shape
    outputs = empty_outputs({"B": 1, "n": 1, "h": cells, "w": width})
    return sum(array.nbytes for array in (*feeds.values(), *outputs.values()))


def graph_bytes(path: Path, feeds: Feeds) -> int:
    """What the graph's nodes read and write, one by one, as no engine that fuses them would."""
    model = onnx.load(str(path))
    names = [item.name for item in model.graph.output]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    got = session.run(names, feeds)
    shapes = {name: list(array.shape) for name, array in zip(names, got, strict=True)}
    given = {name: list(array.shape) for name, array in feeds.items()}
    fixed = update_inputs_outputs_dims(model, given, shapes)
    sizes = {}
    for name, tensor in inferred_tensors(fixed).items():
        width = helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
        sizes[name] = width * int(np.prod([dim.dim_value for dim in tensor.shape.dim]))
    return sum(
        sizes.get(name, 0)
        for node in fixed.graph.node
        if node.op_type not in _VIEWS
        for name in (*node.input, *node.output)
    )


def ways(path: Path, feeds: Feeds, threads: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name; their results are compared first."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    out = safe_step(feeds, threads=threads)
    for name, array in zip(names, session.run(names, feeds), strict=True):
        # The graph's long sums are the less exact ones.
        np.testing.assert_allclose(out[name], array, rtol=1e-3, atol=1e-5, err_msg=name)
    source = np.zeros(least_bytes(feeds) // 2, np.uint8)
    target = np.zeros_like(source)
    return {
        "native": lambda: safe_step(feeds, threads=threads, out=out),
        "graph": lambda: session.run(names, feeds),
        "numpy": lambda: reference.safe_step(feeds),
        "copy": lambda: np.copyto(target, source),
    }


def measure(each: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return microseconds a call, a number a round; one round before the first is not counted."""
    found: dict[str, list[float]] = {name: [] for name in each}
    for number in range(rounds + 1):
        for name, call in each.items():
            times = []
            for _ in range(_REPEATS):
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
            if number:
                found[name].append(min(times) * 1e6)
    return found


def row(cells: int, threads: int, found: dict[str, list[float]], moved: tuple[int, int]) -> str:
    """Return a row of the table."""
    medians = [f"{statistics.median(found[name]):.0f}" for name in found]
    ratios = []
    for other in ("graph", "numpy", "copy"):
        each = [a / b for a, b in zip(found[other], found["native"], strict=True)]
        ratios.append(f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})")
    least, graph = moved
    size = f"{least / 1e6:.2f}, {graph / 1e6:.2f} ({graph / least:.1f}x)"
    return f"| {' | '.join([f'{cells}x{cells}', str(threads), *medians, *ratios, size])} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return the exit code."""
    return run_command(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> None:
    cli = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    cli.add_argument("--cells", type=int, nargs="+", default=[64, 128], help="latent cells a side")
    cli.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    cli.add_argument("--rounds", type=int, default=15)
    asked = cli.parse_args(arguments)
    if min(*asked.cells, *asked.threads, asked.rounds) < 1:
        raise InputError("--cells, --threads and --rounds", expected="1 or more")
    if not HAVE_NATIVE:
        raise InputError("the native step", got="none built", do="see docs/native.md")
    print("| latents | threads | native, us | graph, us | numpy, us | copy, us ", end="")
    print("| graph / native | numpy / native | copy / native | MB moved: least, graph |")
    print("| --- |" + " ---: |" * 9)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "guidance.onnx"
        write_guidance(path)
        for cells in asked.cells:
            feeds = random_feeds(cells)
            moved = least_bytes(feeds), graph_bytes(path, feeds)
            for threads in asked.threads:
                found = measure(ways(path, feeds, threads), asked.rounds)
                print(row(cells, threads, found, moved), flush=True)
    versions = f"NumPy {np.__version__}, ONNX Runtime {onnxruntime.__version__}"
    load = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"\n{platform.machine()}, {load}, {versions}, {asked.rounds} rounds, {date.today()}")


if __name__ == "__main__":
    sys.exit(main())
