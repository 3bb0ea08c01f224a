"""Plans that lie: 250 seeded mutations, each refused with one line or of no effect."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import standin
from sld_edge.engines.errors import BundleError, EngineError, UserError
from sld_edge.engines.tensorrt.engine import TrtEngine
from sld_edge.engines.tensorrt.plan_info import info_path
from sld_edge.runtime import Pipeline, policy, policy_file
from sld_edge.runtime.bundle import EMBEDDED, Bundle
from sld_edge.runtime.plan_list import PLANS, require_digest
from sld_edge.runtime.plans import plans_in, refit_source
from standin.plans import VERSIONS, make_plans, relist

RUN: dict[str, Any] = {"prompt": "a red star at a party", "steps": 2, "seed": 3}
ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**63, 10**400, 1e308, 0.5, "", "x", "²", "a" * 5000, "../unet.plan"),
    *([], {}, [[]], [None], {"a": {}}, ["8.6"] * 100, [1, 2, 3]),
)


@pytest.fixture(scope="module")
def honest() -> bytes:
    with Pipeline.load(provider="cpu") as pipeline:
        return pipeline(**RUN).images[0].tobytes()


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    standin.install(monkeypatch)
    folder = Path(shutil.copytree(EMBEDDED, tmp_path / "mini"))
    make_plans(
        folder, engine="tensorrt", version=VERSIONS["tensorrt"], compute_capabilities=("8.6",)
    )
    return folder


def places(body: Any) -> list[tuple[Any, Any]]:
    """Every container in a JSON value with each of its keys."""
    keys = body.keys() if isinstance(body, dict) else range(len(body) if type(body) is list else 0)
    return [(body, key) for key in keys] + [pair for key in keys for pair in places(body[key])]


def mutated_json(data: bytes, chance: random.Random) -> bytes:
    body = json.loads(data)
    holder, key = chance.choice(places(body))
    kind = chance.randrange(4)
    if kind == 0 and isinstance(holder, dict):
        del holder[key]
    elif kind == 1 and isinstance(holder, list):
        holder.append(holder[key])
    else:
        holder[key] = chance.choice(ODD)
    return json.dumps(body).encode()


def mutated_bytes(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data))
    return (
        data[:at],
        b"",
        data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :],
        data + b"\0" * chance.randrange(1, 99),
        b'{"format":' * 100_000,
    )[chance.randrange(5)]


def cut_short(data: bytes, chance: random.Random) -> bytes:
    """What stands behind --trust-plan is code, so only what is no plan at all is tried there."""
    return chance.choice((b"", b"[" * 100_000, data[: chance.randrange(len(data))]))


def problem(bundle: Path, honest: bytes, **settings: Any) -> str:
    """Return the error; none is a picture, which is the honest one."""
    try:
        with Pipeline.load(bundle, **{"provider": "tensorrt", **settings}) as pipeline:
            made = pipeline(**RUN).images[0].tobytes()
    except UserError as error:
        return str(error)
    assert made == honest
    return ""


@pytest.mark.parametrize(
    ("what", "mutate"),
    [
        *product(("list", "description", "trusted", "relisted"), (mutated_json, mutated_bytes)),
        ("plan", mutated_bytes),
        ("trusted plan", cut_short),
    ],
)
def test_mutations(
    what: str, mutate: Callable[[bytes, random.Random], bytes], bundle: Path, honest: bytes
) -> None:
    plan = bundle / "unet.plan"
    file = bundle / PLANS if what == "list" else plan if "plan" in what else info_path(plan)
    good, names = file.read_bytes(), (bundle / PLANS).read_bytes()
    refused = 0
    for seed in range(25):
        file.write_bytes(mutate(good, random.Random(seed)))
        if what == "relisted":
            with contextlib.suppress(
                UserError, OSError
            ):  # nobody can read it, so it cannot be listed
                relist(bundle)
        says = problem(bundle, honest, trust_plan="trusted" in what)
        assert len(says) <= 300, (seed, says)
        assert "\n" not in says
        refused += bool(says)
        file.write_bytes(good)
        (bundle / PLANS).write_bytes(names)
    assert refused >= 10


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_is_parsed_is_what_was_hashed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exchange(path: Path, *rest: Any) -> None:
        require_digest(path, *rest)
        edit(path, options={"version_compatible": True})  # host code could run

    monkeypatch.setattr("sld_edge.runtime.plans.require_digest", exchange)
    for plan in plans_in(Bundle.open(bundle)).values():
        assert "version_compatible" not in plan.info.options


def test_an_exchanged_plan_is_seen_after_loading(
    bundle: Path, honest: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exchange(path: Path, *rest: Any, **settings: Any) -> Any:
        engine = TrtEngine(path, *rest, **settings)
        path.write_bytes(path.read_bytes())  # the same size, at another time
        return engine

    monkeypatch.setattr("sld_edge.runtime.loader.TrtEngine", exchange)
    assert "was changed while it was loaded" in problem(bundle, honest)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"engine_version": "10.²"}, "built with tensorrt 10.²"),
        ({"inputs": []}, "was built from another unet"),
    ],
)
def test_a_description_that_does_not_fit(
    changes: dict[str, Any], says: str, bundle: Path, honest: bytes
) -> None:
    edit(info_path(bundle / "unet.plan"), **changes)
    relist(bundle)
    assert says in problem(bundle, honest)


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("name", ["unet.plan", "unet.plan.json", PLANS])
def test_a_pipe_does_not_hang(name: str, trust: bool, bundle: Path, honest: bytes) -> None:
    (bundle / name).unlink()
    os.mkfifo(bundle / name)
    if name != PLANS or not trust:  # a trusted plan needs no list
        assert "not a regular file" in problem(bundle, honest, trust_plan=trust)


def test_a_named_plan_that_is_not_listed(bundle: Path, honest: bytes) -> None:
    """Its description is not read for its flavour either."""
    info_path(bundle / "unet.plan").write_text("{}")
    assert "a plan is code" in problem(bundle, honest, provider="auto", plan=bundle / "unet.plan")


def test_weights_come_from_listed_graphs_alone(bundle: Path) -> None:
    """A graph that a stripped plan is filled from, and that `plans.json` does not hold."""
    opened = Bundle.open(bundle)
    plan, component = plans_in(opened)["unet"], opened.manifest.components["unet"]
    name = "unet.decomposed.onnx"
    shutil.copy(bundle / "unet.onnx", bundle / name)
    info = replace(plan.info, options={"strip_weights": True, "refit_from": name})
    with pytest.raises(EngineError, match=rf"plans.json does not hold {name}"):
        refit_source(replace(plan, info=info), opened, component)
    trusted = refit_source(replace(plan, info=info, files=()), opened, component)
    (bundle / name).write_bytes((bundle / name).read_bytes())
    with pytest.raises(BundleError, match="was changed while"):
        trusted.confirm()


@pytest.mark.skipif(os.name == "nt", reason="Windows has other rights")
@pytest.mark.parametrize("who", ["others can write it", "others can write its folder"])
def test_under_a_policy_of_bundles_the_list_is_the_administrators(
    who: str, bundle: Path, tmp_path: Path, honest: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256((bundle / "bundle.json").read_bytes()).hexdigest()
    body = {
        "format": "sld-edge-policy",
        "format_version": 1,
        "bundles": {"sha256": [digest]},
    }
    file = tmp_path / "policy.json"
    file.write_text(json.dumps(body))
    for path, mode in ((file, 0o644), (bundle / PLANS, 0o644), (bundle, 0o755)):
        path.chmod(mode)
    monkeypatch.setattr(policy, "POLICY_FILE", file)
    monkeypatch.setattr(policy_file, "_OWNER", os.geteuid())
    assert problem(bundle, honest) == ""
    if who == "others can write it":
        (bundle / PLANS).chmod(0o666)
    else:
        bundle.chmod(0o777)
    assert "the list of plans" in problem(bundle, honest)
    assert "others can write" in problem(bundle, honest)
    assert "--trust-plan" in problem(bundle, honest, trust_plan=True)
