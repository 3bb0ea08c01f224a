"""What an installation brings: native code where asked for and buildable, NumPy elsewhere."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
STEP = """
import numpy as np
from sld_edge.cpp_ext import HAVE_NATIVE, safe_step
from sld_edge.runtime.contract import INPUTS, shape_of
sizes = {"B": 1, "n": 1, "h": 2, "w": 2}
feeds = {name: np.ones(shape_of(name, sizes), np.float32) for name in INPUTS}
print(HAVE_NATIVE, safe_step(feeds)["latents_next"].mean())
"""
# No edit but the momentum's, 1, so eps = 0 and m = x = 1; next = x + m + 4 past ones + noise.
NEXT = "7.0"


@pytest.fixture(scope="module")
def backend() -> None:
    for package in ("scikit_build_core", "nanobind", "pip"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def environment(**settings: str) -> dict[str, str]:
    """This one without what would show a build the checkout's own files."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHONPATH", "SLD_EDGE_"))}
    return kept | settings


def pip(python: Path | str, *arguments: str | Path, **settings: str) -> str:
    command = [str(python), "-m", "pip", *map(str, arguments)]
    common = ["--no-build-isolation", "--no-deps", "--no-index", "-q"]
    done = subprocess.run(
        [*command, *common],
        env=environment(**settings),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources alone, with their links, as a clone has them; what is compiled is kept in it."""
    clone = tmp_path_factory.mktemp("sources") / "clone"
    kept = (".namespace", "cpp_ext", "engines", "runtime", "export", "benchmarks")
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd", "checkpoint", "miniature")
    for name in kept:
        shutil.copytree(ROOT / name, clone / name, symlinks=True, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone / name)
    return clone


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """An interpreter that has this one's packages and not its sld-edge."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    found = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        capture_output=True,
        text=True,
        check=True,
    )
    here = Path(importlib.util.find_spec("numpy").origin).parents[1]  # type: ignore[union-attr, arg-type]
    Path(found.stdout.strip(), "packages.pth").write_text(f"{here}\n")
    return python


def imported(python: Path, folder: Path, **settings: str) -> str:
    done = subprocess.run(
        [python, "-c", STEP],
        cwd=folder,
        env=environment(**settings),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def wheel_from(copy: Path, folder: Path, **settings: str) -> Path:
    pip(sys.executable, "wheel", "-w", folder, copy, **settings)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    "settings",
    [{"SLD_EDGE_NATIVE": "0"}, {"SLD_EDGE_NATIVE": "1", "SLD_EDGE_PURE": "1"}],
    ids=["native 0", "pure"],
)
def test_one_wheel_for_every_machine(copy: Path, tmp_path: Path, settings: dict[str, str]) -> None:
    assert wheel_from(copy, tmp_path, **settings).name.endswith("-py3-none-any.whl")


@pytest.mark.usefixtures("backend", "compiler")
def test_a_native_wheel(copy: Path, fresh: Path, tmp_path: Path) -> None:
    wheel = wheel_from(copy, tmp_path, SLD_EDGE_NATIVE="1")
    assert "none-any" not in wheel.name
    shutil.unpack_archive(wheel, tmp_path / "installed", "zip")
    names = {path.name for path in (tmp_path / "installed/sld_edge/cpp_ext").iterdir()}
    assert {"_kernels.pyi", "py.typed"} < names
    assert not names & {"src", "tests", "include", "CMakeLists.txt"}
    printed = imported(fresh, tmp_path, PYTHONPATH=str(tmp_path / "installed"))
    assert printed == f"True {NEXT}"


@pytest.mark.usefixtures("backend")
def test_without_a_compiler_numpy_is_installed(copy: Path, fresh: Path, tmp_path: Path) -> None:
    folder = str(tmp_path / "build")  # not that of a build that found one
    wheel = wheel_from(
        copy, tmp_path, SLD_EDGE_NATIVE="1", CXX="/bin/false", SKBUILD_BUILD_DIR=folder
    )
    assert wheel.name.endswith("-py3-none-any.whl")
    shutil.unpack_archive(wheel, tmp_path / "installed", "zip")
    printed = imported(fresh, tmp_path, PYTHONPATH=str(tmp_path / "installed"))
    assert printed == f"False {NEXT}"


@pytest.mark.usefixtures("backend", "compiler")
def test_an_editable_native_install(copy: Path, fresh: Path, tmp_path: Path) -> None:
    pip(fresh, "install", "-e", copy, SLD_EDGE_NATIVE="1")
    assert imported(fresh, tmp_path) == f"True {NEXT}"
    door = copy / "cpp_ext" / "__init__.py"
    text = door.read_text()
    door.write_text(text + "print('edited')\n")
    assert imported(fresh, tmp_path).startswith("edited")
    door.write_text(text)
