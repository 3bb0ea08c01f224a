"""The report of an image: resolved settings, the effect of safety, timings, versions."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from typing import Any

from sld_edge.runtime.bundle import Bundle
from sld_edge.runtime.request import ImageRun, Run
from sld_edge.runtime.safety import NO_EFFECT_BELOW
from sld_edge.runtime.text_filter import FilterEffect

# The entries that are needed to make a picture again; a report without recipe lacks them.
_RECIPE = ("prompt", "negative_prompt", "cut_from_prompts", "seed")


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """A UNet call of an image: the effect of safety (see `Figures`) and the call's seconds."""

    timestep: float
    branches: int
    cached: bool
    share: float
    strength: float
    concept_strength: list[float]
    seconds: float


def image_report(
    *,
    bundle: Bundle,
    run: Run,
    image: ImageRun,
    calls: Sequence[StepReport],
    seconds: dict[str, float],
    cut: dict[str, str],
    filter_effect: FilterEffect | None,
    ran_on: Mapping[str, Any],
) -> dict[str, Any]:
    """Return an image's report, ready for JSON.

    `seconds`, by stage, are for the whole batch of the image; `filter_effect` is None without a
    text filter, or for a prompt without a word; `ran_on` is `Loader.description`.
    """
    manifest = bundle.manifest
    safety = asdict(image.safety)
    safety.pop("concept")
    filtered = safety.pop("text_filter")
    effect = FilterEffect(moved=0.0, words=()) if filter_effect is None else filter_effect
    strengths = {
        concept: _mean([call.concept_strength[k] for call in calls])
        for k, concept in enumerate(image.edited_concepts)
    }
    strongest = max(call.strength for call in calls)
    return {
        "ai_generated": True,
        "prompt": image.prompt,
        "negative_prompt": image.negative_prompt,
        "cut_from_prompts": cut,
        "seed": image.seed,
        "rng": run.rng,
        "steps": run.steps,
        "sampler": run.table.name,
        "eta": run.eta,
        "guidance_scale": image.guidance_scale,
        "width": run.width,
        "height": run.height,
        "cache_interval": run.savings.cache_interval,
        "safety": {
            "preset": image.preset,
            **safety,
            "units": run.table.safety_units,
            "concept": " | ".join(image.acting_concepts) or None,
            "concepts": [
                {"concept": concept, "mean_strength": mean} for concept, mean in strengths.items()
            ],
            "strongest_concept": max(strengths, key=strengths.__getitem__)
            if any(strengths.values())
            else None,
            "acted": strongest >= NO_EFFECT_BELOW
            or image.safety.negative
            or bool(effect.taken_out),
            "mean_share": _mean([call.share for call in calls]),
            "mean_strength": _mean([call.strength for call in calls]),
            "max_strength": strongest,
            "text_filter": _filter_report(image, effect) if filtered else None,
        },
        "policy": None
        if run.policy is None
        else {"sha256": run.policy, "raised": list(run.raised)},
        "calls": [asdict(call) for call in calls],
        "seconds": {name: round(value, 6) for name, value in seconds.items()},
        "model": asdict(manifest.model),
        "model_sha256": manifest.components["unet"].files[-1].sha256,
        "bundle_sha256": bundle.sha256,
        **ran_on,
        "versions": dict(versions()),
    }


def _filter_report(image: ImageRun, effect: FilterEffect) -> dict[str, Any]:
    return {
        "concepts": list(image.text_filter),
        "moved": round(effect.moved, 6),
        "taken_out": list(effect.taken_out),
        "words": [{"word": word, "moved": round(moved, 6)} for word, moved in effect.words],
    }


def without_recipe(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report without the entries that are needed to make its picture again."""
    kept = {name: value for name, value in report.items() if name not in _RECIPE}
    safety = dict(report["safety"])
    if safety["text_filter"] is not None:  # it names the words of the prompt
        safety["text_filter"] = {**safety["text_filter"], "taken_out": [], "words": []}
    return {**kept, "safety": safety, "recipe": "omitted"}


def safety_words(report: Mapping[str, Any]) -> str:
    """Describe the effect of safety on a picture in a few words, from the measured strength."""
    safety = report["safety"]
    if safety["preset"] == "off":
        return "safety off"
    if not safety["acted"]:
        return f"safety {safety['preset']}: no effect (strength {safety['max_strength']:.2g})"
    words = []
    if safety["max_strength"] > 0:
        words.append(
            f"changed the guidance by {safety['mean_strength']:.1%} on average, at most "
            f"{safety['max_strength']:.0%}"
        )
    if safety["negative"]:
        words.append("the concept is the negative prompt")
    if safety["text_filter"] is not None:
        words.append(_filter_words(safety["text_filter"]))
    return f"safety {safety['preset']}: {'; '.join(words)}"


def _filter_words(effect: Mapping[str, Any]) -> str:
    if effect["taken_out"]:
        return ", ".join(f"“{word}”" for word in effect["taken_out"]) + " taken out of the prompt"
    return f"text filter: moved the prompt by {effect['moved']:.1%}, no word taken out"


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 6)


@cache
def versions() -> Mapping[str, str]:
    """Return the versions that a result depends on."""
    installed = {"python": platform.python_version(), "machine": platform.machine()}
    for package in ("sld-edge", "onnxruntime", "onnxruntime-gpu", "numpy", "tokenizers"):
        with suppress(metadata.PackageNotFoundError):
            installed[package] = metadata.version(package)
    return installed
