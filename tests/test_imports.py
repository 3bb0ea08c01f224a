"""What a device loads: no torch, diffusers, transformers or onnx, in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "diffusers", "transformers", "onnx"}
CHECKPOINT = Path(__file__).parents[1] / "benchmarks" / "miniworld" / "checkpoint"


def loaded_by(code: str, folder: Path) -> set[str]:
    """Run code in a fresh interpreter and return the top-level modules it loaded."""
    ends = "\nimport sys; print('loaded:', *sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", code + ends], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rsplit("loaded:", 1)[1].split())


def test_making_an_image_loads_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "from sld_edge.runtime.commands.run import main\n"
        "assert main(['a red star', '--steps', '2', '--output', 'star.png']) == 0"
    )
    loaded = loaded_by(code, tmp_path)
    assert (tmp_path / "star.png").exists()
    assert "onnxruntime" in loaded
    assert not loaded & HEAVY
    assert not {name for name in loaded if name in ("safetensors", "huggingface_hub", "requests")}


def test_exporting_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "from sld_edge.export.commands.export import main\n"
        f"assert main(['--model', {str(CHECKPOINT)!r}, '--output', 'bundle']) == 0"
    )
    loaded = loaded_by(code, tmp_path)
    assert (tmp_path / "bundle" / "bundle.json").exists()
    assert "onnx" in loaded
    assert not loaded & {"torch", "diffusers", "transformers"}


@pytest.mark.parametrize("package", ["engines", "runtime"])
def test_importing_every_module_loads_nothing_heavy(package: str, tmp_path: Path) -> None:
    code = (
        f"import importlib, pkgutil, sld_edge.{package} as p\n"
        "for m in pkgutil.walk_packages(p.__path__, p.__name__ + '.'):\n"
        "    importlib.import_module(m.name)"
    )
    assert not loaded_by(code, tmp_path) & HEAVY


RUN = "from sld_edge.runtime.commands.run import main; main(['a star'])"
EXPORT = (
    "from sld_edge.export.commands.export import main; "
    "main(['--model', {!r}, '--output', 'bundle'])"
)


@pytest.mark.parametrize(
    ("module", "code", "extra"),
    [("onnxruntime", RUN, "cpu"), ("onnx", EXPORT.format(str(CHECKPOINT)), "export")],
)
def test_a_missing_package_is_named_with_its_extra(
    module: str, code: str, extra: str, tmp_path: Path
) -> None:
    hide = f"import sys; sys.modules[{module!r}] = None; "
    command = [sys.executable, "-c", hide + code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr.count("\n") == 1, done.stderr
    assert f'pip install "sld-edge[{extra}]"' in done.stderr
