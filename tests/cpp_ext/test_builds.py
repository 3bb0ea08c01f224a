"""The library as CMake makes it, from C, under sanitizers, and its kernels compiled by nvcc."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from c_library import (
    CPP,
    NVCC,
    Feeds,
    Step,
    bound,
    empty_outputs,
    installed_by,
    opened,
    run,
    step_of,
)

PAGE = Path(__file__).parents[2] / "docs" / "native.md"
STRICT = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
CUDA_FAILED = "CUDA refused a kernel: cudaGetLastError() has the reason"
OLD = "75;80;86;87;89;90"
ARCHITECTURES = {  # by the version of nvcc; docs/native.md names them
    "12.0.140": OLD,
    "12.6.85": OLD,  # of JetPack 6
    "12.8.61": f"{OLD};100;120",
    "12.9.86": f"{OLD};100;120",
    "13.0.88": f"{OLD};100;120;110",
    "13.5.37": f"{OLD};100;120;110",
}


def run_c(compiler: str, source: Path, installed: Path, folder: Path) -> str:
    program, library = folder / "program", installed / "lib" / "libsld_edge.so"
    linked = (f"-I{installed / 'include'}", library, f"-Wl,-rpath,{library.parent}", "-lm")
    run(compiler, "-std=c11", *STRICT, source, *linked, "-o", program)
    return run(program)


@pytest.fixture(scope="session")
def installed(cmake: str, compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What CMake builds and installs."""
    return installed_by(cmake, tmp_path_factory.mktemp("cmake"), f"-DCMAKE_CXX_COMPILER={compiler}")


def test_the_interface_from_c(c_compiler: str, installed: Path, tmp_path: Path) -> None:
    assert run_c(c_compiler, CPP / "tests" / "interface.c", installed, tmp_path) == "passed\n"


def test_the_example_of_the_page(c_compiler: str, installed: Path, tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    examples = re.findall(r"```c\n(.*?)```\n\n.*?prints `(.*?)`", text, re.DOTALL)
    assert len(examples) == 1
    source, printed = examples[0]
    (tmp_path / "example.c").write_text(source, encoding="utf-8")
    assert run_c(c_compiler, tmp_path / "example.c", installed, tmp_path).strip() == printed


@pytest.mark.parametrize("half", [False, True])
def test_two_builds_give_the_same_bits(
    installed: Path, c_step: Step, make_feeds: Callable[..., Feeds], half: bool
) -> None:
    feeds = make_feeds(2, 3, half=half)
    wanted = c_step(feeds)
    for name, array in step_of(installed / "lib" / "libsld_edge.so")(feeds).items():
        np.testing.assert_array_equal(array, wanted[name], err_msg=name)


def test_without_cuda_the_cuda_function_says_so(
    installed: Path, make_feeds: Callable[..., Feeds]
) -> None:
    status, message = on_cuda(installed, make_feeds(), space=64)
    assert (status, "-DSLD_EDGE_CUDA=ON" in message) == (9, True)


def on_cuda(installed: Path, feeds: Feeds, space: int | None = None) -> tuple[int, str]:
    """Call the CUDA function of an installed library; return its status and the message."""
    native = opened(installed / "lib" / "libsld_edge.so")
    outputs = empty_outputs(feeds)
    step = ctypes.byref(bound(feeds, outputs))
    size = native.sld_edge_cuda_workspace_bytes(step) if space is None else space
    workspace = ctypes.create_string_buffer(size)
    status = native.sld_edge_safe_step_cuda(step, workspace, ctypes.c_size_t(size), None)
    return status, native.sld_edge_status_message(status).decode()


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


def chosen_architectures(cmake: str, version: str) -> str:
    """Return what CMake chooses for a version of nvcc, which need not be here."""
    script = CPP / "cuda_architectures.cmake"
    said = run(cmake, f"-DCMAKE_CUDA_COMPILER_VERSION={version}", "-P", script)
    return said.strip().rpartition(": ")[2]


@pytest.mark.parametrize(("version", "architectures"), ARCHITECTURES.items())
def test_architectures_are_those_that_nvcc_knows(
    cmake: str, version: str, architectures: str
) -> None:
    assert chosen_architectures(cmake, version) == architectures


needs_nvcc = pytest.mark.skipif(
    NVCC is None, reason="no nvcc here: the CUDA part is not compiled for devices"
)


@needs_nvcc
@pytest.mark.usefixtures("compiler")
def test_nvcc_takes_the_kernels(cmake: str, tmp_path: Path) -> None:
    """For every kind of device that CMake chooses; they are not run: no GPU is needed."""
    version = re.search(r"V(\d+\.\d+\.\d+)", run(NVCC, "--version"))
    assert version is not None
    numbers = chosen_architectures(cmake, version[1]).split(";")
    targets = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers]
    flags = ["-std=c++20", "--fmad=false", "-Xptxas=-v", "-Werror=all-warnings"]
    command = [NVCC, *flags, *targets, f"-I{CPP / 'include'}", "-c", CPP / "src" / "safe_step.cu"]
    said = run(*command, "-o", tmp_path / "step.o")
    for number in numbers:
        assert f"for 'sm_{number}'" in said
    assert set(re.findall(r"(\d+) bytes spill stores", said)) == {"0"}


@needs_nvcc
@pytest.mark.usefixtures("compiler")
def test_cmake_chooses_for_every_device(cmake: str, tmp_path: Path) -> None:
    options = ["-DSLD_EDGE_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={NVCC}"]
    for _ in range(2):  # the second time with CMake's cache
        said = run(cmake, "-S", CPP, "-B", tmp_path, *options)
        assert f"compute capabilities: {OLD}" in said


@needs_nvcc
@pytest.mark.usefixtures("compiler")
def test_the_cuda_library_for_one_device(
    cmake: str, tmp_path: Path, make_feeds: Callable[..., Feeds]
) -> None:
    """It links, and without a driver it says that CUDA failed. test_on_device.py runs it."""
    options = [f"-DCMAKE_CUDA_COMPILER={NVCC}", "-DCMAKE_CUDA_ARCHITECTURES=87"]
    installed = installed_by(cmake, tmp_path, "-DSLD_EDGE_CUDA=ON", *options)
    if not Path("/dev/nvidiactl").exists():
        assert on_cuda(installed, make_feeds()) == (10, CUDA_FAILED)
