"""Makes the pictures of a checked run: texts, denoising, decoding and reports, batch by batch.

Nothing here knows a policy: `Pipeline` checks a run first. Callers hold `lock`; only the generators
of `steps` take it themselves.
"""

from __future__ import annotations

import sys
import threading
import time
import weakref
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sld_edge.engines.checks import whole_number
from sld_edge.engines.cuda.device import DeviceEngine
from sld_edge.engines.errors import InputError
from sld_edge.runtime.conditioning import Conditioner, Texts, most_concepts
from sld_edge.runtime.denoise.job import Floats, Job
from sld_edge.runtime.denoise.loop import Figures, Step, denoise
from sld_edge.runtime.denoise.on_device import DeviceStage, DeviceStepper
from sld_edge.runtime.denoise.on_host import HostStepper
from sld_edge.runtime.loader import CELLS, Loader
from sld_edge.runtime.manifest import PREVIEW_DECODER
from sld_edge.runtime.numerics import not_finite
from sld_edge.runtime.random import noise_source
from sld_edge.runtime.report import StepReport, image_report
from sld_edge.runtime.request import ImageRun, Run
from sld_edge.runtime.result import Result
from sld_edge.runtime.store import Store

Callback = Callable[[Step], object]
Progress = Callable[[int, int], object]  # takes the finished UNet calls and their total


class Executor:
    """Runs a bundle's graphs.

    Attributes:
        lock: held while anything runs.
        store: the loaded graphs.
        stage: the buffers of the last run on a device.
        conditioner: encodes texts.
    """

    def __init__(self, loader: Loader, texts: Texts) -> None:
        """Load nothing yet."""
        self.lock = threading.RLock()
        self.store = Store(loader)
        self.stage: DeviceStage | None = None
        self.conditioner = Conditioner(
            loader.bundle,
            texts,
            self.store.engine,
            identity=lambda: loader.identity_of(*loader.bundle.manifest.texts),
            say=self._say,
        )
        self._loader, self._texts = loader, texts
        self._manifest = loader.bundle.manifest
        self._walking: set[object] = set()  # the unfinished generators of `steps`

    def steps(
        self, run: Run, images: Sequence[ImageRun], latents: Floats | None
    ) -> Generator[Step, None, None]:
        """Return a generator that denoises images in one batch: a `Step` for each UNet call."""
        self._loader.require_memory(run.height, run.width)
        noise = [noise_source(run.rng, image.seed) for image in images]
        if latents is None:
            latents = np.concatenate([n.normal((1, *self._latent_shape(run))) for n in noise])
        conditioning = self.conditioner.conditioning(images, run.time_ids)
        for encoder in self._manifest.texts:
            self.store.release(encoder)
        job = Job(
            table=run.table,
            images=images,
            conditioning=conditioning,
            classifier_free=self._manifest.guidance == "classifier-free",
            latents=latents,
            noise=noise,
            unet_precision=self._precision("unet"),
            savings=run.savings,
        )
        mark = object()
        self._walking.add(mark)
        steps = self._walked(denoise(self._stepper(job), job), mark, cells=latents[0, 0].size)
        weakref.finalize(steps, self._walking.discard, mark)
        return steps

    def make(
        self,
        run: Run,
        *,
        latents: NDArray[np.float32] | None,
        batch_size: int | None,
        callback: Callback | None,
        progress: Progress | None,
    ) -> Result:
        """Make a run's pictures, batch by batch. `Pipeline.run` describes the arguments."""
        largest = self._loader.largest_batch(most_concepts(run.images))
        size = self._batch_size(run, largest)
        if batch_size is not None:
            size = whole_number("batch_size", batch_size, 1, 100_000)
        if latents is not None:
            self._check_latents(latents, run)
        parts: list[Result] = []
        starts = range(0, len(run.images), size)
        total = run.table.calls * len(starts)
        for start in starts:
            images = run.images[start : start + size]
            noise = latents[start : start + size] if latents is not None else None
            done = run.table.calls * len(parts)

            def watch(step: Step, done: int = done) -> None:
                if progress is not None:
                    progress(done + step.index + 1, total)
                if callback is not None:
                    callback(step)

            parts.append(self._batch(run, images, noise, watch))
        return Result(
            images=[image for part in parts for image in part.images],
            latents=np.concatenate([part.latents for part in parts]),
            edit_maps=np.concatenate([part.edit_maps for part in parts]),
            reports=[report for part in parts for report in part.reports],
        )

    def decode(self, latents: Floats, *, preview: bool = False) -> NDArray[np.uint8]:
        """Turn latents, float32 [B,4,h,w], unscaled, into pictures, uint8 [B,H,W,3].

        A preview uses the bundle's small decoder, if it has one.

        Raises:
            NumericsError: the decoder overflowed.
        """
        small = preview and PREVIEW_DECODER in self._manifest.components
        name = PREVIEW_DECODER if small else self._loader.decoder
        decoder = self.store.engine(name)
        tiling = self._loader.tiling(*latents.shape[2:])

        def decoded(tile: Floats) -> NDArray[np.uint8]:
            out = decoder.run({"latents": np.ascontiguousarray(tile)})
            if not out["finite"].all():
                raise not_finite(name, precision=self._precision(name))
            images: NDArray[np.uint8] = out["images"]
            return images

        parts = []
        for image in latents:  # decoding takes the most memory, so it takes one image at a time
            whole = image[None]
            parts.append(decoded(whole) if tiling is None else tiling.decoded(decoded, whole))
        self.store.release(name)
        return np.concatenate(parts)

    def close(self) -> None:
        """Release graphs, buffers and device."""
        if self.stage is not None:
            self.stage.close()
            self.stage = None
        self.store.close()
        self._loader.close()

    def _say(self, line: str) -> None:
        if not self._loader.settings.quiet:
            print(f"note: {line}", file=sys.stderr)

    def _stepper(self, job: Job) -> HostStepper | DeviceStepper:
        engines = {name: self.store.engine(name) for name in job.components}
        on_device = {name: e for name, e in engines.items() if isinstance(e, DeviceEngine)}
        if len(on_device) < len(engines):
            together = self._loader.runs_together(job.latents[:, 0].size)
            return HostStepper(engines, job, together=together)
        latents, conditioning = job.latents.shape, job.conditioning
        stage = self.stage
        if stage is not None and (
            (stage.latents, stage.shapes, stage.concepts)
            != (latents, conditioning.shapes(), conditioning.concepts)
        ):
            stage.close()
            # Where the next stage finds no memory, no later run uses the closed stage.
            self.stage = stage = None
        if stage is None:
            stage = DeviceStage(on_device, latents=latents, conditioning=conditioning)
        self.stage = stage
        stage.engines.update(on_device)
        return DeviceStepper(stage, job)

    def _walked(
        self, steps: Generator[Step, None, None], mark: object, *, cells: int
    ) -> Generator[Step, None, None]:
        """Make each step under the lock and pass it on; then free a large UNet."""
        while True:
            with self.lock:
                step = next(steps, None)
            if step is None:
                break
            yield step
        self._walking.discard(mark)
        with self.lock:
            if cells >= CELLS and not self._walking:
                # Else its weights and the decoder's activations together are the peak of memory.
                self.store.release_reloadable("unet")

    def _batch(
        self, run: Run, images: Sequence[ImageRun], latents: Floats | None, callback: Callback
    ) -> Result:
        """Make the pictures of images that are denoised together."""
        clock = time.perf_counter
        begin = clock()
        steps = self.steps(run, images, latents)
        encoded = clock()
        made: list[Step] = []
        for step in steps:
            made.append(step)
            callback(step)
        figures, last, edit_maps = made[-1].figures, made[-1].latents, made[-1].edit_map
        denoised = clock()
        pictures = self.decode(last)
        seconds = {
            "text": encoded - begin,
            "denoise": denoised - encoded,
            "decode": clock() - denoised,
            "batch_size": float(len(images)),
        }
        ran_on = self._loader.description()
        reports = [
            image_report(
                bundle=self._loader.bundle,
                run=run,
                image=image,
                calls=_calls(made, figures, position, len(image.edited_concepts)),
                seconds=seconds,
                cut=self._cut_texts(image),
                filter_effect=self.conditioner.filter_effect(image),
                ran_on=ran_on,
            )
            for position, image in enumerate(images)
        ]
        return Result(
            images=[Image.fromarray(picture) for picture in pictures],
            latents=last,
            edit_maps=edit_maps,
            reports=reports,
        )

    def _cut_texts(self, image: ImageRun) -> dict[str, str]:
        texts = {"prompt": image.prompt, "negative_prompt": image.unconditional_text or ""}
        several = len(image.acting_concepts) > 1
        for k, concept in enumerate(image.acting_concepts, 1):
            texts[f"safety_concept_{k}" if several else "safety_concept"] = concept
        cuts = {name: self._texts.cut(text) for name, text in texts.items()}
        return {name: cut for name, cut in cuts.items() if cut}

    def _precision(self, name: str) -> str:
        return self._manifest.components[name].precision

    def _latent_shape(self, run: Run) -> tuple[int, int, int]:
        latents = self._manifest.latents
        return latents.channels, run.height // latents.downscale, run.width // latents.downscale

    def _batch_size(self, run: Run, largest: int | None) -> int:
        """Return how many images are denoised together; on the CPU a batch is no faster, so 1."""
        if not self._loader.on_device:
            return 1
        _, height, width = self._latent_shape(run)
        size = max(1, CELLS // (height * width))
        return size if largest is None else min(size, largest)

    def _check_latents(self, latents: NDArray[Any], run: Run) -> None:
        shape = (len(run.images), *self._latent_shape(run))
        if not isinstance(latents, np.ndarray) or latents.shape != shape:
            raise InputError("latents", got=np.shape(latents), expected=shape)
        if latents.dtype != np.float32:
            raise InputError("latents", got=latents.dtype, expected="float32")
        if not np.isfinite(latents).all():
            raise InputError("latents hold NaN or infinity", do="give finite starting noise")


def _calls(
    steps: Sequence[Step], figures: Figures, position: int, concepts: int
) -> list[StepReport]:
    """Return the figures of each call for the image at `position` in its batch."""
    return [
        StepReport(
            timestep=step.timestep,
            branches=step.branches,
            cached=step.cached,
            share=round(float(figures.share[index, position]), 6),
            strength=round(float(figures.strength[index, position]), 6),
            concept_strength=[
                round(float(strength[position]), 6)
                for strength in figures.concept_strength[index, :concepts]
            ],
            seconds=round(figures.seconds[index], 6),
        )
        for index, step in enumerate(steps)
    ]
