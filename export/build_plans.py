"""TensorRT plans for the components of a bundle, without torch; only decomposing needs onnx."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from sld_edge.engines.errors import EngineError, InputError, MissingPackageError, OutputError
from sld_edge.engines.files import write_whole
from sld_edge.engines.staging import locked, part_folder
from sld_edge.engines.tensorrt.build import build_plan
from sld_edge.engines.tensorrt.build_settings import BuildSettings, dimensions, fixed, profile
from sld_edge.engines.tensorrt.plan_info import (
    PlanInfo,
    PlanTensor,
    Span,
    info_path,
    plan_info_from_file,
    this_system,
)
from sld_edge.engines.tensorrt.target import Target, build_target
from sld_edge.export.output import recover
from sld_edge.export.write_bundle import BUNDLE, created_by
from sld_edge.runtime.bundle import Bundle
from sld_edge.runtime.manifest import MANIFEST, SHALLOW, Component
from sld_edge.runtime.plan_list import (
    PLANS,
    PlanFiles,
    listed_file,
    plan_list,
    plan_list_json,
    require_listed,
)
from sld_edge.runtime.plans import plan_name, source_digest

Say = Callable[[str], None]
Watch = Callable[[str, str], None]
_LOOP = ("unet", SHALLOW, "guidance")  # the components that take a batch of images


def build_plans(
    bundle_path: Path,
    settings: BuildSettings,
    *,
    say: Say = lambda line: None,
    watch: Watch = lambda component, stage: None,
    force: bool = False,
) -> list[PlanInfo]:
    """Build `NAME.plan` and `NAME.plan.json` for a bundle's components and put them into it.

    When the last plan is built, all plans move into the bundle, and then `plans.json`, which lists
    them; until then the bundle does not change. `bundle.json` never changes. An existing plan of
    the same settings is kept.

    Args:
        bundle_path: the bundle.
        settings: what to build, and how.
        say: called with each note, a line.
        watch: called with component and stage: "parsing", "building", "done".
        force: build existing plans again.

    Returns:
        The plans that the settings ask for, built or kept, in the bundle's order.

    Raises:
        BundleError: not a bundle, or a damaged bundle.
        InputError: a component, size or device that cannot be honoured.
        EngineError: TensorRT cannot build a plan.
        MissingPackageError: no TensorRT, or no onnx where a graph must be decomposed.
        OutputError: the bundle cannot be written.
    """
    recover(bundle_path.resolve(), BUNDLE)
    bundle = Bundle.open(bundle_path)
    components = _chosen(bundle, settings)
    fp32 = any(
        part.precision == "fp32" and part.attention != "none" for part in components.values()
    )
    target = build_target(settings, fp32=fp32)
    sizes = _sizes(bundle, settings)
    capabilities = ", ".join(target.compute_capabilities)
    say(f"{target.name} for compute capability {capabilities} ({target.why})")
    job = _Job(bundle=bundle, settings=settings, target=target, sizes=sizes, say=say, watch=watch)
    plans, built = [], {}
    with _staged(bundle.path) as folder:
        for name, component in components.items():
            kept = None if force else job.existing(name, component)
            if kept is not None:
                say(f"{name}: the plan exists and nothing has changed; --force builds it again")
                plans.append(kept)
                continue
            built[name] = job.build(name, component, folder)
            plans.append(built[name])
        if built:
            _move_in(bundle, folder, built, say)
    return plans


def require_buildable(settings: BuildSettings) -> None:
    """Refuse settings that cannot be built, before a checkpoint is exported.

    Raises:
        InputError: a compute capability that TensorRT does not take.
        MissingPackageError: no TensorRT.
        EngineError: no device where one is needed.
    """
    build_target(settings)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """The arguments of `build_plans`, resolved; all components share them."""

    bundle: Bundle
    settings: BuildSettings
    target: Target
    sizes: Mapping[str, Span]
    say: Say
    watch: Watch

    def existing(self, name: str, component: Component) -> PlanInfo | None:
        """Return the existing plan where these settings would build the same plan again."""
        path = self.bundle.path / plan_name(name)
        files = _listed(self.bundle).get(name)
        if files is None:
            return None
        try:
            # A plan is code: it is kept only where the bundle's list has its hash.
            for file in files:
                require_listed(path.with_name(file.path), file)
            info = plan_info_from_file(info_path(path))
        except EngineError:
            return None
        draft = self._draft(name, component)
        return info if _comparable(info) == _comparable(draft) else None

    def build(self, name: str, component: Component, folder: Path) -> PlanInfo:
        self._note_other_flavour(name)
        graph = self.bundle.graph(component).path
        # TensorRT fuses the products of attention itself, with fewer kernels than for the operator
        # (docs/performance.md), for which it has no kernel at all for some heads or in FP32.
        rewritten = component.attention == "op"
        keep = f"{name}.decomposed.onnx" if rewritten and self.settings.strip_weights else None
        info = build_plan(
            self._draft(name, component),
            _decomposed(name, graph, folder, keep) if rewritten else nullcontext(graph),
            folder / plan_name(name),
            settings=self.settings,
            target=self.target,
            stage=lambda stage: self.watch(name, stage),
        )
        self.watch(name, "done")
        return info

    def _draft(self, name: str, component: Component) -> PlanInfo:
        target, options = self.target, self.settings.options()
        if self.settings.strip_weights:
            graph = Path(component.files[0].path).name
            rewritten = component.attention == "op"
            options["refit_from"] = f"{name}.decomposed.onnx" if rewritten else graph
        return PlanInfo(
            component=name,
            sha256="",
            bytes=0,
            source_sha256=source_digest(component),
            engine=target.engine,
            engine_version=target.version,
            system=this_system(),
            devices=target.devices,
            compute_capabilities=target.compute_capabilities,
            precision=component.precision,
            inputs=tuple(
                PlanTensor(spec=spec, profile=profile(spec, self._sizes(name)))
                for spec in component.inputs
            ),
            outputs=tuple(PlanTensor(spec=spec) for spec in component.outputs),
            options=options,
            seconds=0.0,
            created_by=created_by(),
        )

    def _sizes(self, name: str) -> Mapping[str, Span]:
        """Return the sizes of a component; decoders get pictures one by one."""
        return self.sizes if name in _LOOP else {**self.sizes, "B": fixed(1)}

    def _note_other_flavour(self, name: str) -> None:
        path = info_path(self.bundle.path / plan_name(name))
        try:
            engine = plan_info_from_file(path).engine
        except EngineError:
            return  # no plan, or an unusable plan
        if engine != self.target.engine:
            self.say(f"note: {name}: its plan for {engine} is replaced")


def _chosen(bundle: Bundle, settings: BuildSettings) -> dict[str, Component]:
    """Return the components to build, in the bundle's order."""
    components = bundle.manifest.components
    for name in settings.components:
        if name not in components:
            raise InputError("component", got=repr(name), expected=", ".join(components))
    names = settings.components or tuple(components)
    return {name: component for name, component in components.items() if name in names}


def _sizes(bundle: Bundle, settings: BuildSettings) -> dict[str, Span]:
    manifest = bundle.manifest
    return dimensions(
        settings,
        width=manifest.size.width,
        height=manifest.size.height,
        downscale=manifest.latents.downscale,
        text_length=manifest.text_length,
        concepts=len(manifest.safety_concepts),
    )


def _comparable(info: PlanInfo) -> PlanInfo:
    """Return a plan's description without the entries that differ from build to build."""
    return replace(info, sha256="", bytes=0, seconds=0.0, created_by="", contents=None)


@contextmanager
def _decomposed(name: str, graph: Path, folder: Path, keep: str | None) -> Iterator[Path]:
    """Give the graph's decomposed form, written to `folder`, and remove it in the end.

    With `keep` the graph stays, under that name; it reads the bundle's file of weights.
    """
    try:
        from sld_edge.export.graphs.decompose import decomposed_graph
    except ImportError as error:
        raise MissingPackageError(
            "onnx", extra="export", why=f"the form of {name} that this TensorRT builds"
        ) from error
    path = folder / graph.name
    data = decomposed_graph(graph, path)
    try:
        yield path
        if keep is not None:
            path.replace(folder / keep)
    finally:
        path.unlink(missing_ok=True)
        if data is not None:
            data.unlink(missing_ok=True)


# --- files ----------------------------------------------------------------------------------------


@contextmanager
def _staged(bundle: Path) -> Iterator[Path]:
    """Give an empty folder for unfinished plans, and lock the bundle against other builds."""
    bundle = bundle.resolve()
    try:
        if not os.access(bundle, os.W_OK):
            raise PermissionError(13, "Permission denied")
        beside = bundle.parent.stat().st_dev == bundle.stat().st_dev
        beside = beside and os.access(bundle.parent, os.W_OK)
        # Inside the bundle where the bundle is a mounted disk, as in a container.
        place = bundle.parent / f"{bundle.name}.plans" if beside else bundle / "plans"
        with locked(bundle / MANIFEST, shared=False), part_folder(place) as folder:
            yield folder
    except BlockingIOError as error:
        raise OutputError(
            "another sld-build is at work on this bundle", do="wait for it, or stop it"
        ) from error
    except OSError as error:
        raise OutputError(
            f"cannot write to {bundle}", got=error.strerror, do="copy the bundle to another place"
        ) from error


def _move_in(bundle: Bundle, folder: Path, built: Mapping[str, PlanInfo], say: Say) -> None:
    """Move the new plans into the bundle, and then the list with their hashes."""
    path = bundle.path
    plans = {}
    for name, info in built.items():
        plan = folder / plan_name(name)
        refit = folder / str(info.options.get("refit_from"))
        parts = (plan, info_path(plan), *([refit] if refit.exists() else []))
        plans[name] = tuple(map(listed_file, parts))
    try:
        for file in sorted(folder.iterdir()):
            file.replace(path / file.name)
    except OSError as error:
        raise OutputError(
            f"cannot write to {path}", got=error.strerror, do="build again"
        ) from error
    everything = {**_listed(bundle), **plans}
    write_whole(path / PLANS, plan_list_json(bundle.sha256, everything).encode())
    say(f"{path}: {_count(built)} recorded in {PLANS}")


def _listed(bundle: Bundle) -> dict[str, PlanFiles]:
    """Return the plans in the bundle's list; a damaged list counts as empty."""
    try:
        return plan_list(bundle.path, bundle.sha256)
    except EngineError:
        return {}


def _count(built: Mapping[str, PlanInfo]) -> str:
    return "1 plan" if len(built) == 1 else f"{len(built)} plans"
