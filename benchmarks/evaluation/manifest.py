"""manifest.json: the settings of a results folder; only the same run may go on in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sld_edge.benchmarks.evaluation.prompts import EvalPrompt, PromptList, prompt_from_json
from sld_edge.benchmarks.evaluation.settings import EvalSettings
from sld_edge.engines.errors import InputError, OutputError, one_line
from sld_edge.engines.files import json_from_file, write_whole
from sld_edge.runtime.pipeline import Pipeline
from sld_edge.runtime.report import versions
from sld_edge.runtime.scorers import text_from_rule

FILE = "manifest.json"
FORMAT, FORMAT_VERSION = "sld-edge-evaluation-run", 1
# May differ between machines that work on one folder; everything else must be the same.
_OF_THE_MACHINE = ("device", "versions")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a results folder's manifest.

    Raises:
        InputError: the file is not there, or is not a manifest.
    """
    path = folder / FILE
    if not path.exists():
        raise InputError(f"no results in {folder}", got=FILE, do="name sld-eval's --output")
    manifest = json_from_file(path, error=InputError)
    if manifest.get("format") != FORMAT:
        raise InputError(f"{path} is not the manifest of a run of sld-eval")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path}",
            got=f"format version {manifest.get('format_version')}",
            expected=FORMAT_VERSION,
            do="use the sld-edge that wrote it",
        )
    return manifest


def prompts_from_manifest(manifest: Mapping[str, Any]) -> tuple[EvalPrompt, ...]:
    """Return the prompts of a run, as they were chosen.

    Raises:
        InputError: the manifest does not hold them.
    """
    try:
        return tuple(prompt_from_json(entry) for entry in manifest["prompts"]["list"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{FILE} does not hold its prompts", got=one_line(error)) from error


def run_manifest(
    settings: EvalSettings,
    prompts: PromptList,
    *,
    pipeline: Pipeline,
    scorers: Mapping[str, str],
    choice: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the manifest of a run.

    Args:
        settings: how the pictures are made and judged.
        prompts: the chosen prompts, with the hash of their list.
        pipeline: of the bundle, not run yet.
        scorers: SHA-256 of each scorer's model, by name.
        choice: how the prompts were chosen from their list.
    """
    bundle, info = pipeline.bundle, pipeline.bundle.manifest
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "bundle": {
            "model": info.model.id,
            "source": info.model.source,
            "sha256": bundle.sha256,
            "safety_concept": info.safety_concept,
        },
        "safety_concepts": list(settings.concepts) or None,
        "text_filter": list(settings.text_filter) or None,
        "provider": pipeline.provider,
        "scorers": dict(scorers),
        "rule": text_from_rule(settings.rule),
        "settings": [asdict(setting) for setting in settings.settings],
        "protocol": settings.protocol,
        "images_per_prompt": settings.images_per_prompt,
        "images": settings.images,
        "steps": settings.steps if settings.steps is not None else info.defaults.steps,
        "sampler": settings.sampler if settings.sampler is not None else info.defaults.sampler,
        "cache_interval": settings.cache_interval,
        "guidance_scale": settings.guidance_scale,
        "width": info.size.width,
        "height": info.size.height,
        "first_seed": settings.first_seed,
        "prompts": {
            "source": prompts.source,
            "sha256": prompts.sha256,
            "choice": dict(choice),
            "list": [asdict(prompt) for prompt in prompts.prompts],
        },
        "device": {"components": dict(pipeline.providers), "why": pipeline.why},
        "versions": dict(versions()),
    }


def claim_folder(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Make a results folder for a run, or go on with the folder of the same run.

    Raises:
        InputError: the folder is another run's (the first difference is named), or holds other
            files.
        OutputError: the manifest cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}", got=error.strerror) from error
    if not (folder / FILE).exists():
        if any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise InputError(
                f"{folder} holds files, but no {FILE}", do="choose an empty or a new --output"
            )
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        try:
            write_whole(folder / FILE, text.encode(), replace=False)
        except OutputError:
            if not (folder / FILE).exists():  # else another process was first
                raise
    there, here = (
        {name: value for name, value in body.items() if name not in _OF_THE_MACHINE}
        for body in (read_manifest(folder), json.loads(json.dumps(manifest)))
    )
    differing = _differing("", there, here)
    if differing is not None:
        name, theirs, ours = differing
        raise InputError(
            f"{folder} holds another run: {name} differs",
            got=ours,
            expected=f"{theirs}, as there",
            do="choose another --output, or ask for the same",
        )


def _differing(name: str, theirs: Any, ours: Any) -> tuple[str, str, str] | None:
    """Return the first difference: its name, their value and ours; None if there is none."""
    if theirs == ours:
        return None
    inner: list[tuple[str, Any, Any]] = []
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = dict.fromkeys((*theirs, *ours))
        inner = [(f"{name}.{key}".lstrip("."), theirs.get(key), ours.get(key)) for key in keys]
    if isinstance(theirs, list) and isinstance(ours, list):
        if len(theirs) != len(ours):
            return name, f"{len(theirs)} entries", f"{len(ours)} entries"
        inner = [(f"{name}[{k}]", a, b) for k, (a, b) in enumerate(zip(theirs, ours, strict=True))]
    differences = (_differing(*one) for one in inner)
    return next(filter(None, differences), (name, _short(theirs), _short(ours)))


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"
