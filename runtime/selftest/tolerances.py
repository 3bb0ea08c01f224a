"""The largest differences that pass, each from a measurement.

python -m sld_edge.benchmarks.studies.fp16_error prints the measured numbers that stand here; with
--bf16 those of BF16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """The largest differences that pass.

    Attributes:
        network: relative L2 error of the outputs of a network.
        guidance: relative L2 error of guidance's outputs; guidance is FP32 in every bundle and has
            no matrix product.
        levels: mean difference of pictures decoded from the same latents, in levels of 255.
        image_levels: mean difference of whole images, in levels of 255.
        share: difference of the mean share that safety edited.
    """

    network: float
    guidance: float
    levels: float
    image_levels: float
    share: float

    def times(self, factor: float) -> Tolerance:
        """Return the bounds of everything that a network's arithmetic changes, times a factor."""
        return replace(
            self,
            network=factor * self.network,
            levels=factor * self.levels,
            image_levels=factor * self.image_levels,
            share=factor * self.share,
        )


# The same arithmetic in another order: measured 1e-6, and almost no pixel changes.
_CPU = Tolerance(network=1e-4, guidance=1e-5, levels=0.02, image_levels=0.1, share=0.002)
# FP32 on a device, without TF32: another order too. A compiler may choose Winograd convolutions.
_FP32 = Tolerance(network=1e-4, guidance=1e-5, levels=0.02, image_levels=0.25, share=0.005)
# TF32 keeps 10 bits: 5e-4 a rounding, 1e-3 in total. ONNX Runtime with TensorRT leaves it on.
_TF32 = Tolerance(network=2e-3, guidance=1e-5, levels=0.1, image_levels=1.0, share=0.02)
# FP16, each operation rounded, measured on the CPU over 6 seeds: text encoder 3.1e-4, UNet 2.8e-4,
# its deep features 5.5e-4, decoder 0.0017 levels, images 0.05 levels, share 0.002. A kernel that
# adds up in FP16 has a few times that: noise of 2e-3 at every UNet call changed the images by 0.4
# levels and the share by 0.015. Mistakes have more: branches exchanged 0.28; one of 142 biases of
# the UNet left out, 0.021 in the median, above 2e-3 for 90 % of them.
_FP16 = Tolerance(network=2e-3, guidance=1e-5, levels=0.1, image_levels=1.0, share=0.02)
# BF16 keeps 8 bits, 4e-3 a rounding. OpenVINO on an AMD EPYC (AVX-512 with BF16), 6 seeds: UNet
# 6e-3, its deep features 1.2e-2, decoder 0.41 levels, share 0.041; images 0.7 levels, but 5.6 where
# rounding leads to another picture. A UNet of full size has 2.4e-2 a call (Intel, AMX).
_BF16 = Tolerance(network=0.05, guidance=1e-5, levels=1.0, image_levels=8.0, share=0.08)
BOUNDS: Mapping[str, Tolerance] = {
    "cpu": _CPU,
    "fp32": _FP32,
    "tf32": _TF32,
    "fp16": _FP16,
    "bf16": _BF16,
}


def tolerance(precision: str, provider: str) -> Tolerance:
    """Return the bounds of a provider, for graphs with arithmetic "fp16" or "fp32".

    `provider` is from `Loader.runs_on`.
    """
    if "bf16" in provider:
        return _BF16
    if precision == "fp16":
        return _FP16
    if provider in ("cpu", "openvino CPU fp32"):
        return _CPU
    if provider.startswith("openvino"):
        return _FP16  # another device's own precision
    return _TF32 if provider.startswith("ort-") else _FP32
