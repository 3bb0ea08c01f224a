"""The safety check that every run passes: when it is resolved, when checked, and when it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from sld_edge.engines.checks import shown
from sld_edge.engines.errors import InputError
from sld_edge.runtime.conditioning import Texts
from sld_edge.runtime.manifest import Manifest
from sld_edge.runtime.policy import Policy
from sld_edge.runtime.request import (
    ImageRun,
    Run,
    Savings,
    different_concepts,
    filtered_concepts,
    table_for,
)
from sld_edge.runtime.safety import Safety, empty_concept
from sld_edge.runtime.samplers import SamplerTable
from sld_edge.runtime.text_filter import require_some_concepts


def require_admitted(
    run: Run,
    images: Sequence[ImageRun],
    *,
    manifest: Manifest,
    texts: Texts,
    policy: Policy,
) -> None:
    """Refuse images that would be less safe than their settings say or than the policy demands.

    Resolving calls this, and running calls it again, because a caller can change a resolved run.

    Raises:
        InputError: a value of another type than resolving gives; or a concept that says nothing to
            the model, so that safety could not act.
        PolicyError: a setting that the policy does not allow.
    """
    if policy.digest != run.policy:
        raise policy.error(
            "a run that was resolved under another policy",
            expected="a run that was resolved under this policy",
            do="resolve it again",
        )
    if not images:
        raise InputError("a run without pictures", do="give a prompt")
    for value, kind in _typed(run, images):
        if type(value) is not kind:
            raise InputError("a resolved run was changed", got=shown(value), expected=kind.__name__)
    rules = policy.safety
    if rules is not None:
        interval, most = run.savings.cache_interval, rules.cache_interval_max
        policy.require(interval <= most, "cache interval", got=interval, expected=f"at most {most}")
        policy.require(
            run.table.safety_units == "noise",
            "safety units",
            got=run.table.safety_units,
            expected="noise",
        )
        # A table of the caller could call the picture's last steps a warm-up.
        policy.require(
            run.table.equals(table_of(run, manifest)),
            "a sampler table that was changed",
            expected=f"the table of {run.table.name}",
        )
    for image in images:
        _require_guidance(image, manifest)
        if not image.safety.acts and rules is None:
            continue
        for concept in (*image.acting_concepts, *image.acting_filter):
            if texts.says_nothing(concept):
                raise empty_concept(concept)
        if image.safety.text_filter:
            require_some_concepts(image.text_filter)
        if rules is None:
            continue
        policy.require_safety(image.safety, calls=run.table.calls)
        if image.safety.text_filter:
            wanted = filtered_concepts(
                rules.concepts_always, replace(image.safety, concept=None), manifest
            )
            missing = [concept for concept in wanted if concept not in image.text_filter]
            policy.require(
                not missing,
                "a text filter of the caller",
                got=" | ".join(image.text_filter),
                expected=f"also {' | '.join(missing)}",
            )
        if rules.concepts_always:  # a caller's concept could push the other way, and harder
            wanted = different_concepts(rules.concepts_always, None, manifest.safety_concepts)
            policy.require(
                image.concepts == wanted,
                "a safety concept of the caller",
                got=" | ".join(image.concepts),
                expected="none: the policy names the concepts",
            )
        for concept in rules.concepts_always:
            cut = texts.cut(concept)
            policy.require(not cut, "a concept is too long for the model", got=cut, expected="less")
        least, most_scale = rules.guidance_scale
        policy.require(
            least <= image.guidance_scale <= most_scale,
            "guidance scale",
            got=image.guidance_scale,
            expected=f"{least:g} to {most_scale:g}",
        )
        negative = image.negative_prompt
        policy.require(
            rules.negative_prompt == "allow" or negative is None or texts.is_absent(negative),
            "a negative prompt",
            got=negative,
            expected="none",
        )
        # The edit is measured between these texts: between equal texts it is zero.
        for name, text in (("prompt", image.prompt), ("negative prompt", negative)):
            if text is None:
                continue
            same = texts.ids(text) in map(texts.ids, image.acting_concepts)
            policy.require(
                not same, f"a {name} that is the safety concept", got=text, expected="another text"
            )


def _require_guidance(image: ImageRun, manifest: Manifest) -> None:
    """Refuse a negative prompt without guidance, a preset's or the caller's: it could not act.

    Raises:
        InputError: no classifier-free guidance.
    """
    by_preset, classifier_free = image.safety.negative, manifest.guidance == "classifier-free"
    if not (by_preset or image.negative_prompt) or (classifier_free and image.guidance_scale > 1):
        return
    who = f"{image.preset}: " if by_preset else ""
    raise InputError(
        f"{who}a negative prompt has no effect without classifier-free guidance",
        got=f"guidance scale {image.guidance_scale:g}"
        if classifier_free
        else f"{manifest.model.id}, which takes the scale as an input",
        do="choose the preset guard" if by_preset else "leave it out, or choose a preset",
    )


def table_of(run: Run, manifest: Manifest) -> SamplerTable:
    """Compute the sampler table of a run from its settings and the bundle.

    Raises:
        InputError: settings that no sampler has.
    """
    table = run.table
    return table_for(manifest, table.name, run.steps, eta=run.eta, safety_units=table.safety_units)


def _typed(run: Run, images: Sequence[ImageRun]) -> Iterator[tuple[object, type]]:
    """Return every value that safety depends on, with the exact type that it must have."""
    yield run, Run
    yield run.table, SamplerTable
    yield run.table.name, str
    yield run.steps, int
    yield run.eta, float
    yield run.savings, Savings
    yield run.savings.cache_interval, int
    yield run.table.safety_units, str
    for image in images:
        yield image, ImageRun
        yield image.safety, Safety
        yield image.prompt, str
        if image.negative_prompt is not None:
            yield image.negative_prompt, str
        yield image.guidance_scale, float
        yield image.concepts, tuple
        yield image.text_filter, tuple
        yield from ((text, str) for text in (*image.concepts, *image.text_filter))
        yield image.safety.warmup_steps, int
        if image.safety.stop_step is not None:
            yield image.safety.stop_step, int
        for name in ("text_filter", "negative"):
            yield getattr(image.safety, name), bool
        for name in ("scale", "threshold", "momentum_scale", "momentum_beta"):
            yield getattr(image.safety, name), float
