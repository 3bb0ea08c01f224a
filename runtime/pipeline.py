"""The pipeline: a bundle, loaded, that turns prompts into images."""

from __future__ import annotations

import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sld_edge.engines.base import Engine, TensorSpec
from sld_edge.engines.cache import remember, remembered
from sld_edge.engines.checks import shown, whole_number
from sld_edge.engines.errors import BundleError, InputError, shortened
from sld_edge.runtime.constants import check_constants, refuse_empty
from sld_edge.runtime.denoise.loop import Floats, HostStepper, Job, Step, denoise
from sld_edge.runtime.denoise.on_device import DeviceStage, DeviceStepper, device_engine
from sld_edge.runtime.loader import Loader, LoadSettings
from sld_edge.runtime.numerics import not_finite
from sld_edge.runtime.random import Rng, noise_source
from sld_edge.runtime.report import StepReport, image_report
from sld_edge.runtime.request import (
    ImagePlan,
    Request,
    RunPlan,
    plan_from_request,
    require_admitted,
)
from sld_edge.runtime.result import Result
from sld_edge.runtime.safety import Safety
from sld_edge.runtime.scorers import Scorer
from sld_edge.runtime.screening import (
    Screening,
    policy_scorers,
    screened_run,
    screening_under,
)
from sld_edge.runtime.tiles import VaeTiling, checked_tiling
from sld_edge.runtime.tokenizer import Tokenizer, input_ids

Callback = Callable[[Step], object]
Progress = Callable[[int, int], object]  # told the UNet calls done and those of the whole run
_CELLS = 64 * 64  # latent cells that are few enough to be run together: those of a 512 px image
_CACHED_TEXTS = 256


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
        self._engines: dict[str, Engine] = {}
        self._stage: DeviceStage | None = None
        text = self.bundle.manifest.text
        self._tokenizer = Tokenizer(self.bundle.tokenizer_json(), length=text.length)
        self._lock = threading.RLock()
        self._walking: set[object] = set()  # generators of `steps` that may still run the UNet
        self._stored: dict[str, Floats] = self.bundle.embeddings()
        self._texts: OrderedDict[str, Floats] = OrderedDict()  # the last used one last
        self._constants_checked = False

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
        if not isinstance(prompt, str | Sequence):
            raise InputError("prompt", got=shown(prompt), expected="a text, or a list of texts")
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
        """Resolve a request against this bundle and policy, without running anything."""
        return plan_from_request(
            request, self.bundle.manifest, tokenizer=self._tokenizer, policy=self.policy
        )

    def check(self, plan: RunPlan, *, screening: Screening | None = None) -> Screening | None:
        """Refuse what `run` would refuse, before anything runs; return how it would screen.

        Raises:
            InputError: a plan or screening that cannot be honoured.
            PolicyError: what this device's policy does not allow.
        """
        self._require_admitted(plan, plan.images)
        return screening_under(self.policy, screening, plan, self._policy_scorers)

    def run(
        self,
        plan: RunPlan,
        *,
        screening: Screening | None = None,
        latents: NDArray[np.float32] | None = None,
        batch_size: int | None = None,
        callback: Callback | None = None,
        progress: Progress | None = None,
    ) -> Result:
        """Do what a plan says; see `__call__`.

        Args:
            plan: from `plan`.
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
            plan = replace(plan, images=_copied(plan.images))
            screening = self.check(plan, screening=screening)
            rules, safe = self.policy.screening, self.policy.safety
            self.policy.require(
                latents is None or (rules is None and safe is None),
                "starting noise of a caller's own",
                expected="none",
            )
            self.policy.require(
                callback is None or rules is None or rules.previews == "allow",
                "a look at unfinished pictures",
                expected="none",
            )
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
                return make(plan)
            result = screened_run(make, plan, screening)
            if rules is None:
                return result
            return replace(result, latents=np.zeros_like(result.latents))

    def steps(
        self,
        plan: RunPlan,
        images: Sequence[ImagePlan] | None = None,
        latents: NDArray[np.float32] | None = None,
    ) -> Generator[Step, None, None]:
        """Denoise a plan's images (or some of them) in one batch, one `Step` a UNet call.

        Close the generator to stop; `decode` turns any step's latents into pictures. What a step
        holds is read before the next one, and the last one's before the next run.

        Raises:
            PolicyError: this device's policy lets only screened pictures leave.
        """
        self.policy.require(
            self.policy.screening is None, "pictures that are not screened", expected="run()"
        )
        self.policy.require(
            latents is None or self.policy.safety is None,
            "starting noise of a caller's own",
            expected="none",
        )
        own = _copied(plan.images if images is None else images)
        with self._lock:
            return self._steps(plan, own, latents)

    def _steps(
        self,
        plan: RunPlan,
        images: Sequence[ImagePlan],
        latents: NDArray[np.float32] | None,
    ) -> Generator[Step, None, None]:
        self._require_admitted(plan, images)
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
        mark = object()
        self._walking.add(mark)
        steps = self._walked(denoise(self._stepper(job), job), mark, cells=latents[0, 0].size)
        weakref.finalize(steps, self._walking.discard, mark)
        return steps

    def _made(
        self,
        plan: RunPlan,
        *,
        latents: NDArray[np.float32] | None,
        batch_size: int | None,
        callback: Callback | None,
        progress: Progress | None,
    ) -> Result:
        """Make a plan's pictures, batch by batch."""
        largest = self._loader.largest_batch(_concepts(plan.images))
        size = self._batch_size(plan, largest)
        if batch_size is not None:
            size = whole_number("batch_size", batch_size, 1, 100_000)
        if latents is not None:
            self._check_latents(latents, plan)
        parts: list[Result] = []
        starts = range(0, len(plan.images), size)
        total = plan.table.calls * len(starts)
        for start in starts:
            images = plan.images[start : start + size]
            own = latents[start : start + size] if latents is not None else None
            done = plan.table.calls * len(parts)

            def watch(step: Step, done: int = done) -> None:
                if progress is not None:
                    progress(done + step.index + 1, total)
                if callback is not None:
                    callback(step)

            parts.append(self._run_batch(plan, images, own, watch))
        return Result(
            images=[image for part in parts for image in part.images],
            latents=np.concatenate([part.latents for part in parts]),
            edit_maps=np.concatenate([part.edit_maps for part in parts]),
            reports=[report for part in parts for report in part.reports],
        )

    def decode(self, latents: Floats) -> NDArray[np.uint8]:
        """Turn latents, float32 [B,4,h,w], unscaled, into pictures, uint8 [B,H,W,3].

        Raises:
            NumericsError: the decoder overflowed.
            PolicyError: this device's policy lets only screened pictures leave.
        """
        rules = self.policy.screening
        self.policy.require(
            rules is None or rules.previews == "allow",
            "pictures that are not screened",
            expected="run()",
        )
        with self._lock:
            return self._decoded(latents)

    def _decoded(self, latents: Floats) -> NDArray[np.uint8]:
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
        self._release("vae_decoder")
        return np.concatenate(parts)

    def encode_text(self, text: str) -> Floats:
        """Return a text's embedding, float32 [L,C]; repeated texts are encoded once.

        Raises:
            NumericsError: the text encoder overflowed.
        """
        with self._lock:
            if text in self._stored:
                return self._stored[text]
            if text not in self._texts:
                self._texts[text] = self._encoded(text)
                if len(self._texts) > _CACHED_TEXTS:
                    self._texts.popitem(last=False)
            self._texts.move_to_end(text)
            return self._texts[text]

    def _encoded(self, text: str) -> Floats:
        ids = input_ids([self._tokenizer(text)])
        out = self.engine("text_encoder").run({"input_ids": ids})["hidden_states"]
        if not np.isfinite(out).all():
            raise not_finite("text_encoder", precision=self._precision("text_encoder"))
        embedding: Floats = out[0]
        return embedding

    def cut_from(self, text: str) -> str:
        """Return the end of a text that the model does not see; empty where all of it fits."""
        return self._tokenizer(text).cut

    def says_nothing(self, text: str) -> bool:
        """Whether a text is to the model what the empty text is."""
        return self._tokenizer.says_nothing(text)

    def engine(self, name: str) -> Engine:
        """Return a component's engine, loaded and checked against the manifest when first asked."""
        with self._lock:
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
        with self._lock:
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
            unet = self._engines.get("unet")
            if (
                unet is not None
                and cells >= _CELLS
                and not self._walking
                and self._loader.may_go("unet", unet)
            ):
                self._release("unet")  # its mapped weights beside the decoder's work are the peak

    def _release(self, name: str) -> None:
        """Drop an engine that has done its part, where memory is short or nothing is lost."""
        engine = self._engines.get(name)
        if engine is None:
            return
        if self._loader.settings.low_memory or self._loader.may_go(name, engine):
            del self._engines[name]
            engine.close()

    def _require_admitted(self, plan: RunPlan, images: Sequence[ImagePlan]) -> None:
        require_admitted(
            plan,
            images,
            manifest=self.bundle.manifest,
            tokenizer=self._tokenizer,
            policy=self.policy,
        )

    def _precision(self, name: str) -> str:
        return self.bundle.manifest.components[name].precision

    def _run_batch(
        self,
        plan: RunPlan,
        images: Sequence[ImagePlan],
        latents: NDArray[np.float32] | None,
        callback: Callback,
    ) -> Result:
        clock = time.perf_counter
        begin = clock()
        steps = self._steps(plan, images, latents)
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
        """Embeddings of all branches, branch-major, float32 [(2+n)*B,L,C].

        Raises:
            BundleError: stored embeddings that are not what the text encoder gives.
            InputError: a safety concept that the text encoder takes for the empty text.
        """
        if not self._constants_checked:
            known = self._loader.identity_of("text_encoder")
            if not remembered("embeddings", known):
                check_constants(self.bundle, self._encoded)
                remember("embeddings", known)
            self._constants_checked = True
        for acting in {concept for image in images for concept in image.acting_concepts}:
            refuse_empty(acting, self.encode_text(acting), self.encode_text(""))
        uncond = [self.encode_text(image.negative_prompt) for image in images]
        text = [self.encode_text(image.prompt) for image in images]
        concepts = []
        for k in range(_concepts(images)):
            for index, image in enumerate(images):
                own = image.acting_concepts
                # One that has fewer repeats its first: the guidance takes it once.
                concept = own[k if k < len(own) else 0] if own else None
                concepts.append(uncond[index] if concept is None else self.encode_text(concept))
        self._release("text_encoder")
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


def _copied(images: Sequence[ImagePlan]) -> tuple[ImagePlan, ...]:
    """Return copies that no one else holds, so that what was checked is what runs."""
    return tuple(
        replace(image, safety=replace(image.safety)) if type(image) is ImagePlan else image
        for image in images
    )


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

    for want, got in zip_longest(said, found):
        if want is None or got is None or not alike(want, got):
            raise BundleError(
                f"{name}: the graph's tensors are not those that bundle.json says",
                got=_words(got),
                expected=shortened(_words(want), 80),
                do="export the bundle again",
            )


def _words(spec: TensorSpec | None) -> str:
    return "no more" if spec is None else f"{spec.name} {spec.dtype} {list(spec.shape)}"
