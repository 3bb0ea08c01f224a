"""Fake plans for a bundle, described and recorded as the real ones are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sld_edge.engines.plan_info import Flavour, PlanInfo, PlanTensor, info_path, this_system
from sld_edge.runtime.bundle import MANIFEST, Bundle, File
from sld_edge.runtime.plans import plan_name, source_digest

Three = tuple[int, int, int]


def make_plans(
    folder: Path,
    *,
    engine: Flavour,
    version: str,
    compute_capabilities: Sequence[str] = ("8.6",),
    batch: Three = (1, 1, 4),
    size: Three = (64, 64, 64),
    components: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Write a plan and its description for every component, or for those named."""
    options = dict(options or {})
    bundle = Bundle.open(folder)
    manifest = bundle.manifest
    cell = manifest.latents.downscale
    dims: dict[str, Three] = {
        "B": batch,
        "K*B": (batch[0], 3 * batch[1], 3 * batch[2]),
        "N": (1, 1, 3),
        "L": (manifest.text.length,) * 3,
        "H": size,
        "W": size,
        "h": (size[0] // cell, size[1] // cell, size[2] // cell),
        "w": (size[0] // cell, size[1] // cell, size[2] // cell),
    }
    files = dict(manifest.plans)
    for name, component in manifest.components.items():
        if components is not None and name not in components:
            continue
        inputs = [
            PlanTensor(
                spec=spec,
                profile=tuple(  # type: ignore[arg-type]  # three of them
                    tuple(s if isinstance(s, int) else dims[s][which] for s in spec.shape)
                    for which in range(3)
                ),
            )
            for spec in component.inputs
        ]
        body = {
            "engine": engine,
            "version": version,
            "version_compatible": bool(options.get("version_compatible")),
            "stripped": bool(options.get("strip_weights")),
            "graph": str((folder / component.files[0].path).resolve()),
            "source_sha256": source_digest(component),
            "session": source_digest(component),
            "downscale": cell,
            "inputs": {
                tensor.spec.name: {
                    "dtype": tensor.spec.dtype,
                    "shape": tensor.spec.shape,
                    "profile": tensor.profile,
                }
                for tensor in inputs
            },
            "outputs": {
                spec.name: {"dtype": spec.dtype, "shape": spec.shape} for spec in component.outputs
            },
        }
        path = folder / plan_name(name)
        path.write_text(json.dumps(body))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        info = PlanInfo(
            component=name,
            sha256=digest,
            bytes=path.stat().st_size,
            source_sha256=source_digest(component),
            engine=engine,
            engine_version=version,
            system=this_system(),
            devices=(),
            compute_capabilities=tuple(compute_capabilities),
            precision=component.precision,
            inputs=tuple(inputs),
            outputs=tuple(PlanTensor(spec=spec) for spec in component.outputs),
            options=options,
            seconds=0.0,
            created_by="stand-in",
        )
        info_path(path).write_text(info.to_json())
        files[name] = File(path=path.name, sha256=digest, bytes=path.stat().st_size)
    (folder / MANIFEST).write_text(replace(manifest, plans=files).to_json(), encoding="utf-8")
