"""200 kills: nothing half-written under its final name, the next run recovers, nothing is left."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.small_runs import measured
from sld_edge.runtime.bundle import EMBEDDED

pytestmark = [
    pytest.mark.kill,
    pytest.mark.skipif(sys.platform != "linux", reason="signals and locks"),
]

_CHECKPOINT = Path(__file__).parents[2] / "benchmarks" / "miniworld" / "checkpoint"
_KILLS = 200
_MODULES = {
    "run": "runtime.commands.run",
    "export": "export.commands.export",
    "build": "export.commands.build",
    "eval": "benchmarks.evaluation.cli",
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command that is killed in a new folder each time.

    `begin` fills the folder; `whole` fails where something half-written has a final name, given
    a folder in which the command ran undisturbed; `again` is what the next run adds.
    """

    command: str
    arguments: tuple[str, ...]
    whole: Callable[[Path, Path], None]
    begin: Callable[[Path, Path], None] = lambda folder, undisturbed: None
    again: tuple[str, ...] = ()
    cold: bool = False  # with an empty cache


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return np.asarray(image).tobytes()


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if not unfinished_name(path)
    }


def whole_picture(folder: Path, undisturbed: Path) -> None:
    if (folder / "x.png").exists():
        assert pixels(folder / "x.png") == pixels(undisturbed / "x.png")
    for entry in (folder / "cache" / "sessions").glob("[0-9a-f]*"):
        files = json.loads((entry / "prepared.json").read_text())["files"]
        for name, said in files.items():
            assert hashlib.sha256((entry / name).read_bytes()).hexdigest() == said["sha256"]


def whole_export(folder: Path, undisturbed: Path) -> None:
    if (folder / "X").exists():
        assert digests(folder / "X") == digests(undisturbed / "X")


def whole_replaced(folder: Path, undisturbed: Path) -> None:
    assert digests(folder / "X") in (digests(undisturbed / "X"), digests(EMBEDDED))


def whole_build(folder: Path, undisturbed: Path) -> None:
    manifests = [folder / "X" / name for name in ("bundle.json", "plans.json")]
    listed = {path.name for path in manifests if path.exists()}

    def look(part: object) -> None:
        if isinstance(part, dict):
            if {"path", "sha256"} <= part.keys():
                content = (folder / "X" / part["path"]).read_bytes()
                assert hashlib.sha256(content).hexdigest() == part["sha256"]
                listed.add(part["path"])
            for value in part.values():
                look(value)
        elif isinstance(part, list):
            for value in part:
                look(value)

    for manifest in manifests:
        if manifest.exists():
            look(json.loads(manifest.read_text()))
    for said in (folder / "X").glob("*.plan.json"):
        json.loads(said.read_text())
    for plan in (folder / "X").glob("*.plan"):
        said = plan.with_name(f"{plan.name}.json")
        if said.exists():
            content = plan.read_bytes()
            assert json.loads(said.read_text())["sha256"] == hashlib.sha256(content).hexdigest()
    if undisturbed != folder:
        assert listed <= {path.name for path in (undisturbed / "X").iterdir()}


def whole_rows(folder: Path, undisturbed: Path) -> None:
    if not (folder / "E" / "manifest.json").exists():
        return
    rows = measured(folder / "E")
    wanted = measured(undisturbed / "E")
    assert [row for row in rows if row not in wanted] == []
    for picture in (folder / "E").rglob("*.png"):
        if not unfinished_name(picture):
            assert pixels(picture)
    if (folder / "E" / "results.json").exists():
        json.loads((folder / "E" / "results.json").read_text())
        assert rows == wanted


def copy_of_miniature(folder: Path, undisturbed: Path) -> None:
    shutil.copytree(EMBEDDED, folder / "X")


def prompts(folder: Path, undisturbed: Path) -> None:
    (folder / "p.csv").write_text("prompt\na red star at a party\na blue heart in an alley\n")


_RUN = ("a red star", "--steps", "2", "--provider", "cpu", "--output", "x.png", "--quiet")
_EXPORT = ("--model", str(_CHECKPOINT), "--output", "X", "--precision", "fp32", "--quiet")
_EVAL = ("--prompts", "p.csv", "--steps", "2", "--safety", "off", "max", "--output", "E", "--quiet")
CASES = {
    "run": Case(
        command="run", arguments=(*_RUN, "--report", "x.json"), whole=whole_picture,
        again=("--force",),
    ),
    "first preparation": Case(
        command="run", arguments=_RUN, whole=whole_picture, again=("--force",), cold=True
    ),
    "export": Case(
        command="export", arguments=_EXPORT, whole=whole_export, again=("--force",)
    ),
    "export --force": Case(
        command="export", arguments=(*_EXPORT, "--force"), whole=whole_replaced,
        begin=copy_of_miniature,
    ),
    "build": Case(
        command="build",
        arguments=("X", "--engine", "tensorrt-rtx", "--components", "text_encoder", "--quiet"),
        whole=whole_build, begin=copy_of_miniature, again=("--force",),
    ),
    "eval": Case(
        command="eval",
        arguments=(*_EVAL, "--scorer", "miniworld", "--provider", "cpu", "--processes", "1"),
        whole=whole_rows, begin=prompts,
    ),
}  # fmt: skip


def unfinished_name(path: Path) -> bool:
    return path.name.endswith((".sld-part", ".part"))


def unfinished(folder: Path) -> list[Path]:
    """What is unfinished below a folder, without what lies in it."""
    return [
        path
        for path in folder.rglob("*part")
        if unfinished_name(path) and not any(map(unfinished_name, path.parents))
    ]


def started(case: Case, folder: Path, cache: Path, *more: str) -> subprocess.Popen[bytes]:
    own = folder / "cache" if case.cold else cache
    return subprocess.Popen(
        [sys.executable, "-m", f"sld_edge.{_MODULES[case.command]}", *case.arguments, *more],
        cwd=folder,
        env={**os.environ, "SLD_EDGE_CACHE": str(own), "SLD_EDGE_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    _, said = process.communicate()
    assert process.returncode == 0, said.decode()


def killed(process: subprocess.Popen[bytes], wait: Callable[[], None]) -> bool:
    """Kill a command and its children after waiting; say whether it was still at work."""
    wait()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("name", list(CASES))
def test_a_killed_command_leaves_nothing_half_written(
    name: str, tmp_path: Path, budget: float
) -> None:
    case, cache, rng = CASES[name], tmp_path / "cache", random.Random(name)
    until = time.monotonic() + budget
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    case.begin(undisturbed, undisturbed)
    for _ in range(2):  # the second has a warm cache, as those that are killed
        began = time.monotonic()
        finish(started(case, undisturbed, cache, *case.again))
        takes = time.monotonic() - began
    wanted = -(-_KILLS // len(CASES))
    kills = {"writing": 0, "any time": 0}
    for attempt in range(6 * wanted):
        if sum(kills.values()) >= wanted or time.monotonic() > until:
            break
        when = "writing" if kills["writing"] <= kills["any time"] else "any time"
        folder = tmp_path / str(attempt)
        folder.mkdir()
        case.begin(folder, undisturbed)
        process = started(case, folder, cache)

        def wait(process: subprocess.Popen[bytes] = process, folder: Path = folder) -> None:
            while process.poll() is None and not unfinished(folder):
                time.sleep(0.0002)
            time.sleep(rng.choice([0, 0, rng.uniform(0, 0.02), rng.uniform(0, 0.5)]))

        def pause(seconds: float = rng.uniform(0.05, takes)) -> None:
            time.sleep(seconds)

        if killed(process, wait if when == "writing" else pause):
            kills[when] += 1
            case.whole(folder, undisturbed)
            assert len(unfinished(folder)) <= 1
            finish(started(case, folder, cache, *case.again))
            case.whole(folder, undisturbed)
            assert unfinished(folder) == []
        shutil.rmtree(folder)
    print(f"{name}: killed {kills['writing']} times while writing, {kills['any time']} at any time")
    assert sum(kills.values()) >= wanted or time.monotonic() > until
