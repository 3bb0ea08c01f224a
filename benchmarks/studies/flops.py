"""Operations and bytes that a bundle's graphs need, from the graphs alone: nothing is run.

    python -m sld_edge.benchmarks.studies.flops BUNDLE [--size 512 ...] [--branches 2 3]
                                        [--precision fp16] [--check CHECKPOINT]

A multiplication and an addition count as two operations, as torch's counter has it. Bytes of
activations are given twice: every operator run on its own, and only what convolutions, matrix
products and attention read and write, as if an engine fused all the rest into them. `--check`
counts the same model, a diffusers directory, with torch's counter.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from sld_edge.benchmarks.evaluation.report_md import markdown_table
from sld_edge.benchmarks.studies import memory
from sld_edge.benchmarks.studies.memory import named_sizes, with_sizes
from sld_edge.engines.errors import InputError
from sld_edge.runtime.bundle import Bundle
from sld_edge.runtime.commands.console import run_command

Shape = tuple[int, ...]

BRANCHES = (2, 3)  # plain guidance; with safety
WIDTHS = {"fp32": 4, "fp16": 2}
_NORMS = ("GroupNormalization", "LayerNormalization")
_PER_NORMED = 8  # mean 1, variance 3, normalising 2, scale and bias 2
_MOVES = (  # copies and renames: no arithmetic
    *("Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten", "Transpose", "Concat", "Split"),
    *("Tile", "Resize", "Cast", "Shape", "Gather", "Slice", "Where"),
)
_VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten", "Shape")  # no bytes moved


@dataclass(frozen=True, kw_only=True)
class Work:
    """Operations and bytes of one run of a graph.

    Attributes:
        operations: by operator; of two kinds, see `matrix`.
        weights: bytes of the weights that are read, once each.
        alone: bytes of activations read and written if every operator ran on its own.
        fused: the part of `alone` that convolutions, matrix products and attention move.
    """

    operations: Mapping[str, int]
    weights: int
    alone: int
    fused: int

    @property
    def matrix(self) -> int:
        """Operations that tensor cores do."""
        return sum(self.operations.get(name, 0) for name in _MATRIX)

    @property
    def other(self) -> int:
        """All other operations: norms, activation functions, sums."""
        return sum(self.operations.values()) - self.matrix


def works(
    bundle: Bundle, size: int, *, branches: int, batch: int = 1, width: int | None = None
) -> dict[str, Work]:
    """Return each component's work for `batch` square pictures of `size` pixels.

    `width` is a float's bytes; None takes each graph's own.

    Raises:
        InputError: branches, batch or a size that no graph takes.
        CheckpointError: a graph whose shapes cannot be told.
    """
    manifest = bundle.manifest
    if not 1 <= branches <= 3:
        raise InputError("branches", got=branches, expected="1, 2 or 3")
    if batch < 1:
        raise InputError("batch", got=batch, expected="1 or more")
    if size < 1 or size % manifest.latents.downscale:
        expected = f"a multiple of {manifest.latents.downscale}"
        raise InputError("size", got=size, expected=expected)
    sizes = named_sizes(manifest, size, batch, branches=branches)
    return {
        name: work(
            onnx.load(str(bundle.path / part.files[0].path), load_external_data=False), sizes, width
        )
        for name, part in manifest.components.items()
    }


def work(model: onnx.ModelProto, sizes: Mapping[str, int], width: int | None = None) -> Work:
    """Count one graph's work, with the named sizes filled in.

    Raises:
        CheckpointError: a size that has no value, or a tensor whose shape cannot be told.
    """
    filled = with_sizes(model, sizes)
    graph = filled.graph
    given = {tensor.name for tensor in model.graph.initializer}
    constant = {tensor.name for tensor in graph.initializer}  # and what is computed from sizes
    tensors = memory.tensors(filled)
    bytes_of = {
        name: math.prod(shape) * (width if width and kind in _FLOATS else memory.width(kind))
        for name, (shape, kind) in tensors.items()
    }
    operations: Counter[str] = Counter()
    weights: dict[str, int] = {}
    alone = fused = 0
    for node in graph.node:
        inputs = [name for name in node.input if name]
        for name in inputs:
            if name in given:
                rows = node.op_type == "Gather" and name == node.input[0]
                weights[name] = bytes_of[node.output[0] if rows else name]
        if all(name in constant for name in inputs):
            constant.update(node.output)
            continue
        shapes = [tensors[name][0] if name else () for name in node.input]
        operations[node.op_type] += _operations(node, shapes, tensors[node.output[0]][0])
        if node.op_type not in _VIEWS:
            moving = {name for name in (*inputs, *node.output) if name and name not in constant}
            moved = sum(bytes_of[name] for name in moving)
            alone += moved
            fused += moved if node.op_type in _MATRIX else 0
    counted = {name: count for name, count in operations.items() if count}
    return Work(operations=counted, weights=sum(weights.values()), alone=alone, fused=fused)


_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)


def _operations(node: onnx.NodeProto, inputs: Sequence[Shape], output: Shape) -> int:
    if node.op_type in _MATRIX:
        return _MATRIX[node.op_type](node, inputs, output)
    if node.op_type in _MOVES:
        return 0
    elements = math.prod(inputs[0] if node.op_type.startswith("Reduce") else output)
    return elements * (_PER_NORMED if node.op_type in _NORMS else 1)


def _conv(_: onnx.NodeProto, inputs: Sequence[Shape], output: Shape) -> int:
    return 2 * math.prod(output) * math.prod(inputs[1][1:])  # a weight has Cin / group


def _matmul(_: onnx.NodeProto, inputs: Sequence[Shape], output: Shape) -> int:
    return 2 * math.prod(output) * inputs[0][-1]


def _gemm(node: onnx.NodeProto, inputs: Sequence[Shape], output: Shape) -> int:
    turned = next((a.i for a in node.attribute if a.name == "transA"), 0)
    return 2 * math.prod(output) * inputs[0][0 if turned else 1]


def _attention(_: onnx.NodeProto, inputs: Sequence[Shape], output: Shape) -> int:
    """Scores, then their product with the values; a causal half is not taken off, as in torch."""
    count, queries, width = inputs[0]
    keys, out = inputs[2][1:]
    return 2 * count * queries * keys * (width + out)


_MATRIX: Mapping[str, Callable[[onnx.NodeProto, Sequence[Shape], Shape], int]] = {
    "Conv": _conv,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Attention": _attention,
}


def shared_share(bundle: Bundle, size: int, *, branches: int = 3) -> float:
    """Return how much of the UNet's work the shared prefix saves: of all branches run apart."""
    apart = branches * works(bundle, size, branches=1)["unet"].matrix
    return 1 - works(bundle, size, branches=branches)["unet"].matrix / apart


def table(bundle: Bundle, sizes: Sequence[int], branches: Sequence[int], width: int | None) -> str:
    """Return the Markdown table, a row a component and size; the UNet's also by branches."""
    header = ["component", "pixels", "branches", "matrix GFLOP", "other GFLOP", "weights MB"]
    header += ["activations MB, fused", "operators alone"]
    rows = []
    for size in sizes:
        counted = {count: works(bundle, size, branches=count, width=width) for count in branches}
        for name in bundle.manifest.components:
            for count in branches if name == "unet" else branches[:1]:
                one = counted[count][name]
                rows.append(
                    [
                        name,
                        str(size),
                        str(count) if name == "unet" else "",
                        f"{one.matrix / 1e9:.2f}",
                        f"{one.other / 1e9:.3f}",
                        *(f"{n / 1e6:.1f}" for n in (one.weights, one.fused, one.alone)),
                    ]
                )
    lines = [markdown_table(header, rows), ""]
    for size in sizes:
        by = {count: works(bundle, size, branches=count)["unet"].matrix for count in (2, 3)}
        lines.append(
            f"{size} px: three branches are {by[3] / by[2]:.3f} of two; the shared prefix saves "
            f"{shared_share(bundle, size):.1%} of three branches run apart."
        )
    return "\n".join(lines)


def check_table(bundle: Bundle, checkpoint: Path, sizes: Sequence[int]) -> str:
    """Return a Markdown table of our count against torch's, for one branch."""
    from sld_edge.benchmarks.studies.torch_flops import torch_operations

    rows = []
    for size in sizes:
        ours = works(bundle, size, branches=1)
        for name, theirs in torch_operations(checkpoint, size).items():
            counts = (ours[name].matrix, theirs)
            row = [name, str(size), *(f"{count / 1e9:.3f}" for count in counts)]
            rows.append([*row, f"{counts[0] / counts[1]:.6f}"])
    return markdown_table(["component", "pixels", "ours GFLOP", "torch GFLOP", "ratio"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return the exit code."""
    return run_command(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--size", type=int, nargs="+", help="pixels (default: the bundle's own)")
    parser.add_argument("--branches", type=int, nargs="+", default=list(BRANCHES))
    parser.add_argument(
        "--precision", choices=WIDTHS, help="of the bytes (default: each graph's own)"
    )
    parser.add_argument("--check", type=Path, help="the diffusers directory it was made from")
    options = parser.parse_args(arguments)
    bundle = Bundle.open(options.bundle)
    width = WIDTHS[options.precision] if options.precision is not None else None
    sizes = options.size or [bundle.manifest.size.width]
    print(table(bundle, sizes, options.branches, width))
    if options.check is not None:
        print("\n" + check_table(bundle, options.check, sizes))


if __name__ == "__main__":
    sys.exit(main())
