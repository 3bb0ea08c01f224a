"""What a step should take on a device, from the kernels of the UNet's plan. Not measured.

    python -m sld_edge.benchmarks.studies.kernels BUNDLE [--size 512]

TensorRT-RTX builds the UNet for one size and one number of branches, which needs no GPU, and its
log names every kernel with its tensors. A kernel takes the larger of two times: its multiply-adds
at the device's peak, and its bytes at the memory's bandwidth. A step is the sum of its kernels, and
a gap after each.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from sld_edge.benchmarks.tables import Row, Table
from sld_edge.engines.tensorrt.build import build_plan
from sld_edge.engines.tensorrt.build_log import BuildLog, Layer, LayerTensor
from sld_edge.engines.tensorrt.build_settings import BuildSettings, dimensions, fixed, profile
from sld_edge.engines.tensorrt.plan_info import PlanInfo, PlanTensor, this_system
from sld_edge.engines.tensorrt.target import build_target
from sld_edge.export.graphs.decompose import decomposed_graph
from sld_edge.runtime.bundle import Bundle
from sld_edge.runtime.commands.console import run_command

_BYTES = {"Half": 2, "Float": 4, "Int32": 4, "Int64": 8, "Bool": 1, "UInt8": 1, "Int8": 1}
_GAP = 1.5e-6  # seconds between two kernels of a CUDA graph; an assumption
_EARLY = 0.24  # of the steps have a safety branch with the early window, so 2.24 branches


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device's peaks, dense: products of FP16 and of 8 bits, and the memory's bandwidth.

    The sources are in docs/performance.md. GeForce cards sum FP16 products in FP32 at half the rate
    of FP16 sums; Orin at the full rate.
    """

    name: str
    fp16: float  # TFLOPS with FP32 sums; a multiply-add is two operations
    eight_bits: float  # TFLOPS of FP8 with FP32 sums, or TOPS of INT8 where there is no FP8
    kind: str
    bandwidth: float  # GB/s


DEVICES = (
    Device(name="Jetson Orin Nano, super", fp16=16.7, eight_bits=33.4, kind="INT8", bandwidth=102),
    Device(name="Jetson AGX Orin", fp16=42.6, eight_bits=85.2, kind="INT8", bandwidth=204.8),
    Device(name="RTX 3060", fp16=25.5, eight_bits=101.9, kind="INT8", bandwidth=360),
    Device(name="RTX 4090", fp16=165.2, eight_bits=330.3, kind="FP8", bandwidth=1008),
)


@dataclass(frozen=True, kw_only=True)
class Work:
    """A kernel's multiply-adds, its bytes, and those that 8 bits would save."""

    products: int
    bytes: int
    saved: int  # half of the weights and inputs of a convolution or product; 0 for other kernels

    def seconds(self, device: Device, *, small: bool) -> float:
        """Return the kernel's time; `small` computes convolutions and products in 8 bits."""
        small = small and self.saved > 0
        peak = device.eight_bits if small else device.fp16
        moved = self.bytes - self.saved if small else self.bytes
        return max(2 * self.products / (peak * 1e12), moved / (device.bandwidth * 1e9))


def work_of(layer: Layer) -> Work:
    """Return a kernel's work, for a plan whose sizes are all fixed."""
    moved = sum(map(_nbytes, (*layer.inputs, *layer.constants, *layer.outputs)))
    out = layer.outputs[0].shape if layer.outputs else ()
    if "mha" in layer.name:  # q [B*heads,L,size], k and v likewise: two products
        q, k = layer.inputs[0].shape, layer.inputs[1].shape
        return Work(
            products=2 * math.prod(q) * (math.prod(k) // (k[0] * q[2])), bytes=moved, saved=0
        )
    weights = [t for t in layer.constants if t.dtype == "Half" and len(t.shape) > 1]
    largest = max(weights, key=lambda t: math.prod(t.shape), default=None)
    saved = (sum(map(_nbytes, (*layer.inputs, *layer.constants)))) // 2
    kind = kind_of(layer)
    if kind == "convolution" and largest is not None:  # weights [out,in,h,w], images NCHW
        pixels = out[0] * math.prod(out[2:])
        return Work(products=math.prod(largest.shape) * pixels, bytes=moved, saved=saved)
    if kind == "product" and largest is not None:  # weights [...,in,out], rows [...,in]
        rows = math.prod(layer.inputs[-1].shape[:-1])
        return Work(products=math.prod(largest.shape) * rows, bytes=moved, saved=saved)
    return Work(products=0, bytes=moved, saved=0)


def kernels_of(bundle: Bundle, size: int, branches: int) -> tuple[Layer, ...]:
    """Build the UNet for one picture of `size` pixels and return its kernels."""
    component = bundle.manifest.components["unet"]
    settings = BuildSettings(
        engine="tensorrt-rtx",
        compute_capabilities=("8.6",),
        batch=fixed(1),
        size=fixed(size),
    )
    sizes = dimensions(
        settings,
        width=size,
        height=size,
        downscale=bundle.manifest.latents.downscale,
        text_length=bundle.manifest.text_length,
        concepts=1,
    )
    sizes["K*B"] = fixed(branches)
    target, log = build_target(settings), BuildLog()
    inputs = tuple(PlanTensor(spec=s, profile=profile(s, sizes)) for s in component.inputs)
    draft = PlanInfo(
        component="unet",
        sha256="",
        bytes=0,
        source_sha256="",
        engine=target.engine,
        engine_version=target.version,
        system=this_system(),
        devices=(),
        compute_capabilities=target.compute_capabilities,
        precision=component.precision,
        inputs=inputs,
        outputs=tuple(PlanTensor(spec=spec) for spec in component.outputs),
        options={},
        seconds=0,
        created_by="",
    )
    source = bundle.graph(component).path
    with tempfile.TemporaryDirectory(dir=bundle.path.parent) as folder:
        graph = source
        if component.attention == "op":
            graph = Path(folder) / source.name
            decomposed_graph(source, graph)
        build_plan(
            draft,
            nullcontext(graph),
            Path(folder) / "unet.plan",
            settings=settings,
            target=target,
            log=log,
        )
    return log.kernels()


def tables(bundle: Bundle, size: int) -> list[Table]:
    """Return the work by kind of kernel, and the time of a step by device."""
    works = {
        branches: {layer: work_of(layer) for layer in kernels_of(bundle, size, branches)}
        for branches in (2, 3)
    }
    kinds: dict[str, list[Work]] = {}
    for layer, work in works[3].items():
        kinds.setdefault(kind_of(layer), []).append(work)
    by_kind: list[Row] = [
        {
            "kernels": kind,
            "number": str(len(found)),
            "GFLOP": f"{2e-9 * sum(work.products for work in found):.1f}",
            "MB": f"{sum(work.bytes for work in found) / 1e6:.0f}",
        }
        for kind, found in sorted(kinds.items(), key=lambda item: -sum(w.bytes for w in item[1]))
    ]
    by_device: list[Row] = []
    for device in DEVICES:
        for small in (False, True):
            time = {
                branches: sum(w.seconds(device, small=small) + _GAP for w in found.values())
                for branches, found in works.items()
            }
            time[0] = time[2] + _EARLY * (time[3] - time[2])
            by_device.append(
                {
                    "device": device.name,
                    "arithmetic": device.kind if small else "FP16",
                    "2 branches ms": f"{1e3 * time[2]:.1f}",
                    "2.24 branches ms": f"{1e3 * time[0]:.1f}",
                    "3 branches ms": f"{1e3 * time[3]:.1f}",
                    "of it gaps ms": f"{1e3 * _GAP * len(works[3]):.1f}",
                }
            )
    return [
        Table(title=f"Kernels of a step with three branches, {size} px", rows=by_kind),
        Table(title=f"A step, {size} px, computed", rows=by_device),
    ]


def kind_of(layer: Layer) -> str:
    """Return what a kernel computes; its names are Myelin's, as "__myl_FcAddAdd"."""
    if "mha" in layer.name:
        return "attention"
    if layer.kind == "correlation" or "_Corr" in layer.name:
        return "convolution"
    if layer.kind == "gemm" or "_Fc" in layer.name:
        return "product"
    return "normalization" if "Gnor" in layer.name or "Mean" in layer.name else "other"


def _nbytes(tensor: LayerTensor) -> int:
    return math.prod(tensor.shape) * _BYTES.get(tensor.dtype, 2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--size", type=int, default=512)
    options = parser.parse_args(arguments)

    def run() -> int:
        for table in tables(Bundle.open(options.bundle), options.size):
            print(table.markdown())
        return 0

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
