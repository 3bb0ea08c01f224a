"""A run: resumable at any moment, the same however it is split, and never mixed with another."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from evaluation.small_runs import PROMPTS, measured, small_run, small_settings
from sld_edge.benchmarks.evaluation import evaluator, run, workers
from sld_edge.benchmarks.evaluation.evaluator import Evaluator, Task, seed_of
from sld_edge.benchmarks.evaluation.manifest import prompts_from_manifest, read_manifest
from sld_edge.benchmarks.evaluation.prompts import EvalPrompt
from sld_edge.benchmarks.evaluation.rows import locked_shard, read_rows
from sld_edge.benchmarks.evaluation.settings import settings_from_names
from sld_edge.engines.errors import EngineError, InputError, NumericsError, OutputError, UserError
from sld_edge.engines.files import write_whole
from sld_edge.runtime import Pipeline
from sld_edge.runtime.scorers import rule_from_text, scorer_from_name

TOTAL = 4 * 2 * 3


@pytest.fixture(scope="module")
def one_thread() -> Iterator[Pipeline]:
    """A pipeline of the bits that runs of small models have: more threads round otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLD_EDGE_THREADS", "1")
        pipeline = Pipeline.load(provider="cpu")
        pipeline.warm_up()
    yield pipeline
    pipeline.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped, in one process."""
    folder = tmp_path_factory.mktemp("whole") / "results"
    assert small_run(folder) == (True, [])
    return folder


def test_a_run_has_one_row_a_picture(whole: Path) -> None:
    rows = read_rows(whole)
    assert len({row.key for row in rows}) == len(rows) == TOTAL
    assert {row.setting for row in rows} == {"plain", "negative prompt", "max"}
    for row in rows:
        assert (row.change == 0) is (row.setting == "plain")
        assert (max(row.share) > 0) is (row.setting == "max")
        assert row.seed == 500_000 + 1000 * row.prompt + row.image
        assert len(row.share) == len(row.strength) == 2
        assert row.adherent is (row.scores["miniworld.adherence"] >= 0.5)
        assert row.flagged is (row.scores["miniworld.skull"] >= 0.5)
        assert row.picture is not None
        assert (whole / row.picture).is_file()


def test_rows_hold_what_the_pipeline_and_the_judge_say(whole: Path, one_thread: Pipeline) -> None:
    """The oracle is the public interface: one picture at a time, by hand."""
    judge = scorer_from_name("miniworld")
    concept = one_thread.bundle.manifest.safety_concept
    options: dict[str, dict[str, Any]] = {
        "plain": {"safety": "off"},
        "max": {"safety": "max"},
        "negative prompt": {"safety": "off", "negative_prompt": concept},
    }
    for prompt in PROMPTS.prompts[:2]:
        pixels = {}
        for name, option in options.items():
            seed = 500_001 + 1000 * prompt.index
            made = one_thread(prompt.text, seed=seed, steps=2, guidance_scale=7.5, **option)
            pixels[name] = np.asarray(made.images[0]).astype(int)
            (row,) = [r for r in read_rows(whole) if r.key == (name, prompt.index, 1)]
            (scores,) = judge.score(np.asarray(made.images), [prompt.text])
            assert scores.items() <= row.scores.items()
            assert row.change == np.abs(pixels[name] - pixels["plain"]).mean() / 255
            assert row.share == [call["share"] for call in made.reports[0]["calls"]]
            where = made.edit_maps[0]
            assert row.edit_map_max == round(float(where.max()), 6)
            assert (row.edit_map is None) is (name != "max")
            if row.edit_map is not None:
                drawn = np.asarray(Image.open(whole / row.edit_map))
                assert drawn.dtype == np.uint8
                assert drawn.shape == where.shape
                np.testing.assert_allclose(drawn / 255 * where.max(), where, atol=where.max() / 500)
            assert row.picture is not None
            kept = np.asarray(Image.open(whole / row.picture))
            assert row.flagged or np.array_equal(kept, pixels[name])


def test_several_concepts_are_steered_away_from_and_joined_as_negative_prompt(
    tmp_path: Path, one_thread: Pipeline
) -> None:
    concepts = ("skull, bones", "red")
    settings = small_settings(concepts=concepts, images_per_prompt=1)
    assert small_run(tmp_path, settings)[0]
    assert read_manifest(tmp_path)["safety_concepts"] == list(concepts)
    prompt = PROMPTS.prompts[1]
    options: dict[str, dict[str, Any]] = {
        "max": {"safety": "max", "safety_concept": concepts},
        "negative prompt": {"safety": "off", "negative_prompt": "skull, bones, red"},
    }
    plain = one_thread(prompt.text, seed=501_000, steps=2, safety="off").images[0]
    for name, option in options.items():
        made = one_thread(prompt.text, seed=501_000, steps=2, guidance_scale=7.5, **option)
        change = np.abs(np.asarray(made.images[0]).astype(int) - np.asarray(plain)).mean() / 255
        (row,) = [r for r in read_rows(tmp_path) if r.key == (name, 1, 0)]
        assert row.change == change
        told = made.reports[0]["safety"]
        assert row.concepts == [entry["concept"] for entry in told["concepts"]]
        assert row.concept_strength == [entry["mean_strength"] for entry in told["concepts"]]
        assert row.strongest_concept == told["strongest_concept"]
        assert bool(row.concepts) is (name == "max")
    with pytest.raises(InputError, match="safety_concepts differs"):
        small_run(tmp_path, replace(settings, concepts=concepts[:1]))


def test_the_manifest_says_what_was_measured(whole: Path, one_thread: Pipeline) -> None:
    found = read_manifest(whole)
    assert found["bundle"]["sha256"] == one_thread.bundle.sha256
    assert found["scorers"] == {"miniworld": scorer_from_name("miniworld").sha256}
    assert found["rule"] == "miniworld.skull>=0.5"
    assert found["prompts"]["sha256"] == PROMPTS.sha256
    assert prompts_from_manifest(found) == PROMPTS.prompts
    assert (found["steps"], found["sampler"], found["guidance_scale"]) == (2, "ddim", 7.5)
    assert found["provider"] == "cpu"
    assert "onnxruntime" in found["versions"]


def test_two_processes_and_two_shards_give_the_same_rows(whole: Path, tmp_path: Path) -> None:
    assert small_run(tmp_path / "processes", processes=2) == (True, [])
    assert measured(tmp_path / "processes") == measured(whole)
    assert small_run(tmp_path / "shards", shard=2, shards=2) == (False, [])
    assert {row.prompt for row in read_rows(tmp_path / "shards")} == {1, 3}
    assert small_run(tmp_path / "shards", shard=1, shards=2) == (True, [])
    assert measured(tmp_path / "shards") == measured(whole)


def test_what_is_there_is_not_made_again(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are cut off at every place, also within one; what remains is never touched."""
    lines = (whole / "rows-1-of-1.jsonl").read_bytes().split(b"\n")[:-1]
    made: list[tuple[str, int, int]] = []
    plain_outcome = Evaluator._outcome

    def counted(self: Evaluator, setting: Any, task: Task, *rest: Any) -> Any:
        made.append((setting.name, task.prompt.index, task.image))
        return plain_outcome(self, setting, task, *rest)

    monkeypatch.setattr(Evaluator, "_outcome", counted)
    for cut in (1, 2, TOTAL - 1, TOTAL):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "manifest.json").write_bytes((whole / "manifest.json").read_bytes())
        head = b"".join(line + b"\n" for line in lines[:cut])
        torn = lines[cut][:40] if cut < TOTAL else b""
        (folder / "rows-1-of-1.jsonl").write_bytes(head + torn)
        made.clear()
        assert small_run(folder) == (True, [f"{cut} of {TOTAL} pictures are there already"])
        assert len(made) == len(set(made)) == TOTAL - cut
        assert (folder / "rows-1-of-1.jsonl").read_bytes().startswith(head)
        assert measured(folder) == measured(whole)


_CHILD = """
import sys
from pathlib import Path
from evaluation.small_runs import small_run
if __name__ == "__main__":
    small_run(Path(sys.argv[1]), processes=2)
"""


def test_killed_at_any_moment_it_goes_on(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    script = tmp_path / "child.py"
    script.write_text(_CHILD)
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    log = folder / "rows-1-of-1.jsonl"
    for rows in (3, 12):
        child = subprocess.Popen([sys.executable, str(script), str(folder)], env=environment)
        deadline = time.monotonic() + 60
        while not log.exists() or log.read_bytes().count(b"\n") < rows:
            assert time.monotonic() < deadline
            assert child.poll() is None
            time.sleep(0.005)
        workers_of = children(child.pid)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert len(workers_of) >= 2
        while any(Path(f"/proc/{pid}").exists() for pid in workers_of):  # none is left behind
            assert time.monotonic() < deadline
            time.sleep(0.01)
    complete, said = small_run(folder)
    assert complete
    assert said
    assert measured(folder) == measured(whole)


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def test_a_worker_that_dies_is_one_line_and_the_run_goes_on(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "results"
    outcomes = workers.outcomes_from_answer
    killed: list[int] = []

    def kill_then_receive(answer: Any) -> Any:
        if not killed and folder.joinpath("rows-1-of-1.jsonl").stat().st_size:
            for pid in children(os.getpid()):
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                if b"spawn_main" in command:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
        return outcomes(answer)

    monkeypatch.setattr(workers, "outcomes_from_answer", kill_then_receive)
    with pytest.raises(EngineError, match="a worker process died .* goes on where it was"):
        small_run(folder, processes=2)
    assert killed
    assert 0 < len(read_rows(folder)) < TOTAL
    assert small_run(folder)[0]
    assert measured(folder) == measured(whole)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"steps": 3}, "steps differs | got 3 | expected 2, as there"),
        (
            {"rule": rule_from_text("miniworld.skull<=0.5")},
            'rule differs | got "miniworld.skull<=0.5"',
        ),
        ({"settings": settings_from_names(["off", "weak", "max"])}, "settings[1].name differs"),
        ({"settings": settings_from_names(["off"])}, "settings differs | got 1 entries"),
        ({"images_per_prompt": 3}, "images_per_prompt differs"),
        ({"protocol": "per-prompt"}, "protocol differs"),
        ({"images": "keep"}, 'images differs | got "keep" | expected "blur", as there'),
        ({"scorers": ("miniworld", "activation")}, "scorers.activation differs"),
        ({"first_seed": 1}, "first_seed differs"),
    ],
)
def test_a_folder_of_another_run_is_refused_by_what_differs(
    whole: Path, changed: dict[str, Any], named: str
) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in whole.rglob("*"))
    with pytest.raises(InputError) as caught:
        small_run(whole, small_settings(**changed))
    assert f"holds another run: {named}" in str(caught.value)
    assert sorted((path, path.stat().st_mtime_ns) for path in whole.rglob("*")) == before


def test_a_folder_of_other_prompts_or_of_something_else_is_refused(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match=r"holds files, but no manifest.json"):
        small_run(tmp_path)
    other = replace(PROMPTS, sha256="1" * 64)
    monkeypatch.setattr("evaluation.small_runs.PROMPTS", other)
    with pytest.raises(InputError, match=r"another run: prompts.sha256 differs"):
        small_run(whole)


def test_a_manifest_that_is_none_is_refused(tmp_path: Path) -> None:
    for text, said in [
        ("{", "is not whole JSON"),
        ("{}", "is not the manifest"),
        ('{"format": "sld-edge-evaluation-run", "format_version": 2}', "got format version 2"),
    ]:
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(InputError, match=said):
            small_run(tmp_path)


def test_other_versions_or_devices_may_join(whole: Path, tmp_path: Path) -> None:
    manifest = {**read_manifest(whole), "versions": {"numpy": "0"}, "device": None}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert small_run(tmp_path, shard=1, shards=2) == (False, [])


def test_two_processes_on_one_shard(tmp_path: Path) -> None:
    with locked_shard(tmp_path, 1, 2):
        with (
            pytest.raises(InputError, match=r"at work .* got rows-1-of-2\.jsonl") as caught,
            locked_shard(tmp_path, 1, 2),
        ):
            pass
        assert "\n" not in str(caught.value)
        with locked_shard(tmp_path, 2, 2):
            pass
        with (
            pytest.raises(InputError, match="another number of shards .* expected N/2"),
            locked_shard(tmp_path, 1, 3),
        ):
            pass
    with (
        locked_shard(tmp_path, 1, 3),
        pytest.raises(InputError, match="expected N/3"),
        locked_shard(tmp_path, 1, 2),
    ):
        pass
    with locked_shard(tmp_path, 1, 2):
        pass


class Broken:
    name, sha256 = "broken", "0" * 64

    def __init__(self, answers: Any) -> None:
        self._answers = answers

    def score(self, pictures: Any, prompts: Sequence[str], reports: Any = None) -> Any:
        if isinstance(self._answers, Exception):
            raise self._answers
        return self._answers


@pytest.mark.parametrize(
    ("answers", "error", "said"),
    [
        (EngineError("the scorer broke"), EngineError, "the scorer broke"),
        ([], EngineError, "broken"),
        ([{"broken.x": float("nan")}], NumericsError, "broken.x"),
        ([{"broken.y": 0.0}], InputError, "the rule names broken.x"),
    ],
)
def test_a_scorer_that_fails_is_an_error_and_no_pass(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answers: Any,
    error: type[UserError],
    said: str,
) -> None:
    monkeypatch.setattr(evaluator, "scorers_from_names", lambda *_: [Broken(answers)])
    monkeypatch.setattr(run, "scorers_from_names", lambda *_: [Broken(answers)])
    settings = small_settings(scorers=("broken",), rule=rule_from_text("broken.x>=0.5"))
    with pytest.raises(error, match=said):
        small_run(tmp_path / "results", settings)
    assert read_rows(tmp_path / "results") == []


def test_flagged_pictures_are_blurred_and_never_written_sharp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: Pipeline
) -> None:
    written: list[bytes] = []

    def watched(path: Path, data: bytes) -> None:
        written.append(data)
        write_whole(path, data)

    monkeypatch.setattr(run, "write_whole", watched)
    # Every second picture is flagged: the rule is on what is known of it.
    settings = small_settings(rule=rule_from_text("activation.share>=1e-9"), images_per_prompt=1)
    assert small_run(tmp_path / "results", settings)[0]
    rows = read_rows(tmp_path / "results")
    assert len(written) == len(rows) + sum(row.edit_map is not None for row in rows)
    pixels = [np.asarray(Image.open(io.BytesIO(data))) for data in written]
    assert {row.setting for row in rows if row.flagged} == {"max"}
    for row in rows:
        assert row.picture is not None
        if row.setting == "negative prompt":
            continue
        sharp = one_thread(
            PROMPTS.prompts[row.prompt].text,
            seed=row.seed,
            steps=2,
            safety="max" if row.flagged else "off",
        ).images[0]
        kept = np.asarray(Image.open(tmp_path / "results" / row.picture))
        assert np.array_equal(kept, np.asarray(sharp)) is not row.flagged
        if row.flagged:
            assert not any(np.array_equal(data, np.asarray(sharp)) for data in pixels)
            soft = sharp.filter(ImageFilter.GaussianBlur(64 / 12))
            assert np.array_equal(kept, np.asarray(soft))
            assert detail(kept) < detail(np.asarray(sharp)) / 3


def detail(pixels: Any) -> float:
    return float(np.abs(np.diff(pixels.astype(float), axis=1)).mean())


def test_pictures_are_kept_or_thrown_away(tmp_path: Path) -> None:
    flags_all = {"rule": rule_from_text("miniworld.skull>=0"), "images_per_prompt": 1}
    assert small_run(tmp_path / "kept", small_settings(images="keep", **flags_all))[0]
    assert small_run(tmp_path / "blurred", small_settings(images="blur", **flags_all))[0]
    assert small_run(tmp_path / "none", small_settings(images="discard", **flags_all))[0]
    rows = read_rows(tmp_path / "none")
    assert [path.name for path in (tmp_path / "none").iterdir() if path.is_dir()] == []
    assert all(row.picture is None and row.edit_map is None and row.flagged for row in rows)
    assert {row.setting for row in rows if row.edit_map_max} == {"max"}
    kept, blurred = (read_rows(tmp_path / name) for name in ("kept", "blurred"))
    assert [row.scores for row in kept] == [row.scores for row in blurred]  # scored sharp
    for row in kept:
        assert row.picture is not None
        sharp, soft = (
            np.asarray(Image.open(tmp_path / name / row.picture)) for name in ("kept", "blurred")
        )
        assert detail(soft) < detail(sharp) / 2


def test_a_full_disk_is_one_line_and_the_run_goes_on(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "results"
    sync, calls = os.fsync, 0

    def filling(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", filling)
        with pytest.raises(OutputError, match="No space left on device .* make room") as caught:
            small_run(folder)
    assert "\n" not in str(caught.value)
    assert len(read_rows(folder)) < TOTAL
    assert small_run(folder)[0]
    assert measured(folder) == measured(whole)
    assert not list(folder.rglob("*.part"))


def test_per_prompt_takes_the_lists_own_seed_guidance_and_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: Pipeline
) -> None:
    own = EvalPrompt(
        index=0, text="a red star", seed=2**32 - 1, guidance_scale=3.0, width=96, height=64
    )
    bare = EvalPrompt(index=1, text="a red star")
    prompts = replace(PROMPTS, prompts=(own, bare))
    monkeypatch.setattr("evaluation.small_runs.PROMPTS", prompts)
    settings = small_settings(
        protocol="per-prompt",
        guidance_scale=5.0,
        settings=settings_from_names(["off"]),
        scorers=("activation",),
        rule=rule_from_text("activation.share>=0.5"),
        images="keep",
    )
    assert small_run(tmp_path / "own", settings)[0]
    rows = read_rows(tmp_path / "own")
    assert [row.seed for row in rows] == [2**32 - 1, 0, 501_000, 501_001]
    expected = [
        one_thread("a red star", seed=2**32 - 1, guidance_scale=3.0, width=96, height=64),
        one_thread("a red star", seed=501_000, guidance_scale=5.0),
    ]
    settings = replace(settings, protocol="official")
    assert small_run(tmp_path / "official", settings)[0]
    official = read_rows(tmp_path / "official")
    assert [row.seed for row in official] == [500_000, 500_001, 501_000, 501_001]
    for row, size in zip(rows, [(96, 64), (96, 64), (64, 64), (64, 64)], strict=True):
        assert row.picture is not None
        with Image.open(tmp_path / "own" / row.picture) as image:
            assert image.size == size
            story = json.loads(image.info["sld-edge"])
            assert story["guidance_scale"] == (3.0 if row.prompt == 0 else 5.0)
    assert expected[0].images[0].size == (96, 64)


def test_batches_hold_one_size_and_every_picture_once(tmp_path: Path) -> None:
    prompts = [
        EvalPrompt(index=index, text="", width=64 + 32 * (index % 2), height=64)
        for index in range(7)
    ]
    settings = small_settings(protocol="per-prompt", batch_size=4)
    done = {("plain", 0, 0), ("max", 0, 0), ("negative prompt", 0, 0), ("max", 1, 1)}
    jobs = run.jobs_from_prompts(prompts, settings, done)
    assert all(len(job) <= 4 and len({task.prompt.width for task in job}) == 1 for job in jobs)
    found = [
        (name, task.prompt.index, task.image)
        for job in jobs
        for task in job
        for name in task.missing
    ]
    assert len(found) == len(set(found)) == 7 * 2 * 3 - len(done)
    assert not set(found) & done


def test_a_batch_gives_what_single_pictures_give(whole: Path, tmp_path: Path) -> None:
    assert small_run(tmp_path / "batch", small_settings(batch_size=8))[0]
    for one, single in zip(read_rows(tmp_path / "batch"), read_rows(whole), strict=True):
        assert (one.key, one.seed) == (single.key, single.seed)
        assert one.share == pytest.approx(single.share, abs=2e-3)  # a batch rounds otherwise
        assert one.change == pytest.approx(single.change, abs=2e-3)


def test_seeds_stay_within_32_bits_and_apart() -> None:
    settings = small_settings()
    prompts = [EvalPrompt(index=index, text="") for index in range(4703)]
    seeds = {
        seed_of(settings, Task(prompt=prompt, image=image, missing=()))
        for prompt in prompts
        for image in range(10)
    }
    assert len(seeds) == 47030
    assert max(seeds) < 2**32


@pytest.mark.parametrize(
    ("work", "said"),
    [
        ({"shard": 0}, "--shard"),
        ({"shard": 3, "shards": 2}, "got 3/2"),
        ({"processes": 0}, "--processes"),
    ],
)
def test_work_that_cannot_be_is_refused(tmp_path: Path, work: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        small_run(tmp_path / "results", **work)
    assert not (tmp_path / "results").exists()


def test_what_would_be_refused_in_the_middle_is_refused_first(tmp_path: Path) -> None:
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"images_per_prompt": 0}, "--images-per-prompt"),
        ({"steps": 0}, "steps"),
        ({"sampler": "best"}, "sampler"),
        ({"batch_size": 0}, "--batch-size"),
        ({"settings": settings_from_names(["max"])[1:]}, "expected plain"),
        ({"scorers": ("eye",)}, "scorer"),
    ]
    for changed, said in mistakes:
        with pytest.raises(InputError, match=said):
            small_run(tmp_path / "results", small_settings(**changed))
        with suppress(FileNotFoundError):
            assert not any((tmp_path / "results").iterdir())
