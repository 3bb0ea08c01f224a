"""The denoising loop: a generator that knows neither samplers nor what watches it.

Two graphs a call: the UNet on the branches that are needed, then `guidance`, which does Safe Latent
Diffusion, classifier-free guidance and the sampler's row. A `Stepper` runs them: on the host
(`on_host`), or on a device without coming back in between (`on_device`). Progress, previews, timing
and reports are consumers; closing the generator stops it.
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
    """What safety did in the calls so far, and how long they took.

    Attributes:
        share: float32 [calls,B], share of the latent's elements that safety edited, 0 to 1.
        strength: float32 [calls,B], norm of the edit relative to that of the plainly guided
            noise_pred.
        concept_strength: float32 [calls,n,B], the same of each concept's own edit, without
            momentum; 0 where a call had no safety branches.
        seconds: of each call.
    """

    share: Floats
    strength: Floats
    concept_strength: Floats
    seconds: Sequence[float]


class Stepper(Protocol):
    """Runs the calls of one job, in order, and can be asked how it stands."""

    @property
    def calls(self) -> int:
        """How many calls it has run."""

    def call(self, index: int, call: Call) -> None:
        """Run what a call has of the UNet, then guidance."""

    def read(self, name: Literal["latents", "edit_map"]) -> Floats:
        """Return the latents [B,4,h,w] or the edit map [B,h,w] after the last call."""

    def figures(self) -> Figures:
        """Return the figures of all calls so far."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one UNet call did. B images.

    Latents and edit map are fetched when asked for, which on a device waits for it. Ask before the
    next step: a stepper keeps only the latest, and older ones are refused.

    Attributes:
        index: the call, from 0.
        calls: how many there are.
        timestep: the training timestep of the call.
        branches: UNet branches that were computed: 1, 2, or 2 and one for each concept.
        cached: whether the deep features were those of an earlier call.
    """

    index: int
    calls: int
    timestep: float
    branches: int
    cached: bool
    stepper: Stepper = field(repr=False)

    @property
    def latents(self) -> Floats:
        """float32 [B,4,h,w], after the call, unscaled.

        Raises:
            InputError: a later call was made since.
        """
        return self._read("latents")

    @property
    def edit_map(self) -> Floats:
        """float32 [B,h,w], where safety acted, summed over the calls so far.

        Raises:
            InputError: a later call was made since.
        """
        return self._read("edit_map")

    @property
    def figures(self) -> Figures:
        """What safety did in each of the calls up to this one."""
        count, figures = self.index + 1, self.stepper.figures()
        return Figures(
            share=figures.share[:count],
            strength=figures.strength[:count],
            concept_strength=figures.concept_strength[:count],
            seconds=figures.seconds[:count],
        )

    @property
    def share(self) -> Floats:
        """float32 [B], share of the latent's elements that safety edited in this call."""
        own: Floats = self.figures.share[self.index]
        return own

    @property
    def strength(self) -> Floats:
        """float32 [B], norm of this call's edit relative to the plainly guided noise_pred."""
        own: Floats = self.figures.strength[self.index]
        return own

    def _read(self, name: Literal["latents", "edit_map"]) -> Floats:
        if self.stepper.calls != self.index + 1:
            raise InputError(
                f"the {name} of call {self.index + 1} are gone: call {self.stepper.calls} was made "
                "since",
                do="read or copy them before the next step",
            )
        return self.stepper.read(name)


def denoise(stepper: Stepper, job: Job) -> Generator[Step, None, None]:
    """Denoise a job's images, one Step a UNet call.

    Raises:
        NumericsError: NaN or infinity, named by component and call; on a device, when the stepper
            is next asked for something.
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
