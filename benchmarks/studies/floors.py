"""The least time that a step can take on a device, computed from a bundle's graphs. Not measured.

    python -m sld_edge.benchmarks.studies.floors BUNDLE [--size 512 768]

A floor is the larger of two times: all matrix operations at the device's peak, and all bytes at its
bandwidth; in FP16, with the weights read once and activations as in `flops`, fused. Real engines
take longer: the second table says how much longer those took whose authors published a time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sld_edge.benchmarks.evaluation.report_md import markdown_table
from sld_edge.benchmarks.studies.flops import BRANCHES, WIDTHS, Work, works
from sld_edge.runtime.bundle import Bundle
from sld_edge.runtime.commands.console import run_command

STEPS = 50
_SIZES = (512, 768)


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device's peaks: dense FP16 matrix products that are summed up in FP32.

    Attributes:
        tensor_cores: of the whole chip.
        products: multiply-adds a tensor core and clock, FP16 with FP32 sums.
        clock: in GHz, the boost clock of the data sheet.
        bandwidth: of the memory, in GB/s.
        source: the vendor's document that has these numbers.
    """

    name: str
    tensor_cores: int
    products: int
    clock: float
    bandwidth: float
    source: str

    @property
    def peak(self) -> float:
        """In TFLOPS; two operations a multiply-add."""
        return 2e-3 * self.tensor_cores * self.products * self.clock

    def seconds(self, work: Work) -> tuple[float, float]:
        """Return the times of the operations and of the bytes, each alone."""
        moved = work.weights + work.fused
        return work.matrix / (self.peak * 1e12), moved / (self.bandwidth * 1e9)

    def floor(self, work: Work) -> float:
        """Return the larger of the two."""
        return max(self.seconds(work))


# GeForce cards sum FP16 products in FP32 at half their rate for FP16 sums; Orin and the data-centre
# chips at the full rate.
_ORIN = "NVIDIA Jetson Orin Nano Super developer kit data sheet; Jetson modules' table"
DEVICES = (
    Device(
        name="Jetson Orin Nano 8 GB, before JetPack 6.1 (15 W)",
        tensor_cores=32,
        products=256,
        clock=0.625,
        bandwidth=68,
        source=_ORIN,
    ),
    Device(
        name="Jetson Orin Nano 8 GB, super mode (25 W, MAXN)",
        tensor_cores=32,
        products=256,
        clock=1.02,
        bandwidth=102,
        source=_ORIN,
    ),
    Device(
        name="Jetson AGX Orin 64 GB (MAXN)",
        tensor_cores=64,
        products=256,
        clock=1.3,
        bandwidth=204.8,
        source="NVIDIA Jetson AGX Orin Series technical brief",
    ),
    Device(
        name="RTX 3060 12 GB",
        tensor_cores=112,
        products=64,
        clock=1.777,
        bandwidth=360,
        source="NVIDIA GeForce RTX 3060 product page; rates: NVIDIA Ampere GA102 whitepaper",
    ),
    Device(
        name="RTX 4090",
        tensor_cores=512,
        products=64,
        clock=2.52,
        bandwidth=1008,
        source="NVIDIA Ada GPU architecture whitepaper, appendix A",
    ),
    Device(
        name="RTX 5090",
        tensor_cores=680,
        products=64,
        clock=2.407,
        bandwidth=1792,
        source="NVIDIA RTX Blackwell GPU architecture whitepaper, appendix A",
    ),
)
# Those of published times.
OTHERS = (
    Device(
        name="RTX 4080",
        tensor_cores=304,
        products=64,
        clock=2.505,
        bandwidth=716.8,
        source="NVIDIA Ada GPU architecture whitepaper, appendix A",
    ),
    Device(
        name="T4 at 0.99 GHz",
        tensor_cores=320,
        products=64,
        clock=0.99,
        bandwidth=320,
        source="NVIDIA T4 data sheet; the clock is the publisher's",
    ),
    Device(
        name="A100 80 GB, PCIe",
        tensor_cores=432,
        products=256,
        clock=1.41,
        bandwidth=1935,
        source="NVIDIA A100 data sheet",
    ),
    Device(
        name="A100 80 GB, SXM",
        tensor_cores=432,
        products=256,
        clock=1.41,
        bandwidth=2039,
        source="NVIDIA A100 data sheet",
    ),
    Device(
        name="H100 80 GB, SXM",
        tensor_cores=528,
        products=512,
        clock=1.83,
        bandwidth=3350,
        source="NVIDIA H100 data sheet",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Published:
    """A time that others published for SD-1.5, plain guidance, one picture, FP16.

    `seconds` is of a whole picture of 50 steps, or of one step where `per_step`.
    """

    engine: str
    device: str
    size: int
    seconds: float
    source: str
    per_step: bool = False


_README = "onnxruntime's stable_diffusion README, b1954fab"
_STABLE_FAST = "stable-fast README, WSL2"
PUBLISHED = (
    Published(
        engine="ONNX Runtime CUDA", device="RTX 3060 12 GB", size=512, seconds=4.8, source=_README
    ),
    Published(engine="PyTorch 2.0", device="RTX 3060 12 GB", size=512, seconds=5.6, source=_README),
    Published(
        engine="TensorRT demo",
        device="RTX 4080",
        size=512,
        seconds=1 / 52.6,
        source=_STABLE_FAST,
        per_step=True,
    ),
    Published(
        engine="stable-fast",
        device="RTX 4080",
        size=512,
        seconds=1 / 51.6,
        source=_STABLE_FAST,
        per_step=True,
    ),
    Published(
        engine="PyTorch",
        device="RTX 4080",
        size=512,
        seconds=1 / 29.5,
        source=_STABLE_FAST,
        per_step=True,
    ),
    Published(
        engine="ONNX Runtime TensorRT",
        device="T4 at 0.99 GHz",
        size=512,
        seconds=4.7,
        source=_README,
    ),
    Published(
        engine="ONNX Runtime TensorRT",
        device="A100 80 GB, PCIe",
        size=512,
        seconds=0.96,
        source=_README,
    ),
    Published(
        engine="TensorRT",
        device="A100 80 GB, SXM",
        size=512,
        seconds=0.861,
        source="onnxruntime PR 17788, static shapes",
    ),
    Published(
        engine="ONNX Runtime CUDA",
        device="A100 80 GB, SXM",
        size=768,
        seconds=1.901,
        source="onnxruntime PR 17788, dynamic shapes",
    ),
    Published(
        engine="ONNX Runtime, IO binding",
        device="H100 80 GB, SXM",
        size=512,
        seconds=0.572,
        source="onnxruntime PR 22834",
    ),
)


def step_floor(device: Device, parts: Mapping[str, Work]) -> float:
    """Return a step's floor in seconds: the UNet, then the guidance."""
    return device.floor(parts["unet"]) + device.floor(parts["guidance"])


def picture_floor(device: Device, parts: Mapping[str, Work], *, steps: int = STEPS) -> float:
    """Return a picture's floor in seconds: text, steps and decoding, one after another."""
    once = device.floor(parts["text_encoder"]) + device.floor(parts["vae_decoder"])
    return once + steps * step_floor(device, parts)


def floor_table(bundle: Bundle, sizes: Sequence[int]) -> str:
    """Return the Markdown table of floors, a row a device and size."""
    header = ["device", "peak TFLOPS", "GB/s", "pixels"]
    for branches in BRANCHES:
        header += [f"step of {branches}: operations ms", "bytes ms", "**floor ms**"]
    header += ["3 against 2", f"picture of {STEPS} steps, 2 / 3, s"]
    rows = []
    for device in DEVICES:
        for size in sizes:
            row = [device.name, f"{device.peak:.1f}", f"{device.bandwidth:g}", str(size)]
            floors, pictures = [], []
            for branches in BRANCHES:
                parts = works(bundle, size, branches=branches, width=WIDTHS["fp16"])
                row += [f"{1e3 * each:.1f}" for each in device.seconds(parts["unet"])]
                floors.append(step_floor(device, parts))
                row.append(f"**{1e3 * floors[-1]:.1f}**")
                pictures.append(f"{picture_floor(device, parts):.2f}")
            rows.append([*row, f"{floors[1] / floors[0]:.2f}", " / ".join(pictures)])
    return markdown_table(header, rows)


def published_table(bundle: Bundle) -> str:
    """Return the Markdown table of published times against the floor of the same work."""
    known = {device.name: device for device in (*DEVICES, *OTHERS)}
    rows = []
    for one in PUBLISHED:
        device = known[one.device]
        parts = works(bundle, one.size, branches=2, width=WIDTHS["fp16"])
        floor = step_floor(device, parts) if one.per_step else picture_floor(device, parts)
        what = "step" if one.per_step else f"picture, {STEPS} steps"
        rows.append(
            [
                *(one.engine, device.name, f"{device.peak:.1f}", str(one.size), what),
                *(f"{1e3 * one.seconds:.1f}", f"{1e3 * floor:.1f}"),
                *(f"**{floor / one.seconds:.0%}**", one.source),
            ]
        )
    header = ["engine", "device", "peak TFLOPS", "pixels", "of", "published ms", "floor ms"]
    return markdown_table([*header, "share of the floor's speed", "published in"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print both tables; return the exit code."""
    return run_command(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path, help="of SD-1.5: the published times are of it")
    parser.add_argument("--size", type=int, nargs="+", default=list(_SIZES), help="pixels")
    options = parser.parse_args(arguments)
    bundle = Bundle.open(options.bundle)
    print("Computed, not measured.\n")
    print(floor_table(bundle, options.size))
    print("\n" + published_table(bundle))


if __name__ == "__main__":
    sys.exit(main())
