"""OpenVINO as an engine: the same values, prepared graphs that fail closed, devices, BF16."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from oracles.running import relative_error
from sld_edge.engines import cache as cache_of_user
from sld_edge.engines import prepared, providers
from sld_edge.engines.base import Array
from sld_edge.engines.errors import EngineError, InputError, MissingPackageError
from sld_edge.engines.onnxruntime.engine import OrtEngine
from sld_edge.engines.openvino import api, graphs
from sld_edge.engines.openvino import target as targets
from sld_edge.engines.openvino.engine import OpenVinoEngine
from sld_edge.engines.openvino.pages import release_pages
from sld_edge.engines.openvino.target import Target, target
from sld_edge.runtime.bundle import EMBEDDED
from sld_edge.runtime.selftest.miniature import unpack

pytest.importorskip("openvino")

UNET, DECODER = EMBEDDED / "unet.onnx", EMBEDDED / "vae_decoder.onnx"
EXAMINER = Path(__file__).parents[2] / "benchmarks" / "miniworld" / "examiner.onnx"
SHA = "ab" * 32
LATENTS = {"latents": np.random.default_rng(0).standard_normal((1, 4, 16, 16), np.float32)}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLD_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def feeds(rows: int = 3, cells: int = 16) -> dict[str, Array]:
    random = np.random.default_rng(rows)
    return {
        "latents": random.standard_normal((1, 4, cells, cells), np.float32),
        "timestep": np.array([487], np.float32),
        "context": random.standard_normal((rows, 24, 96), np.float32),
    }


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """The UNet of the miniature in FP16."""
    unpack("fp16", tmp_path / "fp16")
    return tmp_path / "fp16" / "unet.onnx"


def never() -> Path:
    raise AssertionError("the graph was read although it was prepared")


def engine(path: Path = UNET, sha256: str = SHA, *, fixed: bool = False) -> OpenVinoEngine:
    how = graphs.recipe(Target(), fixed=fixed)
    return prepared.prepared_engine(sha256, lambda: path, how)


@pytest.mark.parametrize("fixed", [True, False])
def test_the_unet_is_onnxruntimes(cache: Path, fixed: bool) -> None:
    """For other rows and sizes too: a graph of fixed sizes is compiled again for them."""
    exact = OrtEngine(UNET, as_is=True)
    with engine(fixed=fixed) as ours:
        for given in (feeds(3), feeds(1), feeds(2, cells=24), feeds(3)):
            got, wanted = ours.run(given), exact.run(given)
            assert list(got) == list(wanted) == ["noise_pred", "deep"]
            for name in wanted:
                assert got[name].dtype == wanted[name].dtype
                assert relative_error(got[name], wanted[name]) < 5e-6


def test_specifications_are_the_graphs(cache: Path) -> None:
    exact = OrtEngine(UNET)
    for mine, theirs in zip(
        (*engine().inputs, *engine().outputs), (*exact.inputs, *exact.outputs), strict=True
    ):
        assert (mine.name, mine.dtype, len(mine.shape)) == (
            theirs.name,
            theirs.dtype,
            len(theirs.shape),
        )
        sizes = zip(mine.shape, theirs.shape, strict=True)
        assert all(a == b or (isinstance(a, str) and isinstance(b, str)) for a, b in sizes)


def test_outputs_are_the_callers(cache: Path) -> None:
    with engine() as ours:
        first = ours.run(feeds(1))["noise_pred"]
        kept = first.copy()
        ours.run({**feeds(1), "timestep": np.array([1], np.float32)})
        np.testing.assert_array_equal(first, kept)


def test_nan_reaches_the_output(cache: Path) -> None:
    """The guidance graph finds it there."""
    given = feeds(1)
    given["latents"][0, 0, 0, 0] = np.nan
    assert np.isnan(engine().run(given)["noise_pred"]).any()


def test_an_fp16_graph_keeps_its_weights_and_computes_in_fp32(cache: Path, half: Path) -> None:
    """Its arithmetic is the FP32 graph's on the same weights, and its file holds FP16."""
    ours = engine(half)
    exact = OrtEngine(UNET, as_is=True)  # the miniature's weights are FP16 in both
    error = relative_error(ours.run(feeds())["noise_pred"], exact.run(feeds())["noise_pred"])
    assert error < 5e-6
    weights = ours.path.with_suffix(".bin").stat().st_size
    assert weights < 1.02 * half.with_name("unet.onnx.data").stat().st_size
    layers = ElementTree.parse(ours.path).getroot().iter("layer")
    halves = [x for x in layers if x.find("output/port[@precision='FP16']") is not None]
    assert {layer.get("type") for layer in halves} <= {"Const"}


def test_rounded_weights_take_half_the_file(cache: Path) -> None:
    sizes = []
    for rounded in (False, True):
        how = graphs.recipe(Target(), fixed=False, rounded=rounded)
        made = prepared.prepared_engine(SHA, lambda: EXAMINER, how)
        sizes.append(made.path.with_suffix(".bin").stat().st_size)
    assert sizes[1] < 0.55 * sizes[0]


def test_the_outputs_convolution_stays_fp32_in_bf16(cache: Path, half: Path) -> None:
    """Prepared graphs of both forms are marked; with BF16 units the values show it too."""
    for path, sha256 in ((UNET, SHA), (half, "cd" * 32)):
        prepared_graph = engine(path, sha256).path
        marked = [
            str(layer.get("type"))
            for layer in ElementTree.parse(prepared_graph).getroot().iter("layer")
            if layer.find("rt_info/attribute[@name='precise']") is not None
        ]
        assert sorted(marked) == ["Add", "Convolution"]
        if targets.why_no_bf16() is None:
            rounded = OpenVinoEngine(prepared_graph, Target(precision="bf16"), fixed=False)
            bits = rounded.run(feeds())["noise_pred"].view(np.uint32)
            assert (bits & 0xFFFF != 0).mean() > 0.9  # not BF16's numbers


def test_the_pages_of_the_weights_are_given_back(cache: Path) -> None:
    with engine(fixed=True) as ours:
        first = ours.run(feeds())["noise_pred"]
        weights = ours.path.with_suffix(".bin")
        assert resident(weights) < 0.1 * weights.stat().st_size
        assert release_pages(weights) >= weights.stat().st_size  # it is still mapped
        np.testing.assert_array_equal(ours.run(feeds())["noise_pred"], first)
        ours.run(feeds(1))  # compiled again, from the same file
        np.testing.assert_array_equal(ours.run(feeds())["noise_pred"], first)
    assert release_pages(weights.with_name("no such file")) == 0


def resident(file: Path) -> int:
    """Return the bytes of a mapped file that are in this process's memory."""
    found, mine = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            mine = line.endswith(str(file))
        elif mine and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found


def test_bf16_without_a_prepared_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLD_EDGE_CACHE", "off")
    how = graphs.recipe(Target(precision="bf16"), fixed=False)
    with pytest.raises(EngineError, match="bf16 needs prepared graphs"):
        prepared.prepared_engine(SHA, lambda: UNET, how)


def test_wrong_inputs_are_refused(cache: Path) -> None:
    ours = engine()
    with pytest.raises(EngineError, match=r"input context \| got nothing"):
        ours.run({name: array for name, array in feeds().items() if name != "context"})
    with pytest.raises(EngineError, match="input latents .* got float64"):
        ours.run({**feeds(), "latents": np.zeros((1, 4, 16, 16))})
    ours.close()
    with pytest.raises(EngineError, match="was closed"):
        ours.run(feeds())


class TestPrepared:
    """As ONNX Runtime's: made once, checked, and done without where that is not possible."""

    def test_it_is_made_once(self, cache: Path) -> None:
        made = engine(DECODER)
        again = prepared.prepared_engine(SHA, never, graphs.recipe(Target(), fixed=True))
        assert made.path == again.path
        assert cache in made.path.parents

    def test_another_version_makes_its_own(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine(DECODER).close()
        monkeypatch.setattr(api.openvino(), "__version__", "2031.1")
        with pytest.raises(AssertionError, match="was read"):
            prepared.prepared_engine(SHA, never, graphs.recipe(Target(), fixed=False))

    @pytest.mark.parametrize("name", ["model.xml", "model.bin", "prepared.json"])
    @pytest.mark.parametrize("damage", ["removed", "cut short", "altered"])
    def test_a_damaged_one_is_made_again(self, cache: Path, name: str, damage: str) -> None:
        with engine(DECODER) as made:
            wanted = made.run(LATENTS)["images"]
            file = made.path.with_name(name)
        content = bytearray(file.read_bytes())
        if damage == "removed":
            file.unlink()
        elif damage == "cut short":
            file.write_bytes(content[: len(content) // 2])
        else:
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        with engine(DECODER) as mended:
            np.testing.assert_array_equal(mended.run(LATENTS)["images"], wanted)

    def test_no_room_and_no_cache(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("SLD_EDGE_CACHE_LIMIT", "0.0001")
        assert engine(DECODER).path == DECODER
        assert "do not fit into the cache's" in capsys.readouterr().err
        monkeypatch.setenv("SLD_EDGE_CACHE", "off")
        with engine(DECODER) as ours:
            assert ours.path == DECODER
            wanted = OrtEngine(DECODER, as_is=True).run(LATENTS)["images"]
            levels = np.abs(ours.run(LATENTS)["images"].astype(int) - wanted)
            assert levels.max() <= 1

    def test_a_full_disk_leaves_nothing(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise RuntimeError("Could not write: no space left on device")

        monkeypatch.setattr(api.openvino(), "save_model", full)
        assert engine(DECODER).path == DECODER
        assert list((cache / cache_of_user.SESSIONS).iterdir()) == []

    def test_a_killed_preparation_is_swept(self, cache: Path) -> None:
        code = (
            "import os\n"
            "from pathlib import Path\n"
            "from sld_edge.engines import prepared\n"
            "from sld_edge.engines.openvino import graphs\n"
            "from sld_edge.engines.openvino.target import Target\n"
            "how = graphs.recipe(Target(), fixed=False)\n"
            "die = lambda: os.kill(os.getpid(), 9)\n"
            f"prepared.prepared_engine({SHA!r}, lambda: Path({str(DECODER)!r}), how, confirm=die)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], check=False)
        assert done.returncode == -9
        left = list((cache / cache_of_user.SESSIONS).iterdir())
        assert len(left) == 1
        assert left[0].name.endswith(".sld-part")
        made = engine(DECODER)
        assert list((cache / cache_of_user.SESSIONS).iterdir()) == [made.path.parent]

    def test_its_files_stay_while_it_is_loaded(self, cache: Path) -> None:
        with engine(DECODER) as ours:
            cache_of_user.clear()
            assert ours.path.exists()
        cache_of_user.clear()
        assert not ours.path.exists()


def test_what_openvino_cannot_read_is_said_in_one_line(cache: Path, tmp_path: Path) -> None:
    broken = tmp_path / "unet.onnx"
    broken.write_bytes(b"\x08\x08no graph")
    with pytest.raises(EngineError, match=r"OpenVINO .* cannot read .*unet\.onnx") as caught:
        engine(broken)
    assert "\n" not in str(caught.value)


def test_memory_that_runs_out_while_compiling_is_said(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = engine(fixed=True)

    class Core:
        def compile_model(self, *_: Any) -> None:
            raise MemoryError("std::bad_alloc")

    monkeypatch.setattr("sld_edge.engines.openvino.engine.core", Core)
    with pytest.raises(EngineError, match=r"cannot compile .*bad_alloc .*--provider cpu"):
        ours.run(feeds())
    monkeypatch.setattr("sld_edge.engines.openvino.engine.core", api.core)
    assert ours.run(feeds())["noise_pred"].shape == (3, 4, 16, 16)


class TestTarget:
    """Devices and BF16, with a core that lists what the test says."""

    @pytest.fixture
    def machine(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
        def put(
            *devices: str, flags: str = "avx2", capabilities: tuple[str, ...] = ("FP32",)
        ) -> None:
            class Core:
                available_devices = devices

                def get_property(self, device: str, name: str) -> object:
                    return {
                        "OPTIMIZATION_CAPABILITIES": list(capabilities),
                        "FULL_DEVICE_NAME": f"a {device}",
                    }[name]

            info = tmp_path / "cpuinfo"
            info.write_text(f"processor\t: 0\nflags\t\t: fpu {flags} sse\n\n")
            monkeypatch.setattr(targets, "core", Core)
            monkeypatch.setattr(targets, "_CPUINFO", info)

        return put

    @pytest.mark.parametrize(
        ("asked", "there", "chosen"),
        [
            ("CPU", ("CPU",), "CPU"),
            ("GPU", ("CPU", "GPU"), "GPU"),
            ("GPU", ("CPU", "GPU.0", "GPU.1"), "GPU.0"),
            ("GPU.1", ("CPU", "GPU.0", "GPU.1"), "GPU.1"),
            ("NPU", ("CPU", "NPU"), "NPU"),
            ("AUTO", ("CPU", "GPU.0", "NPU"), "GPU.0"),
            ("AUTO", ("CPU", "NPU"), "CPU"),
        ],
    )
    def test_a_device(self, machine: Any, asked: str, there: tuple[str, ...], chosen: str) -> None:
        machine(*there)
        assert target(asked, "fp32").device == chosen

    @pytest.mark.parametrize("asked", ["GPU", "NPU", "GPU.2", "gpu", "", "CPU,GPU", "HETERO:GPU"])
    def test_no_such_device(self, machine: Any, asked: str) -> None:
        machine("CPU", "GPU.0") if asked not in ("GPU",) else machine("CPU")
        with pytest.raises(InputError, match=r"--device \| got .* expected one of CPU"):
            target(asked, "fp32")

    @pytest.mark.parametrize("unit", ["amx_bf16", "avx512_bf16", "avx_ne_convert"])
    def test_bf16_where_there_are_units(self, machine: Any, unit: str) -> None:
        machine("CPU", flags=f"avx2 {unit}", capabilities=("FP32", "BF16"))
        chosen = target("CPU", "bf16")
        assert chosen.settings()["INFERENCE_PRECISION_HINT"] == "bf16"
        assert str(chosen) != str(Target())

    @pytest.mark.parametrize(
        ("flags", "capabilities", "why"),
        [
            ("avx2", ("FP32",), "no BF16 units"),
            ("avx512f avx512_vnni", ("FP32", "BF16"), "no BF16 units"),  # it would be emulated
            ("amx_bf16", ("FP32",), "OpenVINO lists no BF16"),
        ],
    )
    def test_bf16_is_refused_elsewhere(
        self, machine: Any, flags: str, capabilities: tuple[str, ...], why: str
    ) -> None:
        machine("CPU", flags=flags, capabilities=capabilities)
        with pytest.raises(InputError, match=why):
            target("CPU", "bf16")

    def test_bf16_is_the_cpus(self, machine: Any) -> None:
        machine("CPU", "GPU", flags="amx_bf16", capabilities=("BF16",))
        with pytest.raises(InputError, match="only the CPU takes it"):
            target("GPU", "bf16")

    def test_the_cpu_always_gets_a_precision(self) -> None:
        """Without a hint OpenVINO would compute in BF16 in silence."""
        assert Target().settings()["INFERENCE_PRECISION_HINT"] == "f32"
        assert "INFERENCE_PRECISION_HINT" not in Target(device="GPU").settings()

    def test_the_survey_names_devices_and_bf16(self, machine: Any) -> None:
        machine("CPU", "GPU.0", flags="amx_bf16", capabilities=("BF16",))
        devices = providers.status("openvino").devices
        assert devices == ("CPU: a CPU; --cpu-precision bf16 works", "GPU.0: a GPU.0")


def test_every_setting_is_one_that_openvino_knows() -> None:
    """Read back from a compiled graph: a property that is ignored would not be there."""
    settings = Target().settings()
    compiled = api.core().compile_model(api.read_model(DECODER), "CPU", settings)
    read: Mapping[str, Any] = {name: compiled.get_property(name) for name in settings}
    assert read["NUM_STREAMS"] == 1
    assert read["INFERENCE_NUM_THREADS"] == settings["INFERENCE_NUM_THREADS"]
    assert read["ENABLE_CPU_PINNING"] is False
    assert read["INFERENCE_PRECISION_HINT"] == api.openvino().Type.f32


def test_a_missing_or_broken_openvino_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    api.openvino.cache_clear()
    with pytest.raises(MissingPackageError, match=r'pip install "sld-edge\[openvino\]"'):
        api.openvino()
    found = providers.status("openvino")
    assert not found.usable
    assert found.reason == 'openvino is not installed | pip install "sld-edge[openvino]"'


def test_other_threads(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLD_EDGE_THREADS", "1")
    assert Target().settings()["INFERENCE_NUM_THREADS"] == 1
    one = engine().run(feeds())["noise_pred"]
    monkeypatch.setenv("SLD_EDGE_THREADS", "2")
    assert relative_error(engine().run(feeds())["noise_pred"], one) < 5e-6


def test_importing_openvino_calls_nobody(tmp_path: Path) -> None:
    """Its telemetry would call Google Analytics, and keep a number of this user in the home."""
    code = (
        "import sys\n"
        "calls = []\n"
        "watch = lambda event, args: calls.append(event) if event.startswith('socket') else None\n"
        "sys.addaudithook(watch)\n"
        "from sld_edge.engines.openvino.api import core\n"
        "core().available_devices\n"
        "import threading\n"
        "[each.join(5) for each in threading.enumerate() if each is not threading.main_thread()]\n"
        "assert 'openvino_telemetry' not in sys.modules\n"
        "assert not calls, calls\n"
    )
    environment = {**os.environ, "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert list(tmp_path.iterdir()) == []
