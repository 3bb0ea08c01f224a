"""The C interface from C, both entries under sanitizers, and what nvcc makes of the kernels."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CPP = Path(__file__).parents[2] / "cpp_ext"
PAGE = Path(__file__).parents[2] / "docs" / "native.md"
STRICT = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
OLD = "75;80;86;87;89;90"
ARCHITECTURES = {  # by the version of nvcc; docs/native.md names them
    "12.0.140": OLD,
    "12.6.85": OLD,  # of JetPack 6
    "12.8.61": f"{OLD};100;120",
    "12.9.86": f"{OLD};100;120",
    "13.0.88": f"{OLD};100;120;110",
    "13.5.37": f"{OLD};100;120;110",
}


def run(*command: object) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def c_compiler() -> str:
    found = shutil.which("cc") or shutil.which("gcc")
    if found is None:
        pytest.skip("no C compiler here")
    return found


def run_c(compiler: str, source: Path, library: Path, folder: Path) -> str:
    program = folder / "program"
    linked = (f"-I{CPP / 'include'}", library, f"-Wl,-rpath,{library.parent}", "-lm")
    run(compiler, "-std=c11", *STRICT, source, *linked, "-o", program)
    return run(program)


def test_the_interface_from_c(c_compiler: str, library: Path, tmp_path: Path) -> None:
    assert run_c(c_compiler, CPP / "tests" / "interface.c", library, tmp_path) == "passed\n"


def test_the_example_of_the_page(c_compiler: str, library: Path, tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    examples = re.findall(r"```c\n(.*?)```\n\n.*?prints `(.*?)`", text, re.DOTALL)
    assert len(examples) == 1
    source, printed = examples[0]
    (tmp_path / "example.c").write_text(source, encoding="utf-8")
    assert run_c(c_compiler, tmp_path / "example.c", library, tmp_path).strip() == printed


def test_under_sanitizers(compiler: str, tmp_path: Path) -> None:
    """Address and undefined behaviour: the loops with threads, and the kernels as loops."""
    program = tmp_path / "safe_step"
    includes = [f"-I{CPP / name}" for name in ("include", "src", "tests/cuda_on_cpu")]
    sources = [CPP / "tests" / "safe_step.cpp", CPP / "src" / "step.cpp", CPP / "src/safe_step.cpp"]
    kernels = ["-x", "c++", CPP / "src" / "safe_step.cu"]
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"]
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-fopenmp", *STRICT, *checks]
    run(compiler, *flags, *includes, *sources, *kernels, "-o", program)
    assert run(program) == "passed\n"


def chosen_architectures(version: str) -> str:
    """Return what CMake chooses for a version of nvcc, which need not be here."""
    if shutil.which("cmake") is None:
        pytest.skip("no CMake here")
    script = CPP / "cuda_architectures.cmake"
    said = run("cmake", f"-DCMAKE_CUDA_COMPILER_VERSION={version}", "-P", script)
    return said.strip().rpartition(": ")[2]


@pytest.mark.parametrize(("version", "architectures"), ARCHITECTURES.items())
def test_architectures_are_those_that_nvcc_knows(version: str, architectures: str) -> None:
    assert chosen_architectures(version) == architectures


@pytest.mark.skipif(NVCC is None, reason="no nvcc here: the CUDA part is not compiled for devices")
def test_nvcc_takes_the_kernels(tmp_path: Path) -> None:
    """For every kind of device that CMake chooses; they are not run: no GPU is needed."""
    version = re.search(r"V(\d+\.\d+\.\d+)", run(NVCC, "--version"))
    assert version is not None
    numbers = chosen_architectures(version[1]).split(";")
    targets = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers]
    flags = ["-std=c++20", "--fmad=false", "-Xptxas=-v", "-Werror=all-warnings"]
    command = [NVCC, *flags, *targets, f"-I{CPP / 'include'}", "-c", CPP / "src" / "safe_step.cu"]
    done = subprocess.run(
        [*map(str, command), "-o", str(tmp_path / "step.o")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = done.stdout + done.stderr
    for number in numbers:
        assert f"for 'sm_{number}'" in told
    assert set(re.findall(r"(\d+) bytes spill stores", told)) == {"0"}


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("cuda", ["OFF", "ON"])
def test_cmake_takes_the_library_for_c(cuda: str, tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("no CMake here")
    if cuda == "ON" and NVCC is None:
        pytest.skip("no nvcc here")
    options = [f"-DSLD_EDGE_CUDA={cuda}", "-DSLD_EDGE_PYTHON=OFF", "-DBUILD_SHARED_LIBS=ON"]
    if cuda == "ON":
        options.append(f"-DCMAKE_CUDA_COMPILER={NVCC}")
    for _ in range(2):  # the second time with CMake's cache
        said = run("cmake", "-S", CPP, "-B", tmp_path, *options)
        assert "Generating done" in said
        if cuda == "ON":
            assert f"compute capabilities: {OLD}" in said
    if cuda == "ON":
        said = run("cmake", "-S", CPP, "-B", tmp_path, *options, "-DCMAKE_CUDA_ARCHITECTURES=87")
        assert "compute capabilities" not in said
