"""`sld-run`: prompts in, pictures out."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from sld_edge.engines.errors import EngineError, InputError
from sld_edge.engines.files import check_writable, write_whole
from sld_edge.engines.providers import choose, survey, survey_table
from sld_edge.runtime.bundle import KEPT_SAFETY, SHALLOW
from sld_edge.runtime.console import EXIT_FAILED, EXIT_OK, run_command
from sld_edge.runtime.escalate import Screening, check_screening, screened_run
from sld_edge.runtime.loop import Step
from sld_edge.runtime.options import RunSettings, parser
from sld_edge.runtime.picture import edit_map_picture, png_from_image
from sld_edge.runtime.pipeline import Callback, Pipeline, Result
from sld_edge.runtime.plan import Request, RunPlan
from sld_edge.runtime.scorers import rule_for, rule_from_text, scorers_from_names, split_paths
from sld_edge.runtime.selftest import self_test

_LOOK_SECONDS = 0.5  # between looks at what safety does: each waits for the device


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `sld-run`; return its exit code."""
    return run_command(lambda: _run(RunSettings(**vars(parser().parse_args(arguments)))))


def _run(settings: RunSettings) -> int:
    if settings.providers:
        print(survey_table(survey()))
        return EXIT_OK
    if settings.self_test:
        return _self_test(settings)
    if not settings.prompt:
        raise InputError("no prompt given", do="see sld-run --help")
    pipeline = Pipeline.load(
        settings.bundle,
        provider=settings.provider,
        plan=settings.engine,
        trust_plan=settings.trust_plan,
        cuda_graph=not settings.no_cuda_graph,
        low_memory=settings.low_memory,
        vae_tiling=settings.vae_tiling,
    )
    with pipeline:
        _make(pipeline, settings)
    return EXIT_OK


def _self_test(settings: RunSettings) -> int:
    name = settings.provider if settings.provider != "auto" else choose({})[0]
    passed = self_test(name, say=print, build=_build_plans)
    return EXIT_OK if passed else EXIT_FAILED


def _build_plans(bundle: Path, flavour: str) -> None:
    """Build a bundle's plans for this device, in a process of its own.

    Building belongs to `export`, which this package knows nothing of, and its memory goes with it.
    """
    command = [sys.executable, "-m", "sld_edge.export.build_cli", str(bundle)]
    done = subprocess.run([*command, "--engine", flavour], check=False)
    if done.returncode != 0:
        raise EngineError(f"the plans for {flavour} could not be built, see above")


def _make(pipeline: Pipeline, settings: RunSettings) -> None:
    prompts = _prompts(settings.prompt)
    request = Request(
        prompts=prompts,
        negative_prompt=settings.negative_prompt,
        safety=settings.safety,
        safety_concept=tuple(settings.safety_concept) if settings.safety_concept else None,
        safety_numbers=_safety_numbers(settings),
        steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        sampler=settings.sampler,
        eta=settings.eta,
        seed=settings.seed,
        rng=settings.rng,
        count=settings.count,
        width=settings.width,
        height=settings.height,
        cache_interval=settings.cache_interval,
        safety_interval=settings.safety_interval,
    )
    plan = pipeline.plan(request)
    screening = _screening(settings)
    if screening is not None:
        check_screening(plan, screening)
    pictures = _picture_paths(settings.output, plan)
    maps = _numbered(settings.edit_map, len(plan.images)) if settings.edit_map else []
    for path in (*pictures, *maps, *([settings.report] if settings.report else [])):
        check_writable(path, force=settings.force)
    if settings.preview:
        check_writable(settings.preview, force=True)
    for line in _notes(pipeline, settings, prompts):
        print(f"note: {line}", file=sys.stderr)
    with _progress(pipeline, plan, settings) as callback:
        size = settings.batch_size
        if screening is None:
            result = pipeline.run(plan, batch_size=size, callback=callback)
        else:
            result = screened_run(pipeline, plan, screening, batch_size=size, callback=callback)
    shown = [index for index, report in enumerate(result.reports) if not _withheld(report)]
    for index in shown:
        write_whole(pictures[index], png_from_image(result.images[index], result.reports[index]))
    for index in shown if maps else ():
        where = edit_map_picture(result.images[index], result.edit_maps[index])
        write_whole(maps[index], png_from_image(where, result.reports[index]))
    if settings.report:
        body = json.dumps({"images": result.reports}, indent=1, ensure_ascii=False) + "\n"
        write_whole(settings.report, body.encode())
    if not settings.quiet:
        _tell(pictures, result)
    for line in _warnings(pictures, result):
        print(f"warning: {line}", file=sys.stderr)


def _screening(settings: RunSettings) -> Screening | None:
    """Load the scorers; None where none is asked for."""
    if not settings.scorer:
        for option, value in (("--on-flag", settings.on_flag), ("--flag-rule", settings.flag_rule)):
            if value is not None:
                raise InputError(f"{option} needs a scorer", do="add --scorer NAME")
        return None
    on_flag = settings.on_flag if settings.on_flag is not None else "report"
    if settings.preview and on_flag != "report":
        raise InputError(
            "--preview would show pictures before they are scored",
            got=f"--on-flag {on_flag}",
            do="leave one of them out",
        )
    names, paths = split_paths(settings.scorer)
    scorers = scorers_from_names(names, paths)
    rule = rule_from_text(settings.flag_rule) if settings.flag_rule is not None else rule_for(names)
    return Screening(scorers=scorers, rule=rule, on_flag=on_flag)


def _withheld(report: Mapping[str, Any]) -> bool:
    return "screening" in report and report["screening"]["done"] == "withheld"


def _warnings(pictures: Sequence[Path], result: Result) -> Iterator[str]:
    """What is said of flagged pictures even where nothing else is."""
    for path, report in zip(pictures, result.reports, strict=True):
        if not report.get("flagged", False):
            continue
        screening = report["screening"]
        if screening["done"] == "withheld":
            yield f"{path} is flagged, and was not written"
        elif screening["done"] == "blurred":
            yield f"{path} is flagged, and was blurred"
        elif screening["on_flag"] == "escalate":
            yield f"{path} is still flagged with {screening['attempts'][-1]['preset']}"
        else:
            yield f"{path} is flagged"


def _notes(pipeline: Pipeline, settings: RunSettings, prompts: Sequence[str]) -> Iterator[str]:
    """What a user should know before the run."""
    if settings.provider == "auto" and pipeline.provider != "cpu" and not settings.quiet:
        yield pipeline.why
    unused = {"vae_encoder"}  # no run needs it yet
    if settings.cache_interval == 1:
        unused.add(SHALLOW)
    if settings.safety_interval == 1:
        unused.add(KEPT_SAFETY)
    for component, why in pipeline.fallbacks.items():
        if component not in unused:
            yield f"{component}: {why}"
    texts = dict.fromkeys((*prompts, settings.negative_prompt or ""), "prompt")
    texts |= dict.fromkeys(settings.safety_concept, "safety concept")
    for text, what in texts.items():
        cut = pipeline.cut_from(text)
        if cut:
            yield f"the model does not read this far into the {what}: “{cut[:120]}”"


def _prompts(words: Sequence[str]) -> tuple[str, ...]:
    if "-" not in words:
        return tuple(words)
    if len(words) > 1:
        raise InputError('"-" reads prompts from standard input and stands alone')
    try:
        lines = sys.stdin.read().splitlines()
    except UnicodeDecodeError as error:
        raise InputError("standard input is not UTF-8 text", got=error.reason) from error
    if not lines:
        raise InputError("no prompt on standard input", expected="one a line")
    return tuple(lines)


def _safety_numbers(settings: RunSettings) -> dict[str, float]:
    given = {
        "scale": settings.safety_scale,
        "warmup_steps": settings.safety_warmup,
        "threshold": settings.safety_threshold,
        "momentum_scale": settings.safety_momentum_scale,
        "momentum_beta": settings.safety_momentum_beta,
    }
    return {name: value for name, value in given.items() if value is not None}


def _picture_paths(output: Path | None, plan: RunPlan) -> list[Path]:
    """One path a picture: as named, numbered if there are several; or named by prompt and seed."""
    if output is not None and not output.is_dir():
        if output.suffix.lower() != ".png":
            raise InputError("--output", got=output, expected="a name ending in .png, or a folder")
        return _numbered(output, len(plan.images))
    folder = output if output is not None else Path()
    names = [f"{_slug(image.prompt)}-{image.seed}" for image in plan.images]
    unique = [
        f"{name}-{names[:index].count(name) + 1}" if names.count(name) > 1 else name
        for index, name in enumerate(names)
    ]
    return [folder / f"{name}.png" for name in unique]


def _slug(prompt: str) -> str:
    words = re.findall(r"\w+", prompt.lower())
    return "-".join(words)[:60].strip("-") or "image"


def _numbered(path: Path, count: int) -> list[Path]:
    if count == 1:
        return [path]
    digits = len(str(count))
    return [path.with_stem(f"{path.stem}-{k:0{digits}d}") for k in range(1, count + 1)]


@contextmanager
def _progress(pipeline: Pipeline, plan: RunPlan, settings: RunSettings) -> Iterator[Callback]:
    """Give a callback that moves a progress bar and rewrites the preview."""
    calls = plan.table.calls
    every = max(1, calls // 5)
    looked = 0.0
    with tqdm(
        total=None, unit="call", disable=settings.quiet or None, leave=False, file=sys.stderr
    ) as bar:

        def watch(step: Step) -> None:
            nonlocal looked
            if bar.total is None:
                batches = -(-len(plan.images) // len(step.latents))
                bar.reset(total=calls * batches)
            if not bar.disable and time.monotonic() - looked > _LOOK_SECONDS:
                looked = time.monotonic()
                bar.set_postfix_str(f"safety edits {step.share.mean():.0%}", refresh=False)
            bar.update()
            if settings.preview and (step.index + 1) % every == 0:
                picture = Image.fromarray(pipeline.decode(step.latents[:1])[0])
                write_whole(settings.preview, png_from_image(picture))

        yield watch


def _tell(pictures: Sequence[Path], result: Result) -> None:
    """Print one line a picture: where it is and what safety did."""
    for path, report in zip(pictures, result.reports, strict=True):
        if not _withheld(report):
            print(f"{path}  {_story(report['safety'])}{_verdict(report)}")


def _story(safety: Mapping[str, object]) -> str:
    if safety["preset"] == "off":
        return "safety off"
    return f"safety {safety['preset']}: edited {safety['mean_share']:.0%} of the latent on average"


def _verdict(report: Mapping[str, Any]) -> str:
    """What the scorers' rule looked at, and how the picture came to be."""
    if "screening" not in report:
        return ""
    screening = report["screening"]
    thresholds = {c.score: c.threshold for c in rule_from_text(screening["rule"])}
    scores = ", ".join(
        f"{key} {report['scores'][key]:{'.3f' if abs(threshold) >= 0.01 else '.3g'}}"
        for key, threshold in thresholds.items()
    )
    presets = [attempt["preset"] for attempt in screening["attempts"]]
    story = f" after {', '.join(presets[:-1])}" if len(presets) > 1 else ""
    return f"{story}; {scores}"


if __name__ == "__main__":
    sys.exit(main())
