"""The safe step as one function: native code if it is built, else NumPy. See docs/native.md."""

from __future__ import annotations

from collections.abc import Mapping

from sld_edge.cpp_ext import reference
from sld_edge.cpp_ext.arguments import (
    Array,
    check_inputs,
    check_outputs,
    check_overlap,
    check_threads,
    empty_outputs,
)

try:
    import sld_edge.cpp_ext._kernels as _kernels
except ModuleNotFoundError as missing:
    if missing.name != "sld_edge.cpp_ext._kernels":
        raise
    HAVE_NATIVE = False
else:
    HAVE_NATIVE = True

__all__ = ["HAVE_NATIVE", "empty_outputs", "safe_step"]


def safe_step(
    feeds: Mapping[str, Array], *, threads: int = 1, out: Mapping[str, Array] | None = None
) -> dict[str, Array]:
    """Compute the outputs of the `guidance` graph from its inputs.

    Args:
        feeds: arrays by the names and with the shapes of `runtime.contract.INPUTS`, C-contiguous
            float32; the three predictions may all be float16.
        threads: number of threads of native code; the results do not depend on it.
        out: arrays to write to, as `empty_outputs` makes them; an output must not overlap an
            input or another output.

    Returns:
        float32 arrays by the names and with the shapes of `runtime.contract.OUTPUTS`: `out`, or
        new arrays, which the caller owns.

    Raises:
        ValueError: a missing or unknown array; an array of another type, shape or layout; an
            output that overlaps an input or another output; `threads` out of range.

    Source: SLD, arXiv 2211.05105, equations 3 to 8; several concepts are ours.
    """
    sizes = check_inputs(feeds)
    check_threads(threads)
    if out is None:
        outputs = empty_outputs(sizes)
    else:
        outputs = dict(out)
        check_outputs(outputs, sizes)
    if HAVE_NATIVE:
        _kernels.safe_step(**feeds, **outputs, threads=threads)
    else:
        check_overlap(outputs, feeds)
        for name, array in reference.safe_step(feeds).items():
            outputs[name][...] = array
    return outputs
