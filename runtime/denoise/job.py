"""A job: a batch of images to denoise, and the numbers for every call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sld_edge.runtime.denoise.schedule import Call, schedule
from sld_edge.runtime.manifest import SHALLOW
from sld_edge.runtime.numerics import not_finite
from sld_edge.runtime.random import NoiseSource
from sld_edge.runtime.request import ImageRun, Savings
from sld_edge.runtime.samplers import SamplerTable

Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """The UNet's inputs other than latents and timestep, by name. B images, n safety concepts.

    Attributes:
        branch: float32 [(2+n)*B,...], branch-major: all unconditional, all prompts, all first
            concepts, … An image with fewer concepts repeats a concept, which changes nothing.
        image: float32 [B,...], the same for every branch.
        concepts: n, at least 1.
    """

    branch: Mapping[str, Floats]
    image: Mapping[str, Floats]
    concepts: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every input."""
        return {name: array.shape for name, array in {**self.branch, **self.image}.items()}

    def feeds(self, first: int, branches: int, images: int) -> dict[str, Floats]:
        """Return the inputs of `branches` branches, starting with branch `first`."""
        rows = slice(first * images, (first + branches) * images)
        return {**{name: array[rows] for name, array in self.branch.items()}, **self.image}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A batch of B images to denoise, each steered away from up to n concepts.

    Attributes:
        table: the sampler.
        images: B images of a run; their guidance scale and safety are used.
        conditioning: the UNet's inputs other than latents and timestep.
        classifier_free: whether the guidance scale needs an unconditional branch; a model with a
            guidance embedding takes the scale as an input instead.
        latents: float32 [B,4,h,w], starting noise of unit variance.
        noise: B sources of fresh noise, for samplers that add noise.
        unet_precision: precision of the UNet's arithmetic, for the advice in errors.
        savings: see `Savings`.
    """

    table: SamplerTable
    images: Sequence[ImageRun]
    conditioning: Conditioning
    classifier_free: bool
    latents: Floats
    noise: Sequence[NoiseSource]
    unet_precision: str
    savings: Savings

    @property
    def concepts(self) -> int:
        """n, the number of safety branches of a call with safety."""
        return self.conditioning.concepts

    @property
    def components(self) -> tuple[str, ...]:
        """The graphs that the job's calls run."""
        shallow = (SHALLOW,) if self.savings.cache_interval > 1 else ()
        return ("unet", *shallow, "guidance")

    def guidance_scale(self) -> Floats:
        """Return the guidance scales, float32 [B], 1 or more; 1 is no guidance."""
        if not self.classifier_free:
            return np.ones(len(self.images), np.float32)
        return np.array([max(image.guidance_scale, 1.0) for image in self.images], np.float32)

    def timestep(self, index: int) -> Floats:
        """Return the timestep of a call, float32 [B]."""
        return np.full(len(self.images), self.table.timesteps[index], np.float32)

    def safety(self, index: int) -> Floats:
        """Return the safety numbers of a call, float32 [B,5], the columns of `contract.SAFETY`."""
        rows = [
            (
                safety.scale,
                safety.threshold,
                safety.momentum_scale,
                safety.momentum_beta,
                float(safety.edits_in(index)),
            )
            for safety in (image.safety for image in self.images)
        ]
        return np.array(rows, np.float32)

    def starting_latents(self) -> Floats:
        """Return the first latents, float32 [B,4,h,w]: noise times `init_noise_sigma`."""
        return np.ascontiguousarray(self.latents * np.float32(self.table.init_noise_sigma))

    def fresh_noise(self) -> Floats:
        """Draw noise from each image's source, float32 [B,4,h,w]."""
        shape = (1, *self.latents.shape[1:])
        return np.concatenate([source.normal(shape) for source in self.noise])

    def branches(self, index: int) -> int:
        """Count the branches that can change the result of this call or of a later call."""
        if any(
            safety.edits
            and not safety.stopped(index)
            # During the warm-up the safety branch only changes the momentum.
            and (index >= safety.warmup or safety.momentum_scale > 0)
            for safety in (image.safety for image in self.images)
        ):
            return 2 + self.concepts
        return 2 if (self.guidance_scale() > 1).any() else 1

    def calls(self) -> tuple[Call, ...]:
        """Return the work of each call."""
        return schedule(
            [self.branches(index) for index in range(self.table.calls)],
            cache_interval=self.savings.cache_interval,
        )

    def refuse(self, finite: Floats, index: int) -> None:
        """Raise an error if `finite` [B], guidance's output in a call, reports NaN or infinity.

        Raises:
            NumericsError: NaN or infinity; the error names the component and the call.
        """
        worst = finite.min()
        if not worst >= 1:  # also true for NaN
            raise not_finite(
                "guidance" if worst == 0 else "unet",
                precision=self.unet_precision,
                call=f"call {index + 1} of {self.table.calls}",
            )
