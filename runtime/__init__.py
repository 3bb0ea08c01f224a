"""The part that runs on a device: bundle, samplers, safety, pipeline, commands. No PyTorch."""

from sld_edge.engines.errors import (
    BundleError,
    EngineError,
    InputError,
    MissingPackageError,
    NumericsError,
    OutputError,
    PolicyError,
    UserError,
)
from sld_edge.runtime.bundle import Bundle
from sld_edge.runtime.denoise.loop import Step
from sld_edge.runtime.pipeline import Pipeline
from sld_edge.runtime.request import Framing, ImageRun, Request, Run, Sampling, Savings
from sld_edge.runtime.result import Result
from sld_edge.runtime.safety import PAPER_CONCEPT, PRESETS, Safety
from sld_edge.runtime.samplers import SAMPLERS

__all__ = [
    "PAPER_CONCEPT",
    "PRESETS",
    "SAMPLERS",
    "Bundle",
    "BundleError",
    "EngineError",
    "Framing",
    "ImageRun",
    "InputError",
    "MissingPackageError",
    "NumericsError",
    "OutputError",
    "Pipeline",
    "PolicyError",
    "Request",
    "Result",
    "Run",
    "Safety",
    "Sampling",
    "Savings",
    "Step",
    "UserError",
]
