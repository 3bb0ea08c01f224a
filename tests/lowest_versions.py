"""The lowest versions that pyproject.toml states, and whether they make the same picture.

Without arguments the requirements of the base package and of `cpu` are printed. With two
interpreters, the one with the lowest versions first, the miniature makes a picture with either.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from packaging.requirements import Requirement
from PIL import Image

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parents[1]
PYTHON = "{}.{}".format(*sys.version_info)
_LEVELS = 1  # of 255: another release may round otherwise
_SETTINGS = ("a red star at a party", "--seed", "9", "--provider", "cpu", "--quiet")


def stated(*extras: str, python: str = PYTHON) -> list[Requirement]:
    """Return what the base package and extras require under a version of Python."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts, names = [*project["dependencies"]], [*extras]
    for name in names:
        for text in project["optional-dependencies"][name]:
            others = Requirement(text)
            if others.name == project["name"]:
                names += others.extras  # an extra that takes in others
            else:
                texts.append(text)
    requirements = [Requirement(text) for text in texts]
    here = {"python_version": python}
    return [one for one in requirements if one.marker is None or one.marker.evaluate(here)]


def floor(requirement: Requirement) -> str:
    """Return a requirement of exactly the lowest version that another one allows."""
    lowest = [one.version for one in requirement.specifier if one.operator in (">=", "==")]
    if len(lowest) != 1:
        raise ValueError(f"{requirement}: one lowest version is needed")
    return f"{requirement.name}=={lowest[0]}"


def differences(one: str, other: str) -> NDArray[np.int64]:
    """Return the differences of two interpreters' pictures, in levels of 255."""
    pictures = []
    with tempfile.TemporaryDirectory() as folder:
        for index, interpreter in enumerate((one, other)):
            output = Path(folder, f"{index}.png")
            program = "import sys; from sld_edge.runtime.commands.run import main; sys.exit(main())"
            arguments = [*_SETTINGS, "--output", str(output)]
            command = [str(Path(interpreter).absolute()), "-c", program, *arguments]
            environment = {**os.environ, "SLD_EDGE_CACHE": "off"}
            subprocess.run(command, check=True, cwd=folder, env=environment)
            pictures.append(np.asarray(Image.open(output).convert("RGB")).astype(int))
    difference: NDArray[np.int64] = np.abs(pictures[0] - pictures[1])
    return difference


def main(arguments: list[str]) -> int:
    """Print the lowest versions, or compare two interpreters' pictures."""
    if not arguments:
        print("\n".join(map(floor, stated("cpu"))))
        return 0
    levels = differences(*arguments).max()
    print(f"lowest versions: the picture differs by at most {levels} of 255")
    return int(levels > _LEVELS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
