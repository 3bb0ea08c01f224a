"""Runs a job with engines that take and return arrays on the host."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from sld_edge.engines.base import Engine
from sld_edge.runtime.contract import PREDICTIONS, STATE, shape_of
from sld_edge.runtime.denoise.job import Floats, Job
from sld_edge.runtime.denoise.loop import Figures
from sld_edge.runtime.denoise.schedule import Call
from sld_edge.runtime.manifest import SHALLOW


class HostStepper:
    """Runs a job with engines that take and return arrays on the host."""

    def __init__(
        self,
        engines: Mapping[str, Engine],
        job: Job,
        *,
        together: bool,
    ) -> None:
        """Start a job.

        Args:
            engines: the engines of `Job.components`.
            job: the job.
            together: run all branches in one batch, which takes more memory.
        """
        self._engines, self._job, self._together = engines, job, together
        self._deep: list[Floats] = []  # features of the last whole call, by batch
        latents = job.starting_latents()
        count, _, height, width = latents.shape
        sizes = {"B": count, "h": height, "w": width}
        self._state = {name: np.zeros(shape_of(name, sizes), np.float32) for name in STATE}
        self._state["latents"] = latents
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
        """The number of calls that were run."""
        return len(self._seconds)

    def call(self, index: int, call: Call) -> None:
        """Run the branches of a call, then guidance.

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
        concept_strength = np.zeros((job.concepts, len(self._scale)), np.float32)
        if call.safe:
            concept_strength[:] = out["concept_strength"]
        self._concept_strength.append(concept_strength)
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
        """Run the needed branches.

        A skipped branch is fed another branch's prediction; guidance ignores it.
        """
        count = len(self._unet_latents)
        first = 1 if call.branches == 1 else 0  # a single branch is the branch of the prompt
        feeds = {"latents": self._unet_latents, "timestep": self._job.timestep(index)}
        step = call.branches if self._together else 1
        batches = [
            {**feeds, **self._job.conditioning.feeds(branch, step, count)}
            for branch in range(first, first + call.branches, step)
        ]
        predicted = self._unet_outputs(batches, call)
        parts = predicted[0] if self._together else np.stack(predicted)
        parts = parts.reshape(call.branches, *self._unet_latents.shape)
        uncond, text = parts[0], parts[min(1, call.branches - 1)]
        return uncond, text, parts[2:] if call.safe else parts[:1]

    def _unet_outputs(self, batches: Sequence[dict[str, Floats]], call: Call) -> list[Floats]:
        """Return noise_pred of each batch; a cached call reads the kept deep features."""
        if call.cached:
            rows = len(self._unet_latents) * (call.branches if self._together else 1)
            shallow = self._engines[SHALLOW]
            return [
                shallow.run({**feeds, "deep": deep[:rows]})["noise_pred"]
                for feeds, deep in zip(batches, self._deep[: len(batches)], strict=True)
            ]
        outputs = [self._engines["unet"].run(feeds) for feeds in batches]
        if SHALLOW in self._engines:
            self._deep = [out["deep"] for out in outputs]
        return [out["noise_pred"] for out in outputs]
