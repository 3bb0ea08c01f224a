"""Prepared sessions: made once, used only where they fit, done without where they cannot be."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from oracles.graphs import chain
from oracles.prepared import prepared_engine
from sld_edge.engines.base import Array
from sld_edge.engines.errors import EngineError, InputError
from sld_edge.engines.onnxruntime import sessions
from sld_edge.engines.onnxruntime.engine import OrtEngine, create_session, onnxruntime
from sld_edge.engines.settings import cache_folder, thread_count
from sld_edge.runtime.bundle import EMBEDDED

GRAPH = EMBEDDED / "vae_decoder.onnx"
SHA = "ab" * 32


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLD_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def latents() -> dict[str, Array]:
    return {"latents": np.random.default_rng(0).standard_normal((1, 4, 16, 16), np.float32)}


def never() -> Path:
    raise AssertionError("the graph was read although it was prepared")


def test_a_prepared_graph_gives_the_same_and_is_not_read_again(cache: Path) -> None:
    expected = OrtEngine(GRAPH).run(latents())["images"].astype(int)
    first = prepared_engine(SHA, lambda: GRAPH)
    again = prepared_engine(SHA, never)
    for engine in (first, again):
        assert cache in engine.path.parents
        assert np.abs(engine.run(latents())["images"] - expected).max() <= 1
    assert again.inputs == OrtEngine(GRAPH).inputs


def test_weights_are_beside_the_prepared_graph_and_not_in_it(cache: Path) -> None:
    graph = prepared_engine(SHA, lambda: GRAPH).path
    weights = graph.with_name("model.onnx.data")
    assert weights.stat().st_size > 10 * graph.stat().st_size


def test_attention_is_computed_block_by_block(cache: Path) -> None:
    graph = onnx.load(prepared_engine(SHA, lambda: GRAPH).path, load_external_data=False).graph
    operators = {node.op_type for node in graph.node}
    assert "MultiHeadAttention" in operators
    assert "Attention" not in operators


def test_fp16_weights_stay_fp16_and_are_cast_at_every_use(cache: Path) -> None:
    expected = OrtEngine(GRAPH).run(latents())["images"].astype(int)
    folded = prepared_engine(SHA, lambda: GRAPH)
    kept = prepared_engine(SHA, lambda: GRAPH, keep_fp16=True)
    assert kept.path != folded.path
    assert np.abs(kept.run(latents())["images"] - expected).max() <= 1

    sizes = [engine.path.with_name("model.onnx.data").stat().st_size for engine in (folded, kept)]
    assert sizes[1] < 0.55 * sizes[0]
    graph = onnx.load(str(kept.path), load_external_data=False).graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    assert {tensor.data_type for tensor in weights.values() if np.prod(tensor.dims) > 1024} == {
        TensorProto.FLOAT16
    }
    first = [weights.keys() >= set(node.input) for node in graph.node if node.input]
    assert any(first)
    assert first == sorted(first, reverse=True)  # see onnx_edit


# A process of its own: in this one blocks that were freed before would be used again.
_GROWTH = """
import sys, threading
import numpy as np
from sld_edge.engines.onnxruntime.sessions import recipe
from sld_edge.engines.prepared import prepared_engine

def anonymous():  # KiB of this process that are no file's
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

def watch():
    global peak
    while not stop.wait(0.0005):
        peak = max(peak, anonymous())

sha256, width, keep_fp16 = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
before, peak, stop = anonymous(), 0, threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
how = recipe(keep_fp16=keep_fp16)
with prepared_engine(sha256, lambda: sys.exit("not prepared"), how) as engine:
    for _ in range(5):
        engine.run({"x0": np.ones((1, width), np.float32)})
stop.set()
watcher.join()
print(peak - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what memory is no file's")
@pytest.mark.parametrize("keep_fp16", [True, False])
def test_weights_are_never_all_in_memory(cache: Path, tmp_path: Path, keep_fp16: bool) -> None:
    """Neither as casts of those that stay FP16 nor packed: they stay mapped."""
    layers, width = 48, 1024
    model = chain(layers, width)
    onnx.save(model, tmp_path / "chain.onnx", save_as_external_data=True, location="chain.data")
    prepared_engine(SHA, lambda: tmp_path / "chain.onnx", keep_fp16=keep_fp16)
    command = [sys.executable, "-c", _GROWTH, SHA, str(width), str(keep_fp16)]
    grown = int(subprocess.run(command, check=True, capture_output=True).stdout)
    assert grown < layers * width**2 * 4 / 1024 / 3  # of 192 MiB as FP32


@pytest.mark.parametrize("what", ["graph", "processor", "version"])
def test_another_graph_processor_or_version_is_prepared_anew(
    cache: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    prepared_engine(SHA, lambda: GRAPH)
    if what == "processor":
        monkeypatch.setattr(sessions, "_processor", lambda: "another")
    if what == "version":
        monkeypatch.setattr(onnxruntime(), "__version__", "0.0.1")
    with pytest.raises(AssertionError, match="was read"):
        prepared_engine("cd" * 32 if what == "graph" else SHA, never)


@pytest.mark.parametrize("damage", ["cut short", "no stamp", "garbage of the same size"])
def test_a_damaged_one_is_prepared_anew(cache: Path, damage: str) -> None:
    graph = prepared_engine(SHA, lambda: GRAPH).path
    if damage == "cut short":
        graph.with_name("model.onnx.data").write_bytes(b"")
    elif damage == "no stamp":
        graph.with_name("prepared.json").unlink()
    else:
        graph.write_bytes(bytes(graph.stat().st_size))
    engine = prepared_engine(SHA, lambda: GRAPH)
    assert engine.run(latents())["images"].shape == (1, 64, 64, 3)
    assert prepared_engine(SHA, never).path == engine.path


def test_what_another_process_prepared_meanwhile_is_left_alone(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be loading the files just now."""
    seen = []

    def slow(*arguments: Any) -> Any:
        monkeypatch.setattr(sessions, "create_session", create_session)
        other = prepared_engine(SHA, lambda: GRAPH).path
        seen.append((other, other.stat().st_ino))
        return create_session(*arguments)

    monkeypatch.setattr(sessions, "create_session", slow)
    ours = prepared_engine(SHA, lambda: GRAPH).path
    assert seen == [(ours, ours.stat().st_ino)]
    assert len(list(ours.parent.parent.iterdir())) == 1


def test_without_a_cache_the_graph_runs_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "a-file"
    blocked.write_text("")
    for value in ("0", "off", str(blocked / "below-a-file")):
        monkeypatch.setenv("SLD_EDGE_CACHE", value)
        assert prepared_engine(SHA, lambda: GRAPH).path == GRAPH


def test_nothing_half_made_is_left(cache: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a graph")
    with pytest.raises(EngineError, match=r"cannot load .*broken\.onnx"):
        prepared_engine(SHA, lambda: broken)
    assert list((cache / "sessions").iterdir()) == []


def test_a_graph_without_its_weights_is_one_line(tmp_path: Path) -> None:
    shutil.copy(GRAPH, tmp_path)
    with pytest.raises(EngineError, match="cannot load") as caught:
        OrtEngine(tmp_path / GRAPH.name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("feeds", "says"),
    [
        ({}, "input latents | got nothing"),
        ({"latents": np.zeros((1, 4, 16, 16))}, "got float64"),
        ({"latents": np.zeros((1, 3, 16, 16), np.float32)}, "expected float32"),
        ({"latents": np.zeros((4, 16, 16), np.float32)}, "input latents"),
        ({**latents(), "more": np.zeros(1, np.float32)}, "no such input | got more"),
    ],
)
def test_inputs_that_do_not_fit_are_named(feeds: dict[str, Array], says: str) -> None:
    with pytest.raises(EngineError, match=says.replace(" | ", r" \| ")):
        OrtEngine(GRAPH).run(feeds)


def test_environment_variables() -> None:
    assert cache_folder({"SLD_EDGE_CACHE": "0"}) is None
    assert cache_folder({"SLD_EDGE_CACHE": "/x"}) == Path("/x")
    assert cache_folder({"XDG_CACHE_HOME": "/y"}) == Path("/y/sld-edge")
    assert cache_folder({}) == Path.home() / ".cache" / "sld-edge"
    assert [thread_count({"SLD_EDGE_THREADS": value}) for value in ("0", "3")] == [0, 3]
    assert thread_count({}) == 0
    for value in ("-1", "two", ""):
        with pytest.raises(InputError, match="SLD_EDGE_THREADS"):
            thread_count({"SLD_EDGE_THREADS": value})
