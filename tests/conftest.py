"""What every test shares: a cache of its own, and the embedded miniature bundle."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from sld_edge.runtime import Pipeline
from sld_edge.runtime.bundle import EMBEDDED


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
