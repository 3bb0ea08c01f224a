"""What a device installs: pinned, hashed, and within what pyproject.toml states."""

from __future__ import annotations

import re

import pytest
from packaging.requirements import Requirement

from lowest_versions import ROOT, floor, stated

CONSTRAINTS = ROOT / "constraints" / "device-cpu.txt"


def pinned() -> dict[str, tuple[str, list[str]]]:
    """Version and hashes of each package in the constraints."""
    entry = r"([a-z0-9-]+)==([0-9a-z.]+)((?: +--hash=sha256:[0-9a-f]{64})*) *"
    text = re.sub(r"^ *#.*\n", "", CONSTRAINTS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = {}
    for line in text.replace("\\\n", " ").splitlines():
        match = re.fullmatch(entry, line)
        assert match is not None, f"not `name==version` with SHA-256 hashes: {line}"
        assert match[1] not in found, f"{match[1]} is there twice"
        found[match[1]] = (match[2], match[3].split())
    return found


def test_every_package_of_a_device_is_hashed() -> None:
    without = [name for name, (_, hashes) in pinned().items() if not hashes]
    assert not without


def test_a_device_gets_versions_that_the_project_takes() -> None:
    versions = {name: version for name, (version, _) in pinned().items()}
    for requirement in stated("cpu", python="3.11"):
        assert requirement.name in versions, requirement
        assert requirement.specifier.contains(versions[requirement.name]), requirement


# Earlier ones have published advisories. This is a list kept by hand, not an audit.
@pytest.mark.parametrize(
    ("name", "lowest"),
    [("pillow", "12.3"), ("onnxruntime", "1.24.1"), ("onnx", "1.21"), ("tqdm", "4.66.3")],
)
@pytest.mark.parametrize("python", ["3.10", "3.11", "3.14"])
def test_versions_before_a_mended_advisory_are_refused(name: str, lowest: str, python: str) -> None:
    if (name, python) == ("onnxruntime", "3.10"):
        lowest = "1.23.2"  # the last for 3.10; engines/onnx_files.py checks what it would not
    requirements = stated("cpu", "rtx", "tensorrt", "jetson", "export", python=python)
    given = {floor(one) for one in requirements if one.name == name}
    assert given == {f"{name}=={lowest}"}


def test_jetpack_6_gets_the_cuda_bindings_that_its_driver_takes() -> None:
    """12.9's CUDA runtime is for ARM servers; JetPack 7 has CUDA 13."""
    for python, lowest in (("3.10", "12.8.0"), ("3.12", "13")):
        bindings = [one for one in stated("jetson", python=python) if one.name == "cuda-bindings"]
        assert [floor(one) for one in bindings] == [f"cuda-bindings=={lowest}"]
        assert bindings[0].specifier.contains("12.9.4") is False


def test_one_lowest_version_is_needed() -> None:
    assert floor(Requirement("numpy>=1.26,<3")) == "numpy==1.26"
    for text in ("numpy", "numpy<3", "numpy>=1,>=2"):
        with pytest.raises(ValueError, match="one lowest version"):
            floor(Requirement(text))
