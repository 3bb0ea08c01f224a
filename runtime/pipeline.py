"""The pipeline: a loaded bundle that turns prompts into images."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sld_edge.engines.base import Engine
from sld_edge.engines.checks import shown
from sld_edge.engines.errors import InputError
from sld_edge.engines.openvino.engine import OpenVinoEngine
from sld_edge.engines.openvino.target import CpuPrecision
from sld_edge.runtime.admission import require_admitted, table_of
from sld_edge.runtime.conditioning import Embedding, Texts
from sld_edge.runtime.denoise.job import Floats
from sld_edge.runtime.denoise.loop import Step
from sld_edge.runtime.executor import Callback, Executor, Progress
from sld_edge.runtime.loader import Loader, LoadSettings, Vae
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
    """A loaded bundle. Each graph is loaded at its first use and kept.

    Threads may share a pipeline: runs wait for each other. A generator from `steps` holds the lock
    only during a call, so a generator that rests blocks no other run. On a device, a newer run
    takes over the buffers; if the older generator then goes on, it raises an error.

    Attributes:
        bundle: the bundle.
        provider: the provider that runs its graphs.
        why: the reason for this provider, one line.
        policy: this device's policy; every run is checked against it.
    """

    def __init__(self, loader: Loader) -> None:
        """Use `Pipeline.load`."""
        self.bundle = loader.bundle
        self.policy = loader.policy
        self.provider = loader.provider
        self.why = loader.why
        self._loader = loader
        self._texts = Texts(self.bundle)
        self._executor = Executor(loader, self._texts)

    @classmethod
    def load(
        cls,
        bundle: str | Path | None = None,
        *,
        provider: str = "auto",
        device: str = "CPU",
        cpu_precision: CpuPrecision = "fp32",
        plan: str | Path | None = None,
        trust_plan: bool = False,
        cuda_graph: bool = True,
        low_memory: bool = False,
        vae: Vae = "full",
        vae_tiling: VaeTiling = "auto",
        evaluation: bool = False,
        quiet: bool = False,
    ) -> Pipeline:
        """Load the bundle at a path; None is the embedded miniature bundle.

        Args:
            bundle: a bundle's directory.
            provider: "auto", "cpu", "openvino", "cuda", "tensorrt", "tensorrt-rtx", "ort-tensorrt"
                or "ort-tensorrt-rtx"; auto takes the best provider that works here (see `why`).
            device: of OpenVINO: "CPU", "GPU", "NPU", "AUTO", or numbered like "GPU.1".
            cpu_precision: "fp32", exact; or "bf16", faster on a processor with BF16 units, with
                other rounding (docs/openvino.md); guidance stays FP32.
            plan: a TensorRT plan of a bundle; the other plans in its folder are used too.
            trust_plan: run plans that `plans.json` does not list. A plan is code.
            cuda_graph: replay the calls of the loop from CUDA graphs.
            low_memory: keep text encoder and decoder in memory only while they run. On the CPU,
                large text encoders and decoders are always unloaded: loading them again is quick.
            vae: "full", the model's own decoder; "tiny", the small decoder of a bundle that was
                exported with --preview-vae: many times as fast, with less detail.
            vae_tiling: decode in overlapping tiles: "on" or "off"; "auto" uses tiles on the CPU for
                pictures larger than 768x768 pixels.
            evaluation: the pictures measure safety; a policy may then allow safety to be off.
            quiet: do not print on standard error that a large graph is being prepared.

        Raises:
            BundleError: no bundle there, or a damaged bundle.
            EngineError: plans that are missing, not trusted, or do not fit this machine.
            InputError: a provider that is unknown or does not work here.
            PolicyError: a setting that this device's policy does not allow, or a damaged policy.
        """
        settings = LoadSettings(
            provider=provider,
            device=device,
            cpu_precision=cpu_precision,
            plan=Path(plan) if plan is not None else None,
            trust_plan=trust_plan,
            cuda_graph=cuda_graph,
            low_memory=low_memory,
            vae=vae,
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
        """The reason why a component runs on another provider, by component."""
        return self._loader.fallbacks

    @property
    def slowed(self) -> Mapping[str, str]:
        """What a provider left to the CPU, by component; known once a component has run."""
        return self._loader.slowed

    @property
    def providers(self) -> Mapping[str, str]:
        """The provider that runs each component; for OpenVINO with device and precision."""
        return {name: self._loader.runs_on(name) for name in self.bundle.manifest.components}

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        safety: str | Safety | Sequence[str | Safety] | None = None,
        safety_concept: str | tuple[str, ...] | Sequence[str | tuple[str, ...]] | None = None,
        text_filter: str | tuple[str, ...] | bool | None = None,
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

        None means the bundle's default. A sequence holds a value for each prompt. Image k of seed s
        is the image of seed s + k. On the CPU images are made one by one unless `batch_size` is
        given, so an image is always the same to the last bit. In a batch it differs by rounding.

        Args:
            prompt: a prompt or a list of prompts; "" gives an unconditional image.
            safety: a preset (`PRESETS`) or a `Safety`.
            safety_concept: the text that the image is steered away from. A tuple holds several
                concepts; each has its own UNet branch and threshold.
            text_filter: words to take out of the prompts, "blood; weapons" or a tuple; True takes
                the concepts of the bundle's filter; False switches a preset's filter off. The
                default is the preset's.
            steps: denoising steps.
            guidance_scale: how closely the prompt is followed; 1 and below switch guidance off,
                never safety.
            sampler: one of `SAMPLERS`.
            eta: noise added by ddim, 0 to 1.
            seed: first seed.
            rng: "torch" for torch's noise on the CPU, "philox" for torch's noise on CUDA.
            count: images for each prompt.
            negative_prompt: used in place of the empty text.
            height: in pixels.
            width: in pixels.
            cache_interval: every N-th UNet call runs the whole UNet; the calls in between use the
                features of the deep layers again (DeepCache). 1 is off.
            safety_units: "noise" gives the safety numbers the same meaning on every model; "raw"
                takes them in units of the model's output, as diffusers does.
            framing: the picture sizes that SDXL takes as inputs.
            latents: float32 [B,4,h,w], starting noise of unit variance, in place of the seeds'.
            batch_size: images denoised together. The default is 1 on the CPU; on a device, as many
                images as have the area of a 512 px image together.
            callback: called with every `Step`; an exception from it ends the run.

        Raises:
            InputError: a setting that is not possible.
            NumericsError: NaN or infinity in the output of a graph.
        """
        if not isinstance(prompt, str | Sequence):
            raise InputError("prompt", got=shown(prompt), expected="a text, or a list of texts")
        request = Request(
            prompts=(prompt,) if isinstance(prompt, str) else tuple(prompt),
            negative_prompt=negative_prompt,
            safety=safety,
            safety_concept=safety_concept,
            text_filter=text_filter,
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
            InputError: a setting that is not possible; the error names the possible values.
            PolicyError: a setting that the policy does not allow.
        """
        run = run_from_request(request, self.bundle.manifest, policy=self.policy)
        self._require_admitted(run, run.images)
        self._loader.require_memory(run.height, run.width)
        return run

    def check(self, run: Run, *, screening: Screening | None = None) -> Screening | None:
        """Make the checks of `run` before anything runs; return the screening that `run` would use.

        Raises:
            InputError: a run or screening that is not possible.
            PolicyError: a setting that this device's policy does not allow.
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
            screening: how pictures are scored, and what happens to flagged pictures.
            latents: float32 [B,4,h,w], starting noise of unit variance, in place of the seeds'.
            batch_size: images denoised together.
            callback: called with every `Step`.
            progress: called with the finished UNet calls and their total; it sees no picture.

        Raises:
            InputError: a setting that is not possible.
            PolicyError: a setting that this device's policy does not allow.
            NumericsError: NaN or infinity in the output of a graph.
        """
        with self._executor.lock:
            run = _copied_run(run)
            screening = self.check(run, screening=screening)
            run = self._with_own_table(run)
            self._require_no_latents(latents)
            if callback is not None:
                self.policy.require_previews("a callback, which can see unfinished pictures")
            if screening is not None and latents is not None:
                raise InputError("both starting noise and screening", do="leave one of them out")

            def make(run: Run) -> Result:
                self._require_admitted(run, run.images)
                return self._executor.make(
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
        """Denoise a run's images (or some of them) in one batch; give a `Step` for each UNet call.

        Close the generator to stop. `decode` turns the latents of a step into pictures. Read a
        step's values before the next step, and the last step's values before the next run.

        Raises:
            PolicyError: this device's policy lets only screened pictures leave.
        """
        self.policy.require(
            self.policy.screening is None, "pictures that are not screened", expected="run()"
        )
        self._require_no_latents(latents)
        run = _copied_run(run)
        chosen = run.images if images is None else _copied(images)
        with self._executor.lock:
            self._require_admitted(run, chosen)
            return self._executor.steps(self._with_own_table(run), chosen, latents)

    def decode(self, latents: Floats, *, preview: bool = False) -> NDArray[np.uint8]:
        """Turn latents, float32 [B,4,h,w], unscaled, into pictures, uint8 [B,H,W,3].

        A preview uses the bundle's small decoder, if it has one.

        Raises:
            NumericsError: the decoder overflowed.
            PolicyError: this device's policy lets only screened pictures leave.
        """
        self.policy.require_previews("pictures that are not screened")
        with self._executor.lock:
            return self._executor.decode(latents, preview=preview)

    def encode_text(self, text: str) -> Embedding:
        """Return a text's embeddings, float32 [...] by UNet input; a repeated text is encoded once.

        Raises:
            NumericsError: a text encoder overflowed.
        """
        with self._executor.lock:
            return self._executor.conditioner.embedding(text)

    def cut_from(self, text: str) -> str:
        """Return the end of a text that the model does not read; empty for a short text."""
        return self._texts.cut(text)

    def says_nothing(self, text: str) -> bool:
        """Whether a text says nothing to the model, like the empty text."""
        return self._texts.says_nothing(text)

    def engine(self, name: str) -> Engine:
        """Return a component's engine; the first call loads and checks it.

        Raises:
            BundleError: the bundle has no such component, or its graph has other tensors than the
                manifest.
            EngineError: the engine refuses it.
        """
        with self._executor.lock:
            return self._executor.store.engine(name)

    def warm_up(self, *, width: int | None = None, height: int | None = None) -> None:
        """Load now every graph that a run needs; OpenVINO compiles its graphs for a picture's size.

        Args:
            width: in pixels; None is the bundle's.
            height: in pixels; None is the bundle's.
        """
        usual = self.bundle.manifest.size
        size = (
            height if height is not None else usual.height,
            width if width is not None else usual.width,
        )
        names = (*self.bundle.manifest.texts, "unet", "guidance", self._loader.decoder)
        loaded = {name: self.engine(name) for name in names}
        with ThreadPoolExecutor() as pool:  # compiling one graph does not fill two cores
            compiling = [
                pool.submit(engine.compile, self._loader.sizes(name, *size))
                for name, engine in loaded.items()
                if isinstance(engine, OpenVinoEngine)
            ]
        for each in compiling:
            each.result()  # raises its error

    def close(self) -> None:
        """Release graphs, buffers and device; graphs that were prepared on disk stay there."""
        with self._executor.lock:
            self._executor.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _with_own_table(self, run: Run) -> Run:
        """Under a policy, take the table that was computed here: a caller's arrays can change."""
        if self.policy.safety is None:
            return run
        return replace(run, table=table_of(run, self.bundle.manifest))

    def _require_no_latents(self, latents: object) -> None:
        """Refuse latents from the caller under a policy: they may hold a finished picture."""
        self.policy.require(
            latents is None or (self.policy.screening is None and self.policy.safety is None),
            "starting noise from the caller",
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


def _copied_run(run: Run) -> Run:
    savings = replace(run.savings) if type(run.savings) is Savings else run.savings
    return replace(run, images=_copied(run.images), savings=savings)


def _copied(images: Sequence[ImageRun]) -> tuple[ImageRun, ...]:
    """Return copies: the caller has no reference to them and cannot change them after the check."""
    return tuple(
        replace(image, safety=replace(image.safety)) if type(image) is ImageRun else image
        for image in images
    )
