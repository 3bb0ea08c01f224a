"""What every test shares: a cache of its own, and the embedded miniature bundle."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from sld_edge.runtime import Pipeline
from sld_edge.runtime.bundle import EMBEDDED

_started = time.monotonic()
_finished: list[str] = []
_DEVELOPERS = ("tensorrt_rtx", "torch")  # no device needs them
_SUITES = ("fuzz", "kill", "soak")  # minutes to hours: run only where -m names them


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="a test of fuzz, kill and soak ends early after this time (default: it does not)",
    )
    parser.addoption(
        "--stop-after",
        type=float,
        metavar="SECONDS",
        help="start no test after this time, and say how many were left (make quick)",
    )
    parser.addoption(
        "--device",
        action="store_true",
        help="a device's packages: one case of each test, and no file that imports developers'",
    )


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    missing = re.search(r"ModuleNotFoundError: No module named '(\w+)'", str(report.longrepr))
    device: bool = collector.config.getoption("--device")
    if device and missing is not None and missing[1] in _DEVELOPERS:
        report.outcome = "skipped"
        report.longrepr = (
            str(collector.path),
            0,
            f"Skipped: no device has {missing[1]}",
        )
    return report


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    named = set(re.findall(r"\w+", config.option.markexpr))
    resting = [
        item
        for item in items
        if any(item.get_closest_marker(suite) for suite in _SUITES if suite not in named)
    ]
    if resting:
        config.hook.pytest_deselected(items=resting)
        items[:] = [item for item in items if item not in resting]
    if config.getoption("--device"):
        cases = {item.nodeid.partition("[")[0]: item for item in items}
        config.hook.pytest_deselected(items=list(set(items) - set(cases.values())))
        items[:] = cases.values()


def pytest_runtest_logfinish(nodeid: str, location: object) -> None:
    _finished.append(nodeid)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    limit: float | None = item.config.getoption("--stop-after")
    if limit is not None and time.monotonic() - _started > limit:
        left = len(item.session.items) - len(_finished) - 1
        if left:
            item.session.shouldstop = f"time is over: {left} tests are left for `make check`"


@pytest.fixture
def budget(request: pytest.FixtureRequest) -> float:
    """Seconds that a test of a long suite may take."""
    given: float | None = request.config.getoption("--budget")
    return float("inf") if given is None else given


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep prepared sessions away from the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLD_EDGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="session")
def miniature() -> Pipeline:
    return Pipeline.load(provider="cpu")


@pytest.fixture
def bundle_copy(tmp_path: Path) -> Path:
    """A copy of the embedded bundle that a test may damage."""
    return Path(shutil.copytree(EMBEDDED, tmp_path / "bundle"))
