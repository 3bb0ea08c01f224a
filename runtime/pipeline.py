"""The pipeline: a bundle, loaded, that turns prompts into images."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sld_edge.engines.base import Engine, TensorSpec
from sld_edge.engines.errors import BundleError, InputError
from sld_edge.runtime.device_loop import DeviceStage, DeviceStepper, device_engine
from sld_edge.runtime.loader import Loader, LoadSettings
from sld_edge.runtime.loop import Floats, HostStepper, Job, Step, denoise
from sld_edge.runtime.numerics import not_finite
from sld_edge.runtime.plan import ImagePlan, Request, RunPlan, plan_from_request
from sld_edge.runtime.random import Rng, noise_source
from sld_edge.runtime.report import StepReport, image_report
from sld_edge.runtime.safety import Safety
from sld_edge.runtime.tiles import VaeTiling, checked_tiling
from sld_edge.runtime.tokenizer import Tokenizer, input_ids

Callback = Callable[[Step], object]
_CELLS = 64 * 64  # latent cells that are few enough to be run together: those of a 512 px image
_CACHED_TEXTS = 256


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run made. B images, in the order of the prompts, each prompt's seeds in a row.

    Attributes:
        images: the pictures, RGB.
        latents: float32 [B,4,h,w], the last latents, unscaled.
        edit_maps: float32 [B,h,w], where safety acted, summed over the calls; elsewhere zero.
        reports: one dictionary an image, ready for JSON (see docs/report.md).
    """

    images: list[Image.Image]
    latents: Floats
    edit_maps: Floats
    reports: list[dict[str, Any]]


class Pipeline:
    """A loaded bundle. Graphs are loaded when first needed and kept.

    Attributes:
        bundle: whose graphs.
        provider: what runs them.
        why: why this provider was taken, one line.
    """

    def __init__(self, loader: Loader) -> None:
        """Use `Pipeline.load`."""
        self.bundle = loader.bundle
        self.provider = loader.provider
        self.why = loader.why
        self._loader = loader
        self._engines: dict[str, Engine] = {}
        self._stage: DeviceStage | None = None
        text = self.bundle.manifest.text
        self._tokenizer = Tokenizer(self.bundle.tokenizer_json(), length=text.length)
        self._embeddings: dict[str, Floats] = self.bundle.embeddings()

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

        Raises:
            BundleError: no bundle there, or a damaged one.
            EngineError: plans that are missing, not trusted, or do not fit this machine.
            InputError: a provider that is unknown or does not work here.
        """
        settings = LoadSettings(
            provider=provider,
            plan=Path(plan) if plan is not None else None,
            trust_plan=trust_plan,
            cuda_graph=cuda_graph,
            low_memory=low_memory,
            vae_tiling=checked_tiling(vae_tiling),
        )
        return cls(Loader.open(bundle, settings))

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
        safety_interval: int = 1,
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
            safety_interval: UNet calls from one with the safety branches to the next; between them
                their distance from the unconditional branch is used again. 1 is off.
            latents: float32 [B,4,h,w], starting noise of unit variance, in place of the seeds'.
            batch_size: images denoised at once; by default one on the CPU, elsewhere as many as
                fill one 512 px image.
            callback: called with every `Step`; an exception it raises ends the run.

        Raises:
            InputError: a setting that cannot be honoured.
            NumericsError: NaN or infinity in what a graph gave.
        """
        request = Request(
            prompts=(prompt,) if isinstance(prompt, str) else tuple(prompt),
            negative_prompt=negative_prompt,
            safety=safety,
            safety_concept=safety_concept,
            steps=steps,
            guidance_scale=guidance_scale,
            sampler=sampler,
            eta=eta,
            seed=seed,
            rng=rng,
            count=count,
            width=width,
            height=height,
            cache_interval=cache_interval,
            safety_interval=safety_interval,
        )
        return self.run(
            self.plan(request), latents=latents, batch_size=batch_size, callback=callback
        )

    def plan(self, request: Request) -> RunPlan:
        """Resolve a request against this bundle, without running anything."""
        return plan_from_request(request, self.bundle.manifest)

    def run(
        self,
        plan: RunPlan,
        *,
        latents: NDArray[np.float32] | None = None,
        batch_size: int | None = None,
        callback: Callback | None = None,
    ) -> Result:
        """Do what a plan says; see `__call__`."""
        largest = self._loader.largest_batch(_concepts(plan.images))
        size = batch_size if batch_size is not None else self._batch_size(plan, largest)
        if size < 1:
            raise InputError("batch_size", got=size, expected="1 or more")
        if latents is not None:
            self._check_latents(latents, plan)
        parts = []
        for start in range(0, len(plan.images), size):
            images = plan.images[start : start + size]
            own = latents[start : start + size] if latents is not None else None
            parts.append(self._run_batch(plan, images, own, callback))
        return Result(
            images=[image for part in parts for image in part.images],
            latents=np.concatenate([part.latents for part in parts]),
            edit_maps=np.concatenate([part.edit_maps for part in parts]),
            reports=[report for part in parts for report in part.reports],
        )

    def steps(
        self,
        plan: RunPlan,
        images: Sequence[ImagePlan] | None = None,
        latents: NDArray[np.float32] | None = None,
    ) -> Generator[Step, None, None]:
        """Denoise a plan's images (or some of them) in one batch, one `Step` a UNet call.

        Close the generator to stop; `decode` turns any step's latents into pictures. What a step
        holds is read before the next one, and the last one's before the next run.
        """
        images = plan.images if images is None else images
        noise = [noise_source(plan.rng, image.seed) for image in images]
        if latents is None:
            latents = np.concatenate([n.normal((1, *self._latent_shape(plan))) for n in noise])
        context = self._context(images)
        job = Job(
            table=plan.table,
            images=images,
            context=context,
            latents=latents,
            noise=noise,
            unet_precision=self._precision("unet"),
            cache_interval=plan.cache_interval,
            safety_interval=plan.safety_interval,
        )
        return self._ended(denoise(self._stepper(job), job), cells=latents[0, 0].size)

    def decode(self, latents: Floats) -> NDArray[np.uint8]:
        """Turn latents, float32 [B,4,h,w], unscaled, into pictures, uint8 [B,H,W,3].

        Raises:
            NumericsError: the decoder overflowed.
        """
        decoder = self.engine("vae_decoder")
        tiling = self._loader.tiling(*latents.shape[2:])

        def decoded(one: Floats) -> NDArray[np.uint8]:
            out = decoder.run({"latents": np.ascontiguousarray(one)})
            if not out["finite"].all():
                raise not_finite("vae_decoder", precision=self._precision("vae_decoder"))
            images: NDArray[np.uint8] = out["images"]
            return images

        parts = []
        for one in latents:  # one at a time: the decoder's activations are the largest of all
            whole = one[None]
            parts.append(decoded(whole) if tiling is None else tiling.decoded(decoded, whole))
        self._unneeded("vae_decoder")
        return np.concatenate(parts)

    def encode_text(self, text: str) -> Floats:
        """Return a text's embedding, float32 [L,C]; repeated texts are encoded once.

        Raises:
            NumericsError: the text encoder overflowed.
        """
        if text not in self._embeddings:
            ids = input_ids([self._tokenizer(text)])
            out: Floats = self.engine("text_encoder").run({"input_ids": ids})["hidden_states"]
            if not np.isfinite(out).all():
                raise not_finite("text_encoder", precision=self._precision("text_encoder"))
            if len(self._embeddings) >= _CACHED_TEXTS:
                self._embeddings.pop(next(reversed(self._embeddings)))
            self._embeddings[text] = out[0]
        return self._embeddings[text]

    def cut_from(self, text: str) -> str:
        """Return the end of a text that the model does not see; empty where all of it fits."""
        return self._tokenizer(text).cut

    def engine(self, name: str) -> Engine:
        """Return a component's engine, loaded and checked against the manifest when first asked."""
        if name not in self._engines:
            components = self.bundle.manifest.components
            if name not in components:
                raise BundleError(f"this bundle has no {name}", do="export it again")
            engine = self._loader.load(name, components[name])
            _check_tensors(name, components[name].inputs, engine.inputs)
            _check_tensors(name, components[name].outputs, engine.outputs)
            self._engines[name] = engine
        return self._engines[name]

    def warm_up(self) -> None:
        """Load every graph that a run needs now, not at its first use."""
        for name in ("text_encoder", "unet", "guidance", "vae_decoder"):
            self.engine(name)

    def close(self) -> None:
        """Give back graphs, buffers and device; what was compiled for the device is kept."""
        if self._stage is not None:
            self._stage.close()
            self._stage = None
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()
        self._loader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _stepper(self, job: Job) -> HostStepper | DeviceStepper:
        engines = {name: self.engine(name) for name in job.components}
        lent = {name: device_engine(engine) for name, engine in engines.items()}
        on_device = {name: engine for name, engine in lent.items() if engine is not None}
        if len(on_device) < len(engines):
            together = self._loader.on_device or job.latents[:, 0].size < _CELLS
            return HostStepper(engines, job, together=together)
        shapes = (job.latents.shape, job.context.shape)
        if self._stage is not None and (self._stage.latents, self._stage.context) != shapes:
            self._stage.close()
            self._stage = None
        if self._stage is None:
            self._stage = DeviceStage(on_device, latents=shapes[0], context=shapes[1])
        self._stage.engines.update(on_device)
        return DeviceStepper(self._stage, job)

    def _ended(
        self, steps: Generator[Step, None, None], *, cells: int
    ) -> Generator[Step, None, None]:
        """Pass the steps on; after the last the UNet may go."""
        yield from steps
        unet = self._engines.get("unet")
        if unet is not None and cells >= _CELLS and self._loader.may_go("unet", unet):
            self._unneeded("unet")  # its mapped weights beside the decoder's work are the peak

    def _unneeded(self, name: str) -> None:
        """Drop an engine that has done its part, where memory is short or nothing is lost."""
        engine = self._engines.get(name)
        if engine is None:
            return
        if self._loader.settings.low_memory or self._loader.may_go(name, engine):
            del self._engines[name]
            engine.close()

    def _precision(self, name: str) -> str:
        return self.bundle.manifest.components[name].precision

    def _run_batch(
        self,
        plan: RunPlan,
        images: Sequence[ImagePlan],
        latents: NDArray[np.float32] | None,
        callback: Callback | None,
    ) -> Result:
        clock = time.perf_counter
        begin = clock()
        steps = self.steps(plan, images, latents)
        encoded = clock()
        made = []
        for step in steps:
            made.append((step.branches, step.cached))
            if callback is not None:
                callback(step)
            last = step
        figures, latents, edit_maps = last.figures, last.latents, last.edit_map
        denoised = clock()
        pictures = self.decode(latents)
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
                plan=plan,
                image=image,
                calls=[
                    StepReport(
                        timestep=float(plan.table.timesteps[index]),
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
                    for index in range(plan.table.calls)
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

    def _context(self, images: Sequence[ImagePlan]) -> Floats:
        """Embeddings of all branches, branch-major, float32 [(2+n)*B,L,C]."""
        uncond = [self.encode_text(image.negative_prompt) for image in images]
        text = [self.encode_text(image.prompt) for image in images]
        concepts = []
        for k in range(_concepts(images)):
            for index, image in enumerate(images):
                own = image.acting_concepts
                # One that has fewer repeats its first: the guidance takes it once.
                concept = own[k if k < len(own) else 0] if own else None
                concepts.append(uncond[index] if concept is None else self.encode_text(concept))
        self._unneeded("text_encoder")
        return np.stack([*uncond, *text, *concepts])

    def _cut_texts(self, image: ImagePlan) -> dict[str, str]:
        texts = {"prompt": image.prompt, "negative_prompt": image.negative_prompt}
        several = len(image.acting_concepts) > 1
        for k, concept in enumerate(image.acting_concepts, 1):
            texts[f"safety_concept_{k}" if several else "safety_concept"] = concept
        cuts = {name: self.cut_from(text) for name, text in texts.items()}
        return {name: cut for name, cut in cuts.items() if cut}

    def _latent_shape(self, plan: RunPlan) -> tuple[int, int, int]:
        latents = self.bundle.manifest.latents
        return latents.channels, plan.height // latents.downscale, plan.width // latents.downscale

    def _batch_size(self, plan: RunPlan, largest: int | None) -> int:
        """One at a time on the CPU, where a batch is no faster and rounds otherwise."""
        if not self._loader.on_device:
            return 1
        _, height, width = self._latent_shape(plan)
        size = max(1, _CELLS // (height * width))
        return size if largest is None else min(size, largest)

    def _check_latents(self, latents: NDArray[Any], plan: RunPlan) -> None:
        shape = (len(plan.images), *self._latent_shape(plan))
        if not isinstance(latents, np.ndarray) or latents.shape != shape:
            raise InputError("latents", got=np.shape(latents), expected=shape)
        if latents.dtype != np.float32:
            raise InputError("latents", got=latents.dtype, expected="float32")
        if not np.isfinite(latents).all():
            raise InputError("latents hold NaN or infinity", do="give finite starting noise")


def _concepts(images: Sequence[ImagePlan]) -> int:
    """Count the safety branches that images made together need."""
    return max(1, *(len(image.acting_concepts) for image in images))


def _check_tensors(name: str, said: tuple[TensorSpec, ...], found: tuple[TensorSpec, ...]) -> None:
    """Refuse a graph whose tensors are not those that `bundle.json` says."""

    def alike(a: TensorSpec, b: TensorSpec) -> bool:
        return (
            a.name == b.name
            and a.dtype == b.dtype
            and len(a.shape) == len(b.shape)
            and all(
                isinstance(x, str) or isinstance(y, str) or x == y
                for x, y in zip(a.shape, b.shape, strict=True)
            )
        )

    if len(said) != len(found) or not all(map(alike, said, found)):
        raise BundleError(
            f"{name}: the graph's tensors are not those that bundle.json says",
            got=", ".join(f"{spec.name} {spec.dtype} {list(spec.shape)}" for spec in found),
            expected=", ".join(f"{spec.name} {spec.dtype} {list(spec.shape)}" for spec in said),
            do="export the bundle again",
        )
