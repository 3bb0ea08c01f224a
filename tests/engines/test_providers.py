"""Every state of every provider, made by its condition: fake packages, a fake device."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from sld_edge.engines import providers
from sld_edge.engines.errors import InputError
from sld_edge.engines.onnxruntime.engine import PROVIDERS
from sld_edge.engines.openvino.api import openvino
from sld_edge.engines.providers import NAMES, ProviderStatus, choose, status, survey, survey_table

RTX_4090 = "NVIDIA GeForce RTX 4090, compute capability 8.9, driver for CUDA 12.6, 24 GiB"
NO_PLAN = "no plan was built for this bundle"
Put = Callable[[str, ModuleType | None], None]


class FakeCuda(ModuleType):
    """The calls that looking at a device makes; what is still open is counted."""

    cudaStreamNonBlocking = 1  # noqa: N815

    def __init__(
        self,
        *,
        driver: int = 12060,
        devices: int = 1,
        error: int = 0,
        capability: str = "8.9",
        name: bytes = b"NVIDIA GeForce RTX 4090\0\0",
        integrated: int = 0,
        raises: str = "",
    ) -> None:
        super().__init__("cuda.bindings.runtime")
        self.raises = raises  # instead of an answer, as cuda-bindings 12.8.0 without a driver
        self.driver, self.devices, self.error = driver, devices, error
        self.name, self.integrated = name, integrated
        self.major, self.minor = capability.split(".")
        self.streams = 0

    def cudaDriverGetVersion(self) -> tuple[int, int]:  # noqa: N802
        if self.raises:
            raise RuntimeError(self.raises)
        return 0, self.driver

    def cudaGetDeviceCount(self) -> tuple[int, int]:  # noqa: N802
        return self.error, self.devices

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:  # noqa: N802
        return 0, f"error number {error}".encode()

    def cudaSetDevice(self, index: int) -> tuple[int]:  # noqa: N802
        return (0 if index < self.devices else 101,)

    def cudaGetDeviceProperties(self, index: int) -> tuple[int, Any]:  # noqa: N802
        return 0, SimpleNamespace(
            name=self.name, major=self.major, minor=self.minor, integrated=self.integrated
        )

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:  # noqa: N802
        self.streams += 1
        return 0, 77

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:  # noqa: N802
        self.streams -= 1
        return (0,)

    def cudaMemGetInfo(self) -> tuple[int, int, int]:  # noqa: N802
        return 0, 20 << 30, 24 << 30


def fake_tensorrt(name: str, version: str, takes: tuple[str, ...] = ()) -> ModuleType:
    module = ModuleType(name)
    module.__dict__["__version__"] = version
    if takes:
        members = {"NONE": 0, "CURRENT": 1, **{f"SM{number}": int(number) for number in takes}}
        module.__dict__["ComputeCapability"] = SimpleNamespace(__members__=members)
    return module


RTX_TAKES = ("75", "80", "86", "89", "120", "121")


def fake_onnxruntime(
    *available: str, starts: bool = True, fails: str = "", version: str = "1.23.2"
) -> ModuleType:
    module = ModuleType("onnxruntime")

    class Session:
        def __init__(
            self, graph: bytes, options: Any, *, providers: list[str], enable_fallback: int
        ) -> None:
            assert options.log_severity_level == 4
            if fails:
                raise RuntimeError(fails)
            self.providers = providers if starts else providers[1:]

        def get_providers(self) -> list[str]:
            return self.providers

    module.__dict__.update(
        __version__=version,
        get_available_providers=lambda: [*map(PROVIDERS.__getitem__, available)],
        SessionOptions=SimpleNamespace,
        InferenceSession=Session,
    )
    return module


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> Put:
    """Put modules in the place of packages; None makes one missing. All of them are, at first."""

    def put(name: str, module: ModuleType | None) -> None:
        monkeypatch.setitem(sys.modules, name, module)

    for name in ("tensorrt", "tensorrt_bindings", "tensorrt_rtx", "tensorrt_rtx_bindings"):
        put(name, None)
    put("onnxruntime", None)
    put("openvino", None)
    openvino.cache_clear()
    put("cuda.bindings.runtime", None)
    return put


def by_name() -> Mapping[str, ProviderStatus]:
    return {found.name: found for found in survey()}


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="for a machine without a GPU")
def test_a_machine_without_a_gpu() -> None:
    """The real packages: ONNX Runtime for the CPU, tensorrt_rtx, at most bindings of tensorrt."""
    rtx = pytest.importorskip("tensorrt_rtx")
    found = by_name()
    assert found["cpu"].usable
    assert found["cpu"].version == import_module("onnxruntime").__version__
    assert found["cpu"].devices
    assert found["tensorrt-rtx"].version == rtx.__version__
    assert found["tensorrt-rtx"].reason.startswith("no NVIDIA driver is installed | ")
    assert found["tensorrt"].reason.startswith(
        ("tensorrt is installed without its libraries: lib", "tensorrt is not installed for Python")
    )
    for name in ("cuda", "ort-tensorrt", "ort-tensorrt-rtx"):
        assert found[name].reason.startswith("not in the installed ONNX Runtime | ")
    assert {one.name for one in found.values() if one.usable} - {"openvino"} == {"cpu"}


def test_nothing_is_installed(put: Put) -> None:
    found = survey()
    assert tuple(one.name for one in found) == NAMES
    assert not any(one.usable or one.version or one.devices for one in found)
    reasons = {one.name: one.reason for one in found}
    assert reasons["cpu"] == 'onnxruntime is not installed | pip install "sld-edge[cpu]"'
    assert reasons["tensorrt-rtx"].startswith("tensorrt_rtx is not installed for Python 3.")
    assert reasons["tensorrt-rtx"].endswith('| pip install "sld-edge[rtx]"')
    assert "JetPack" in reasons["tensorrt"]
    assert "sld-edge[gpu]" in reasons["cuda"]


def test_everything_works(put: Put) -> None:
    cuda = FakeCuda()
    put("cuda.bindings.runtime", cuda)
    put("onnxruntime", fake_onnxruntime(*PROVIDERS))
    put("tensorrt", fake_tensorrt("tensorrt", "10.3.0"))
    put("tensorrt_rtx", fake_tensorrt("tensorrt_rtx", "1.7.1.116", RTX_TAKES))
    found = [one for one in survey() if one.name != "openvino"]
    assert all(one.usable and not one.reason for one in found)
    assert [one.version for one in found] == ["1.7.1.116", "10.3.0", *["1.23.2"] * 4]
    assert all(one.devices == (RTX_4090,) for one in found[:-1])
    assert cuda.streams == 0, "a device was left open"


@pytest.mark.parametrize(
    ("cuda", "reason"),
    [
        (None, 'needs the package cuda-bindings | pip install "sld-edge[rtx]"'),
        (FakeCuda(driver=0), "no NVIDIA driver is installed"),
        (FakeCuda(raises="Failed to dlopen libcuda.so.1"), "libcuda.so.1 | install the driver if"),
        (FakeCuda(error=35), "got error number 35 | update the NVIDIA driver"),
        (FakeCuda(error=100), "no CUDA device was found"),
        (FakeCuda(devices=0), "no CUDA device 0 | got 0 devices"),
    ],
)
def test_a_device_that_does_not_work(put: Put, cuda: FakeCuda | None, reason: str) -> None:
    put("cuda.bindings.runtime", cuda)
    put("onnxruntime", fake_onnxruntime(*PROVIDERS))
    put("tensorrt_rtx", fake_tensorrt("tensorrt_rtx", "1.7.1.116", RTX_TAKES))
    found = by_name()
    for name in ("tensorrt-rtx", "cuda", "ort-tensorrt"):
        assert reason in found[name].reason
        assert not found[name].usable
        assert not found[name].devices
        assert found[name].version
    assert found["cpu"].usable


@pytest.mark.parametrize(
    ("capability", "usable"), [("8.7", False), ("9.0", False), ("12.0", True), ("7.5", True)]
)
def test_rtx_takes_the_devices_that_it_lists(put: Put, capability: str, usable: bool) -> None:
    put("cuda.bindings.runtime", FakeCuda(capability=capability))
    put("tensorrt_rtx", fake_tensorrt("tensorrt_rtx", "1.7.1.116", RTX_TAKES))
    put("tensorrt", fake_tensorrt("tensorrt", "10.3.0"))
    found = status("tensorrt-rtx")
    assert found.usable is usable
    if not usable:
        assert found.reason == (
            f"the device has compute capability {capability}; TensorRT-RTX takes 7.5, 8.0, 8.6, "
            "8.9, 12.0, 12.1 | use tensorrt or cuda"
        )
    assert status("tensorrt").usable


def test_the_installed_rtx_lists_what_it_takes() -> None:
    """The list is read from the package; this is where its form would change unseen."""
    trt = pytest.importorskip("tensorrt_rtx")
    for capability in ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1"):
        assert providers._refusal(trt, capability) == ""
    assert "takes 7.5, " in providers._refusal(trt, "8.7")


class Broken:
    """An importer under which some packages are found and fail."""

    def __init__(self, failures: Mapping[str, Exception]) -> None:
        self.failures = failures

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name in self.failures:
            raise self.failures[name]


@pytest.mark.parametrize(
    ("package", "error", "reason"),
    [
        (
            "tensorrt",
            ImportError("libnvinfer.so.10: cannot open shared object file: No such file"),
            "tensorrt is installed without its libraries: libnvinfer.so.10 is missing | ",
        ),
        (
            "tensorrt_bindings",
            OSError("libnvinfer.so.10: cannot open shared object file: No such file"),
            "tensorrt is installed without its libraries: libnvinfer.so.10 is missing | ",
        ),
        (
            "tensorrt",
            FileNotFoundError("Could not find: nvinfer_11.dll. Is it on your PATH?\nNote: " * 9),
            "tensorrt is installed without its libraries: Could not find: nvinfer_11.dll. Is it ",
        ),
        ("tensorrt", SystemError(), "SystemError"),
    ],
)
def test_a_package_that_does_not_load(
    put: Put, monkeypatch: pytest.MonkeyPatch, package: str, error: Exception, reason: str
) -> None:
    monkeypatch.delitem(sys.modules, package)
    monkeypatch.setattr(sys, "meta_path", [Broken({package: error}), *sys.meta_path])
    found = status("tensorrt")
    assert reason in found.reason
    assert "\n" not in found.reason
    assert len(found.reason) < 400
    assert not found.usable


def test_onnxruntime_that_does_not_load(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "onnxruntime")
    error = ImportError("libonnxruntime.so.1: cannot open shared object file: No such file")
    monkeypatch.setattr(sys, "meta_path", [Broken({"onnxruntime": error}), *sys.meta_path])
    assert status("cpu").reason.startswith(
        "onnxruntime does not load: libonnxruntime.so.1 is missing | pip install"
    )


@pytest.mark.parametrize(
    ("onnxruntime", "reason"),
    [
        (fake_onnxruntime("cpu"), "not in the installed ONNX Runtime | "),
        (
            fake_onnxruntime("cuda", "cpu", starts=False),
            "CUDAExecutionProvider does not start: a library of CUDA, cuDNN or TensorRT is missing",
        ),
        (
            fake_onnxruntime("cuda", "cpu", fails="cuDNN 8 is too\nold"),
            "CUDAExecutionProvider does not start: cuDNN 8 is too old | ",
        ),
    ],
)
def test_onnxruntime_without_a_working_cuda(put: Put, onnxruntime: ModuleType, reason: str) -> None:
    put("cuda.bindings.runtime", FakeCuda())
    put("onnxruntime", onnxruntime)
    found = status("cuda")
    assert reason in found.reason
    assert not found.usable
    assert found.version == "1.23.2"
    assert status("cpu").usable


def test_the_smallest_graph_is_one_that_onnxruntime_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ort = import_module("onnxruntime")
    with pytest.warns(UserWarning, match="Duplicate provider"):
        assert providers._start(ort, "CPUExecutionProvider") == ""
    monkeypatch.setattr(providers, "_IDENTITY", b"no graph")
    with pytest.warns(UserWarning, match="Duplicate provider"):
        assert "does not start" in providers._start(ort, "CPUExecutionProvider")


def test_memory_shared_with_the_host_and_further_devices_are_said(put: Put) -> None:
    put("tensorrt", fake_tensorrt("tensorrt", "10.3.0"))
    put(
        "cuda.bindings.runtime",
        FakeCuda(devices=3, capability="8.7", name=b"Orin", integrated=1),
    )
    assert status("tensorrt").devices == (
        "Orin, compute capability 8.7, driver for CUDA 12.6, 24 GiB shared with the CPU",
        "not used: device 1, see CUDA_VISIBLE_DEVICES",
        "not used: device 2, see CUDA_VISIBLE_DEVICES",
    )


def test_an_unknown_provider_is_refused() -> None:
    with pytest.raises(InputError, match=r"provider \| got 'tpu' \| expected one of auto, cpu, "):
        status("tpu")


def test_the_table_is_aligned_and_fits() -> None:
    statuses = [
        ProviderStatus(
            name="tensorrt", usable=False, reason=f"{'long ' * 40}| do it", version="", devices=()
        ),
        ProviderStatus(
            name="cuda", usable=True, reason="", version="1.23.2", devices=(RTX_4090, "another")
        ),
    ]
    lines = survey_table(statuses).splitlines()
    assert all(len(line) <= 100 for line in lines)
    start = lines[0].index("device, or")
    assert {line[start - 1] for line in lines} == {" "}
    assert all(line[start] != " " for line in lines)
    assert [line.split()[0] for line in lines if line[0] != " "] == ["provider", "tensorrt", "cuda"]
    assert lines[-1].strip() == "another"
    assert "do it" in [line.strip() for line in lines]
    assert " ".join(line[start:] for line in lines).count("long") == 40
    rows = {line.split()[0]: line.split()[1:3] for line in lines if line[0] != " "}
    assert rows["tensorrt"] == ["-", "no"]
    assert rows["cuda"] == ["1.23.2", "yes"]


@pytest.fixture
def rtx_machine(put: Put) -> Put:
    put("cuda.bindings.runtime", FakeCuda())
    put("onnxruntime", fake_onnxruntime("cuda", "cpu"))
    put("tensorrt_rtx", fake_tensorrt("tensorrt_rtx", "1.7.1.116", RTX_TAKES))
    put("tensorrt", fake_tensorrt("tensorrt", "10.3.0"))
    return put


@pytest.mark.parametrize(
    ("planned", "provider", "why"),
    [
        (
            {"tensorrt-rtx": None, "tensorrt": None},
            "tensorrt-rtx",
            "tensorrt-rtx: the plans of this bundle fit the NVIDIA GeForce RTX 4090 here",
        ),
        (
            {"tensorrt-rtx": NO_PLAN, "tensorrt": None},
            "tensorrt",
            "tensorrt: the plans of this bundle fit the NVIDIA GeForce RTX 4090 here",
        ),
        (
            {"tensorrt-rtx": NO_PLAN, "tensorrt": NO_PLAN},
            "cuda",
            f"cuda: it works on the NVIDIA GeForce RTX 4090 here; {NO_PLAN}",
        ),
        (
            {"tensorrt-rtx": "it was built for 8.6", "tensorrt": NO_PLAN},
            "cuda",
            "cuda: it works on the NVIDIA GeForce RTX 4090 here; "
            f"tensorrt-rtx: it was built for 8.6; tensorrt: {NO_PLAN}",
        ),
        ({}, "cuda", "cuda: it works on the NVIDIA GeForce RTX 4090 here"),
    ],
)
def test_the_best_is_chosen(
    rtx_machine: Put, planned: Mapping[str, str | None], provider: str, why: str
) -> None:
    assert choose(planned) == (provider, why)


def test_plans_whose_engine_does_not_load_are_not_chosen(rtx_machine: Put) -> None:
    rtx_machine("tensorrt_rtx", None)
    provider, why = choose({"tensorrt-rtx": None, "tensorrt": NO_PLAN})
    assert provider == "cuda"
    assert "tensorrt-rtx: tensorrt_rtx is not installed" in why


def test_without_anything_else_it_is_the_cpu(rtx_machine: Put) -> None:
    rtx_machine("onnxruntime", fake_onnxruntime("cpu"))
    assert choose({"tensorrt-rtx": NO_PLAN, "tensorrt": NO_PLAN}) == (
        "cpu",
        f"cpu: {NO_PLAN}; cuda: not in the installed ONNX Runtime",
    )
    rtx_machine("onnxruntime", fake_onnxruntime("cuda", "cpu"))
    rtx_machine("cuda.bindings.runtime", FakeCuda(driver=0))
    assert choose({"tensorrt-rtx": None, "tensorrt": None}) == (
        "cpu",
        "cpu: no NVIDIA driver is installed",
    )
