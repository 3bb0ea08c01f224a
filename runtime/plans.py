"""The TensorRT plans of a bundle: which there are, and whether one may and can run here."""

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
from sld_edge.runtime.bundle import (
    Bundle,
    CheckedGraph,
    require_own_weights,
)
from sld_edge.runtime.manifest import MANIFEST, Component
from sld_edge.runtime.plan_list import (
    PLANS,
    PlanFiles,
    plan_list,
    require_digest,
    require_listed,
)
from sld_edge.runtime.policy import Policy
from sld_edge.runtime.policy_file import why_not_owned


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A plan file and its description; `files` are those of the list, none where it is trusted."""

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


def plans_in(bundle: Bundle, folder: Path | None = None, *, trust: bool = False) -> dict[str, Plan]:
    """Return the plans that lie in a folder, by component; None is the bundle's own folder.

    A description is read only if the bundle's list of plans holds its hash, or on `trust`.

    Raises:
        EngineError: a plan without a readable description, or one that is not listed.
    """
    folder = bundle.path if folder is None else folder
    listed = _listed(bundle)
    found = {}
    for path in sorted(folder.glob("*.plan")):
        plan = _described(path, None if trust else listed.get(path.name, ()))
        found[plan.info.component] = plan
    return found


def _listed(bundle: Bundle) -> dict[str, PlanFiles]:
    """Return the files of the listed plans by name of the plan."""
    return {files[0].path: files for files in plan_list(bundle.path, bundle.sha256).values()}


def _described(path: Path, files: PlanFiles | None) -> Plan:
    """Read a plan's description, whose hash is that of the list; None is no list, but trust."""
    origin = info_path(path)
    data = description_of(origin)
    if files is not None:
        require_digest(origin, hashlib.sha256(data).hexdigest(), files[1] if files else None)
    info = plan_info_from_bytes(data, origin=origin)
    return Plan(path=path, info=info, files=() if files is None else files)


def planned(bundle: Bundle, flavour: Flavour, device: Device) -> str | None:
    """Say why a bundle's plans of a flavour do not fit this machine; None where they do."""
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
    """Refuse a plan whose hash the bundle's list does not hold: a plan is code.

    Where the policy names bundles, the list itself must be the administrator's.

    Returns:
        The files that were hashed, and what tells whether they are still the same.

    Raises:
        EngineError: the list does not name it, or names another hash.
        PolicyError: the list could be another user's.
    """
    if policy.signers or policy.bundles:
        why = why_not_owned(bundle.path / PLANS)
        policy.require(why is None, "the list of plans", got=why, expected="root's own")
    if not plan.files:
        require_listed(plan.path, None)
    paths = [plan.path, *(plan.path.with_name(file.path) for file in plan.files[2:])]
    files = (file for file in plan.files if file is not plan.files[1])  # which was read and hashed
    return {path: require_listed(path, file) for path, file in zip(paths, files, strict=True)}


def refit_source(plan: Plan, bundle: Bundle, component: Component) -> CheckedGraph:
    """Return the graph that a plan without weights takes them from, its files checked.

    Raises:
        BundleError: the graph reads other files than the component's.
        EngineError: the plan names a graph that is not its own.
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
    """Return the flavour of a plan that the user named beside a provider.

    Raises:
        EngineError: a plan without a readable description, or one that is not listed.
        InputError: the provider is another one.
    """
    flavour = _described(plan, None if trust else _listed(bundle).get(plan.name, ())).info.engine
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
