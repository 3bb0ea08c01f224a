"""The denoising loop: a generator that knows neither samplers nor what watches it.

Two graphs a call: the UNet on the branches that are needed, then `guidance`, which does Safe Latent
Diffusion, classifier-free guidance and the sampler's row. Who runs them is a `Stepper`: on the host
(here), or on a device without coming back in between (`device_loop`). Progress, previews, timing
and reports are consumers; closing the generator stops it.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from sld_edge.engines.base import Engine
from sld_edge.engines.errors import InputError
from sld_edge.runtime.bundle import KEPT_SAFETY, SHALLOW
from sld_edge.runtime.denoise.schedule import Call, schedule
from sld_edge.runtime.numerics import not_finite
from sld_edge.runtime.random import NoiseSource
from sld_edge.runtime.request import ImagePlan
from sld_edge.runtime.samplers import SamplerTable
from sld_edge.runtime.samplers.table import HISTORY

Floats = NDArray[np.float32]
PREDICTIONS = ("noise_pred_uncond", "noise_pred_text", "noise_pred_safety")


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


@dataclass(frozen=True, kw_only=True)
class Job:
    """B images to be denoised together, steered away from up to n concepts each.

    Attributes:
        table: the sampler.
        images: B plans, whose guidance scale and safety are used.
        context: float32 [(2+n)*B,L,C], all unconditional, all prompts, all first concepts, ...
            An image with fewer concepts repeats one, which changes nothing.
        latents: float32 [B,4,h,w], starting noise of unit variance.
        noise: B sources of fresh noise, for samplers that add some.
        unet_precision: of the UNet's arithmetic, for advice.
        cache_interval: calls from one whole UNet to the next.
        safety_interval: calls from one run of the safety branches to the next.
    """

    table: SamplerTable
    images: Sequence[ImagePlan]
    context: Floats
    latents: Floats
    noise: Sequence[NoiseSource]
    unet_precision: str
    cache_interval: int
    safety_interval: int

    @property
    def concepts(self) -> int:
        """n, the safety branches of a call that has any."""
        return len(self.context) // len(self.images) - 2

    @property
    def components(self) -> tuple[str, ...]:
        """The graphs that its calls run."""
        shallow = (SHALLOW,) if self.cache_interval > 1 else ()
        kept = (KEPT_SAFETY,) if self.safety_interval > 1 else ()
        return ("unet", *shallow, *kept, "guidance")

    def guidance_scale(self) -> Floats:
        """float32 [B]; 1 is no guidance, and nothing is less."""
        return np.array([max(image.guidance_scale, 1.0) for image in self.images], np.float32)

    def timestep(self, index: int) -> Floats:
        """float32 [B]."""
        return np.full(len(self.images), self.table.timesteps[index], np.float32)

    def safety(self, index: int) -> Floats:
        """float32 [B,5]: scale, threshold, momentum scale and beta, and 1 where the call edits."""
        rows = []
        for safety in (image.safety for image in self.images):
            active = float(safety.acts and index >= safety.warmup)
            rows.append(
                (
                    safety.scale,
                    safety.threshold,
                    safety.momentum_scale,
                    safety.momentum_beta,
                    active,
                )
            )
        return np.array(rows, np.float32)

    def starting_latents(self) -> Floats:
        """float32 [B,4,h,w], of the sampler's first standard deviation."""
        return np.ascontiguousarray(self.latents * np.float32(self.table.init_noise_sigma))

    def fresh_noise(self) -> Floats:
        """float32 [B,4,h,w], the next that each image's source draws."""
        shape = (1, *self.latents.shape[1:])
        return np.concatenate([source.normal(shape) for source in self.noise])

    def branches(self, index: int) -> int:
        """Count the branches that can change this call's or a later one's result: 2+n, 2 or 1."""
        if any(
            image.safety.acts
            # In the warm-up the branch matters only for the momentum it builds up.
            and (index >= image.safety.warmup or image.safety.momentum_scale > 0)
            for image in self.images
        ):
            return 2 + self.concepts
        return 2 if any(image.guidance_scale > 1 for image in self.images) else 1

    def calls(self) -> tuple[Call, ...]:
        """What each call computes."""
        return schedule(
            [self.branches(index) for index in range(self.table.calls)],
            cache_interval=self.cache_interval,
            safety_interval=self.safety_interval,
        )

    def refuse(self, finite: Floats, index: int) -> None:
        """Raise for what guidance's `finite` [B] of call `index` says.

        Raises:
            NumericsError: NaN or infinity, named by component and call.
        """
        worst = finite.min()
        if not worst >= 1:  # NaN fails too
            raise not_finite(
                "guidance" if worst == 0 else "unet",
                precision=self.unet_precision,
                call=f"call {index + 1} of {self.table.calls}",
            )


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


class HostStepper:
    """Runs a job with engines that take and give host arrays."""

    def __init__(
        self,
        engines: Mapping[str, Engine],
        job: Job,
        *,
        together: bool,
    ) -> None:
        """Start a job.

        Args:
            engines: those that `Job.components` names.
            job: what to run.
            together: run the branches in one batch, which takes more memory.
        """
        self._engines, self._job, self._together = engines, job, together
        self._deep: list[Floats] = []  # of the last whole call, by batch
        self._kept: dict[str, Floats] = {}  # predictions of the last call with safety branches
        latents = job.starting_latents()
        count, _, height, width = latents.shape
        self._state: dict[str, Floats] = {
            "latents": latents,
            "momentum": np.zeros_like(latents),
            "history": np.zeros((HISTORY, *latents.shape), np.float32),
            "edit_map": np.zeros((count, height, width), np.float32),
        }
        self._unet_latents = latents * np.float32(job.table.c_in[0])
        self._silence = np.zeros_like(latents)
        self._rows = job.table.rows()
        self._scale = job.guidance_scale()
        self._share: list[Floats] = []
        self._strength: list[Floats] = []
        self._concept_strength: list[Floats] = []
        self._seconds: list[float] = []

    @property
    def calls(self) -> int:
        """How many calls it has run."""
        return len(self._seconds)

    def call(self, index: int, call: Call) -> None:
        """Run what a call has of the UNet, then guidance.

        Raises:
            NumericsError: NaN or infinity.
        """
        begin = time.perf_counter()
        job = self._job
        out = self._engines["guidance"].run(
            {
                **dict(zip(PREDICTIONS, self._predict(index, call), strict=True)),
                **self._state,
                "noise": job.fresh_noise() if job.table.s[index] > 0 else self._silence,
                "row": self._rows[index],
                "guidance_scale": self._scale,
                "safety": job.safety(index),
            }
        )
        self._state = {name: out[f"{name}_next"] for name in self._state}
        self._unet_latents = out["unet_latents"]
        job.refuse(out["finite"], index)
        self._share.append(out["share"])
        self._strength.append(out["strength"])
        own = np.zeros((job.concepts, len(self._scale)), np.float32)
        if call.safe:
            own[:] = out["concept_strength"]
        self._concept_strength.append(own)
        self._seconds.append(time.perf_counter() - begin)

    def read(self, name: Literal["latents", "edit_map"]) -> Floats:
        """Return the latents [B,4,h,w] or the edit map [B,h,w] after the last call."""
        return self._state[name]

    def figures(self) -> Figures:
        """Return the figures of all calls so far."""
        return Figures(
            share=np.stack(self._share),
            strength=np.stack(self._strength),
            concept_strength=np.stack(self._concept_strength),
            seconds=tuple(self._seconds),
        )

    def _predict(self, index: int, call: Call) -> tuple[Floats, Floats, Floats]:
        """Run the needed branches; one that is not gets another's place, where it has no effect."""
        count = len(self._unet_latents)
        first = 1 if call.branches == 1 else 0  # a single branch is the prompt's
        wanted = self._job.context[first * count : (first + call.branches) * count]
        feeds = {"latents": self._unet_latents, "timestep": self._job.timestep(index)}
        batches = [wanted] if self._together else np.split(wanted, call.branches)
        predicted = self._unet_outputs([{**feeds, "context": part} for part in batches], call)
        parts = predicted[0] if self._together else np.stack(predicted)
        parts = parts.reshape(call.branches, *self._unet_latents.shape)
        uncond, text = parts[0], parts[min(1, call.branches - 1)]
        if call.keeps:
            feeds = {**self._kept, "noise_pred_uncond": uncond}
            return uncond, text, self._engines[KEPT_SAFETY].run(feeds)["noise_pred_safety_now"]
        if call.safe:
            self._kept = {"noise_pred_safety": parts[2:], "noise_pred_uncond_then": uncond}
        return uncond, text, parts[2:] if call.safe else parts[:1]

    def _unet_outputs(self, batches: Sequence[dict[str, Floats]], call: Call) -> list[Floats]:
        """noise_pred of each batch, from the whole UNet or from what its last run left."""
        if call.cached:
            kept = self._deep[: len(batches)]  # and of each the branches that are run
            deep = [k[: len(b["context"])] for k, b in zip(kept, batches, strict=True)]
            feeds = [{**b, "deep": d} for b, d in zip(batches, deep, strict=True)]
            return [self._engines[SHALLOW].run(each)["noise_pred"] for each in feeds]
        outputs = [self._engines["unet"].run(feeds) for feeds in batches]
        if SHALLOW in self._engines:
            self._deep = [out["deep"] for out in outputs]
        return [out["noise_pred"] for out in outputs]
