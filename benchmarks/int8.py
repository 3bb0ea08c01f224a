"""Is an 8-bit UNet worth it on the CPU? Time and error of quantized variants, against FP32.

    SLD_EDGE_THREADS=1 python -m sld_edge.benchmarks.int8 BUNDLE --output DIR [--size 256]

Makes the variants with ONNX Runtime's own quantizer from the decomposed graph of an FP32 bundle:
static 8 bit (QDQ, ranges from `--samples` random inputs at timesteps from noise to picture), and
weights only in 8 and 4 bit blocks. Each is run beside the bundle's own graph, in turn, on other
random inputs. The budget is 1 % relative L2 of noise_pred; FP16 has 0.09 %. Needs the extra
`export`.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from sld_edge.benchmarks.evaluation.report_md import markdown_table
from sld_edge.engines.base import Engine
from sld_edge.engines.errors import InputError
from sld_edge.engines.ort import OrtEngine
from sld_edge.export.decompose import decomposed_graph
from sld_edge.runtime.bundle import Bundle, Manifest
from sld_edge.runtime.console import run_command

Feeds = dict[str, NDArray[np.float32]]

BUDGET = 0.01
BRANCHES = 3
_TIMESTEPS = (981, 741, 501, 261, 21)
_BLOCK = 32  # weights that share a scale


def random_feeds(manifest: Manifest, size: int, count: int, seed: int) -> Iterator[Feeds]:
    """Yield inputs of the UNet: normal noise, as latents are at every timestep, and text."""
    rng = np.random.default_rng(seed)
    cells = size // manifest.latents.downscale
    text = (BRANCHES, manifest.text.length, manifest.text.width)
    for index in range(count):
        yield {
            "latents": rng.standard_normal((1, 4, cells, cells), np.float32),
            "timestep": np.array([_TIMESTEPS[index % len(_TIMESTEPS)]], np.float32),
            "context": rng.standard_normal(text, np.float32),
        }


def static_int8(source: Path, target: Path, samples: Sequence[Feeds]) -> None:
    """Quantize convolutions and matrix products, weights a channel and activations a tensor."""
    from onnxruntime import quantization

    class Samples(quantization.CalibrationDataReader):
        """Hands out the samples once."""

        def __init__(self) -> None:
            self.left = iter(samples)

        def get_next(self) -> Feeds | None:
            """Return the next sample."""
            return next(self.left, None)

    quantization.quantize_static(
        str(source),
        str(target),
        Samples(),
        quant_format=quantization.QuantFormat.QDQ,
        op_types_to_quantize=["Conv", "MatMul"],
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        use_external_data_format=True,
    )


def weights_only(source: Path, target: Path, bits: int) -> None:
    """Store the matrix products' weights in blocks of few bits; sums are FP32's."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        onnx.load(str(source)), block_size=_BLOCK, is_symmetric=True, bits=bits, accuracy_level=4
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(target), use_external_data_format=True)


def _unlink_weights(data: Path) -> None:
    """Make the weights' file one of its own: onnx reads none that is linked to twice."""
    copy = data.with_name("copy")
    shutil.copyfile(data, copy)
    copy.replace(data)


def relative_error(got: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """Return ||got - wanted|| / ||wanted||."""
    difference = got.astype(np.float64) - wanted
    return float(np.linalg.norm(difference) / np.linalg.norm(wanted.astype(np.float64)))


def compared(
    fp32: Engine, other: Engine, feeds: Sequence[Feeds], rounds: int
) -> tuple[list[float], list[float]]:
    """Return each run's relative error, and each round's ratio of times; one round warms up.

    Times are the processor's, so that other work on the machine counts as little as it can.
    """
    errors, ratios = [], []
    for index in range(rounds + 1):
        one = feeds[index % len(feeds)]
        begin = time.process_time()
        wanted = fp32.run(one)["noise_pred"]
        middle = time.process_time()
        got = other.run(one)["noise_pred"]
        end = time.process_time()
        errors.append(relative_error(got, wanted))
        if index:  # the first runs read the weights
            ratios.append((end - middle) / (middle - begin))
    return errors, ratios


def measure(bundle: Bundle, output: Path, *, size: int, samples: int, rounds: int) -> str:
    """Make the variants in `output`, run them, and return the Markdown table.

    Raises:
        InputError: numbers below 1, a size the bundle cannot take, or a bundle that is not FP32.
    """
    manifest = bundle.manifest
    if min(samples, rounds) < 1:
        raise InputError("samples and rounds", got=min(samples, rounds), expected="1 or more")
    if size < 1 or size % manifest.latents.downscale:
        expected = f"a multiple of {manifest.latents.downscale}"
        raise InputError("size", got=size, expected=expected)
    unet = manifest.components["unet"]
    if (unet.precision, unet.storage) != ("fp32", "fp32"):
        raise InputError(
            "the bundle's UNet",
            got=f"{unet.precision}, stored as {unet.storage}",
            expected="fp32, stored as fp32",
            do="export it with --precision fp32",
        )
    output.mkdir(parents=True, exist_ok=True)
    feeds = list(random_feeds(manifest, size, len(_TIMESTEPS), seed=1))
    with tempfile.TemporaryDirectory(dir=output) as folder:
        source = Path(folder) / "unet.onnx"
        shipped = bundle.path / unet.files[0].path
        decomposed_graph(shipped, source)
        _unlink_weights(source.with_name(source.name + ".data"))
        calibration = list(random_feeds(manifest, size, samples, seed=0))
        variants: Mapping[str, Callable[[Path], None]] = {
            "static 8 bit, convolutions and products": lambda to: static_int8(
                source, to, calibration
            ),
            "weights of products 8 bit": lambda to: weights_only(source, to, 8),
            "weights of products 4 bit": lambda to: weights_only(source, to, 4),
        }
        rows = []
        for number, (name, make) in enumerate(variants.items()):
            target = Path(folder) / f"variant-{number}.onnx"
            make(target)
            stored = sum(file.stat().st_size for file in Path(folder).glob(f"{target.name}*"))
            with OrtEngine(shipped) as fp32, OrtEngine(target) as other:
                errors, ratios = compared(fp32, other, feeds, rounds)
            inside = "yes" if max(errors) <= BUDGET else "no"
            rows.append(
                [
                    name,
                    f"{stored / 1e6:.0f}",
                    f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                    f"{statistics.median(errors):.2%} (at most {max(errors):.2%})",
                    inside,
                ]
            )
            for file in Path(folder).glob(f"{target.name}*"):
                file.unlink()
    header = ["UNet", "MB", "time against FP32", "relative error", f"within {BUDGET:.0%}"]
    return markdown_table(header, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return the exit code."""
    return run_command(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="room for two more UNets")
    parser.add_argument("--size", type=int, help="pixels (default: the bundle's own)")
    parser.add_argument("--samples", type=int, default=5, help="for the ranges of static 8 bit")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    bundle = Bundle.open(options.bundle)
    size = options.size if options.size is not None else bundle.manifest.size.width
    numbers = {"samples": options.samples, "rounds": options.rounds}
    print(measure(bundle, options.output, size=size, **numbers))


if __name__ == "__main__":
    sys.exit(main())
