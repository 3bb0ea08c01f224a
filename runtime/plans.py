"""The TensorRT plans of a bundle: which there are, and whether one may and can run here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sld_edge.engines.device import Device
from sld_edge.engines.errors import BundleError, EngineError, InputError, UserError
from sld_edge.engines.plan_info import (
    Flavour,
    PlanInfo,
    info_path,
    misfit,
    plan_info_from_file,
    this_system,
)
from sld_edge.engines.tensorrt import tensorrt_module
from sld_edge.runtime.bundle import MANIFEST, Bundle, Component


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A plan file and its description."""

    path: Path
    info: PlanInfo


def source_digest(component: Component) -> str:
    """Return one hash of a component's graph and weights."""
    digests = "".join(file.sha256 for file in component.files)
    return hashlib.sha256(digests.encode()).hexdigest()


def plan_name(component: str) -> str:
    """Return the name of a component's plan in its bundle."""
    return f"{component}.plan"


def bundle_of_plan(plan: Path) -> Path:
    """Return the bundle that a plan lies in.

    Raises:
        BundleError: no such plan, or no bundle around it.
    """
    if not plan.is_file():
        raise BundleError(
            f"no plan at {plan}", do="build one with: sld-build BUNDLE --engine tensorrt-rtx"
        )
    for folder in (plan.parent, plan.resolve().parent, plan.resolve().parent.parent):
        if (folder / MANIFEST).is_file():
            return folder
    raise BundleError(f"no bundle beside {plan}", do="name it with --bundle DIR")


def plans_in(folder: Path, flavour: Flavour | None = None) -> dict[str, Plan]:
    """Return the plans that lie in a folder, by component, of one flavour or of any.

    Raises:
        EngineError: a plan without a readable description.
    """
    found = {}
    for path in sorted(folder.glob("*.plan")):
        info = plan_info_from_file(info_path(path))
        if flavour is None or info.engine == flavour:
            found[info.component] = Plan(path=path, info=info)
    return found


def planned(bundle: Bundle, flavour: Flavour, device: Device) -> str | None:
    """Say why a bundle's plans of a flavour do not fit this machine; None where they do."""
    try:
        plans = plans_in(bundle.path, flavour)
        if "unet" not in plans:
            return f"this bundle has no {flavour} plan of the UNet"
        for plan in plans.values():
            require_fit(plan, bundle, device)
    except UserError as error:
        return str(error)
    return None


def require_fit(plan: Plan, bundle: Bundle, device: Device) -> None:
    """Refuse a plan that this machine cannot run or that was built from another model.

    Raises:
        EngineError: it says what the plan was built for, what is here, and what to type.
    """
    info = plan.info
    again = f"build it here: sld-build {bundle.path} --engine {info.engine}"
    reason = misfit(
        info,
        version=tensorrt_module(info.engine).__version__,
        compute_capability=device.compute_capability,
        system=this_system(),
    )
    if reason is not None:
        raise EngineError(f"{plan.path}: {reason}", do=f"{again}, or run with --provider cpu")
    component = bundle.manifest.components.get(info.component)
    if component is None or source_digest(component) != info.source_sha256:
        raise EngineError(
            f"{plan.path} was built from another {info.component} than this bundle's", do=again
        )


def require_trust(plan: Plan, bundle: Bundle) -> None:
    """Refuse a plan whose hash the bundle does not hold: a plan is code.

    Raises:
        EngineError: the bundle does not name it, or names another hash.
    """
    with plan.path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest not in {file.sha256 for file in bundle.manifest.plans.values()}:
        raise EngineError(
            f"{plan.path} is not a plan that was built for this bundle, and a plan is code",
            got=f"SHA-256 {digest[:12]}…, which {bundle.path / MANIFEST} does not hold",
            do=f"build it: sld-build {bundle.path} --engine {plan.info.engine}, or add "
            "--trust-plan if you know where it comes from",
        )


def flavour_of(plan: Path, provider: str) -> Flavour:
    """Return the flavour of a plan that the user named beside a provider.

    Raises:
        InputError: the provider is another one.
    """
    flavour = plan_info_from_file(info_path(plan)).engine
    if provider not in ("auto", flavour):
        raise InputError(
            f"--engine {plan} is a plan for {flavour}", got=f"--provider {provider}", do="drop one"
        )
    return flavour


def why_missing(plans: Mapping[str, Plan], bundle: Bundle, flavour: Flavour) -> EngineError:
    """Return the error for a bundle that has no plan of the flavour asked for."""
    others = sorted({plan.info.engine for plan in plans.values()})
    return EngineError(
        f"{bundle.path} has no plan for {flavour}",
        got=f"plans for {', '.join(others)}" if others else "no plan",
        do=f"build them: sld-build {bundle.path} --engine {flavour}, or run with --provider cpu",
    )
