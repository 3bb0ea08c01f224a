"""`sld-run`: prompts in, pictures out."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from sld_edge.engines import cache
from sld_edge.engines.errors import InputError, OutputError
from sld_edge.engines.files import check_writable, write_whole
from sld_edge.engines.providers import survey, survey_table
from sld_edge.runtime.commands.arguments import parsed
from sld_edge.runtime.commands.certify import run_certify, run_self_test
from sld_edge.runtime.commands.console import EXIT_FLAGGED, EXIT_OK, run_command
from sld_edge.runtime.commands.options import RunSettings, parser
from sld_edge.runtime.denoise.loop import Step
from sld_edge.runtime.executor import Callback, Progress
from sld_edge.runtime.manifest import DECODER, PREVIEW_DECODER, SHALLOW
from sld_edge.runtime.picture import grey_from_edit_map, picture_with_heat, png_from_image
from sld_edge.runtime.pipeline import Pipeline
from sld_edge.runtime.policy_file import machine_policy
from sld_edge.runtime.report import safety_words
from sld_edge.runtime.request import Framing, Request, Run, Sampling, Savings
from sld_edge.runtime.result import Result
from sld_edge.runtime.scorers import rule_for, rule_from_text, scorers_from_names, split_paths
from sld_edge.runtime.screening import Screening


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `sld-run`; return its exit code."""
    return run_command(lambda: _run(parsed(parser(), RunSettings, arguments)))


def _run(settings: RunSettings) -> int:
    if settings.providers:
        print(survey_table(survey()))
        return EXIT_OK
    if settings.cache:
        print(cache.text())
        return EXIT_OK
    if settings.clear_cache:
        count, freed = cache.clear()
        print(f"{count} entries removed, {freed / 1e6:.1f} MB freed")
        return EXIT_OK
    if settings.policy:
        print(machine_policy().text())
        return EXIT_OK
    if settings.self_test:
        return run_self_test(settings)
    if settings.certify is not None:
        return run_certify(settings, settings.certify)
    if settings.minutes != RunSettings.minutes:
        raise InputError("--minutes is the time for --certify", do="leave it out")
    if not settings.prompt:
        raise InputError("no prompt given", do="see sld-run --help")
    pipeline = Pipeline.load(
        settings.bundle,
        provider=settings.provider,
        device=settings.device,
        cpu_precision=settings.cpu_precision,
        plan=settings.engine,
        trust_plan=settings.trust_plan,
        cuda_graph=settings.cuda_graph,
        low_memory=settings.low_memory,
        vae=settings.vae,
        vae_tiling=settings.vae_tiling,
        quiet=settings.quiet,
    )
    with pipeline:
        flagged = _make(pipeline, settings)
    return EXIT_FLAGGED if flagged else EXIT_OK


def _make(pipeline: Pipeline, settings: RunSettings) -> bool:
    """Make the pictures and write them; return whether any picture is flagged."""
    prompts = _prompts(settings.prompt)
    request = Request(
        prompts=prompts,
        negative_prompt=settings.negative_prompt,
        safety=settings.safety,
        safety_concept=tuple(settings.safety_concept) if settings.safety_concept else None,
        safety_numbers=_safety_numbers(settings),
        text_filter=_text_filter(settings),
        guidance_scale=settings.guidance_scale,
        seed=settings.seed,
        count=settings.count,
        width=settings.width,
        height=settings.height,
        sampling=Sampling(
            steps=settings.steps,
            sampler=settings.sampler,
            eta=settings.eta,
            rng=settings.rng,
            safety_units=settings.safety_units,
        ),
        savings=Savings(cache_interval=settings.cache_interval),
        framing=Framing(
            original_size=settings.original_size or None,
            crop=settings.crop or (0, 0),
            target_size=settings.target_size or None,
        ),
    )
    run = pipeline.resolve(request)
    screening = _screening(settings)
    pipeline.check(run, screening=screening)
    pictures = _picture_paths(settings.output, run)
    maps = _numbered(settings.edit_map, len(run.images)) if settings.edit_map else []
    others = [path for path in (settings.report, settings.preview) if path is not None]
    _check_different((*pictures, *maps, *others))
    for path in (*pictures, *maps, *([settings.report] if settings.report else [])):
        check_writable(path, force=settings.force)
    if settings.preview:
        check_writable(settings.preview, force=True)
    for line in _notes(pipeline, settings, run):
        print(f"note: {line}", file=sys.stderr)
    with _progress(settings) as progress:
        result = pipeline.run(
            run,
            screening=screening,
            batch_size=settings.batch_size,
            callback=_preview(pipeline, settings.preview) if settings.preview else None,
            progress=progress,
        )
    _write(result, pictures, maps, settings)
    if not settings.quiet:
        _print_pictures(pictures, result)
    slowed = (f"{component}: {why}" for component, why in pipeline.slowed.items())
    for line in (*slowed, *_warnings(pictures, result)):
        print(f"warning: {line}", file=sys.stderr)
    return any(report.get("flagged", False) for report in result.reports)


def _write(
    result: Result, pictures: Sequence[Path], maps: Sequence[Path], settings: RunSettings
) -> None:
    """Write pictures, edit maps and report; a withheld picture and its edit map are not written."""
    for index, (image, report) in enumerate(zip(result.images, result.reports, strict=True)):
        if _withheld(report):
            for path in (pictures[index], *maps[index : index + 1]):
                path.unlink(missing_ok=True)  # a picture of an earlier run
            continue
        write_whole(pictures[index], png_from_image(image, report), replace=settings.force)
        if maps:
            where = picture_with_heat(image, grey_from_edit_map(result.edit_maps[index]))
            write_whole(maps[index], png_from_image(where, report), replace=settings.force)
    if settings.report:
        body = json.dumps({"images": result.reports}, indent=1, ensure_ascii=False) + "\n"
        write_whole(settings.report, body.encode(), replace=settings.force)


def _check_different(paths: Sequence[Path]) -> None:
    """Refuse two outputs with the same name: the second would overwrite the first."""
    seen: set[str] = set()
    for path in paths:
        name = os.path.normcase(os.path.realpath(path))
        if name in seen:
            raise OutputError(f"two outputs are called {path}", do="give them different names")
        seen.add(name)


def _screening(settings: RunSettings) -> Screening | None:
    """Load the scorers of the command line; None without --scorer."""
    if not settings.scorer:
        options = {
            "--on-flag": settings.on_flag,
            "--flag-rule": settings.flag_rule,
            "--report-recipe": settings.report_recipe,
        }
        for option, value in options.items():
            if value is not None:
                raise InputError(f"{option} needs a scorer", do="add --scorer NAME")
        return None
    if settings.preview and settings.on_flag not in (None, "report"):
        raise InputError(
            "--preview would show pictures before they are scored",
            got=f"--on-flag {settings.on_flag}",
            do="leave one of them out",
        )
    names, paths = split_paths(settings.scorer)
    scorers = scorers_from_names(names, paths)
    rule = rule_from_text(settings.flag_rule) if settings.flag_rule is not None else rule_for(names)
    return Screening(
        scorers=scorers,
        rule=rule,
        on_flag=settings.on_flag,
        report_recipe=settings.report_recipe,
    )


def _withheld(report: Mapping[str, Any]) -> bool:
    return "screening" in report and report["screening"]["done"] == "withheld"


def _warnings(pictures: Sequence[Path], result: Result) -> Iterator[str]:
    """Return warnings about flagged and unsafe pictures; they are printed even with --quiet."""
    for path, report in zip(pictures, result.reports, strict=True):
        safety = report["safety"]
        if safety["preset"] != "off" and not safety["acted"]:
            yield (
                f"{path}: safety had no effect on this picture ({safety['preset']}, strongest edit "
                f"{safety['max_strength']:.1e} of the guidance)"
            )
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


def _notes(pipeline: Pipeline, settings: RunSettings, run: Run) -> Iterator[str]:
    """Return notes for the user before the run."""
    if settings.provider == "auto" and pipeline.provider != "cpu" and not settings.quiet:
        yield pipeline.why
    unused = {DECODER if settings.vae == "tiny" else PREVIEW_DECODER}
    if settings.preview:
        unused.discard(PREVIEW_DECODER)
    if settings.cache_interval == 1:
        unused.add(SHALLOW)
    for component, why in pipeline.fallbacks.items():
        if component not in unused:
            yield f"{component}: {why}"
    if settings.safety is None and not any(image.safety.acts for image in run.images):
        yield "safety: off (the bundle's default)"
    texts: dict[str, str] = {}
    for image in run.images:
        texts |= {image.prompt: "prompt", image.negative_prompt or "": "negative prompt"}
    for image in run.images:
        texts |= dict.fromkeys(image.acting_concepts, "safety concept")
        if image.prompt in image.edited_concepts and not image.acting_filter:
            yield "the prompt is the safety concept: safety has nothing to edit"
    for text, name in texts.items():
        cut = pipeline.cut_from(text)
        if cut:
            yield f"the model does not read the end of the {name}: “{cut[:120]}”"


def _prompts(words: Sequence[str]) -> tuple[str, ...]:
    if "-" not in words:
        return tuple(words)
    if len(words) > 1:
        raise InputError('"-" reads prompts from standard input; no other prompt is possible')
    try:
        lines = sys.stdin.read().splitlines()
    except UnicodeDecodeError as error:
        raise InputError("standard input is not UTF-8 text", got=error.reason) from error
    if not lines:
        raise InputError("no prompt on standard input", expected="a prompt in each line")
    return tuple(lines)


def _safety_numbers(settings: RunSettings) -> dict[str, float]:
    given = {
        "scale": settings.safety_scale,
        "warmup_steps": settings.safety_warmup,
        "threshold": settings.safety_threshold,
        "momentum_scale": settings.safety_momentum_scale,
        "momentum_beta": settings.safety_momentum_beta,
        "stop_step": _stop_step(settings.safety_stop),
    }
    return {name: value for name, value in given.items() if value is not None}


def _stop_step(value: float | None) -> float | None:
    """Return a whole number as an int: it counts calls."""
    return int(value) if value is not None and value >= 1 and value.is_integer() else value


def _text_filter(settings: RunSettings) -> tuple[str, ...] | bool | None:
    if settings.text_filter and settings.no_text_filter:
        raise InputError("both --text-filter and --no-text-filter", do="leave one of them out")
    if settings.no_text_filter:
        return False
    return settings.text_filter or None


def _picture_paths(output: Path | None, run: Run) -> list[Path]:
    """Return a path for each picture: `output`, numbered; or named by prompt and seed."""
    if output is not None and not output.is_dir():
        if output.suffix.lower() != ".png":
            raise InputError("--output", got=output, expected="a name ending in .png, or a folder")
        return _numbered(output, len(run.images))
    folder = output if output is not None else Path()
    names = [f"{_slug(image.prompt)}-{image.seed}" for image in run.images]
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
def _progress(settings: RunSettings) -> Iterator[Progress]:
    """Show a progress bar; give the function that moves it."""
    with tqdm(
        total=None, unit="call", disable=settings.quiet or None, leave=False, file=sys.stderr
    ) as bar:

        def watch(done: int, total: int) -> None:
            if bar.total != total:
                bar.reset(total=total)
            bar.update(done - bar.n)

        yield watch


def _preview(pipeline: Pipeline, path: Path) -> Callback:
    """Return a callback that writes the unfinished image to a picture, five times in a run."""

    def watch(step: Step) -> None:
        if (step.index + 1) % max(1, step.calls // 5) == 0:
            picture = Image.fromarray(pipeline.decode(step.latents[:1], preview=True)[0])
            write_whole(path, png_from_image(picture))

    return watch


def _print_pictures(pictures: Sequence[Path], result: Result) -> None:
    """Print a line for each picture: its path and the effect of safety."""
    for path, report in zip(pictures, result.reports, strict=True):
        if not _withheld(report):
            print(f"{path}  {safety_words(report)}{_verdict(report)}")


def _verdict(report: Mapping[str, Any]) -> str:
    """Return the scores that the rule uses, and the presets of earlier attempts."""
    if "screening" not in report:
        return ""
    screening = report["screening"]
    thresholds = {c.score: c.threshold for c in rule_from_text(screening["rule"])}
    scores = ", ".join(
        f"{key} {report['scores'][key]:{'.3f' if abs(threshold) >= 0.01 else '.3g'}}"
        for key, threshold in thresholds.items()
    )
    presets = [attempt["preset"] for attempt in screening["attempts"]]
    earlier = f" after {', '.join(presets[:-1])}" if len(presets) > 1 else ""
    return f"{earlier}; {scores}"


if __name__ == "__main__":
    sys.exit(main())
