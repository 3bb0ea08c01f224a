"""The TensorRT plans of a bundle: listing them, and checking trust and fit before they run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sld_edge.engines.cuda.device import Device
from sld_edge.engines.errors import BundleError, EngineError, InputError, UserError
from sld_edge.engines.files import Identity, identity, read_limited
from sld_edge.engines.onnx_files import GRAPH_LIMIT
from sld_edge.engines.tensorrt.engine import tensorrt_module
from sld_edge.engines.tensorrt.plan_info import (
    Flavour,
    PlanInfo,
    description_of,
    info_path,
    misfit,
    plan_info_from_bytes,
    this_system,
)
from sld_edge.runtime.bundle import Bundle, CheckedGraph, require_own_weights
from sld_edge.runtime.manifest import MANIFEST, Component
from sld_edge.runtime.plan_list import PLANS, PlanFiles, plan_list, require_digest, require_listed
from sld_edge.runtime.policy import Policy
from sld_edge.runtime.policy_file import why_not_owned


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A plan and its description; `files` are its listed files, empty for an unlisted plan."""

    path: Path
    info: PlanInfo
    files: PlanFiles = ()


def source_digest(component: Component) -> str:
    """Return one hash of a component's graph and weights."""
    digests = "".join(file.sha256 for file in component.files)
    return hashlib.sha256(digests.encode()).hexdigest()


def plan_name(component: str) -> str:
    """Return the name of a component's plan in its bundle."""
    return f"{component}.plan"


def bundle_of_plan(plan: Path) -> Path:
    """Return the folder of the bundle that a plan was built for.

    Raises:
        BundleError: no such plan, or no bundle in its folder or the folder above.
    """
    if not plan.is_file():
        raise BundleError(
            f"no plan at {plan}", do="build one with: sld-build BUNDLE --engine tensorrt-rtx"
        )
    for folder in (plan.parent, plan.resolve().parent, plan.resolve().parent.parent):
        if (folder / MANIFEST).is_file():
            return folder
    raise BundleError(f"no bundle beside {plan}", do="name it with --bundle DIR")


def plans_in(bundle: Bundle, folder: Path | None = None, *, trust: bool = False) -> dict[str, Plan]:
    """Return the plans in a folder, by component; None is the bundle's folder.

    A description is read only if `plans.json` holds its hash, or if the caller gives `trust`.

    Raises:
        EngineError: a plan that is not listed, or that has no readable description.
    """
    folder = bundle.path if folder is None else folder
    listed = _listed(bundle)
    plans = {}
    for path in sorted(folder.glob("*.plan")):
        plan = _described(path, None if trust else listed.get(path.name, ()))
        plans[plan.info.component] = plan
    return plans


def _listed(bundle: Bundle) -> dict[str, PlanFiles]:
    """Return the files of the listed plans, by the plan's file name."""
    return {files[0].path: files for files in plan_list(bundle.path, bundle.sha256).values()}


def _described(path: Path, files: PlanFiles | None) -> Plan:
    """Read a plan's description after checking its hash; `files` None trusts it without a check."""
    origin = info_path(path)
    data = description_of(origin)
    if files is not None:
        require_digest(origin, hashlib.sha256(data).hexdigest(), files[1] if files else None)
    info = plan_info_from_bytes(data, origin=origin)
    return Plan(path=path, info=info, files=() if files is None else files)


def why_unfit(bundle: Bundle, flavour: Flavour, device: Device) -> str | None:
    """Return the reason why a bundle's plans of a flavour do not fit this machine, or None."""
    try:
        plans = {
            name: plan for name, plan in plans_in(bundle).items() if plan.info.engine == flavour
        }
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
        EngineError: the error names the plan's target, this machine, and the command to type.
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
        raise EngineError(f"{plan.path.name}: {reason}", do=f"{again}, or run with --provider cpu")
    component = bundle.manifest.components.get(info.component)
    if (
        component is None
        or source_digest(component) != info.source_sha256
        or tuple(tensor.spec for tensor in info.inputs) != component.inputs
        or tuple(tensor.spec for tensor in info.outputs) != component.outputs
    ):
        raise EngineError(
            f"{plan.path} was built from another {info.component} than this bundle's", do=again
        )


def require_trust(plan: Plan, bundle: Bundle, policy: Policy) -> dict[Path, Identity]:
    """Refuse a plan whose hash `plans.json` does not hold: a plan is code.

    If the policy names signers or bundles, only the administrator may be able to write the list.

    Returns:
        The identity of each hashed file, which changes if the file is changed.

    Raises:
        EngineError: the list does not name the plan, or names another hash.
        PolicyError: another user could have written the list.
    """
    if policy.signers or policy.bundles:
        reason = why_not_owned(bundle.path / PLANS)
        policy.require(reason is None, "the list of plans", got=reason, expected="owner root")
    if not plan.files:
        require_listed(plan.path, None)
    paths = [plan.path, *(plan.path.with_name(file.path) for file in plan.files[2:])]
    # The description, the second file, was hashed when it was read.
    files = (file for file in plan.files if file is not plan.files[1])
    return {path: require_listed(path, file) for path, file in zip(paths, files, strict=True)}


def refit_source(plan: Plan, bundle: Bundle, component: Component) -> CheckedGraph:
    """Return the checked graph from which a plan without weights takes its weights.

    Raises:
        BundleError: the graph reads other files than the component's.
        EngineError: the plan names a graph that was not made for it.
    """
    checked = bundle.graph(component)
    name = str(plan.info.options.get("refit_from", checked.path.name))
    if name == checked.path.name:
        return checked
    if name != f"{plan.info.component}.decomposed.onnx":
        raise EngineError(f"{plan.path} takes its weights from {name}", do="build it again")
    if plan.files and name not in {file.path for file in plan.files[2:]}:
        raise EngineError(f"{plan.path}: {PLANS} does not hold {name}", do="build it again")
    path = plan.path.with_name(name)
    sizes = {PurePosixPath(file.path).name: file.bytes for file in component.files[1:]}
    try:
        seen = identity(path.stat())
    except OSError as error:
        raise EngineError(f"no {path}", got=error.strerror, do="build it again") from error
    model = read_limited(path, GRAPH_LIMIT, error=EngineError, do="build the plan again")
    require_own_weights(model, path=name, sizes=sizes)
    return CheckedGraph(path=path, seen={**checked.seen, path: seen})


def flavour_of(plan: Path, provider: str, bundle: Bundle, *, trust: bool) -> Flavour:
    """Return the flavour of a plan that the user named, together with a provider.

    Raises:
        EngineError: a plan that is not listed, or that has no readable description.
        InputError: the provider is not "auto" and not the plan's flavour.
    """
    flavour = _described(plan, None if trust else _listed(bundle).get(plan.name, ())).info.engine
    if provider not in ("auto", flavour):
        raise InputError(
            f"--engine {plan} is a plan for {flavour}",
            got=f"--provider {provider}",
            do="leave one out",
        )
    return flavour


def why_missing(plans: Mapping[str, Plan], bundle: Bundle, flavour: Flavour) -> EngineError:
    """Return the error for a bundle without a plan of the flavour; `plans` are its plans."""
    flavours = sorted({plan.info.engine for plan in plans.values()})
    return EngineError(
        f"{bundle.path} has no plan for {flavour}",
        got=f"plans for {', '.join(flavours)}" if flavours else "no plan",
        do=f"build them: sld-build {bundle.path} --engine {flavour}, or run with --provider cpu",
    )
