"""Python 3.10, which JetPack 6 has: the miniature's picture and the runtime's tests, for `make`.

The environment is a JetPack 6 user's, but for TensorRT and with the packages that tests need. Where
no Python 3.10 is here, uv downloads one; where it cannot, a line says so and nothing fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from lowest_versions import ROOT, differences

VENV = ROOT / ".venv-py310"
PYTHON = VENV / "bin" / "python"
UV = (sys.executable, "-m", "uv")
EXTRAS = ".[jetson,sign,export]"
TESTS = ("tests/runtime", "tests/engines", "tests/standin", "tests/test_supply_chain.py")
LONG = tuple(
    f"tests/runtime/test_{name}.py"
    for name in ("certify", "selftest", "selftest_bounds", "selftest_faults", "threads")
)
_LEVELS = 1  # of 255: ONNX Runtime 1.23 may round otherwise than the newest


def made_environment() -> bool:
    """Make the virtual environment; say so where no Python 3.10 can be had."""
    pyenv = sorted(Path.home().glob(".pyenv/versions/3.10.*/bin"))
    path = os.pathsep.join([*map(str, pyenv), os.environ["PATH"]])
    command = [*UV, "venv", "--quiet", "--clear", "--python", "3.10", str(VENV)]
    done = subprocess.run(
        command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = " ".join(done.stderr.split())
        print(f"NOT TESTED: Python 3.10. None is here, and uv could not download one: {reason}")
    return not done.returncode


def main() -> int:
    """Return 0 where picture and tests are right, or where no Python 3.10 can be had."""
    if not made_environment():
        return 0
    install = [*UV, "pip", "install", "--quiet", "--python", str(PYTHON), "--editable", EXTRAS]
    subprocess.run([*install, "pytest", "pytest-randomly"], cwd=ROOT, check=True)
    levels = differences(str(PYTHON), sys.executable)
    print(
        f"Python 3.10: the picture differs by at most {levels.max()} of 255 levels, in the mean by "
        f"{levels.mean():.6f}"
    )
    if levels.max() > _LEVELS:
        return 1
    print(f"Python 3.10: one case of each test; not run, minutes of arithmetic: {', '.join(LONG)}")
    left = [f"--ignore={file}" for file in LONG]
    tests = [str(PYTHON), "-m", "pytest", "-q", "--device", *left, *TESTS]
    return subprocess.run(tests, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
