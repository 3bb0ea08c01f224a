"""The opset-20 form of a graph: what the builder writes itself, from the same weights' file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from oracles.models import (
    TEXT_LENGTH,
    TEXT_WIDTH,
    config_of,
    tiny_text_encoder,
    tiny_unet,
    tiny_vae,
    weights_of,
)
from oracles.running import outputs_of, relative_error
from sld_edge.engines.errors import CheckpointError, OutputError
from sld_edge.engines.onnxruntime.engine import OrtEngine
from sld_edge.export.graphs.builder import GraphOptions
from sld_edge.export.graphs.clip import write_text_encoder
from sld_edge.export.graphs.decompose import decomposed_graph
from sld_edge.export.graphs.guidance import write_guidance
from sld_edge.export.graphs.unet import write_unet
from sld_edge.export.graphs.vae import write_vae_decoder

Array = np.ndarray[Any, Any]
Write = Callable[[Path, GraphOptions], None]

COMPONENTS = ("text_encoder", "unet", "vae_decoder")
FORMS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "fp32 from fp16": {"precision": "fp32", "storage": "fp16"},
    "fp16": {"precision": "fp16"},
}
# The same sums in another order; in FP16 the two forms round at other places besides.
TOLERANCES = {"fp32": 1e-5, "fp16": 3e-3}


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Write]:
    folder = tmp_path_factory.mktemp("weights")
    models = {
        "text_encoder": (write_text_encoder, tiny_text_encoder("gelu")),
        "unet": (write_unet, tiny_unet("sd2")),
        "vae_decoder": (write_vae_decoder, tiny_vae()),
    }
    made: dict[str, Write] = {}
    for name, (write, model) in models.items():
        config, weights = config_of(model), weights_of(model, folder / f"{name}.st", name=name)
        made[name] = lambda path, options, w=write, c=config, t=weights: w(c, t, options, path)  # type: ignore[misc]  # defaults bind the loop's values
    return made


@pytest.fixture
def feeds() -> dict[str, dict[str, Array]]:
    rng = np.random.default_rng(5)

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape, np.float32)

    return {
        "text_encoder": {"input_ids": rng.integers(0, 100, (2, TEXT_LENGTH))},
        "unet": {
            "latents": normal(2, 4, 6, 10),
            "timestep": np.array([3, 700], np.float32),
            "context": normal(6, TEXT_LENGTH, TEXT_WIDTH),
        },
        "vae_decoder": {"latents": normal(1, 4, 5, 6)},
    }


def apart(graph: Path) -> Path:
    """Give a graph a weights' file of its own: ONNX's checker takes hard links for an attack."""
    data = graph.with_name(graph.name + ".data")
    content = data.read_bytes()
    data.unlink()
    data.write_bytes(content)
    return graph


def assert_same(got: Path, wanted: Path, feeds: dict[str, Array], tolerance: float) -> None:
    ours, theirs = outputs_of(got, feeds), outputs_of(wanted, feeds)
    assert list(ours) == list(theirs)
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype
        if array.dtype == np.uint8:  # whole levels: a rounding may fall to the other side
            difference = np.abs(array.astype(int) - theirs[name].astype(int))
            assert difference.max() <= 1
            assert np.mean(difference > 0) <= (1e-3 if tolerance < 1e-4 else 0.1)
        else:
            assert relative_error(array, theirs[name]) <= tolerance, name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("component", COMPONENTS)
def test_it_computes_what_both_other_forms_do(
    component: str,
    form: str,
    writers: dict[str, Write],
    feeds: dict[str, dict[str, Array]],
    tmp_path: Path,
) -> None:
    source, own, target = (tmp_path / f"{name}.onnx" for name in ("source", "own", "target"))
    writers[component](source, GraphOptions(**FORMS[form]))
    writers[component](own, GraphOptions(attention="decomposed", **FORMS[form]))
    before = source.read_bytes()
    decomposed_graph(source, target)
    onnx.checker.check_model(str(apart(target)), full_check=True)
    tolerance = TOLERANCES[FORMS[form]["precision"]]
    assert_same(target, source, feeds[component], tolerance)
    # The same operators on the same numbers; only their order may differ.
    assert_same(target, own, feeds[component], 1e-6)
    ops = [
        sorted(node.op_type for node in onnx.load(str(p), load_external_data=False).graph.node)
        for p in (target, own)
    ]
    assert ops[0] == ops[1]
    assert source.read_bytes() == before


def test_the_weights_take_no_room_and_are_no_symbolic_link(
    writers: dict[str, Write], tmp_path: Path
) -> None:
    source, target = tmp_path / "unet.onnx", tmp_path / "plans" / "other.onnx"
    target.parent.mkdir()
    writers["unet"](source, GraphOptions())
    target.with_name("other.onnx.data").write_bytes(b"stale")
    decomposed_graph(source, target)
    ours, theirs = target.with_name("other.onnx.data"), tmp_path / "unet.onnx.data"
    assert ours.samefile(theirs)
    assert not ours.is_symlink()
    model = onnx.load(str(target), load_external_data=False)
    assert (model.opset_import[0].version, model.ir_version) == (20, 9)
    places = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert places == {"other.onnx.data"}
    OrtEngine(target)  # reads it through the link


def test_where_links_are_not_possible_the_weights_are_copied(
    writers: dict[str, Write],
    feeds: dict[str, dict[str, Array]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    source, target = tmp_path / "source.onnx", tmp_path / "target.onnx"
    writers["unet"](source, GraphOptions())
    decomposed_graph(source, target)
    copy = tmp_path / "target.onnx.data"
    assert not copy.samefile(tmp_path / "source.onnx.data")
    assert copy.read_bytes() == (tmp_path / "source.onnx.data").read_bytes()
    assert_same(target, source, feeds["unet"], 1e-5)


def test_a_decomposed_graph_stays_as_it_is(tmp_path: Path) -> None:
    source, target = tmp_path / "guidance.onnx", tmp_path / "target.onnx"
    write_guidance(source)
    decomposed_graph(source, target)
    before, after = onnx.load(str(source)), onnx.load(str(target))
    after.graph.name = before.graph.name
    assert before == after


# --- what it does not know ----------------------------------------------------------------------


def attention_of(**changes: Any) -> onnx.NodeProto:
    attributes = {"q_num_heads": 2, "kv_num_heads": 2, "scale": 0.5, **changes}
    attributes = {key: value for key, value in attributes.items() if value is not None}
    return helper.make_node("Attention", ["x", "x", "x"], ["y"], name="att", **attributes)


def saved(path: Path, *nodes: onnx.NodeProto, shape: Any = ("N", 4, 8), **changes: Any) -> Path:
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("x", "y")]
    scale = helper.make_tensor("scale", TensorProto.FLOAT, [8], [1.0] * 8)
    graph = helper.make_graph(list(nodes), "g", ends[:1], ends[1:], [scale])
    opsets = [helper.make_opsetid("", changes.get("opset", 23))]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=11), path)
    return path


def test_the_attention_of_these_tests_is_known(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = {"x": rng.standard_normal((2, 4, 8), np.float32)}
    for causal in (0, 1):
        source = saved(tmp_path / "source.onnx", attention_of(is_causal=causal))
        decomposed_graph(source, tmp_path / "target.onnx")
        assert_same(tmp_path / "target.onnx", source, x, 1e-5)


GROUPS: dict[str, Any] = {"name": "norm", "num_groups": 2}
UNKNOWN: dict[str, tuple[list[onnx.NodeProto], dict[str, Any], str]] = {
    "softcap": ([attention_of(softcap=2.0)], {}, "softcap of att"),
    "scale": ([attention_of(scale=1.0)], {}, "scale of att .* got 1.0"),
    "no scale": ([attention_of(scale=None)], {}, "scale of att"),
    "grouped heads": ([attention_of(kv_num_heads=1)], {}, "kv_num_heads of att"),
    "heads in the shape": ([attention_of(q_num_heads=None)], {}, "got 0 heads"),
    "mask": (
        [
            helper.make_node(
                "Attention", ["x", "x", "x", "x"], ["y"], name="att", q_num_heads=2, kv_num_heads=2
            )
        ],
        {},
        "inputs of att",
    ),
    "causal of any length": ([attention_of(is_causal=1)], {"shape": ("N", "L", 8)}, "any length"),
    "any channels": ([attention_of()], {"shape": ("N", 4, "C")}, "att of keys"),
    "another gelu": (
        [helper.make_node("Gelu", ["x"], ["y"], name="act", approximate="tanh")],
        {},
        "approximation of act",
    ),
    "a scale that is computed": (
        [
            helper.make_node("Neg", ["scale"], ["s"]),
            helper.make_node("GroupNormalization", ["x", "s", "scale"], ["y"], **GROUPS),
        ],
        {"shape": ("N", 8, 2, 2)},
        "is no weight",
    ),
    "a scale used twice": (
        [helper.make_node("GroupNormalization", ["x", "scale", "scale"], ["y"], **GROUPS)],
        {"shape": ("N", 8, 2, 2)},
        "scale, which",
    ),
    "a newer operator": (
        [helper.make_node("RMSNormalization", ["x", "scale"], ["y"])],
        {},
        "operator RMSNormalization",
    ),
    "a newer attribute": (
        [helper.make_node("Cast", ["x"], ["y"], to=1, round_mode="up")],
        {"opset": 23},
        "round_mode",
    ),
    "another opset": ([helper.make_node("Neg", ["x"], ["y"])], {"opset": 22}, "ai.onnx 22"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_is_not_known_is_refused(case: str, tmp_path: Path) -> None:
    nodes, changes, message = UNKNOWN[case]
    source = saved(tmp_path / "source.onnx", *nodes, **changes)
    with pytest.raises(CheckpointError, match=f"{message}.*--attention decomposed") as caught:
        decomposed_graph(source, tmp_path / "target.onnx")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source.onnx"]


def test_weights_elsewhere_are_refused(writers: dict[str, Write], tmp_path: Path) -> None:
    writers["unet"](tmp_path / "unet.onnx", GraphOptions())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "unet.onnx.data").rename(tmp_path / "elsewhere" / "unet.onnx.data")
    (tmp_path / "unet.onnx").rename(tmp_path / "moved.onnx")
    with pytest.raises(CheckpointError, match=r"weights in unet\.onnx\.data"):
        decomposed_graph(tmp_path / "moved.onnx", tmp_path / "target.onnx")


def test_what_cannot_be_written_leaves_nothing(writers: dict[str, Write], tmp_path: Path) -> None:
    writers["unet"](tmp_path / "unet.onnx", GraphOptions())
    with pytest.raises(OutputError, match="cannot write"):
        decomposed_graph(tmp_path / "unet.onnx", tmp_path / "nowhere" / "target.onnx")
    (tmp_path / "target.onnx").mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        decomposed_graph(tmp_path / "unet.onnx", tmp_path / "target.onnx")
    assert not (tmp_path / "target.onnx.data").exists()


# --- TensorRT-RTX -------------------------------------------------------------------------------

SHAPES = {
    "latents": (1, 4, 8, 8),
    "timestep": (1,),
    "context": (3, TEXT_LENGTH, TEXT_WIDTH),
    "input_ids": (1, TEXT_LENGTH),
    "images": (1, 64, 64, 3),
}


def built(path: Path) -> int:
    """Build a real plan for one compute capability; return its size in bytes."""
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(path))
    assert parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    assert config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        name = network.get_input(i).name
        profile.set_shape(name, *[SHAPES[name]] * 3)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None
    return int(plan.nbytes)


@pytest.mark.parametrize("component", COMPONENTS)
def test_tensorrt_rtx_builds_it_in_fp32(
    component: str, writers: dict[str, Write], tmp_path: Path
) -> None:
    writers[component](tmp_path / "source.onnx", GraphOptions(storage="fp16"))
    decomposed_graph(tmp_path / "source.onnx", tmp_path / "target.onnx")
    assert built(tmp_path / "target.onnx") > 0


def test_tensorrt_rtx_takes_bytes_at_the_boundary(
    writers: dict[str, Write], tmp_path: Path
) -> None:
    writers["vae_decoder"](tmp_path / "source.onnx", GraphOptions(precision="fp16"))
    assert built(tmp_path / "source.onnx") > 0
