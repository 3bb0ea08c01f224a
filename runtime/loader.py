"""Loads an engine for each component: its TensorRT plan if it has one, else its graph."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast, get_args

from sld_edge.engines.base import Engine
from sld_edge.engines.cuda.device import Device
from sld_edge.engines.errors import BundleError, EngineError, InputError, UserError
from sld_edge.engines.files import Identity, require_unchanged
from sld_edge.engines.onnxruntime.engine import OrtEngine, OrtProvider
from sld_edge.engines.onnxruntime.on_device import OrtDeviceEngine
from sld_edge.engines.onnxruntime.sessions import recipe as onnxruntime_recipe
from sld_edge.engines.openvino.graphs import recipe as openvino_recipe
from sld_edge.engines.openvino.target import CpuPrecision, Target, target
from sld_edge.engines.prepared import AnyEngine, Recipe, prepared_engine
from sld_edge.engines.providers import ON_HOST, choose, status
from sld_edge.engines.tensorrt.engine import TrtEngine, tensorrt_module
from sld_edge.engines.tensorrt.plan_info import FLAVOURS, Flavour
from sld_edge.runtime.bundle import Bundle, CheckedGraph, own_graph
from sld_edge.runtime.manifest import DECODER, OWN_GRAPHS, PREVIEW_DECODER, SHALLOW, Component
from sld_edge.runtime.plans import (
    Plan,
    bundle_of_plan,
    flavour_of,
    plans_in,
    refit_source,
    require_fit,
    require_trust,
    source_digest,
    why_missing,
    why_unfit,
)
from sld_edge.runtime.policy import NO_POLICY, Policy
from sld_edge.runtime.policy_file import machine_policy
from sld_edge.runtime.tiles import Tiling, VaeTiling, tiling_for

CELLS = 64 * 64  # latent cells of a 512 px image; smaller images and their branches are batched
_HEAVY_BYTES = 64_000_000  # smaller weights are cast once and stay loaded
_DECODER_BYTES = 128 * 4 * 3  # a pixel: input, norm and output of the decoder's last block
_PICTURE_BYTES = 3 * (4 + 4 + 1)  # a pixel of a blended picture


Vae = Literal["full", "tiny"]


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """The settings of a pipeline that hold for all its runs.

    Attributes:
        provider: "auto" or one of `engines.providers.NAMES`.
        device: of OpenVINO: "CPU", "GPU", "NPU", "AUTO", or numbered like "GPU.1".
        cpu_precision: of the arithmetic on the CPU; "bf16" is OpenVINO's, and never guidance's.
        plan: a plan of a bundle; the plans of its flavour in its folder are used.
        trust_plan: run plans that `plans.json` does not list.
        cuda_graph: replay the calls of the loop from CUDA graphs.
        low_memory: keep text encoder and decoder in memory only while they run.
        vae: decodes the pictures: "full", the model's own decoder; or "tiny", the small decoder of
            a bundle that was exported with --preview-vae.
        vae_tiling: decode in tiles: "auto", on the CPU above 768x768 pixels; "on"; or "off".
        evaluation: the pictures measure safety; a policy may then allow safety to be off.
        quiet: do not print that a large graph is being prepared.
    """

    provider: str = "auto"
    device: str = "CPU"
    cpu_precision: CpuPrecision = "fp32"
    plan: Path | None = None
    trust_plan: bool = False
    cuda_graph: bool = True
    low_memory: bool = False
    vae: Vae = "full"
    vae_tiling: VaeTiling = "auto"
    evaluation: bool = False
    quiet: bool = False


@dataclass(kw_only=True)
class Loader:
    """Loads the components of a bundle for one provider.

    Attributes:
        bundle: the bundle.
        provider: the provider, resolved: never "auto".
        why: the reason for this provider, one line.
        settings: the caller's settings.
        policy: this device's policy; for a permitted evaluation, without its rules for pictures.
        target: where OpenVINO runs its components.
        plans: the plans in use, by component.
        fallbacks: the reason why a component runs on another provider, by component.
        slowed: what a provider left to the CPU, by component; known once a component is loaded.
    """

    bundle: Bundle
    provider: str
    why: str
    settings: LoadSettings
    policy: Policy = NO_POLICY
    target: Target = field(default_factory=Target)
    plans: dict[str, Plan] = field(default_factory=dict)
    fallbacks: dict[str, str] = field(default_factory=dict)
    slowed: dict[str, str] = field(default_factory=dict)
    _hashed: dict[str, dict[Path, Identity]] = field(default_factory=dict)

    @classmethod
    def open(cls, bundle: str | Path | None, settings: LoadSettings) -> Loader:
        """Open a bundle and choose its provider.

        Raises:
            BundleError: no bundle there, or a damaged bundle.
            EngineError: plans that are missing, not trusted, or do not fit this machine.
            InputError: a provider that is unknown or does not work here.
        """
        policy = machine_policy()
        policy.require(
            policy.trust_plan or not settings.trust_plan, "--trust-plan", expected="listed plans"
        )
        if settings.evaluation and policy.allow_off:
            policy = replace(policy, safety=None, screening=None)
        if bundle is None and settings.plan is not None:
            bundle = bundle_of_plan(settings.plan)
        opened = Bundle.open(bundle, policy=policy)
        _require_decoder(opened, settings.vae)
        provider, why = _resolved(opened, settings)
        loader = cls(bundle=opened, provider=provider, why=why, settings=settings, policy=policy)
        if provider == "openvino":
            loader.target = target(settings.device, settings.cpu_precision)
        if provider in FLAVOURS:
            loader._take_plans(provider)
        return loader

    @property
    def decoder(self) -> str:
        """The component that decodes the pictures."""
        return PREVIEW_DECODER if self.settings.vae == "tiny" else DECODER

    @cached_property
    def device(self) -> Device:
        """The CUDA device, opened at its first use."""
        return Device()

    @cached_property
    def fallback_provider(self) -> OrtProvider:
        """The provider of components without a plan."""
        return "cuda" if status("cuda").usable else "cpu"

    @property
    def on_device(self) -> bool:
        """Whether the provider runs on a CUDA device."""
        return self.provider not in ON_HOST

    def load(self, name: str, component: Component) -> Engine:
        """Return a component's engine.

        Raises:
            BundleError: a file of the component is damaged.
            EngineError: the engine refuses it.
        """
        plan = self.plans.get(name)
        if plan is not None:
            refit = None
            if plan.info.options.get("strip_weights"):
                refit = refit_source(plan, self.bundle, component)
            engine = TrtEngine(
                plan.path,
                plan.info,
                self.device,
                cuda_graph=self.settings.cuda_graph,
                source=None if refit is None else refit.path,
            )
            require_unchanged(self._hashed.get(name, {}), error=BundleError)
            if refit is not None:
                refit.confirm()
            return engine
        provider = self.provider_of(name)
        if provider == "openvino":
            return self._prepared(
                name,
                component,
                openvino_recipe(
                    self.target,
                    fixed=_is_heavy(component),
                    rounded=self.target.precision == "bf16" and component.storage == "fp32",
                ),
            )
        provider = cast(OrtProvider, provider)
        if name in OWN_GRAPHS:  # never from a bundle or a cache
            if provider == "cpu":
                return OrtEngine(own_graph(name))
            return OrtDeviceEngine(own_graph(name), self.device, provider=provider)
        if provider != "cpu":
            graph = self.bundle.graph(component)
            device_engine = OrtDeviceEngine(graph.path, self.device, provider=provider)
            graph.confirm()
            if device_engine.heavy_on_cpu:
                nodes = ", ".join(f"{n} {op}" for op, n in device_engine.heavy_on_cpu.items())
                self.slowed[name] = (
                    f"{provider} left {nodes} to the cpu, which is slow: update onnxruntime-gpu, "
                    "or export with --attention decomposed"
                )
            return device_engine
        # Weights of half the size of the arithmetic were asked for to save memory.
        stored_small = component.precision == "fp32" and component.storage == "fp16"
        keep_fp16 = stored_small and _is_heavy(component)
        return self._prepared(name, component, onnxruntime_recipe(keep_fp16=keep_fp16))

    def identity_of(self, *names: str) -> str:
        """Return a text that is the same only if the outputs of these components are the same."""
        parts = [self.bundle.sha256]
        for name in names:
            plan = self.plans.get(name)
            parts += [] if plan is None else [plan.info.sha256]
            parts.append(self.runs_on(name))
        return " ".join(parts)

    def provider_of(self, name: str) -> str:
        """Return the provider that runs a component."""
        if name in self.plans:
            return self.provider
        if name in self.fallbacks:
            return self.fallback_provider
        if self.provider == "openvino" and name not in self._openvino_parts:
            return "cpu"
        return self.provider

    def sizes(self, name: str, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Return the sizes of a component's inputs for one branch of one picture, in pixels."""
        manifest = self.bundle.manifest
        cell = manifest.latents.downscale
        h, w = height // cell, width // cell
        if name in (DECODER, PREVIEW_DECODER):
            tiling = self.tiling(h, w)
            h, w = (h, w) if tiling is None else tiling.sides
        known = {"B": 1, "K*B": 1, "L": manifest.text_length, "h": h, "w": w}
        return {
            spec.name: tuple(known[x] if isinstance(x, str) else x for x in spec.shape)
            for spec in manifest.components[name].inputs
        }

    def runs_together(self, cells: int) -> bool:
        """Whether all branches of a call run in one batch, for latents of this many cells.

        On the host a batch is faster only for small pictures. A large graph of OpenVINO is compiled
        for one branch: it would be compiled again wherever the number of branches changes.
        """
        if self.on_device:
            return True
        compiled = self.provider == "openvino" and _is_heavy(
            self.bundle.manifest.components["unet"]
        )
        return cells < CELLS and not compiled

    @property
    def _openvino_parts(self) -> frozenset[str]:
        """The components that OpenVINO runs: the UNet, and in BF16 the decoders.

        ONNX Runtime loads the other components at once and in less memory, and takes as long.
        """
        parts = frozenset({"unet", SHALLOW})
        if self.target == Target():
            return parts
        return parts | {DECODER, PREVIEW_DECODER}

    def runs_on(self, name: str) -> str:
        """Return the provider that runs a component; for OpenVINO with device and precision."""
        provider = self.provider_of(name)
        return f"{provider} {self.target}" if provider == "openvino" else provider

    def is_reloadable(self, name: str, engine: Engine) -> bool:
        """Whether unloading an engine saves memory and loading it again is cheap."""
        component = self.bundle.manifest.components[name]
        return isinstance(engine, OrtEngine) and engine.prepared and _is_heavy(component)

    def tiling(self, height: int, width: int) -> Tiling | None:
        """Return the tiling for latents of this size in cells; None decodes them as a whole."""
        name = self.decoder
        choice = self.settings.vae_tiling
        if choice == "auto" and self.provider_of(name) not in ON_HOST:
            choice = "off"
        profiles = [
            tensor.profile
            for tensor in (self.plans[name].info.inputs if name in self.plans else ())
            if tensor.spec.name == "latents"
        ]
        profile = profiles[0] if profiles else None
        return tiling_for(choice, height, width, profile)

    def require_memory(self, height: int, width: int) -> None:
        """Refuse a picture, in pixels, whose decoding needs more than the free memory.

        A CUDA device reports this itself. Attention keeps no whole matrix of scores, so the largest
        tensors are the decoder's, for a picture or for a tile.

        Raises:
            InputError: too little memory; the error says how much is needed and how much is free.
        """
        if self.provider_of(self.decoder) not in ON_HOST:
            return
        cell = self.bundle.manifest.latents.downscale
        tiling = self.tiling(height // cell, width // cell)
        tile = (height, width) if tiling is None else tuple(side * cell for side in tiling.sides)
        needed = min(height, tile[0]) * min(width, tile[1]) * _DECODER_BYTES
        needed += height * width * _PICTURE_BYTES
        available = memory_available()
        if needed > available:
            raise InputError(
                f"a picture of {width}x{height} pixels needs more than this machine's memory",
                got=f"about {needed / 2**30:.1f} GiB needed",
                expected=f"at most {available / 2**30:.1f} GiB, the free memory",
                do="choose a smaller --width and --height, or --vae-tiling on",
            )

    def largest_batch(self, concepts: int) -> int | None:
        """Return the most images that the plans take in one batch; None without a limit.

        Raises:
            EngineError: the plans were built for fewer safety concepts.
        """
        most: dict[str, int] = {}  # rows that the loop's plans take, by input
        for name in ("unet", "guidance"):
            for tensor in self.plans[name].info.inputs if name in self.plans else ():
                if tensor.profile is not None:
                    rows = tensor.profile[2][0]
                    most[tensor.spec.name] = min(most.get(tensor.spec.name, rows), rows)
        if not most:
            return None
        most_concepts = most.get("noise_pred_safety", concepts)
        conditioning = self.bundle.manifest.conditioning
        wide = [name for name, item in conditioning.items() if item.per == "branch"]
        images = min(most.get(name, 2 + concepts) for name in wide) // (2 + concepts)
        if most_concepts < concepts or not images:
            raise EngineError(
                f"the plans were not built for {concepts} safety concepts at once",
                do=f"build them again with: sld-build --concepts {concepts}",
            )
        return min(most["latents"], images)

    def description(self) -> dict[str, Any]:
        """Return the entries of a report about provider, plans and device."""
        description: dict[str, Any] = {
            "provider": self.provider,
            "vae": self.settings.vae,
            "components": {name: self.runs_on(name) for name in self.bundle.manifest.components},
            "plans": {name: plan.info.sha256 for name, plan in self.plans.items()},
            "device": None,
        }
        if "device" in self.__dict__:
            device = self.device
            description["device"] = {
                "name": device.name,
                "compute_capability": device.compute_capability,
                "driver": device.driver,
            }
            if self.provider in FLAVOURS:
                description["device"][self.provider] = tensorrt_module(self.provider).__version__
        return description

    def close(self) -> None:
        """Release the device."""
        if "device" in self.__dict__:
            self.device.close()
            del self.__dict__["device"]

    def _take_plans(self, flavour: Flavour) -> None:
        folder = self.settings.plan.parent if self.settings.plan is not None else self.bundle.path
        trust = self.settings.trust_plan
        all_plans = plans_in(self.bundle, folder, trust=trust)
        plans = {name: plan for name, plan in all_plans.items() if plan.info.engine == flavour}
        if not plans:
            raise why_missing(all_plans, self.bundle, flavour)
        for name, plan in plans.items():
            require_fit(plan, self.bundle, self.device)
            if not trust:
                self._hashed[name] = require_trust(plan, self.bundle, self.policy)
        self.plans = plans
        for name in self.bundle.manifest.components:
            if name not in plans:
                reason = f"no {flavour} plan of it: runs on {self.fallback_provider}"
                self.fallbacks[name] = reason

    def _prepared(self, name: str, component: Component, recipe: Recipe[AnyEngine]) -> AnyEngine:
        source = _Source(self.bundle, component)
        return prepared_engine(
            source_digest(component),
            source.path,
            recipe,
            confirm=source.confirm,
            quiet=self.settings.quiet,
            what=f"{name} of {self.bundle.manifest.model.id}",
        )


class _Source:
    """A component's graph, hashed only if the engine is not already prepared."""

    def __init__(self, bundle: Bundle, component: Component) -> None:
        self._bundle, self._component = bundle, component
        self._checked: CheckedGraph | None = None

    def path(self) -> Path:
        """Hash the files now."""
        self._checked = self._bundle.graph(self._component)
        return self._checked.path

    def confirm(self) -> None:
        """Check that the files are still the hashed files, if they were hashed."""
        if self._checked is not None:
            self._checked.confirm()


def memory_available() -> int:
    """Return the bytes of free memory; 2**63 if the system does not report them."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, AttributeError):
        return 2**63


def _is_heavy(component: Component) -> bool:
    return sum(file.bytes for file in component.files) >= _HEAVY_BYTES


def _require_decoder(bundle: Bundle, vae: Vae) -> None:
    if vae not in get_args(Vae):
        raise InputError("--vae", got=vae, expected=f"one of {', '.join(get_args(Vae))}")
    if vae == "tiny" and PREVIEW_DECODER not in bundle.manifest.components:
        raise InputError(
            "--vae tiny",
            got="a bundle without a small decoder",
            do="export it with --preview-vae DIR, the folder of an AutoencoderTiny",
        )


def _resolved(bundle: Bundle, settings: LoadSettings) -> tuple[str, str]:
    for_openvino = {"--device": settings.device, "--cpu-precision": settings.cpu_precision}
    usual = ("CPU", "fp32")
    asked = [f"{option} {value}" for option, value in for_openvino.items() if value not in usual]
    if asked and settings.plan is None and settings.provider == "auto":
        settings = replace(settings, provider="openvino")
    if asked and settings.provider != "openvino":
        got = "a plan" if settings.plan is not None else f"--provider {settings.provider}"
        raise InputError(f"{asked[0]} needs OpenVINO", got=got, do="add --provider openvino")
    if settings.plan is not None:
        flavour = flavour_of(settings.plan, settings.provider, bundle, trust=settings.trust_plan)
        return flavour, "the plan was built for it"
    if settings.provider != "auto":
        provider = status(settings.provider)
        if not provider.usable:
            raise InputError(f"provider {provider.name} does not work here", got=provider.reason)
        return provider.name, "it was asked for"
    return choose(_plan_problems(bundle))


def _plan_problems(bundle: Bundle) -> dict[str, str | None]:
    """Return, by flavour, the reason why the bundle's plans do not fit here; None if they fit."""
    try:
        flavours = {plan.info.engine for plan in plans_in(bundle).values()}
    except EngineError as error:
        return dict.fromkeys(FLAVOURS, str(error))
    if not flavours:
        return dict.fromkeys(FLAVOURS, "no plan was built for this bundle")
    try:
        device = Device()
    except UserError as error:
        return dict.fromkeys(FLAVOURS, str(error))
    try:
        return {
            flavour: why_unfit(bundle, flavour, device)
            if flavour in flavours
            else "no plan of it was built for this bundle"
            for flavour in FLAVOURS
        }
    finally:
        device.close()
