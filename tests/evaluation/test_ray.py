"""The same work on a local Ray cluster, one of whose workers is killed."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evaluation.small_runs import measured, small_run, small_settings
from sld_edge.benchmarks.evaluation import ray_run
from sld_edge.benchmarks.evaluation.rows import read_rows
from sld_edge.engines.errors import EngineError, MissingPackageError, UserError

ray = pytest.importorskip("ray")

TESTS = str(Path(__file__).parents[1])


@pytest.fixture(scope="module")
def _cluster() -> Iterator[None]:
    """Two CPUs of this machine; what a session before us left running is not ours to join."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", TESTS, prepend=os.pathsep)
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        yield
        ray.shutdown()


def workers_at_work() -> list[int]:
    """Processes of this session's cluster that run our jobs."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes()
            ancestors = tuple(_ancestors(int(path.name)))
        except OSError:  # it has ended meanwhile
            continue
        if command.startswith(b"ray::evaluate_on_worker") and os.getpid() in ancestors:
            found.append(int(path.name))
    return found


def _ancestors(pid: int) -> Iterator[int]:
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        yield pid


@pytest.mark.usefixtures("_cluster")
def test_with_a_worker_killed_the_rows_are_those_of_one_machine(tmp_path: Path) -> None:
    settings = small_settings(steps=10)
    assert small_run(tmp_path / "alone", settings)[0]
    folder = tmp_path / "ray"
    log = folder / "rows-1-of-1.jsonl"
    killed: list[int] = []
    rows_then: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 120
        while not killed and time.monotonic() < deadline:
            if log.exists() and log.stat().st_size:
                for pid in workers_at_work()[:1]:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                    rows_then.append(log.read_bytes().count(b"\n"))
            time.sleep(0.002)

    killer = threading.Thread(target=kill)
    killer.start()
    complete, _ = small_run(folder, settings, ray="local")
    killer.join()
    assert complete
    assert killed
    assert rows_then[0] < 24  # in the middle of the run
    assert measured(folder) == measured(tmp_path / "alone")
    # The pictures came back too, the same.
    for row in read_rows(folder):
        assert row.picture is not None
        assert (folder / row.picture).is_file()


@pytest.mark.usefixtures("_cluster")
def test_a_job_whose_workers_keep_dying_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_run, "evaluate_on_worker", _dies)
    monkeypatch.setattr(ray_run, "_RETRIES", 1)
    with pytest.raises(EngineError, match="could not be done on the Ray cluster") as caught:
        small_run(tmp_path / "ray", ray="local")
    assert "\n" not in str(caught.value)


def _dies(_shared: Any, _job: Any) -> None:
    os._exit(1)


@pytest.mark.usefixtures("_cluster")
def test_what_a_worker_refuses_reaches_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_run, "evaluate_on_worker", _refuses)
    with pytest.raises(UserError, match="the scorer broke"):
        small_run(tmp_path / "ray", ray="local")


def _refuses(_shared: Any, _job: Any) -> tuple[str, str]:
    return "mistake", "the scorer broke"


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingPackageError, match=r'pip install "sld-edge\[ray\]"'):
        small_run(tmp_path / "ray", ray="local")
