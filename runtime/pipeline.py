"""The pipeline: a loaded bundle that turns prompts into images."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from sld_edge.engines.base import Engine
from sld_edge.engines.checks import shown
from sld_edge.engines.errors import InputError
from sld_edge.runtime.admission import require_admitted
from sld_edge.runtime.conditioning import Embedding, Texts
from sld_edge.runtime.denoise.job import Floats
from sld_edge.runtime.denoise.loop import Step
from sld_edge.runtime.executor import Callback, Executor, Progress
from sld_edge.runtime.loader import Loader, LoadSettings
from sld_edge.runtime.random import Rng
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
from sld_edge.runtime.tiles import VaeTiling, checked_tiling


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
        executor: makes the pictures, once a run is checked.
    """

    def __init__(self, loader: Loader) -> None:
        """Use `Pipeline.load`."""
        self.bundle = loader.bundle
        self.policy = loader.policy
        self.provider = loader.provider
        self.why = loader.why
        self._loader = loader
        self._texts = Texts(self.bundle)
        self.executor = Executor(loader, self._texts)

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
        with self.executor.lock:
            run = replace(run, images=_copied(run.images), savings=_copied_savings(run.savings))
            screening = self.check(run, screening=screening)
            self._require_own_noise(latents)
            if callback is not None:
                self.policy.require_previews("a look at unfinished pictures")
            if screening is not None and latents is not None:
                raise InputError("starting noise of your own and screening", do="leave one out")

            def make(run: Run) -> Result:
                self._require_admitted(run, run.images)
                return self.executor.make(
                    run,
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
        with self.executor.lock:
            self._require_admitted(run, copied)
            return self.executor.steps(run, copied, latents)

    def decode(self, latents: Floats, *, preview: bool = False) -> NDArray[np.uint8]:
        """Turn latents, float32 [B,4,h,w], unscaled, into pictures, uint8 [B,H,W,3].

        A preview is made by the bundle's small decoder, where it has one.

        Raises:
            NumericsError: the decoder overflowed.
            PolicyError: this device's policy lets only screened pictures leave.
        """
        self.policy.require_previews("pictures that are not screened")
        with self.executor.lock:
            return self.executor.decode(latents, preview=preview)

    def encode_text(self, text: str) -> Embedding:
        """Return a text's embeddings, float32 [...] by UNet input; repeated texts are encoded once.

        Raises:
            NumericsError: a text encoder overflowed.
        """
        with self.executor.lock:
            return self.executor.conditioner.embedding(text)

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
        with self.executor.lock:
            return self.executor.store.engine(name)

    def warm_up(self) -> None:
        """Load every graph that a run needs now, not at its first use."""
        for name in (*self.bundle.manifest.texts, "unet", "guidance", "vae_decoder"):
            self.engine(name)

    def close(self) -> None:
        """Give back graphs, buffers and device; what was compiled for the device is kept."""
        with self.executor.lock:
            self.executor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

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


def _copied_savings(savings: Savings) -> Savings:
    return replace(savings) if type(savings) is Savings else savings


def _copied(images: Sequence[ImageRun]) -> tuple[ImageRun, ...]:
    """Return copies that no one else holds, so that what was checked is what runs."""
    return tuple(
        replace(image, safety=replace(image.safety)) if type(image) is ImageRun else image
        for image in images
    )
