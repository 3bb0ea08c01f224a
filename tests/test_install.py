"""What an installation brings: one pure wheel, from a checkout or the sdist, and the checkout."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("engines", "runtime", "export", "benchmarks")
NATIVE = "cpp_ext"  # in the sdist alone: nothing in the package uses it
LEFT_OUT = (
    "benchmarks/miniworld/checkpoint/",
    "benchmarks/miniworld/few_steps.safetensors",
    "benchmarks/miniworld/training/",
    "benchmarks/studies/",
)
PICTURE = """
import sld_edge.runtime
from sld_edge.runtime.commands.run import main
assert main(["a red star", "--steps", "1", "--output", "star.png", "--quiet"]) == 0
print(sld_edge.runtime.__file__)
"""
pytestmark = pytest.mark.slow


def environment() -> dict[str, str]:
    """This one without what would show a build the checkout's own files."""
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTHONPATH")}


def run(*command: str | Path, folder: Path = ROOT) -> str:
    done = subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def pip(python: Path | str, *arguments: str | Path) -> None:
    common = ("--no-build-isolation", "--no-deps", "--no-index", "--quiet")
    run(python, "-m", "pip", *arguments, *common)


def wheel_from(source: Path, folder: Path) -> Path:
    pip(sys.executable, "wheel", "--wheel-dir", folder, source)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders and links of a clone, without what was compiled in this one."""
    for package in ("hatchling", "pip"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    clone = tmp_path_factory.mktemp("sources") / "clone"
    unwanted = shutil.ignore_patterns("__pycache__")
    for name in (".namespace", NATIVE, *FOLDERS):
        shutil.copytree(ROOT / name, clone / name, symlinks=True, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, clone / name)
    return clone


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """An interpreter that has this one's packages and not its sld-edge."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    folder = run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])")
    for package in ("numpy", "pip"):
        origin = getattr(importlib.util.find_spec(package), "origin", None)
        assert origin is not None
        Path(folder, f"{package}.pth").write_text(f"{Path(origin).parents[1]}\n")
    return python


def files_of(folder: Path, *names: str) -> set[str]:
    paths = (path for name in names for path in (folder / name).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix() for path in paths}


def test_the_wheel_has_four_folders_and_runs(checkout: Path, fresh: Path, tmp_path: Path) -> None:
    wheel = wheel_from(checkout, tmp_path)
    assert wheel.name.endswith("-py3-none-any.whl")
    modules = {name for name in files_of(checkout, *FOLDERS) if not name.startswith(LEFT_OUT)}
    with zipfile.ZipFile(wheel) as content:
        names = {name for name in content.namelist() if ".dist-info/" not in name}
    assert names == {f"sld_edge/{name}" for name in modules}
    pip(fresh, "install", wheel)
    assert Path(run(fresh, "-c", PICTURE, folder=tmp_path)).is_relative_to(tmp_path / "venv")


def test_the_sdist_has_the_native_code_and_makes_the_same_wheel(
    checkout: Path, tmp_path: Path
) -> None:
    script = "import sys, hatchling.build; print(hatchling.build.build_sdist(sys.argv[1]))"
    name = run(sys.executable, "-c", script, tmp_path, folder=checkout)
    with tarfile.open(tmp_path / name) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / name.removesuffix(".tar.gz")
    assert files_of(unpacked, NATIVE) == files_of(checkout, NATIVE)
    one, other = (
        zipfile.ZipFile(wheel_from(source, tmp_path / source.name))
        for source in (unpacked, checkout)
    )
    with one, other:
        assert one.namelist() == other.namelist()
        for entry in one.namelist():
            assert one.read(entry) == other.read(entry), entry


def test_an_editable_installation_follows_the_checkout(
    checkout: Path, fresh: Path, tmp_path: Path
) -> None:
    pip(fresh, "install", "--editable", checkout)
    assert Path(run(fresh, "-c", PICTURE, folder=tmp_path)).is_relative_to(checkout)
    (checkout / "runtime" / "new.py").write_text("print('new')\n")
    assert run(fresh, "-c", "import sld_edge.runtime.new", folder=tmp_path) == "new"
    (checkout / "runtime" / "new.py").unlink()
