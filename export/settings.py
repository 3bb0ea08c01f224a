"""The settings of an export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sld_edge.engines.checks import finite_number, whole_number
from sld_edge.engines.errors import InputError
from sld_edge.export.checkpoints.sources import PREDICTION_TYPES
from sld_edge.export.families import FAMILIES
from sld_edge.export.families.family import Part
from sld_edge.runtime.request import MOST_GUIDANCE
from sld_edge.runtime.safety import DEFAULT_PRESET, PAPER_CONCEPT, PRESETS
from sld_edge.runtime.samplers import SAMPLERS
from sld_edge.runtime.text_filter import concepts_from_texts, require_some_concepts

Precision = Literal["fp16", "fp32"]


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """The settings of an export.

    Attributes:
        model: alias, Hub id, diffusers directory or `.safetensors` file.
        output: the bundle's directory; it must not exist yet, except with `force`.
        precision: arithmetic of the graphs; guidance, inputs and outputs are always FP32.
        fp32_components: components with FP32 arithmetic in any case, because FP16 overflows.
        storage: type of the weights on disk; None: as each component's precision.
        attention: "op" is ONNX's Attention (opset 23), "decomposed" plain products (opset 20).
        via: "builder" writes the graphs from the config, "torch" exports diffusers' modules.
        width: default width of a picture in pixels; None: the width of the training.
        height: default height of a picture in pixels; None: the height of the training.
        safety_concept: default concept that Safe Latent Diffusion steers away from; a tuple holds
            several concepts, each with its own branch and gate.
        preset: default strength of safety.
        text_filter: words that a text filter in the bundle takes out of prompts, "nudity; blood";
            None: the safety concept's, if the preset has a filter, else no filter.
        filter_preserve: texts whose embeddings the filter leaves; None: the package's list.
        name: the model's name in the bundle; None: the checkpoint's name.
        verify: compare every graph with diffusers' module (needs torch).
        force: replace an existing bundle.
        variant: "fp16" reads the half-size weight files of the checkpoint.
        tokenizer: directory or tokenizer.json, instead of the checkpoint's tokenizer.
        prediction_type: of the UNet, instead of the checkpoint's type.
        vae: the folder of another VAE, for example AutoencoderTiny's, instead of the checkpoint's.
        preview_vae: the folder of a VAE as a second decoder, for previews during a run.
        sampler: default sampler; None: the checkpoint's.
        steps: default steps; None: 50, or 4 for LCM.
        guidance_scale: default guidance; None: 7.5, or the value of the distilled model.
        timestep_spacing: "leading", "trailing" or "linspace", instead of the scheduler's spacing.
    """

    model: str
    output: Path
    precision: Precision = "fp16"
    fp32_components: tuple[str, ...] = ()
    storage: Literal["fp16", "fp32"] | None = None
    attention: Literal["op", "decomposed"] = "op"
    via: Literal["builder", "torch"] = "builder"
    width: int | None = None
    height: int | None = None
    safety_concept: str | tuple[str, ...] = PAPER_CONCEPT
    preset: str = DEFAULT_PRESET
    text_filter: str | tuple[str, ...] | None = None
    filter_preserve: tuple[str, ...] | None = None
    name: str | None = None
    verify: bool = False
    force: bool = False
    variant: str | None = None
    tokenizer: Path | None = None
    prediction_type: str | None = None
    vae: Path | None = None
    preview_vae: Path | None = None
    sampler: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    timestep_spacing: str | None = None

    def __post_init__(self) -> None:
        if not self.safety_concepts:
            raise InputError("safety concept", got="none", expected="one or more")
        choices = {
            "precision": ("fp16", "fp32"),
            "storage": (None, "fp16", "fp32"),
            "attention": ("op", "decomposed"),
            "via": ("builder", "torch"),
            "preset": tuple(PRESETS),
            "prediction_type": (None, *PREDICTION_TYPES),
            "sampler": (None, *SAMPLERS),
            "timestep_spacing": (None, "leading", "trailing", "linspace"),
        }
        for name, values in choices.items():
            if getattr(self, name) not in values:
                expected = ", ".join(value for value in values if value is not None)
                raise InputError(name, got=repr(getattr(self, name)), expected=expected)
        if self.storage == "fp32" and self.precision == "fp16":
            raise InputError("storage fp32 with precision fp16", do="leave storage out")
        if self.storage is not None and self.via == "torch":
            raise InputError("storage cannot be chosen with via torch", do="leave it out")
        if self.steps is not None:
            whole_number("steps", self.steps, 1, 1000)
        if self.guidance_scale is not None:
            finite_number("guidance scale", self.guidance_scale, 0, MOST_GUIDANCE)
        known = dict.fromkeys(
            part.name
            for family in FAMILIES
            for part in family.parts
            if part.folder is not None and part.weights_of is None
        )
        for name in self.fp32_components:
            if name not in known:
                raise InputError("fp32 component", got=repr(name), expected=", ".join(known))
        if self.text_filter is not None:
            require_some_concepts(self.filter_concepts)
        if self.fp32_components and self.precision == "fp32":
            raise InputError(
                "fp32 components with precision fp32, where all are in fp32",
                do="leave fp32 components out",
            )

    @property
    def safety_concepts(self) -> tuple[str, ...]:
        """The safety concepts, each once."""
        concepts = self.safety_concept
        return (concepts,) if isinstance(concepts, str) else tuple(dict.fromkeys(concepts))

    @property
    def filter_concepts(self) -> tuple[str, ...]:
        """The concepts of the text filter; none without a filter."""
        texts = self.text_filter
        if texts is None:
            texts = self.safety_concepts if PRESETS[self.preset].text_filter else ()
        return concepts_from_texts((texts,) if isinstance(texts, str) else texts)

    def precision_of(self, part: Part) -> Precision:
        """Return the arithmetic of one graph."""
        fp32 = part.precision == "fp32" or (part.weights_of or part.name) in self.fp32_components
        return "fp32" if fp32 else self.precision

    def storage_of(self, part: Part) -> Precision:
        """Return the type of one graph's weights on disk."""
        if part.folder is None or self.storage is None:
            return self.precision_of(part)
        return self.storage
