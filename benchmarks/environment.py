"""Measure the size of what a device installs, package by package, in a fresh environment.

python -m sld_edge.benchmarks.environment
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_SKIPPED = ("pip", "setuptools", "wheel", "_distutils_hack", "pkg_resources")


def size_of(path: Path) -> int:
    """Bytes of a file, or of everything under a directory."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def main() -> None:
    """Install the runtime into a new environment and print what it takes."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "venv"
        venv.create(home, with_pip=True)
        pip = [str(home / "bin" / "pip"), "install", "--quiet", "--no-compile", f"{ROOT}[cpu]"]
        subprocess.run(pip, check=True)
        packages = next(home.glob("lib/python*/site-packages"))
        sizes = {
            path.name: size_of(path)
            for path in packages.iterdir()
            if not path.name.startswith(_SKIPPED)
        }
    for name, size in sorted(sizes.items(), key=lambda item: -item[1])[:12]:
        print(f"{size / 1e6:8.1f} MB  {name}")
    print(f"{sum(sizes.values()) / 1e6:8.1f} MB  in all, Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
