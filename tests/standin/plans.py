"""Plans for the TensorRT stand-in, in a bundle, with real descriptions beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sld_edge.engines.base import TensorSpec
from sld_edge.engines.tensorrt.plan_info import (
    Flavour,
    PlanInfo,
    PlanTensor,
    Span,
    info_path,
    this_system,
)
from sld_edge.runtime.bundle import Bundle
from sld_edge.runtime.manifest import Component, Manifest
from sld_edge.runtime.plan_list import PLANS, listed_file, plan_list, plan_list_json
from sld_edge.runtime.plans import Plan, plan_name, plans_in, source_digest

VERSIONS: dict[Flavour, str] = {"tensorrt-rtx": "1.7.1.116", "tensorrt": "10.3.0"}
MAGIC = "sld-edge stand-in plan"


def make_plans(
    bundle_dir: Path,
    *,
    engine: Flavour,
    version: str | None = None,
    compute_capabilities: Sequence[str] = ("8.6",),
    batch: tuple[int, int, int] = (1, 1, 4),
    size: tuple[int, int, int] | None = None,
    components: Sequence[str] | None = None,
    concepts: int = 1,
    options: Mapping[str, Any] | None = None,
    source: str | None = None,
) -> dict[str, Plan]:
    """Write plans and descriptions into a bundle (a copy!), and the list that names them.

    Args:
        bundle_dir: the bundle.
        engine: flavour of TensorRT.
        version: of it; None for the version that `install` pretends.
        compute_capabilities: the plans run on.
        batch: least, usual and largest number of images.
        size: the same for the sides of a picture, in pixels; None for the bundle's own size alone.
        concepts: most safety concepts at once.
        components: to plan; None for all.
        options: of the build; `version_compatible`, `hardware_compatible` and `strip_weights` act.
        source: the SHA-256 to say the plans were built from, where it is not the true one.
    """
    bundle = Bundle.open(bundle_dir)
    manifest = bundle.manifest
    spans = _spans(manifest, batch, size, concepts)
    made = {}
    for name in components if components is not None else manifest.components:
        component = manifest.components[name]
        inputs = tuple(_planned(spec, spans) for spec in component.inputs)
        info = PlanInfo(
            component=name,
            sha256="",
            bytes=0,
            source_sha256=source if source is not None else source_digest(component),
            engine=engine,
            engine_version=version if version is not None else VERSIONS[engine],
            system=this_system(),
            devices=(),
            compute_capabilities=tuple(compute_capabilities),
            precision=component.precision,
            inputs=inputs,
            outputs=tuple(PlanTensor(spec=spec) for spec in component.outputs),
            options=dict(options or {}),
            seconds=1.0,
            created_by=manifest.created_by,
        )
        data = _plan_bytes(info, bundle, component)
        info = replace(info, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
        path = bundle_dir / plan_name(name)
        path.write_bytes(data)
        info_path(path).write_text(info.to_json(), encoding="utf-8")
        made[name] = Plan(path=path, info=info)
    _record(bundle_dir, made)
    return made


def _plan_bytes(info: PlanInfo, bundle: Bundle, component: Component) -> bytes:
    """What the stand-in's runtime needs: where the graph lies, and all that a plan settles."""
    graph = bundle.path.resolve() / component.files[0].path
    weights = graph.with_name(info.options.get("refit_from", graph.name))
    return json.dumps(
        {
            "magic": MAGIC,
            "component": info.component,
            "graph": str(graph),
            "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
            "digest": source_digest(component),
            "flavour": info.engine,
            "version": info.engine_version,
            "compute_capabilities": info.compute_capabilities,
            "downscale": bundle.manifest.latents.downscale,
            "inputs": [asdict(tensor) for tensor in info.inputs],
            "outputs": [asdict(tensor) for tensor in info.outputs],
            "options": info.options,
        }
    ).encode()


def _spans(
    manifest: Manifest,
    batch: tuple[int, int, int],
    size: tuple[int, int, int] | None,
    concepts: int,
) -> dict[str, Span]:
    images = Span(min=batch[0], opt=batch[1], max=batch[2])
    height = width = size
    if size is None:
        own = manifest.size
        height, width = (own.height,) * 3, (own.width,) * 3
    assert height is not None
    assert width is not None
    cell = manifest.latents.downscale
    length = manifest.text_length
    return {
        "B": images,
        "K*B": Span(min=images.min, opt=3 * images.opt, max=(2 + concepts) * images.max),
        "n": Span(min=1, opt=1, max=concepts),
        "N": Span(min=1, opt=1, max=3),
        "L": Span(min=length, opt=length, max=length),
        "H": _span(height, 1),
        "W": _span(width, 1),
        "h": _span(height, cell),
        "w": _span(width, cell),
    }


def _span(sides: tuple[int, int, int], cell: int) -> Span:
    return Span(min=sides[0] // cell, opt=sides[1] // cell, max=sides[2] // cell)


def _planned(spec: TensorSpec, spans: Mapping[str, Span]) -> PlanTensor:
    def shape(which: str) -> tuple[int, ...]:
        return tuple(
            getattr(spans[size], which) if isinstance(size, str) else size for size in spec.shape
        )

    return PlanTensor(spec=spec, profile=(shape("min"), shape("opt"), shape("max")))


def _record(bundle_dir: Path, made: Mapping[str, Plan]) -> None:
    digest = Bundle.open(bundle_dir).sha256
    plans = {}
    for name, plan in made.items():
        refit = plan.path.with_name(f"{name}.decomposed.onnx")
        parts = (plan.path, info_path(plan.path), *([refit] if refit.exists() else []))
        plans[name] = tuple(map(listed_file, parts))
    everything = {**plan_list(bundle_dir, digest), **plans}
    (bundle_dir / PLANS).write_text(plan_list_json(digest, everything), encoding="utf-8")


def relist(bundle_dir: Path) -> None:
    """Put the true hashes of all plans' files into the list again, as an attacker could not."""
    _record(bundle_dir, plans_in(Bundle.open(bundle_dir), trust=True))
