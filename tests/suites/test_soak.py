"""1,000 pictures by four threads that share a pipeline: none is mixed, nothing piles up."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import standin
from sld_edge.runtime import Pipeline
from sld_edge.runtime.bundle import EMBEDDED
from sld_edge.runtime.safety import PRESETS
from standin.plans import VERSIONS, make_plans

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(sys.platform != "linux", reason="memory and descriptors from /proc"),
]

_PICTURES, _WARM_UP, _THREADS = 1000, 300, 4
_GROWTH = 10 * 1024  # bytes a picture
_REQUESTS: list[dict[str, Any]] = [
    {"prompt": prompt, "safety": preset, "sampler": sampler, "seed": seed, "steps": 2 + seed % 2}
    for seed, (preset, sampler, prompt) in enumerate(
        product(PRESETS, ("ddim", "euler-a", "dpm++2m", "unipc"), ("a star", "a skull in an alley"))
    )
]


@pytest.fixture(params=["cpu", "stand-in"])
def shared(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Pipeline]:
    if request.param == "cpu":
        with Pipeline.load(provider="cpu") as pipeline:
            yield pipeline
        return
    standin.install(monkeypatch)
    bundle = Path(shutil.copytree(EMBEDDED, tmp_path / "mini"))
    make_plans(bundle, engine="tensorrt", version=VERSIONS["tensorrt"])
    with Pipeline.load(bundle, provider="tensorrt") as pipeline:
        yield pipeline


def held() -> tuple[int, int]:
    """Bytes in memory, and open descriptors."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE"), len(os.listdir("/proc/self/fd"))


def test_a_thousand_pictures_are_each_its_twin(shared: Pipeline, budget: float) -> None:
    until = time.monotonic() + budget

    def picture(index: int) -> bytes:
        return bytes(shared(**_REQUESTS[index % len(_REQUESTS)]).images[0].tobytes())

    twins = [picture(index) for index in range(len(_REQUESTS))]
    assert len(set(twins)) > len(twins) // 2
    made, wrong = 0, []
    before: tuple[int, int] | None = None
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, _PICTURES, 100):
            if time.monotonic() > until:
                break
            if start == _WARM_UP:
                before = held()
            indices = range(start, start + 100)
            for index, found in zip(indices, pool.map(picture, indices), strict=True):
                made += 1
                if found != twins[index % len(twins)]:
                    wrong.append(index)
        after = held()
    assert not wrong, f"{len(wrong)} of {made} pictures are another's"
    if before is not None:
        memory, descriptors = (now - was for now, was in zip(after, before, strict=True))
        print(f"{made} pictures: {memory / (made - _WARM_UP) / 1024:.1f} KiB a picture")
        assert memory < _GROWTH * (made - _WARM_UP)
        assert descriptors <= 0
