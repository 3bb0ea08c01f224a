"""The pipeline: a loaded bundle that turns prompts into images."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sld_edge.engines.base import Engine
from sld_edge.engines.checks import shown, whole_number
from sld_edge.engines.cuda.device import DeviceEngine
from sld_edge.engines.errors import InputError
from sld_edge.runtime.admission import require_admitted
from sld_edge.runtime.conditioning import Conditioner, Embedding, Texts, most_concepts
from sld_edge.runtime.denoise.job import Floats, Job
from sld_edge.runtime.denoise.loop import Step, denoise
from sld_edge.runtime.denoise.on_device import DeviceStage, DeviceStepper
from sld_edge.runtime.denoise.on_host import HostStepper
from sld_edge.runtime.loader import Loader, LoadSettings
from sld_edge.runtime.manifest import PREVIEW_DECODER
from sld_edge.runtime.numerics import not_finite
from sld_edge.runtime.random import Rng, noise_source
from sld_edge.runtime.report import StepReport, image_report
from sld_edge.runtime.request import (
    Framing,
    ImageRun,
    Request,
    Run,
    Sampling,
    Savings,
    run_from_request,
)
from sld_edge.runtime.result import Result
from sld_edge.runtime.safety import Safety
from sld_edge.runtime.samplers import SafetyUnits
from sld_edge.runtime.scorers import Scorer
from sld_edge.runtime.screening import (
    Screening,
    policy_scorers,
    screened_run,
    screening_under,
)
from sld_edge.runtime.store import Store
from sld_edge.runtime.tiles import VaeTiling, checked_tiling

Callback = Callable[[Step], object]
Progress = Callable[[int, int], object]  # takes the UNet calls done and those of the whole run
_CELLS = 64 * 64  # latent cells of a 512 px image: fewer are run together


class Pipeline:
    """A loaded bundle. Graphs are loaded when first needed and kept.

    Threads may share it: runs wait for each other, on every provider. A generator from `steps`
    waits for one call at a time, so one that is left alone blocks nobody; on a device a newer run
    takes the buffers over, and the older generator is refused if it goes on.

    Attributes:
        bundle: whose graphs.
        provider: what runs them.
        why: why this provider was taken, one line.
        policy: what this device's owner has set; every run is held against it.
    """

    def __init__(self, loader: Loader) -> None:
        """Use `Pipeline.load`."""
        self.bundle = loader.bundle
        self.policy = loader.policy
        self.provider = loader.provider
        self.why = loader.why
        self._loader = loader
        self.store = Store(loader)
        self._stage: DeviceStage | None = None
        self._texts = Texts(self.bundle)
        self._conditioner = Conditioner(
            self.bundle,
            self._texts,
            self.store.engine,
            identity=lambda: loader.identity_of(*self.bundle.manifest.texts),
        )
        self._lock = threading.RLock()
        self._walking: set[object] = set()  # generators of `steps` that may still run the UNet

    @classmethod
    def load(
        cls,
        bundle: str | Path | None = None,
        *,
        provider: str = "auto",
        plan: str | Path | None = None,
        trust_plan: bool = False,
        cuda_graph: bool = True,
        low_memory: bool = False,
        vae_tiling: VaeTiling = "auto",
        evaluation: bool = False,
        quiet: bool = False,
    ) -> Pipeline:
        """Load the bundle at a path; None is the embedded miniature bundle.

        Args:
            bundle: a bundle's directory.
            provider: "auto", "cpu", "cuda", "tensorrt", "tensorrt-rtx", "ort-tensorrt" or
                "ort-tensorrt-rtx"; auto takes the best that works here (see `why`).
            plan: one of a bundle's TensorRT plans; those beside it are used too.
            trust_plan: run plans whose hash the bundle does not hold. A plan is code.
            cuda_graph: replay the loop's calls from CUDA graphs.
            low_memory: hold text encoder and decoder only while they are needed. On the CPU large
                ones are, whatever this says, since prepared graphs are loaded at once.
            vae_tiling: decode in overlapping tiles: "on" or "off"; "auto" does on the CPU, where a
                picture is larger than 768x768 pixels.
            evaluation: the pictures measure safety, which a policy may allow to be off for that.
            quiet: do not say on standard error that a large graph is being prepared, once.

        Raises:
            BundleError: no bundle there, or a damaged one.
            EngineError: plans that are missing, not trusted, or do not fit this machine.
            InputError: a provider that is unknown or does not work here.
            PolicyError: what this device's policy does not allow, or a policy that is no use.
        """
        settings = LoadSettings(
            provider=provider,
            plan=Path(plan) if plan is not None else None,
            trust_plan=trust_plan,
            cuda_graph=cuda_graph,
            low_memory=low_memory,
            vae_tiling=checked_tiling(vae_tiling),
            evaluation=evaluation,
            quiet=quiet,
        )
        return cls(Loader.open(bundle, settings))

    @cached_property
    def _policy_scorers(self) -> Sequence[Scorer]:
        return policy_scorers(self.policy)

    @property
    def fallbacks(self) -> Mapping[str, str]:
        """Why a component runs on another provider, by component."""
        return self._loader.fallbacks

    @property
    def providers(self) -> Mapping[str, str]:
        """What runs each component."""
        return {name: self._loader.provider_of(name) for name in self.bundle.manifest.components}

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        safety: str | Safety | Sequence[str | Safety] | None = None,
        safety_concept: str | tuple[str, ...] | Sequence[str | tuple[str, ...]] | None = None,
        steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        sampler: str | None = None,
        eta: float = 0.0,
        seed: int | Sequence[int] = 0,
        rng: Rng = "torch",
        count: int = 1,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        cache_interval: int = 1,
        safety_units: SafetyUnits = "noise",
        framing: Framing | None = None,
        latents: NDArray[np.float32] | None = None,
        batch_size: int | None = None,
        callback: Callback | None = None,
    ) -> Result:
        """Make images.

        None takes the bundle's default. A sequence gives each prompt its own value. Image k of seed
        s is the image of seed s + k. On the CPU each image is made alone unless `batch_size` says
        otherwise, so it is the same to the last bit; within a batch it is up to rounding.

        Args:
            prompt: one prompt or several; "" is the unconditional image.
            safety: a preset ("off", "weak", "medium", "strong", "max") or a `Safety`.
            safety_concept: the text steered away from; a tuple is several, each with its own
                branch and gate.
            steps: denoising steps.
            guidance_scale: how closely the prompt is followed; 1 and below switch guidance off,
                never SLD.
            sampler: one of `SAMPLERS`.
            eta: noise added by ddim, 0 to 1.
            seed: first seed.
            rng: "torch" draws what torch draws on the CPU, "philox" what it draws on CUDA.
            count: images a prompt.
            negative_prompt: takes the empty prompt's place.
            height: in pixels.
            width: in pixels.
            cache_interval: UNet calls from one whole one to the next; between them the deep layers'
                features are used again (DeepCache). 1 is off.
            safety_units: "noise" gives the safety numbers the same meaning on every model, "raw"
                takes them in units of the model's output, as diffusers does.
            framing: what SDXL is told of the picture's size and crop.
            latents: float32 [B,4,h,w], starting noise of unit variance, in place of the seeds'.
            batch_size: images denoised at once; by default one on the CPU, elsewhere as many as
                fill one 512 px image.
            callback: called with every `Step`; an exception it raises ends the run.

        Raises:
            InputError: a setting that cannot be honoured.
            NumericsError: NaN or infinity in what a graph gave.
        """
        if not isinstance(prompt, str | Sequence):
            raise InputError("prompt", got=shown(prompt), expected="a text, or a list of texts")
        request = Request(
            prompts=(prompt,) if isinstance(prompt, str) else tuple(prompt),
            negative_prompt=negative_prompt,
            safety=safety,
            safety_concept=safety_concept,
            guidance_scale=guidance_scale,
            seed=seed,
            count=count,
            width=width,
            height=height,
            sampling=Sampling(
                steps=steps, sampler=sampler, eta=eta, rng=rng, safety_units=safety_units
            ),
            savings=Savings(cache_interval=cache_interval),
            framing=framing if framing is not None else Framing(),
        )
        return self.run(
            self.resolve(request), latents=latents, batch_size=batch_size, callback=callback
        )

    def resolve(self, request: Request) -> Run:
        """Resolve a request against this bundle and policy, without running anything.

        Raises:
            InputError: a setting that cannot be honoured, named with what would be.
            PolicyError: a setting that the policy does not allow.
        """
        run = run_from_request(request, self.bundle.manifest, policy=self.policy)
        self._require_admitted(run, run.images)
        self._loader.require_memory(run.height, run.width)
        return run

    def check(self, run: Run, *, screening: Screening | None = None) -> Screening | None:
        """Refuse what `run` would refuse, before anything runs; return how it would screen.

        Raises:
            InputError: a run or screening that cannot be honoured.
            PolicyError: what this device's policy does not allow.
        """
        self._require_admitted(run, run.images)
        return screening_under(self.policy, screening, run, self._policy_scorers)

    def run(
        self,
        run: Run,
        *,
        screening: Screening | None = None,
        latents: NDArray[np.float32] | None = None,
        batch_size: int | None = None,
        callback: Callback | None = None,
        progress: Progress | None = None,
    ) -> Result:
        """Make the pictures of a run; see `__call__`.

        Args:
            run: from `resolve`.
            screening: how pictures are judged before they leave, and what happens to flagged ones.
            latents: float32 [B,4,h,w], starting noise of unit variance, in place of the seeds'.
            batch_size: images denoised at once.
            callback: called with every `Step`.
            progress: told the UNet calls done and those of the whole run; it sees no picture.

        Raises:
            InputError: a setting that cannot be honoured.
            PolicyError: what this device's policy does not allow.
            NumericsError: NaN or infinity in what a graph gave.
        """
        with self._lock:
            run = replace(run, images=_copied(run.images), savings=_copied_savings(run.savings))
            screening = self.check(run, screening=screening)
            self._require_own_noise(latents)
            if callback is not None:
                self.policy.require_previews("a look at unfinished pictures")
            if screening is not None and latents is not None:
                raise InputError("starting noise of your own and screening", do="leave one out")
            make = partial(
                self._made,
                latents=latents,
                batch_size=batch_size,
                callback=callback,
                progress=progress,
            )
            if screening is None:
                return make(run)
            result = screened_run(make, run, screening)
            if self.policy.screening is None:
                return result
            return replace(result, latents=np.zeros_like(result.latents))

    def steps(
        self,
        run: Run,
        images: Sequence[ImageRun] | None = None,
        latents: NDArray[np.float32] | None = None,
    ) -> Generator[Step, None, None]:
        """Denoise a run's images (or some of them) in one batch, one `Step` a UNet call.

        Close the generator to stop; `decode` turns any step's latents into pictures. What a step
        holds is read before the next one, and the last one's before the next run.

        Raises:
            PolicyError: this device's policy lets only screened pictures leave.
        """
        self.policy.require(
            self.policy.screening is None, "pictures that are not screened", expected="run()"
        )
        self._require_own_noise(latents)
        copied = _copied(run.images if images is None else images)
        with self._lock:
            return self._steps(run, copied, latents)

    def _steps(
        self,
        run: Run,
        images: Sequence[ImageRun],
        latents: NDArray[np.float32] | None,
    ) -> Generator[Step, None, None]:
        self._require_admitted(run, images)
        self._loader.require_memory(run.height, run.width)
        noise = [noise_source(run.rng, image.seed) for image in images]
        if latents is None:
            latents = np.concatenate([n.normal((1, *self._latent_shape(run))) for n in noise])
        manifest = self.bundle.manifest
        conditioning = self._conditioner.conditioning(images, run.time_ids)
        for encoder in manifest.texts:
            self.store.release(encoder)
        job = Job(
            table=run.table,
            images=images,
            conditioning=conditioning,
            classifier_free=manifest.guidance == "classifier-free",
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

    def _made(
        self,
        run: Run,
        *,
        latents: NDArray[np.float32] | None,
        batch_size: int | None,
        callback: Callback | None,
        progress: Progress | None,
    ) -> Result:
        """Make a run's pictures, batch by batch."""
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
            own = latents[start : start + size] if latents is not None else None
            done = run.table.calls * len(parts)

            def watch(step: Step, done: int = done) -> None:
                if progress is not None:
                    progress(done + step.index + 1, total)
                if callback is not None:
                    callback(step)

            parts.append(self._run_batch(run, images, own, watch))
        return Result(
            images=[image for part in parts for image in part.images],
            latents=np.concatenate([part.latents for part in parts]),
            edit_maps=np.concatenate([part.edit_maps for part in parts]),
            reports=[report for part in parts for report in part.reports],
        )

    def decode(self, latents: Floats, *, preview: bool = False) -> NDArray[np.uint8]:
        """Turn latents, float32 [B,4,h,w], unscaled, into pictures, uint8 [B,H,W,3].

        A preview is made by the bundle's small decoder, where it has one.

        Raises:
            NumericsError: the decoder overflowed.
            PolicyError: this device's policy lets only screened pictures leave.
        """
        self.policy.require_previews("pictures that are not screened")
        with self._lock:
            small = preview and PREVIEW_DECODER in self.bundle.manifest.components
            return self._decoded(latents, PREVIEW_DECODER if small else "vae_decoder")

    def _decoded(self, latents: Floats, name: str = "vae_decoder") -> NDArray[np.uint8]:
        decoder = self.engine(name)
        tiling = self._loader.tiling(*latents.shape[2:])

        def decoded(one: Floats) -> NDArray[np.uint8]:
            out = decoder.run({"latents": np.ascontiguousarray(one)})
            if not out["finite"].all():
                raise not_finite(name, precision=self._precision(name))
            images: NDArray[np.uint8] = out["images"]
            return images

        parts = []
        for one in latents:  # one at a time: the decoder's activations are the largest of all
            whole = one[None]
            parts.append(decoded(whole) if tiling is None else tiling.decoded(decoded, whole))
        self.store.release(name)
        return np.concatenate(parts)

    def encode_text(self, text: str) -> Embedding:
        """Return a text's embeddings, float32 [...] by UNet input; repeated texts are encoded once.

        Raises:
            NumericsError: a text encoder overflowed.
        """
        with self._lock:
            return self._conditioner.embedding(text)

    def cut_from(self, text: str) -> str:
        """Return the end of a text that the model does not see; empty where all of it fits."""
        return self._texts.cut(text)

    def says_nothing(self, text: str) -> bool:
        """Whether a text is to the model what the empty text is."""
        return self._texts.says_nothing(text)

    def engine(self, name: str) -> Engine:
        """Return a component's engine, loaded and checked against the manifest when first asked.

        Raises:
            BundleError: the bundle has no such component, or its graph has other tensors.
            EngineError: the engine does not take it.
        """
        with self._lock:
            return self.store.engine(name)

    def warm_up(self) -> None:
        """Load every graph that a run needs now, not at its first use."""
        for name in (*self.bundle.manifest.texts, "unet", "guidance", "vae_decoder"):
            self.engine(name)

    def close(self) -> None:
        """Give back graphs, buffers and device; what was compiled for the device is kept."""
        with self._lock:
            if self._stage is not None:
                self._stage.close()
                self._stage = None
            self.store.close()
            self._loader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _stepper(self, job: Job) -> HostStepper | DeviceStepper:
        engines = {name: self.engine(name) for name in job.components}
        on_device = {name: e for name, e in engines.items() if isinstance(e, DeviceEngine)}
        if len(on_device) < len(engines):
            together = self._loader.on_device or job.latents[:, 0].size < _CELLS
            return HostStepper(engines, job, together=together)
        latents, conditioning = job.latents.shape, job.conditioning
        stage = self._stage
        if stage is not None and (
            (stage.latents, stage.shapes, stage.concepts)
            != (latents, conditioning.shapes(), conditioning.concepts)
        ):
            stage.close()
            stage = None
        if stage is None:
            stage = DeviceStage(on_device, latents=latents, conditioning=conditioning)
        self._stage = stage
        stage.engines.update(on_device)
        return DeviceStepper(stage, job)

    def _walked(
        self, steps: Generator[Step, None, None], mark: object, *, cells: int
    ) -> Generator[Step, None, None]:
        """Pass the steps on, each made under the lock; after the last, free the UNet."""
        while True:
            with self._lock:
                step = next(steps, None)
            if step is None:
                break
            yield step
        self._walking.discard(mark)
        with self._lock:
            if cells >= _CELLS and not self._walking:
                # Its mapped weights beside the decoder's work would be the peak.
                self.store.release_reloadable("unet")

    def _require_own_noise(self, latents: object) -> None:
        """Refuse starting noise of a caller under a policy: it may hold a finished picture."""
        self.policy.require(
            latents is None or (self.policy.screening is None and self.policy.safety is None),
            "starting noise of a caller's own",
            expected="none",
        )

    def _require_admitted(self, run: Run, images: Sequence[ImageRun]) -> None:
        require_admitted(
            run,
            images,
            manifest=self.bundle.manifest,
            texts=self._texts,
            policy=self.policy,
        )

    def _precision(self, name: str) -> str:
        return self.bundle.manifest.components[name].precision

    def _run_batch(
        self,
        run: Run,
        images: Sequence[ImageRun],
        latents: NDArray[np.float32] | None,
        callback: Callback,
    ) -> Result:
        clock = time.perf_counter
        begin = clock()
        steps = self._steps(run, images, latents)
        encoded = clock()
        made = []
        for step in steps:
            made.append((step.branches, step.cached))
            callback(step)
            last = step
        figures, latents, edit_maps = last.figures, last.latents, last.edit_map
        denoised = clock()
        pictures = self._decoded(latents)
        seconds = {
            "text": encoded - begin,
            "denoise": denoised - encoded,
            "decode": clock() - denoised,
            "batch_size": float(len(images)),
        }
        ran_on = self._loader.description()
        reports = [
            image_report(
                bundle=self.bundle,
                run=run,
                image=image,
                calls=[
                    StepReport(
                        timestep=float(run.table.timesteps[index]),
                        branches=made[index][0],
                        cached=made[index][1],
                        share=round(float(figures.share[index, position]), 6),
                        strength=round(float(figures.strength[index, position]), 6),
                        concept_strength=[
                            round(float(own[position]), 6)
                            for own in figures.concept_strength[index, : len(image.acting_concepts)]
                        ],
                        seconds=round(figures.seconds[index], 6),
                    )
                    for index in range(run.table.calls)
                ],
                seconds=seconds,
                cut=self._cut_texts(image),
                ran_on=ran_on,
            )
            for position, image in enumerate(images)
        ]
        return Result(
            images=[Image.fromarray(picture) for picture in pictures],
            latents=latents,
            edit_maps=edit_maps,
            reports=reports,
        )

    def _cut_texts(self, image: ImageRun) -> dict[str, str]:
        texts = {"prompt": image.prompt, "negative_prompt": image.negative_prompt or ""}
        several = len(image.acting_concepts) > 1
        for k, concept in enumerate(image.acting_concepts, 1):
            texts[f"safety_concept_{k}" if several else "safety_concept"] = concept
        cuts = {name: self.cut_from(text) for name, text in texts.items()}
        return {name: cut for name, cut in cuts.items() if cut}

    def _latent_shape(self, run: Run) -> tuple[int, int, int]:
        latents = self.bundle.manifest.latents
        return latents.channels, run.height // latents.downscale, run.width // latents.downscale

    def _batch_size(self, run: Run, largest: int | None) -> int:
        """One at a time on the CPU, where a batch is no faster and rounds otherwise."""
        if not self._loader.on_device:
            return 1
        _, height, width = self._latent_shape(run)
        size = max(1, _CELLS // (height * width))
        return size if largest is None else min(size, largest)

    def _check_latents(self, latents: NDArray[Any], run: Run) -> None:
        shape = (len(run.images), *self._latent_shape(run))
        if not isinstance(latents, np.ndarray) or latents.shape != shape:
            raise InputError("latents", got=np.shape(latents), expected=shape)
        if latents.dtype != np.float32:
            raise InputError("latents", got=latents.dtype, expected="float32")
        if not np.isfinite(latents).all():
            raise InputError("latents hold NaN or infinity", do="give finite starting noise")


def _copied_savings(savings: Savings) -> Savings:
    return replace(savings) if type(savings) is Savings else savings


def _copied(images: Sequence[ImageRun]) -> tuple[ImageRun, ...]:
    """Return copies that no one else holds, so that what was checked is what runs."""
    return tuple(
        replace(image, safety=replace(image.safety)) if type(image) is ImageRun else image
        for image in images
    )
