"""The denoising loop: a generator of steps. It knows neither the sampler nor its consumers.

Each call runs two graphs: the UNet on the branches that are needed, then `guidance`, which computes
Safe Latent Diffusion, classifier-free guidance and the sampler's step. A `Stepper` runs the graphs:
on the host (`on_host`), or on a device without copies to the host in between (`on_device`).
Progress, previews and reports consume the steps; closing the generator stops the loop.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from sld_edge.engines.errors import InputError
from sld_edge.runtime.denoise.job import Floats, Job
from sld_edge.runtime.denoise.schedule import Call


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The effect of safety in the calls so far, and their times.

    Attributes:
        share: float32 [calls,B], share of the latent's elements that safety edited, 0 to 1.
        strength: float32 [calls,B], norm of the edit, relative to the norm of the noise_pred that
            is guided without safety.
        concept_strength: float32 [calls,n,B], the strength of the edit for each concept, without
            momentum; 0 for a call without safety branches.
        seconds: seconds of each call.
    """

    share: Floats
    strength: Floats
    concept_strength: Floats
    seconds: Sequence[float]


class Stepper(Protocol):
    """Runs the calls of a job in order, and returns the state after the last call."""

    @property
    def calls(self) -> int:
        """The number of calls that were run."""

    def call(self, index: int, call: Call) -> None:
        """Run the branches of a call, then guidance."""

    def read(self, name: Literal["latents", "edit_map"]) -> Floats:
        """Return the latents [B,4,h,w] or the edit map [B,h,w] after the last call."""

    def figures(self) -> Figures:
        """Return the figures of all calls so far."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """The result of a UNet call. B images.

    Latents and edit map are copied from the device when they are read. Read them before the next
    step: a stepper keeps only the newest state, and reading an older step raises an error.

    Attributes:
        index: the number of the call, from 0.
        calls: the number of calls of the run.
        timestep: the training timestep of the call.
        branches: the number of UNet branches: 1, 2, or 2 and a branch for each concept.
        cached: whether the call used the deep features of an earlier call.
    """

    index: int
    calls: int
    timestep: float
    branches: int
    cached: bool
    stepper: Stepper = field(repr=False)

    @property
    def latents(self) -> Floats:
        """The latents after the call, float32 [B,4,h,w], unscaled.

        Raises:
            InputError: a later call was made.
        """
        return self._read("latents")

    @property
    def edit_map(self) -> Floats:
        """Where safety acted, summed over the calls so far, float32 [B,h,w].

        Raises:
            InputError: a later call was made.
        """
        return self._read("edit_map")

    @property
    def figures(self) -> Figures:
        """The effect of safety in this call and in all calls before."""
        count, figures = self.index + 1, self.stepper.figures()
        return Figures(
            share=figures.share[:count],
            strength=figures.strength[:count],
            concept_strength=figures.concept_strength[:count],
            seconds=figures.seconds[:count],
        )

    @property
    def share(self) -> Floats:
        """Share of the latent's elements that safety edited in this call, float32 [B]."""
        share: Floats = self.figures.share[self.index]
        return share

    @property
    def strength(self) -> Floats:
        """Norm of this call's edit, relative to noise_pred guided without safety, float32 [B]."""
        strength: Floats = self.figures.strength[self.index]
        return strength

    def _read(self, name: Literal["latents", "edit_map"]) -> Floats:
        if self.stepper.calls != self.index + 1:
            raise InputError(
                f"the {name} of call {self.index + 1} are gone: call {self.stepper.calls} was made",
                do="read or copy them before the next step",
            )
        return self.stepper.read(name)


def denoise(stepper: Stepper, job: Job) -> Generator[Step, None, None]:
    """Denoise a job's images; give a Step for each UNet call.

    Raises:
        NumericsError: NaN or infinity; the error names the component and the call. On a device it
            is raised when a value of a step is read.
    """
    for index, call in enumerate(job.calls()):
        stepper.call(index, call)
        yield Step(
            index=index,
            calls=job.table.calls,
            timestep=float(job.table.timesteps[index]),
            branches=call.branches,
            cached=call.cached,
            stepper=stepper,
        )
