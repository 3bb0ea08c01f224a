"""Inputs of a component for a comparison: drawn at random, the same at every call."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from sld_edge.engines.base import Array, TensorSpec
from sld_edge.runtime.bundle import Bundle
from sld_edge.runtime.contract import PREDICTIONS, ROW
from sld_edge.runtime.manifest import Component
from sld_edge.runtime.samplers import sampler_table

_STEPS = 10
_FLOAT32_MAX = float(np.finfo(np.float32).max)
# A value for each image. Safety: the preset strong, then numbers whose edit does not saturate.
_SETTINGS: Mapping[str, Any] = {
    "timestep": [801, 81],
    "guidance_scale": [7.5, 3],
    "safety": [[2000, 0.025, 0.5, 0.7, 1], [0.5, 0.25, 0.3, 0.4, 1]],
}


@dataclass(frozen=True, kw_only=True)
class Feeds:
    """Draws the inputs of a bundle's components.

    Attributes:
        bundle: has the components.
        width: of the pictures, in pixels.
        height: of the pictures, in pixels.
        images: 1 or 2 images at once.
        seed: another seed draws other numbers.
    """

    bundle: Bundle
    width: int
    height: int
    images: int = 2
    seed: int = 7

    def of(self, name: str) -> dict[str, Array]:
        """Return inputs of a component for all images and all their branches."""
        rng = np.random.default_rng([self.seed, *name.encode()])
        component = self.bundle.manifest.components[name]
        sizes = self._sizes(name)
        return {spec.name: self._drawn(spec, sizes, rng) for spec in component.inputs}

    def broken(self) -> Iterator[tuple[str, str, dict[str, Array], list[float]]]:
        """Give case, component, inputs, and the values of `finite` that the component must give.

        NaN or infinity is in the first image alone.
        """
        fine = [1.0] * (self.images - 1)
        for name, value in product(PREDICTIONS, (np.nan, np.inf)):
            feeds = self.of("guidance")
            feeds[name].reshape(-1)[0] = value
            yield f"{value} in {name}", "guidance", feeds, [-1.0, *fine]
        feeds = self.of("guidance")
        feeds["guidance_scale"][0] = _FLOAT32_MAX
        yield "latents that overflow", "guidance", feeds, [0.0, *fine]
        feeds = self.of("vae_decoder")
        feeds["latents"][0, 0, 0, 0] = np.nan
        yield "nan in latents", "vae_decoder", feeds, [0.0] * len(feeds["latents"])

    def _drawn(self, spec: TensorSpec, sizes: Mapping[str, int], rng: np.random.Generator) -> Array:
        shape = tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape)
        if spec.name in _SETTINGS:
            return np.array(_SETTINGS[spec.name][: self.images], np.float32)
        if spec.name == "row":
            return self._sampler_row()
        if spec.name == "input_ids":
            text = next(iter(self.bundle.manifest.texts))
            words = len(json.loads(self.bundle.tokenizer_json(text))["model"]["vocab"])
            return rng.integers(0, words, shape, np.int64)
        if spec.dtype == "uint8":
            return rng.integers(0, 256, shape, np.uint8)
        drawn = rng.standard_normal(shape, np.float32).astype(spec.dtype)
        return np.abs(drawn) if spec.name == "edit_map" else drawn

    def _sizes(self, name: str) -> dict[str, int]:
        manifest = self.bundle.manifest
        cell = manifest.latents.downscale
        concepts = len(manifest.safety_concepts)
        return {
            "N": 1,  # texts are encoded one by one
            "B": 1 if name == "vae_decoder" else self.images,  # pictures are decoded one by one
            "K*B": (2 + concepts) * self.images,
            "n": max(1, concepts),
            "L": manifest.text_length,
            "h": self.height // cell,
            "w": self.width // cell,
            "H": self.height,
            "W": self.width,
        }

    def _sampler_row(self) -> Array:
        """Return a sampler's row that uses the history and adds some noise."""
        manifest = self.bundle.manifest
        scheduler = {**manifest.scheduler, "prediction_type": manifest.prediction_type}
        row: Array = sampler_table("unipc", scheduler, _STEPS).rows()[_STEPS // 2]
        row[ROW.index("s")] = 0.3
        return row


def cast_to(component: Component, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Return inputs in the types that a component takes."""
    return {spec.name: feeds[spec.name].astype(spec.dtype) for spec in component.inputs}
