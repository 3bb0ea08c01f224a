"""Which engine runs which component: plans where there are any, ONNX Runtime for the rest."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from sld_edge.engines.base import Engine
from sld_edge.engines.cuda.device import Device
from sld_edge.engines.errors import BundleError, EngineError, InputError, UserError
from sld_edge.engines.files import Identity, require_unchanged
from sld_edge.engines.onnxruntime.engine import OrtEngine, OrtProvider
from sld_edge.engines.onnxruntime.on_device import OrtDeviceEngine
from sld_edge.engines.onnxruntime.sessions import prepared_engine
from sld_edge.engines.providers import choose, status
from sld_edge.engines.tensorrt.engine import TrtEngine, tensorrt_module
from sld_edge.engines.tensorrt.plan_info import FLAVOURS, Flavour
from sld_edge.runtime.bundle import (
    Bundle,
    CheckedGraph,
    own_graph,
)
from sld_edge.runtime.manifest import OWN_GRAPHS, Component
from sld_edge.runtime.plans import (
    Plan,
    bundle_of_plan,
    flavour_of,
    planned,
    plans_in,
    refit_source,
    require_fit,
    require_trust,
    source_digest,
    why_missing,
)
from sld_edge.runtime.policy import NO_POLICY, Policy
from sld_edge.runtime.policy_file import machine_policy
from sld_edge.runtime.tiles import Tiling, VaeTiling, tiling_for

# Smaller weights are no burden: cast once, kept loaded.
_HEAVY_BYTES = 64_000_000
_DECODER_BYTES = 128 * 4 * 3  # a pixel: input, norm and output of the decoder's last block
_PICTURE_BYTES = 3 * (4 + 4 + 1)  # a pixel of a blended picture


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """What runs a bundle, and how.

    Attributes:
        provider: "auto" or one of `engines.providers.NAMES`.
        plan: a plan of a bundle, whose flavour is taken and beside which the others lie.
        trust_plan: run plans whose hash the bundle does not hold.
        cuda_graph: replay the calls of a loop from CUDA graphs.
        low_memory: hold text encoder and decoder only while they are needed.
        vae_tiling: decode in tiles: "auto", on the CPU above 768x768 pixels; "on"; or "off".
        evaluation: for measuring safety, which a policy may allow to be off then.
        quiet: do not say that a large graph is being prepared.
    """

    provider: str = "auto"
    plan: Path | None = None
    trust_plan: bool = False
    cuda_graph: bool = True
    low_memory: bool = False
    vae_tiling: VaeTiling = "auto"
    evaluation: bool = False
    quiet: bool = False


@dataclass(kw_only=True)
class Loader:
    """Loads the components of a bundle for one provider.

    Attributes:
        bundle: whose components.
        provider: the resolved one.
        why: why it was taken, one line.
        settings: as asked for.
        policy: this device's, as it bears on what is loaded here.
        plans: the plans that are used, by component.
        fallbacks: why a component runs on another provider, by component.
    """

    bundle: Bundle
    provider: str
    why: str
    settings: LoadSettings
    policy: Policy = NO_POLICY
    plans: dict[str, Plan] = field(default_factory=dict)
    fallbacks: dict[str, str] = field(default_factory=dict)
    _hashed: dict[str, dict[Path, Identity]] = field(default_factory=dict)

    @classmethod
    def open(cls, bundle: str | Path | None, settings: LoadSettings) -> Loader:
        """Open a bundle and resolve what runs it.

        Raises:
            BundleError: no bundle there, or a damaged one.
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
        provider, why = _resolved(opened, settings)
        loader = cls(bundle=opened, provider=provider, why=why, settings=settings, policy=policy)
        if provider in FLAVOURS:
            loader._take_plans(provider)
        return loader

    @cached_property
    def device(self) -> Device:
        """The CUDA device, opened when first needed."""
        return Device()

    @cached_property
    def rest(self) -> OrtProvider:
        """What runs the components that have no plan."""
        return "cuda" if status("cuda").usable else "cpu"

    @property
    def on_device(self) -> bool:
        """Whether the provider runs on a CUDA device."""
        return self.provider != "cpu"

    def load(self, name: str, component: Component) -> Engine:
        """Return a component's engine.

        Raises:
            BundleError: a file of the component is damaged.
            EngineError: the engine does not take it.
        """
        plan = self.plans.get(name)
        if plan is not None:
            refit = None
            if plan.info.options.get("strip_weights"):
                refit = refit_source(plan, self.bundle, component)
            planned = TrtEngine(
                plan.path,
                plan.info,
                self.device,
                cuda_graph=self.settings.cuda_graph,
                source=None if refit is None else refit.path,
            )
            require_unchanged(self._hashed.get(name, {}), error=BundleError)
            if refit is not None:
                refit.confirm()
            return planned
        provider = self._ort_provider(name)
        if name in OWN_GRAPHS:  # never from a bundle or a cache
            if provider == "cpu":
                return OrtEngine(own_graph(name))
            return OrtDeviceEngine(own_graph(name), self.device, provider=provider)
        source = _Source(self.bundle, component)
        engine: Engine
        if provider == "cpu":
            engine = prepared_engine(
                source_digest(component),
                source.path,
                keep_fp16=_is_stored_small(component) and _is_heavy(component),
                confirm=source.confirm,
                quiet=self.settings.quiet,
                what=f"{name} of {self.bundle.manifest.model.id}",
            )
        else:
            engine = OrtDeviceEngine(source.path(), self.device, provider=provider)
            source.confirm()
        return engine

    def identity_of(self, *names: str) -> str:
        """Return a text that differs wherever the outputs of these components may differ."""
        parts = [self.bundle.sha256]
        for name in names:
            plan = self.plans.get(name)
            parts += [] if plan is None else [plan.info.sha256]
            parts.append(self.provider_of(name))
        return " ".join(parts)

    def provider_of(self, name: str) -> str:
        """Return what runs a component."""
        return self.provider if name in self.plans else self._ort_provider(name)

    def is_reloadable(self, name: str, engine: Engine) -> bool:
        """Whether an engine is cheap to unload and reload: heavy, and prepared."""
        component = self.bundle.manifest.components[name]
        return isinstance(engine, OrtEngine) and engine.prepared and _is_heavy(component)

    def tiling(self, height: int, width: int) -> Tiling | None:
        """Return how latents of this size are cut to be decoded; None where they are not."""
        name = "vae_decoder"
        choice = self.settings.vae_tiling
        if choice == "auto" and self.provider_of(name) != "cpu":
            choice = "off"
        profiles = [
            tensor.profile
            for tensor in (self.plans[name].info.inputs if name in self.plans else ())
            if tensor.spec.name == "latents"
        ]
        profile = profiles[0] if profiles else None
        return tiling_for(choice, height, width, profile)

    def require_memory(self, height: int, width: int) -> None:
        """Refuse a picture whose decoding needs more memory than the processor has free.

        On a device CUDA says so itself. Attention holds no whole matrix of scores, so the largest
        tensors are the decoder's, of a picture or of a tile.

        Raises:
            InputError: about how much is needed, and how much there is.
        """
        if self.provider_of("vae_decoder") != "cpu":
            return
        cell = self.bundle.manifest.latents.downscale
        tiling = self.tiling(height // cell, width // cell)
        tile = (height, width) if tiling is None else tuple(side * cell for side in tiling.sides)
        needed = min(height, tile[0]) * min(width, tile[1]) * _DECODER_BYTES
        needed += height * width * _PICTURE_BYTES
        available = memory_available()
        if needed > available:
            raise InputError(
                f"a picture of {width}x{height} pixels is out of this machine's memory",
                got=f"about {needed / 2**30:.1f} GiB needed",
                expected=f"at most {available / 2**30:.1f} GiB, which is free",
                do="choose a smaller --width and --height, or --vae-tiling on",
            )

    def largest_batch(self, concepts: int) -> int | None:
        """Return the most images that the plans take at once; None where there is no limit.

        Raises:
            EngineError: plans that were built for fewer safety concepts.
        """
        most: dict[str, int] = {}  # of each input of the loop's plans, along its first axis
        for name in ("unet", "guidance"):
            for tensor in self.plans[name].info.inputs if name in self.plans else ():
                if tensor.profile is not None:
                    own = tensor.profile[2][0]
                    most[tensor.spec.name] = min(most.get(tensor.spec.name, own), own)
        if not most:
            return None
        taken = most.get("noise_pred_safety", concepts)
        images = most.get("context", 2 + concepts) // (2 + concepts)
        if taken < concepts or not images:
            raise EngineError(
                f"the plans were not built for {concepts} safety concepts at once",
                do=f"build them again with: sld-build --concepts {concepts}",
            )
        return min(most["latents"], images)

    def description(self) -> dict[str, Any]:
        """Return what a report says of what ran the bundle."""
        told: dict[str, Any] = {
            "provider": self.provider,
            "components": {
                name: self.provider_of(name) for name in self.bundle.manifest.components
            },
            "plans": {name: plan.info.sha256 for name, plan in self.plans.items()},
            "device": None,
        }
        if "device" in self.__dict__:
            device = self.device
            told["device"] = {
                "name": device.name,
                "compute_capability": device.compute_capability,
                "driver": device.driver,
            }
            if self.provider in FLAVOURS:
                told["device"][self.provider] = tensorrt_module(self.provider).__version__
        return told

    def close(self) -> None:
        """Give the device back."""
        if "device" in self.__dict__:
            self.device.close()
            del self.__dict__["device"]

    def _take_plans(self, flavour: Flavour) -> None:
        folder = self.settings.plan.parent if self.settings.plan is not None else self.bundle.path
        trust = self.settings.trust_plan
        everything = plans_in(self.bundle, folder, trust=trust)
        own = {name: plan for name, plan in everything.items() if plan.info.engine == flavour}
        if not own:
            raise why_missing(everything, self.bundle, flavour)
        for name, plan in own.items():
            require_fit(plan, self.bundle, self.device)
            if not trust:
                self._hashed[name] = require_trust(plan, self.bundle, self.policy)
        self.plans = own
        for name in self.bundle.manifest.components:
            if name not in own:
                self.fallbacks[name] = f"no {flavour} plan of it: runs on {self.rest}"

    def _ort_provider(self, name: str) -> OrtProvider:
        if name in self.fallbacks:
            return self.rest
        return cast(OrtProvider, self.provider)


class _Source:
    """A component's graph in its bundle, hashed when an engine asks for it."""

    def __init__(self, bundle: Bundle, component: Component) -> None:
        self._bundle, self._component = bundle, component
        self._checked: CheckedGraph | None = None

    def path(self) -> Path:
        """Hash the files now."""
        self._checked = self._bundle.graph(self._component)
        return self._checked.path

    def confirm(self) -> None:
        """Look whether the engine read what was hashed, where it read anything."""
        if self._checked is not None:
            self._checked.confirm()


def _is_stored_small(component: Component) -> bool:
    """Whether the weights are of half the arithmetic's size, as one asks for to save memory."""
    return component.precision == "fp32" and component.storage == "fp16"


def memory_available() -> int:
    """Return the bytes of memory that are free now; a huge number where the system says nothing."""
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


def _resolved(bundle: Bundle, settings: LoadSettings) -> tuple[str, str]:
    if settings.plan is not None:
        flavour = flavour_of(settings.plan, settings.provider, bundle, trust=settings.trust_plan)
        return flavour, "it is what the plan was built for"
    if settings.provider != "auto":
        found = status(settings.provider)
        if not found.usable:
            raise InputError(f"provider {found.name} does not work here", got=found.reason)
        return found.name, "it was asked for"
    return choose(_planned(bundle))


def _planned(bundle: Bundle) -> dict[str, str | None]:
    """Say for each flavour why the bundle's plans do not fit here, or None."""
    try:
        have = {plan.info.engine for plan in plans_in(bundle).values()}
    except EngineError as error:
        return dict.fromkeys(FLAVOURS, str(error))
    if not have:
        return dict.fromkeys(FLAVOURS, "no plan was built for this bundle")
    try:
        device = Device()
    except UserError as error:
        return dict.fromkeys(FLAVOURS, str(error))
    try:
        return {
            flavour: planned(bundle, flavour, device)
            if flavour in have
            else "no plan of it was built for this bundle"
            for flavour in FLAVOURS
        }
    finally:
        device.close()
