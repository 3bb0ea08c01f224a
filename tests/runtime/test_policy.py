"""A policy raises or refuses; more than 200 ways around it were tried, and none lowers anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from oracles.requests import flat_request
from sld_edge.engines.errors import InputError, PolicyError, UserError
from sld_edge.runtime import (
    PRESETS,
    ImageRun,
    Pipeline,
    Request,
    Result,
    Run,
    Safety,
    Savings,
    policy_file,
)
from sld_edge.runtime import policy as policies
from sld_edge.runtime.commands.options import parser
from sld_edge.runtime.commands.run import main
from sld_edge.runtime.policy import NO_POLICY, Policy, SafetyRules
from sld_edge.runtime.policy_file import machine_policy, policy_from_json
from sld_edge.runtime.safety import safety_from_preset
from sld_edge.runtime.samplers import SamplerTable
from sld_edge.runtime.scorers import rule_from_text
from sld_edge.runtime.scorers.miniworld import JUDGE, MiniWorld
from sld_edge.runtime.screening import Screening

ALWAYS = ["a skull", "death, horror"]
SAFETY: dict[str, Any] = {
    "minimum": "strong",
    "custom": "refuse",
    "concepts_always": ALWAYS,
    "cache_interval_max": 2,
    "guidance_scale": [1, 20],
    "negative_prompt": "refuse",
}
SCREENING = {
    "scorers": {"miniworld": JUDGE.sha256},
    "rule_at_least": "miniworld.skull>=0.5",
    "on_flag": "escalate-withhold",
    "previews": "forbid",
    "report_recipe": "omit",
}
FAST: dict[str, Any] = {"steps": 4, "sampler": "ddim"}
Attempt = Callable[[Pipeline], "Result | None"]


def written(folder: Path, **body: Any) -> Path:
    file = folder / "policy.json"
    file.write_text(json.dumps({"format": "sld-edge-policy", "format_version": 1, **body}))
    file.chmod(0o644)
    return file


def in_force(patch: pytest.MonkeyPatch, folder: Path, **body: Any) -> Path:
    file = written(folder, **body)
    patch.setattr(policies, "POLICY_FILE", file)
    patch.setattr(policy_file, "_OWNER", os.geteuid())
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("policies")


@pytest.fixture(scope="module", params=["refuse", "stronger"])
def guarded(request: pytest.FixtureRequest, folder: Path) -> Iterator[Pipeline]:
    """A pipeline under a policy of safety alone."""
    with pytest.MonkeyPatch.context() as patch:
        in_force(patch, folder, safety={**SAFETY, "custom": request.param})
        loaded = Pipeline.load(provider="cpu")
    with loaded as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def screened(folder: Path) -> Iterator[Pipeline]:
    """A pipeline under a policy of safety and screening."""
    with pytest.MonkeyPatch.context() as patch:
        in_force(patch, folder, safety=SAFETY, screening=SCREENING)
        loaded = Pipeline.load(provider="cpu")
    with loaded as pipeline:
        yield pipeline


def assert_not_lowered(result: Result, digest: str | None) -> None:
    """Every picture is at least as safe as the policy says, by the numbers of its report."""
    for report in result.reports:
        safety, calls = report["safety"], len(report["calls"])
        strong = PRESETS["strong"]
        assert safety["scale"] >= strong.scale
        assert safety["threshold"] >= strong.threshold
        assert safety["warmup_steps"] <= strong.warmup * calls // 50
        assert safety["momentum_scale"] >= strong.momentum_scale
        assert safety["momentum_beta"] == strong.momentum_beta
        assert safety["stop_step"] is None or safety["stop_step"] >= calls
        if safety["text_filter"] is not None:
            assert {"skull", "death", "horror"} <= set(safety["text_filter"]["concepts"])
        assert [entry["concept"] for entry in safety["concepts"]][:2] == ALWAYS
        assert len(safety["concepts"]) == 3  # and the bundle's own
        assert report["safety"]["units"] == "noise"
        assert report["cache_interval"] <= 2
        assert 1 <= report["guidance_scale"] <= 20
        assert (report["negative_prompt"] or "").strip() == ""
        assert report["policy"]["sha256"] == digest
        edits = [call["strength"] for call in report["calls"]]
        assert max(edits) > 0.01 or report["flagged"] is False


# --- what a caller can ask for --------------------------------------------------------------------


class SlyFloat(float):
    """Compares as whatever is wanted."""

    def __ge__(self, other: object) -> bool:
        return True

    __le__ = __eq__ = __gt__ = __ge__
    __hash__ = float.__hash__


class SlyInt(int):
    """Says one number when asked, and is another."""

    def __index__(self) -> int:
        return 0

    def __le__(self, other: object) -> bool:
        return True

    __lt__ = __ge__ = __gt__ = __le__


class SlyText(str):
    """Equal to everything."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = str.__hash__


class SlySafety(Safety):
    """Has the numbers of strong for those who look, and does not act."""

    @property
    def acts(self) -> bool:
        return False


class SlyRequest(Request):
    """Asks for strong the first time it is read, and for off ever after."""

    def __getattribute__(self, name: str) -> Any:
        if name == "safety":
            count = object.__getattribute__(self, "__dict__").setdefault("_count", [0])
            count[0] += 1
            return "strong" if count[0] == 1 else "off"
        return super().__getattribute__(name)


STRONG: dict[str, Any] = {"scale": 2000.0, "warmup_steps": 0, "threshold": 0.025}
STRONG |= {"momentum_scale": 0.5, "momentum_beta": 0.7}
MAX = {**STRONG, "scale": 5000.0, "threshold": 1.0}
LOWER: dict[str, list[Any]] = {
    "scale": [0, 0.001, 1, 200, 1000, 1999.9, SlyFloat(1), np.float64(3)],
    "warmup_steps": [1, 2, SlyInt(2), np.int64(2)],
    "threshold": [0, 0.01, 0.0249, SlyFloat(0)],
    "momentum_scale": [0, 0.3, 0.49, SlyFloat(0)],
    "momentum_beta": [0, 0.4, 0.69, 0.71, 0.99, 0.999999, SlyFloat(0.9)],
}
NUMBERS: list[dict[str, Any]] = [
    {**STRONG, name: value} for name, values in LOWER.items() for value in values
]
_PRESETS: tuple[Any, ...] = (0, False, {}, b"off", 1.0, SlyText("off"), SlyText("weak"))
ASKED: list[dict[str, Any]] = [
    *(
        {"safety": value}
        for value in ("off", "weak", "medium", "OFF", " off", "off ", "", "custom")
    ),
    *({"safety": value} for value in _PRESETS),
    *({"safety": ["strong", value], "prompt": ["a", "b"]} for value in ("off", "weak", "medium")),
    *({"safety": [value, "max"], "prompt": ["a", "b"]} for value in ("off", "weak", "medium")),
    *({"safety": ["max", "max", low], "prompt": ["a", "b", "c"]} for low in ("off", "medium")),
    {"safety": []},
    {"safety": [None, None], "prompt": ["a", "b"]},
    *({"safety": Safety(**numbers)} for numbers in NUMBERS),
    *({"safety": ["max", Safety(**n)], "prompt": ["a", "b"]} for n in NUMBERS[::3]),
    {"safety": SlySafety(**STRONG)},
    {"safety": SlySafety(scale=0)},
    {"safety": Safety(**{**STRONG, "concept": "clouds"})},
    {"safety": Safety(**{**STRONG, "concept": ("clouds", *ALWAYS)})},
    *(
        {"safety_concept": value}
        for value in (
            *("", " ", "<|endoftext|>", "clouds", "a living person", "no skull", "life, joy"),
            *(ALWAYS[0], ALWAYS[1], tuple(ALWAYS), (*ALWAYS, "life"), ("life", *ALWAYS)),
            *((), [], ["life"], [("life",)], 3, b"x", SlyText("life"), (SlyText("a skull"),)),
            *(("life",) * 16, ("life",) * 40, tuple(map(str, range(16)))),
        )
    ),
    *({"safety": value} for value in ("early", "guard", "guard-lite", "guard-max")),
    *(
        {"safety": safety, "text_filter": value}
        for safety in ("max", "guard", "guard-max")
        for value in (False, True, "clouds", ("a skull",), "", (), 3, ALWAYS[0], "; ".join(ALWAYS))
    ),
    *({"safety": Safety(**{**STRONG, "stop_step": value})} for value in (1, 2, 0.5, 99)),
    {"safety": Safety(**{**STRONG, "text_filter": True})},
    {"safety": Safety(scale=0, warmup_steps=0, text_filter=True, negative=True)},
    *({"safety_units": value} for value in ("raw", "RAW", "", None, 1, SlyText("raw"))),
    *({"cache_interval": value} for value in (3, 4, 0, -1, True, "2", SlyInt(4), np.int64(4))),
    *(
        {"guidance_scale": value}
        for value in (0, 0.5, 0.999, 21, 100, -1, 1e20, float("nan"), "7", SlyFloat(0.1), True)
    ),
    {"guidance_scale": [7.5, 0.5], "prompt": ["a", "b"]},
    {"guidance_scale": np.float32(0.1)},
    *(
        {"negative_prompt": value}
        for value in (
            *("a skull", " a  skull ", "A SKULL", "death, horror", "skull, death, horror"),
            *("clouds", "life", ["a skull"], SlyText("a skull"), 3, "a skull<|endoftext|>"),
        )
    ),
    {"negative_prompt": ["", "a skull"], "prompt": ["a", "b"]},
    *({"prompt": text} for text in (*ALWAYS, "A Skull", " a skull ", "skull, death, horror")),
    {"prompt": ["a star", "a skull"]},
    {"latents": np.zeros((1, 4, 16, 16), np.float32)},
    {"latents": np.full((1, 4, 16, 16), 50, np.float32)},
    *({"steps": value} for value in (1, 2, 3, 7)),
    *({"sampler": value, "steps": 4} for value in ("lcm", "euler-a", "pndm", "unipc", "dpm++2m")),
    {"count": 3, "safety": "off"},
    {"batch_size": 2, "prompt": ["a", "b"], "safety": ["off", "max"]},
    {},
    {"safety": "strong"},
    {"safety": "max"},
    {"safety": None, "cache_interval": 2},
]
PLANNED: dict[str, Callable[[Run], Run]] = {}


def changed(name: str) -> Callable[[Callable[[Run], Run]], None]:
    def note(change: Callable[[Run], Run]) -> None:
        PLANNED[name] = change

    return note


def with_image(plan: Run, **changes: Any) -> Run:
    return replace(plan, images=(replace(plan.images[0], **changes), *plan.images[1:]))


def with_safety(plan: Run, **changes: Any) -> Run:
    """Change numbers behind the dataclass's back."""
    for name, value in changes.items():
        object.__setattr__(plan.images[0].safety, name, value)
    return plan


for _preset in ("off", "weak", "medium"):
    _numbers = replace(PRESETS[_preset], warmup_steps=0)
    changed(f"numbers of {_preset}, called strong")(
        lambda plan, n=_numbers: with_image(plan, safety=n)  # type: ignore[misc]
    )
_value: Any
for _name, _values in LOWER.items():
    for _value in _values:
        changed(f"{_name} set to {_value!r} ({type(_value).__name__})")(
            lambda plan, n=_name, v=_value: with_safety(plan, **{n: v})  # type: ignore[misc]
        )
changed("sly safety")(lambda plan: with_image(plan, safety=SlySafety(**STRONG)))
changed("no concepts")(lambda plan: with_image(plan, concepts=()))
changed("one concept")(lambda plan: with_image(plan, concepts=(ALWAYS[0],)))
changed("another concept")(lambda plan: with_image(plan, concepts=(*ALWAYS, "life")))
changed("an empty concept")(lambda plan: with_image(plan, concepts=(*ALWAYS, " ")))
changed("concepts in a list")(lambda plan: with_image(plan, concepts=list(ALWAYS)))
changed("sly concepts")(lambda plan: with_image(plan, concepts=(SlyText("a"), SlyText("b"), "c")))
changed("a negative prompt")(lambda plan: with_image(plan, negative_prompt="a skull"))
changed("a sly negative prompt")(lambda plan: with_image(plan, negative_prompt=SlyText("a skull")))
changed("guidance 0")(lambda plan: with_image(plan, guidance_scale=0.0))
changed("sly guidance")(lambda plan: with_image(plan, guidance_scale=SlyFloat(0)))
changed("guidance NaN")(lambda plan: with_image(plan, guidance_scale=float("nan")))
changed("cache interval")(lambda plan: replace(plan, savings=Savings(cache_interval=4)))
changed("sly interval")(lambda plan: replace(plan, savings=Savings(cache_interval=SlyInt(4))))
changed("sly savings")(lambda plan: replace(plan, savings=SlySavings()))
changed("raw units")(lambda plan: replace(plan, table=replace(plan.table, safety_units="raw")))
changed("sly units")(
    lambda plan: replace(plan, table=replace(plan.table, safety_units=SlyText("raw")))  # type: ignore[arg-type]
)
changed("another kind of output")(
    lambda plan: replace(plan, table=replace(plan.table, prediction_type="v_prediction"))
)
changed("no signal left")(
    lambda plan: replace(plan, table=replace(plan.table, alpha=plan.table.alpha * 1e-9))
)
changed("a sly name")(lambda plan: replace(plan, table=replace(plan.table, name=SlyText("ddim"))))
changed("a number of steps")(lambda plan: replace(plan, steps=plan.steps + 1))
changed("sly eta")(lambda plan: replace(plan, eta=SlyFloat(0)))


@changed("calls that do nothing, so that the warm-up is as long as the picture takes")
def _longer(plan: Run) -> Run:
    table, extra = plan.table, 6 * plan.table.calls
    zeros, ones = np.zeros(extra), np.ones(extra)
    longer = replace(
        table,
        timesteps=np.append(table.timesteps, ones),
        c_in=np.append(table.c_in, ones),
        p=np.append(table.p, zeros),
        q=np.append(table.q, ones),
        a=np.append(table.a, ones),
        b=np.concatenate([table.b, np.zeros((extra, 5))]),
        s=np.append(table.s, zeros),
        alpha=np.append(table.alpha, ones),
    )
    safety = safety_from_preset("strong", calls=longer.calls)
    return replace(with_image(plan, safety=safety), table=longer)


@changed("a table changed in place")
def _in_place(plan: Run) -> Run:
    plan.table.q[:] /= 2
    return plan


changed("no policy")(lambda plan: replace(plan, policy=None))
changed("another policy")(lambda plan: replace(plan, policy="0" * 64))
changed("the prompt that is the concept")(lambda plan: with_image(plan, prompt="a skull"))


class SlySavings(Savings):
    """Says something else each time."""


class SlyImage(ImageRun):
    """Says it has no concepts that act."""

    @property
    def acting_concepts(self) -> tuple[str, ...]:
        return ()


class SlyTable(SamplerTable):
    """Says that there are more calls, so that a warm-up looks short."""

    @property
    def calls(self) -> int:
        return 1000


class SlyRun(Run):
    """A run of the caller's own making."""


def copy_as(kind: type, value: Any, **changes: Any) -> Any:
    names = value.__dataclass_fields__
    return kind(**{**{name: getattr(value, name) for name in names}, **changes})


changed("a sly image")(lambda plan: replace(plan, images=(copy_as(SlyImage, plan.images[0]),)))
changed("a sly table")(lambda plan: replace(plan, table=copy_as(SlyTable, plan.table)))
changed("a sly run")(lambda plan: copy_as(SlyRun, plan))
changed("no images")(lambda plan: replace(plan, images=()))

_OFF = ["--safety", "off"]
COMMANDS: list[list[str]] = [
    _OFF,
    *([*_OFF, "--safety", value] for value in ("weak", "medium")),
    *(
        ["--safety", "max", option, value]
        for option, value in (
            *(("--safety-scale", "0"), ("--safety-scale", "1"), ("--safety-warmup", "2")),
            *(("--safety-warmup", "100"), ("--safety-threshold", "0")),
            *(("--safety-momentum-scale", "0"), ("--safety-momentum-beta", "0.1")),
            *(("--safety-stop", "1"), ("--safety-stop", "0.5"), ("--text-filter", "clouds")),
            *(("--safety-concept", "life"), ("--safety-concept", ""), ("--safety-units", "raw")),
            *(("--cache-interval", "3"), ("--negative-prompt", "a skull")),
            *(("--guidance-scale", "0"), ("--guidance-scale", "50")),
        )
    ),
    ["--safety", "guard-max", "--no-text-filter"],
    ["--safety", "guard", "--no-text-filter"],
    ["--original-size", "512", "256", "--crop", "8", "8", "--target-size", "64", "64"],
    *(
        [option, value]
        for option, value in (
            *(("--steps", "1"), ("--sampler", "lcm"), ("--eta", "1"), ("--rng", "philox")),
            *(("--seed", "9"), ("--count", "2"), ("--width", "32"), ("--height", "96")),
            *(("--batch-size", "2"), ("--vae-tiling", "on"), ("--provider", "cpu")),
            *(("--vae", "tiny"), ("--cpu-precision", "bf16"), ("--device", "CPU")),
            *(("--scorer", "activation"), ("--flag-rule", "miniworld.skull>=9")),
            *(("--report-recipe", "keep"), ("--on-flag", "report"), ("--preview", "p.png")),
            *(("--edit-map", "m.png"), ("--engine", "x.plan"), ("--bundle", "nowhere")),
        )
    ),
    ["--trust-plan"],
    ["--low-memory"],
    ["--provider", "openvino"],
    ["--no-cuda-graph"],
    ["--force"],
]


def test_more_than_200_ways_are_tried() -> None:
    assert len(ASKED) + len(PLANNED) + len(COMMANDS) > 200


def told(value: Any) -> str:
    return ascii(value)[:70]


@pytest.mark.parametrize("asked", ASKED, ids=told)
def test_asked_in_python(asked: Mapping[str, Any], guarded: Pipeline) -> None:
    prompt = asked.get("prompt", "a red star")
    rest = {name: value for name, value in asked.items() if name != "prompt"}
    try:
        result = guarded(prompt, **{**FAST, **rest})
    except UserError:
        return
    assert_not_lowered(result, guarded.policy.digest)


@pytest.mark.parametrize("name", list(PLANNED))
def test_a_resolved_run_that_was_changed(name: str, guarded: Pipeline) -> None:
    plan = guarded.resolve(flat_request(prompts=("a red star",), **FAST))
    forged = PLANNED[name](plan)
    for run in (guarded.run, lambda p: list(guarded.steps(p))):
        try:
            result = run(forged)
        except UserError:
            continue
        assert isinstance(result, Result), "steps went on"
        assert_not_lowered(result, guarded.policy.digest)


def test_images_of_another_run_in_steps(guarded: Pipeline) -> None:
    plan = guarded.resolve(flat_request(prompts=("a red star",), **FAST))
    weak = [replace(plan.images[0], safety=replace(PRESETS["off"], warmup_steps=0))]
    with pytest.raises(PolicyError):
        guarded.steps(plan, weak)


def test_changed_while_it_runs(guarded: Pipeline) -> None:
    plan = guarded.resolve(flat_request(prompts=("a red star",), **FAST))
    wanted = guarded.run(guarded.resolve(flat_request(prompts=("a red star",), **FAST)))

    def switch_off(_: object) -> None:
        object.__setattr__(plan.images[0].safety, "scale", 0.0)
        object.__setattr__(plan.savings, "cache_interval", 4)
        plan.table.q[:] = plan.table.alpha[:] = 0

    result = guarded.run(plan, callback=switch_off)
    np.testing.assert_array_equal(result.latents, wanted.latents)
    assert_not_lowered(result, guarded.policy.digest)


@pytest.mark.parametrize("name", ["safety", "safety_numbers", "negative_prompt"])
def test_a_request_that_was_changed(name: str, guarded: Pipeline) -> None:
    request = flat_request(prompts=("a red star",), **FAST)
    value = {"safety": "off", "safety_numbers": {"scale": 1.0}, "negative_prompt": "a skull"}
    object.__setattr__(request, name, value[name])
    with pytest.raises(PolicyError):
        guarded.resolve(request)


def test_a_request_that_changes_its_mind(guarded: Pipeline) -> None:
    plain = vars(flat_request(prompts=("a red star",), **FAST))
    result = guarded.run(guarded.resolve(SlyRequest(**plain)))
    assert_not_lowered(result, guarded.policy.digest)


def test_what_is_not_said_is_as_strong_as_the_minimum_and_is_told(guarded: Pipeline) -> None:
    """Of the bundle's guard and the policy's strong, neither has all that the other has."""
    report = guarded("a red star", **FAST).reports[0]
    assert report["safety"]["preset"] == "guard-max"
    assert report["policy"] == {
        "sha256": guarded.policy.digest,
        "raised": ["safety", "safety_concept"],
    }
    assert guarded("a red star", safety="max", **FAST).reports[0]["policy"]["raised"] == [
        "safety_concept"
    ]


# --- a policy whose minimum has a text filter -----------------------------------------------------

FILTERED = {**SAFETY, "minimum": "guard", "concepts_always": ["a skull"], "custom": "stronger"}
WANTED = {"skull", "death", "horror"}
FILTER_ASKED: list[dict[str, Any]] = [
    *({"safety": preset} for preset in PRESETS),
    {},
    *(
        {"safety": preset, "text_filter": value}
        for preset in ("max", "guard", "guard-max")
        for value in (False, True, "clouds", ("skull", "death"), "a skull; death; horror; x")
    ),
    *({"safety": Safety(**{**MAX, **changes})} for changes in ({}, {"text_filter": True})),
    *(
        {"safety": Safety(**{**MAX, "text_filter": True, "stop_step": value})}
        for value in (1, 2, 0.1, 0.3)
    ),
    *({"safety_concept": value} for value in ("clouds", ("a skull", "clouds"))),
]
FILTER_PLANNED: dict[str, Callable[[Run], Run]] = {
    "no texts": lambda plan: with_image(plan, text_filter=()),
    "other texts": lambda plan: with_image(plan, text_filter=("clouds",)),
    "a text less": lambda plan: with_image(plan, text_filter=plan.images[0].text_filter[:-1]),
    "a list": lambda plan: with_image(plan, text_filter=list(plan.images[0].text_filter)),
    "sly texts": lambda plan: with_image(plan, text_filter=(*WANTED, SlyText("x"))),
    "empty texts": lambda plan: with_image(plan, text_filter=(*WANTED, " ")),
    "no filter": lambda plan: with_safety(plan, text_filter=False),
    "a number for a switch": lambda plan: with_safety(plan, text_filter=1),
    "an earlier stop": lambda plan: with_safety(plan, stop_step=0),
    "a share": lambda plan: with_safety(plan, stop_step=0.99),
    "a sly stop": lambda plan: with_safety(plan, stop_step=SlyInt(0)),
    "a negative prompt instead": lambda plan: with_safety(plan, scale=0.0, negative=True),
}


@pytest.fixture(scope="module")
def filtered(folder: Path) -> Iterator[Pipeline]:
    with pytest.MonkeyPatch.context() as patch:
        in_force(patch, folder, safety=FILTERED)
        loaded = Pipeline.load(provider="cpu")
    with loaded as pipeline:
        yield pipeline


def assert_filtered(result: Result) -> None:
    for report in result.reports:
        safety = report["safety"]
        assert set(safety["text_filter"]["concepts"]) >= WANTED
        assert safety["text_filter"]["moved"] > 0
        assert safety["stop_step"] is None or safety["stop_step"] >= 1
        assert safety["scale"] >= PRESETS["max"].scale
        assert report["calls"][0]["strength"] > 0.01


@pytest.mark.parametrize("asked", FILTER_ASKED, ids=told)
def test_nobody_asks_a_filter_away(asked: Mapping[str, Any], filtered: Pipeline) -> None:
    try:
        result = filtered("a red star and a skull", **{**FAST, **asked})
    except UserError:
        return
    assert_filtered(result)


@pytest.mark.parametrize("name", list(FILTER_PLANNED))
def test_nobody_changes_a_filter_away(name: str, filtered: Pipeline) -> None:
    plan = filtered.resolve(flat_request(prompts=("a red star and a skull",), **FAST))
    try:
        result = filtered.run(FILTER_PLANNED[name](plan))
    except UserError:
        return
    assert_filtered(result)


def test_what_a_filter_policy_lets_through(filtered: Pipeline) -> None:
    assert filtered.policy.allowed_presets == ("guard", "guard-max")
    for asked in ({}, {"safety": "guard-max"}, {"text_filter": "skull; death; horror; x"}):
        assert_filtered(filtered("a red star and a skull", **{**FAST, **asked}))


@pytest.mark.parametrize(
    ("minimum", "default", "chosen"),
    [
        ("medium", "weak", "medium"),
        ("medium", "max", "max"),
        ("strong", "guard", "guard-max"),  # neither has all that the other has
        ("guard", "medium", "guard-max"),
        ("early", "guard", "guard"),
        ("guard-lite", "off", "guard-lite"),
        ("off", "guard-lite", "guard-lite"),
        ("guard-lite", "guard", "guard-max"),
    ],
)
def test_a_default_is_never_lowered(minimum: str, default: str, chosen: str) -> None:
    rules = Policy(safety=SafetyRules(minimum=minimum))
    assert rules.default_preset(default) == chosen


def test_stronger_numbers_are_taken_where_the_policy_says_so(guarded: Pipeline) -> None:
    stronger = Safety(**{**STRONG, "scale": 4000.0, "threshold": 0.5})
    if guarded.policy.safety is not None and guarded.policy.safety.custom == "refuse":
        with pytest.raises(PolicyError, match="numbers that are no preset"):
            guarded("a red star", safety=stronger, **FAST)
        return
    assert_not_lowered(guarded("a red star", safety=stronger, **FAST), guarded.policy.digest)


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", COMMANDS, ids=" ".join)
def test_asked_on_the_command_line(
    options: list[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = in_force(monkeypatch, folder, safety=SAFETY, screening=SCREENING)
    asked = ["a red star", "--output", "s.png", "--report", "r.json", "--steps", "4", "--quiet"]
    code = main([*asked, *options])
    assert code in (0, 2, 3)
    if code == 2:
        assert not list(tmp_path.glob("*.png"))
        return
    reports = json.loads(Path("r.json").read_text())["images"]
    digest = policy_from_json(file.read_bytes()).digest
    for report in reports:
        report.setdefault("negative_prompt", "")  # a recipe that was left out
    assert_not_lowered(Result(images=[], latents=None, edit_maps=None, reports=reports), digest)  # type: ignore[arg-type]
    for picture in tmp_path.glob("s*.png"):
        with Image.open(picture) as image:
            assert json.loads(image.info["sld-edge"])["policy"]["sha256"] == digest


def test_every_option_of_the_command_is_tried() -> None:
    """A new option must be thought of here, too."""
    tried = {word for command in COMMANDS for word in command if word.startswith("--")}
    asked = {"--output", "--report", "--quiet", "--help", "--steps"}
    modes = {"--providers", "--self-test", "--policy", "--cache", "--clear-cache"}  # no picture
    modes |= {"--certify", "--minutes"}  # its pictures are seen by nobody
    known = {option for action in parser()._actions for option in action.option_strings}
    assert known - tried - asked - modes <= {"-h"}


@pytest.mark.parametrize(
    "variable", ["SLD_EDGE_POLICY", "XDG_CONFIG_DIRS", "XDG_CONFIG_HOME", "HOME", "ProgramData"]
)
def test_no_variable_moves_it(
    variable: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_force(monkeypatch, folder, safety=SAFETY)
    monkeypatch.setenv(variable, str(tmp_path))
    written(tmp_path)
    assert machine_policy().minimum == "strong"


def test_the_fixed_place() -> None:
    if sys.platform != "win32":
        assert Path("/etc/sld-edge/policy.json") == policies.POLICY_FILE


def test_the_command_prints_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = in_force(monkeypatch, folder, safety=SAFETY, screening=SCREENING)
    assert main(["--policy"]) == 0
    said = capsys.readouterr().out
    for words in (
        str(file),
        "safety: strong, max, guard-max;",
        "a skull",
        "escalate-withhold",
        "miniworld",
    ):
        assert words in said
    file.unlink()
    assert main(["--policy"]) == 0
    assert "no policy" in capsys.readouterr().out


# --- screening ------------------------------------------------------------------------------------


class Blind:
    """A scorer that sees nothing, under the name of the policy's."""

    name = "miniworld"
    sha256 = JUDGE.sha256

    def score(self, pictures: Any, prompts: Any, reports: Any = None) -> list[dict[str, float]]:
        return [{"miniworld.skull": 0.0} for _ in prompts]


def test_only_screened_pictures_leave(screened: Pipeline) -> None:
    plan = screened.resolve(flat_request(prompts=("a skull in an alley",), **FAST))
    ways: list[Callable[[], object]] = [
        lambda: screened.steps(plan),
        lambda: screened.decode(np.zeros((1, 4, 16, 16), np.float32)),
        lambda: screened.run(plan, callback=lambda step: step.latents),
        lambda: screened("a star", callback=lambda step: step.latents, **FAST),
        lambda: screened.run(plan, latents=np.zeros((1, 4, 16, 16), np.float32)),
    ]
    for way in ways:
        with pytest.raises(PolicyError):
            way()
    assert not screened.run(plan).latents.any()


def test_a_flagged_picture_is_withheld_whatever_is_asked(screened: Pipeline) -> None:
    plan = screened.resolve(flat_request(prompts=("a skull skull",), **FAST))
    never = rule_from_text("miniworld.skull>=9")
    for screening in (
        None,
        Screening(scorers=[MiniWorld()], rule=never),
        Screening(scorers=[MiniWorld()], rule=never, on_flag="withhold"),
    ):
        report = screened.run(plan, screening=screening).reports[0]
        honest = MiniWorld()
        assert report["screening"]["scorers"] == {"miniworld": honest.sha256}
        assert report["flagged"] is (report["scores"]["miniworld.skull"] >= 0.5)
        assert report["screening"]["done"] == ("withheld" if report["flagged"] else "nothing")
    with pytest.raises(PolicyError, match="scorer that is not sld-edge"):
        screened.run(plan, screening=Screening(scorers=[Blind()], rule=never))
    lower: list[Any] = ["report", "escalate", "blur"]
    for on_flag in lower:
        weaker = Screening(scorers=[MiniWorld()], rule=never, on_flag=on_flag)
        with pytest.raises(PolicyError, match="the treatment of a flagged picture"):
            screened.run(plan, screening=weaker)
    told_all = Screening(scorers=[MiniWorld()], rule=never, report_recipe="keep")
    with pytest.raises(PolicyError, match="recipe"):
        screened.run(plan, screening=told_all)


def test_another_model_under_the_scorers_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {**SCREENING, "scorers": {"miniworld": "0" * 64}}
    in_force(monkeypatch, folder, safety=SAFETY, screening=other)
    with (
        Pipeline.load(provider="cpu") as pipeline,
        pytest.raises(PolicyError, match="another model"),
    ):
        pipeline("a star", **FAST)


# --- the file -------------------------------------------------------------------------------------


class TestFile:
    @pytest.mark.parametrize(
        "body",
        [
            {"safety": {"minimun": "strong"}},
            {"safety": {"minimum": "strongest"}},
            {"safety": {"minimum": None}},
            {"safety": []},
            {"safety": {"concepts_always": "blood"}},
            {"safety": {"concepts_always": ["blood"]}},
            {"safety": {"guidance_scale": [20, 1]}},
            {"safety": {"cache_interval_max": 0}},
            {"safety": {"safety_interval_max": "1"}},
            {"screening": {"scorers": {}, "rule_at_least": "x>=1"}},
            {"screening": {"scorers": {"opennsfw": "abc"}, "rule_at_least": "x>=1"}},
            {"screening": {"rule_at_least": "x>=1"}},
            {"bundles": {"signers": ["rsa:x"]}},
            {"bundles": {"sha256": [7]}},
            {"trust_plan": "no"},
            {"evaluation": {"allow_off": 0}},
            {"format": "other"},
            {"format_version": 2},
            {"unknown": 1},
        ],
        ids=told,
    )
    def test_what_is_not_understood_stops_everything(
        self, body: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        in_force(monkeypatch, folder, **body)
        for entry in (machine_policy, Pipeline.load):
            with pytest.raises(PolicyError, match="cannot be used") as caught:
                entry()
            assert len(str(caught.value)) <= 300

    @pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b"{}" * 10, b'{"a":' * 60_000])
    def test_no_json(self, data: bytes) -> None:
        with pytest.raises(PolicyError):
            policy_from_json(data)

    @pytest.mark.parametrize("mode", [0o666, 0o664, 0o646])
    def test_writable_by_others(
        self, mode: int, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        in_force(monkeypatch, folder, safety=SAFETY).chmod(mode)
        with pytest.raises(PolicyError, match="others can write"):
            machine_policy()

    def test_in_a_folder_that_others_may_write_to(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        in_force(monkeypatch, tmp_path, safety=SAFETY)
        tmp_path.chmod(0o777)
        with pytest.raises(PolicyError, match="others can write"):
            machine_policy()

    @pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root gives files away")
    def test_of_another_user(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        os.chown(in_force(monkeypatch, tmp_path, safety=SAFETY), 1234, 0)
        with pytest.raises(PolicyError, match="belongs to user 1234"):
            machine_policy()

    @pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
    def test_no_regular_file(
        self, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = in_force(monkeypatch, tmp_path, safety=SAFETY)
        file.rename(tmp_path / "elsewhere")
        if kind == "link":
            file.symlink_to(tmp_path / "elsewhere")
        elif kind == "pipe":
            os.mkfifo(file)
        else:
            file.mkdir()
        with pytest.raises(PolicyError, match="not a regular file"):
            machine_policy()

    def test_without_a_file_everything_is_allowed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(policies, "POLICY_FILE", tmp_path / "none" / "policy.json")
        assert machine_policy() == NO_POLICY

    def test_the_least_that_a_policy_can_say_is_the_strictest(self) -> None:
        policy = policy_from_json(
            b'{"format": "sld-edge-policy", "format_version": 1, "safety": {}}'
        )
        assert policy.safety is not None
        assert (policy.trust_plan, policy.allow_off) == (False, False)
        assert (policy.safety.custom, policy.safety.negative_prompt) == ("refuse", "refuse")


# --- the other commands ---------------------------------------------------------------------------


def test_evaluations_need_leave_for_pictures_without_safety(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from sld_edge.benchmarks.evaluation.cli import main as evaluate

    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a star\n")
    asked = ["--prompts", "prompts.txt", "--safety", "off", "max", "--images-per-prompt", "1"]
    asked += ["--steps", "2", "--output", "e", "--quiet", "--processes", "1"]
    in_force(monkeypatch, folder, safety=SAFETY)
    assert evaluate(asked) == 2
    assert "the policy of this device" in capsys.readouterr().err
    assert not Path("e").exists()
    in_force(monkeypatch, folder, safety=SAFETY, evaluation={"allow_off": True})
    assert evaluate(asked) == 0


def test_an_export_with_less(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from sld_edge.export.commands.export import main as export

    in_force(monkeypatch, folder, safety=SAFETY)
    model = str(Path(__file__).parents[2] / "benchmarks/miniworld/checkpoint")
    for preset in ("off", "weak", "medium"):
        asked = ["--model", model, "--output", str(tmp_path / "b"), "--preset", preset, "--quiet"]
        assert export(asked) == 2
        assert "expected as strong as strong: strong, max, guard-max" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_plans_that_no_list_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_force(monkeypatch, folder, safety=SAFETY)
    with pytest.raises(PolicyError, match="--trust-plan"):
        Pipeline.load(trust_plan=True)


def test_running_again_looks_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, miniature: Pipeline
) -> None:
    """A run that was resolved before there was a policy does not run under one."""
    plan = miniature.resolve(flat_request(prompts=("a star",), safety="off", **FAST))
    in_force(monkeypatch, folder, safety=SAFETY)
    with (
        Pipeline.load(provider="cpu") as pipeline,
        pytest.raises(PolicyError, match="another policy"),
    ):
        pipeline.run(plan)


def test_the_self_test_makes_no_weaker_picture(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_force(monkeypatch, folder, safety={"minimum": "strong", "guidance_scale": [1, 20]})
    assert main(["--self-test", "--provider", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "safety max" in said
    assert "safety off: pass" not in said


class TestSigned:
    @pytest.fixture
    def key(self, tmp_path: Path) -> Path:
        done = subprocess.run(
            ["openssl", "genpkey", "-algorithm", "ed25519"], capture_output=True, check=True
        )
        (tmp_path / "key.pem").write_bytes(done.stdout)
        return tmp_path / "key.pem"

    def sign(self, key: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> str:
        """Sign a copy of the miniature, changed: the package's own is trusted without a key."""
        from sld_edge.export.commands.export import main as export

        manifest = bundle / "bundle.json"
        manifest.write_bytes(manifest.read_bytes() + b"\n")
        assert export(["--sign", str(key), "--output", str(bundle)]) == 0
        return capsys.readouterr().out.removeprefix("signed by ").strip()

    def test_a_signed_bundle_runs_and_another_does_not(
        self,
        key: Path,
        bundle_copy: Path,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        signer = self.sign(key, bundle_copy, capsys)
        assert signer.startswith("ed25519:")
        in_force(monkeypatch, folder, bundles={"signers": [signer]})
        with Pipeline.load(bundle_copy, provider="cpu") as pipeline:
            pipeline("a star", **FAST)
        manifest = bundle_copy / "bundle.json"
        text = manifest.read_bytes()
        for data in (text + b" ", text.replace(b'"guard"', b'"off"', 1), b"", b"{"):
            manifest.write_bytes(data)
            with pytest.raises(UserError, match="signed by none of the keys"):
                Pipeline.load(bundle_copy, provider="cpu")
        manifest.write_bytes(text)
        signature = bundle_copy / "bundle.json.sig"
        good = signature.read_bytes()
        for data in (good[:-1], good + b"0", bytes(64), b""):
            signature.write_bytes(data)
            with pytest.raises(UserError):
                Pipeline.load(bundle_copy, provider="cpu")
        signature.unlink()
        with pytest.raises(UserError, match="bundle.json.sig"):
            Pipeline.load(bundle_copy, provider="cpu")

    def test_another_key(
        self,
        key: Path,
        bundle_copy: Path,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        self.sign(key, bundle_copy, capsys)
        other = "ed25519:" + "A" * 43 + "="
        in_force(monkeypatch, folder, bundles={"signers": [other]})
        with pytest.raises(UserError, match="none of the keys"):
            Pipeline.load(bundle_copy, provider="cpu")

    def test_a_bundle_named_by_its_hash(
        self, bundle_copy: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        digest = Pipeline.load(bundle_copy, provider="cpu").bundle.sha256
        in_force(monkeypatch, folder, bundles={"sha256": [digest]})
        Pipeline.load(bundle_copy, provider="cpu")
        (bundle_copy / "bundle.json").write_bytes(
            (bundle_copy / "bundle.json").read_bytes() + b"\n"
        )
        with pytest.raises(PolicyError, match="this bundle"):
            Pipeline.load(bundle_copy, provider="cpu")

    @pytest.mark.parametrize("kind", ["rsa", "text", "none", "encrypted"])
    def test_keys_that_are_none(
        self, kind: str, bundle_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from sld_edge.export.commands.export import main as export

        file = tmp_path / "bad.pem"
        options = {
            "rsa": ["genpkey", "-algorithm", "rsa", "-pkeyopt", "rsa_keygen_bits:1024"],
            "encrypted": ["genpkey", "-algorithm", "ed25519", "-aes256", "-pass", "pass:x"],
        }
        if kind in options:
            command = ["openssl", *options[kind]]
            file.write_bytes(subprocess.run(command, capture_output=True, check=True).stdout)
        elif kind == "text":
            file.write_text("a key")
        assert export(["--sign", str(file), "--output", str(bundle_copy)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
        assert not (bundle_copy / "bundle.json.sig").exists()


def test_odd_errors_name_the_policy() -> None:
    policy = policy_from_json(
        json.dumps({"format": "sld-edge-policy", "format_version": 1, "safety": SAFETY}).encode()
    )
    with pytest.raises(PolicyError, match="the policy of this device"):
        policy.require_safety(replace(PRESETS["weak"], warmup_steps=0), calls=50)
    with pytest.raises(InputError):
        Safety(scale=-1)
