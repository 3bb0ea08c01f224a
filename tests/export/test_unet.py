from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from oracles.models import UNET_KINDS, UnetKind, config_of, tiny_unet, weights_of
from oracles.running import outputs_of, relative_error
from oracles.unet_calls import feeds_for, predicted
from sld_edge.engines.errors import CheckpointError, InputError
from sld_edge.export.graphs.builder import GraphOptions
from sld_edge.export.graphs.unet import write_unet
from sld_edge.export.graphs.unet_settings import (
    levels_from_settings,
    middle_from_settings,
    pooled_width,
    unet_settings,
)

# FP32 differs by the order of sums, FP16 by its eleven bits through some fifty layers.
TOLERANCES = {"fp32": 2e-6, "fp16": 3e-3}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def written(
    tmp_path: Path, model: Any, options: GraphOptions, config: dict[str, Any] | None = None,
    **weight_changes: Any,
) -> Path:  # fmt: skip
    weights = weights_of(model, tmp_path / "unet.safetensors", **weight_changes)
    path = tmp_path / "unet.onnx"
    write_unet(config if config is not None else config_of(model), weights, options, path)
    return path


@pytest.mark.parametrize("shared_prefix", [True, False])
@pytest.mark.parametrize("attention", ["op", "decomposed"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", UNET_KINDS)
def test_predicts_what_diffusers_predicts(
    tmp_path: Path, kind: UnetKind, precision: Any, attention: Any, shared_prefix: bool
) -> None:
    model = tiny_unet(kind)
    options = GraphOptions(precision=precision, attention=attention, shared_prefix=shared_prefix)
    path = written(tmp_path, model, options)
    for branches in (1, 2, 3):
        feeds = feeds_for(model, branches)
        got = outputs_of(path, feeds)["noise_pred"]
        assert got.dtype == np.float32
        error = relative_error(got, predicted(model, feeds))
        assert error <= TOLERANCES[precision], f"{branches} branches"


@pytest.mark.parametrize("attention", ["op", "decomposed"])
@pytest.mark.parametrize(("height", "width"), [(11, 14), (9, 17), (8, 24)])
@pytest.mark.parametrize("kind", ["four-level", "no-middle", "lcm-sdxl"])
def test_any_latent_size(
    tmp_path: Path, attention: Any, height: int, width: int, kind: UnetKind
) -> None:
    model = tiny_unet(kind)
    path = written(tmp_path, model, GraphOptions(attention=attention))
    feeds = feeds_for(model, 3, height, width)
    error = relative_error(outputs_of(path, feeds)["noise_pred"], predicted(model, feeds))
    assert error <= TOLERANCES["fp32"]


@pytest.mark.parametrize(
    "changes",
    [
        {"flip_sin_to_cos": False},
        {"freq_shift": 1},
        {"norm_eps": 1e-2},
        {"attention_head_dim": 1},
        {"attention_head_dim": (8, 4)},
        {"norm_num_groups": 2},
        {"layers_per_block": (1, 2)},
        {"transformer_layers_per_block": (1, 2)},
        {"block_out_channels": (16, 16), "attention_head_dim": 4},
    ],
    ids=str,
)
def test_every_free_setting_is_honoured(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = tiny_unet("sd2", **changes)
    path = written(tmp_path, model, GraphOptions())
    feeds = feeds_for(model, 2)
    error = relative_error(outputs_of(path, feeds)["noise_pred"], predicted(model, feeds))
    assert error <= TOLERANCES["fp32"]


@pytest.mark.parametrize("key", ["flip_sin_to_cos", "attention_head_dim", "norm_eps"])
def test_the_parity_test_would_see_a_wrong_setting(tmp_path: Path, key: str) -> None:
    model = tiny_unet("sd1")
    wrong = {"flip_sin_to_cos": False, "attention_head_dim": 4, "norm_eps": 1e-2}[key]
    path = written(tmp_path, model, GraphOptions(), {**config_of(model), key: wrong})
    feeds = feeds_for(model, 1)
    error = relative_error(outputs_of(path, feeds)["noise_pred"], predicted(model, feeds))
    assert error > 20 * TOLERANCES["fp32"]


def test_fp16_storage_under_fp32_halves_the_file(tmp_path: Path) -> None:
    model = tiny_unet("sd2")
    plain = written(tmp_path, model, GraphOptions()).with_name("unet.onnx.data").stat().st_size
    path = written(tmp_path, model, GraphOptions(storage="fp16"))
    feeds = feeds_for(model, 3)
    # The oracle has the same rounded weights, so only FP32 arithmetic is left.
    rounded = model.half().float()
    error = relative_error(outputs_of(path, feeds)["noise_pred"], predicted(rounded, feeds))
    assert error <= TOLERANCES["fp32"]
    assert path.with_name("unet.onnx.data").stat().st_size < 0.75 * plain  # pages are padded


def test_fp32_storage_under_fp16_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="storage fp32"):
        written(tmp_path, tiny_unet(), GraphOptions(precision="fp16", storage="fp32"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_unet("sd1").to(dtype)
    path = written(tmp_path, model, GraphOptions())
    feeds = feeds_for(model, 2)
    error = relative_error(outputs_of(path, feeds)["noise_pred"], predicted(model.float(), feeds))
    assert error <= TOLERANCES["fp32"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(
    tmp_path: Path, dtype: torch.dtype, value: float
) -> None:
    model = tiny_unet("sd1").to(dtype)
    model.conv_in.weight.data[-1, 1, 2, 0] = value
    with pytest.raises(CheckpointError, match="conv_in.weight .*NaN or infinity"):
        written(tmp_path, model, GraphOptions(precision="fp16"))
    model.conv_in.weight.data[-1, 1, 2, 0] = -65504  # the least number of FP16
    written(tmp_path, model, GraphOptions(precision="fp16"))


def test_the_prefix_is_shared(tmp_path: Path) -> None:
    path = written(tmp_path, tiny_unet("sd1"), GraphOptions())
    nodes = onnx.load(path, load_external_data=False).graph.node
    # The embedding, the first skip, two residuals, the query of the first cross-attention.
    assert Counter(node.op_type for node in nodes)["Tile"] == 5


def test_every_repeated_value_gets_the_batch_of_the_context(tmp_path: Path) -> None:
    """From Tile alone TensorRT cannot tell that two batches are equal, and fuses no attention."""
    graph = onnx.load(written(tmp_path, tiny_unet("sd1"), GraphOptions()), load_external_data=False)
    made = {name: node for node in graph.graph.node for name in node.output}
    readers = {name: node for node in graph.graph.node for name in node.input}
    tiles = [node for node in graph.graph.node if node.op_type == "Tile"]
    assert tiles
    for tile in tiles:
        reshape = readers[tile.output[0]]
        assert reshape.op_type == "Reshape"
        shape = made[reshape.input[1]]
        batch = made[shape.input[0]] if shape.op_type == "Concat" else shape
        assert (batch.op_type, batch.input[0]) == ("Shape", "context")


@pytest.mark.parametrize(("attention", "opset"), [("op", 23), ("decomposed", 20)])
def test_attention_is_one_op_or_none(tmp_path: Path, attention: Any, opset: int) -> None:
    options = GraphOptions(attention=attention, precision="fp16")
    graph = onnx.load(written(tmp_path, tiny_unet(), options))
    ops = Counter(node.op_type for node in graph.graph.node)
    assert graph.opset_import[0].version == opset
    fused = {"Attention", "GroupNormalization", "Gelu"}
    assert fused <= set(ops) if attention == "op" else not fused & set(ops)


def test_the_same_input_gives_the_same_bytes_wherever_it_lies(tmp_path: Path) -> None:
    files = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        path = written(tmp_path / name, tiny_unet(), GraphOptions(precision="fp16"))
        files.append((path.read_bytes(), path.with_name("unet.onnx.data").read_bytes()))
        assert str(tmp_path).encode() not in files[-1][0]
    assert files[0] == files[1]


def test_tensors_are_named_after_the_checkpoint(tmp_path: Path) -> None:
    model = tiny_unet()
    graph = onnx.load(written(tmp_path, model, GraphOptions()), load_external_data=False).graph
    assert set(model.state_dict()) <= {tensor.name for tensor in graph.initializer}


def test_equal_weights_are_written_once_and_large_ones_start_on_a_page(tmp_path: Path) -> None:
    model = tiny_unet("sd2", block_out_channels=(32, 48))
    first, second = (model.mid_block.resnets[i].conv1.weight for i in (0, 1))
    second.data = first.data.clone()
    graph = onnx.load(written(tmp_path, model, GraphOptions()), load_external_data=False).graph
    places = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in graph.initializer
    }
    same = [places[f"mid_block.resnets.{i}.conv1.weight"] for i in (0, 1)]
    assert same[0] == same[1]
    assert int(same[0]["offset"]) % 4096 == 0
    assert same[0]["location"] == "unet.onnx.data"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"in_channels": 9}, "in_channels"),
        ({"act_fn": "gelu"}, "act_fn"),
        ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "down_block_types"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"time_cond_proj_dim": 256}, "cond_proj"),
        ({"time_cond_proj_dim": 7}, "time_cond_proj_dim"),
        ({"time_cond_proj_dim": 2}, "time_cond_proj_dim"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type"),
        ({"mid_block_type": "UNetMidBlock2D"}, "mid_block"),
        ({"mid_block_type": None}, "mid_block"),
        ({"only_cross_attention": [True, False]}, "only_cross_attention"),
        ({"dual_cross_attention": True}, "dual_cross_attention"),
        ({"num_class_embeds": 10}, "num_class_embeds"),
        ({"addition_embed_type": "text"}, "addition_embed_type"),
        ({"addition_time_embed_dim": 8}, "addition_time_embed_dim"),
        ({"projection_class_embeddings_input_dim": 8}, "projection_class_embeddings_input_dim"),
        ({"transformer_layers_per_block": [1, 2, 3]}, "transformer_layers_per_block"),
        ({"transformer_layers_per_block": [[1], 1]}, "transformer_layers_per_block"),
        ({"transformer_layers_per_block": [[[1, 1]], 1]}, "transformer_layers_per_block"),
        ({"reverse_transformer_layers_per_block": [1]}, "reverse_transformer_layers_per_block"),
        ({"reverse_transformer_layers_per_block": [1, [1, 1]]}, "reverse_transformer_layers"),
        ({"attention_head_dim": 3}, "attention_head_dim"),
        ({"attention_head_dim": [2]}, "attention_head_dim"),
        ({"attention_head_dim": 0}, "attention_head_dim"),
        ({"attention_head_dim": "8"}, "attention_head_dim"),
        ({"num_attention_heads": 8}, "num_attention_heads"),
        ({"norm_num_groups": 5}, "norm_num_groups"),
        ({"brand_new_option": None}, "brand_new_option"),
        ({"block_out_channels": [16, 48]}, "down_blocks"),
        ({"cross_attention_dim": 32}, "attn2"),
        ({"layers_per_block": 1}, "resnets.1"),
        ({"layers_per_block": 3}, "resnets.2"),
        ({"use_linear_projection": "yes"}, "use_linear_projection"),
    ],
    ids=str,
)
def test_a_config_that_is_not_known_is_named(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    model = tiny_unet("sd1")
    with pytest.raises(CheckpointError, match=named):
        written(tmp_path, model, GraphOptions(), {**config_of(model), **changes})
    assert not list(tmp_path.glob("unet.onnx*")), "half a graph was left behind"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"addition_time_embed_dim": None}, "addition_time_embed_dim"),
        ({"addition_time_embed_dim": 7}, "addition_time_embed_dim"),
        ({"projection_class_embeddings_input_dim": None}, "projection_class_embeddings_input_dim"),
        ({"projection_class_embeddings_input_dim": 36}, "projection_class_embeddings_input_dim"),
        ({"projection_class_embeddings_input_dim": 57}, r"add_embedding\.linear_1"),
        ({"addition_embed_type": None}, "addition_time_embed_dim"),
        ({"freq_shift": 3}, "freq_shift"),
    ],
    ids=str,
)
def test_sizes_of_sdxl_that_do_not_fit_are_named(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    model = tiny_unet("sdxl")
    with pytest.raises(CheckpointError, match=named) as caught:
        written(tmp_path, model, GraphOptions(), {**config_of(model), **changes})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["pooled", "time_ids", "guidance_embedded"])
def test_every_input_counts(tmp_path: Path, name: str) -> None:
    model = tiny_unet("lcm-sdxl")
    path = written(tmp_path, model, GraphOptions())
    feeds = feeds_for(model, 3)
    before = outputs_of(path, feeds)["noise_pred"]
    feeds[name][1] = feeds[name][0]
    changed = np.abs(outputs_of(path, feeds)["noise_pred"] - before).max(axis=(1, 2, 3)) > 1e-4
    # Row 1 is the second image of the first branch; the other two belong to the image.
    rows = [1] if name == "pooled" else [1, 3, 5]
    assert np.flatnonzero(changed).tolist() == rows


def test_all_before_the_first_embedding_is_shared_in_sdxl(tmp_path: Path) -> None:
    path = written(tmp_path, tiny_unet("sdxl"), GraphOptions())
    nodes = onnx.load(path, load_external_data=False).graph.node
    tiled = [node.input[0] for node in nodes if node.op_type == "Tile"]
    assert tiled == [
        "add_time_proj/row",
        "time_embedding.linear_2_1",  # after its bias
        "down_blocks.0.resnets.0.conv1",
        "conv_in",
    ]


_SDXL = {
    "_class_name": "UNet2DConditionModel", "act_fn": "silu", "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64, "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048, "cross_attention_norm": None,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "layers_per_block": 2, "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128, "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None, "use_linear_projection": True,
}  # fmt: skip
_HALF_SDXL = {
    **_SDXL, "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "down", "up", "middle"),
    [
        (_SDXL, [(0, 0), (2, 2), (10, 10)], [(0, 0, 0), (2, 2, 2), (10, 10, 10)], (2, 10)),
        (_HALF_SDXL, [(0, 0), (2, 2), (4, 4)], [(0, 0, 0), (2, 1, 1), (4, 4, 10)], (1, 0)),
    ],
    ids=["SDXL", "SSD-1B"],
)
def test_levels_of_large_models(config: Any, down: Any, up: Any, middle: Any) -> None:
    settings = unet_settings(config, name="unet")
    levels = levels_from_settings(settings, name="unet")
    assert [level.down for level in levels] == down
    assert [level.up for level in levels] == up
    assert [level.heads for level in levels] == [5, 10, 20]
    made = middle_from_settings(settings)
    assert (made.resnets, made.transformers) == middle
    assert pooled_width(settings, name="unet") == 1280


def test_old_configs_and_leftovers_of_training_are_accepted(tmp_path: Path) -> None:
    model = tiny_unet("sd1")
    old = {
        key: config_of(model)[key]
        for key in (
            "attention_head_dim",
            "block_out_channels",
            "cross_attention_dim",
            "down_block_types",
            "up_block_types",
            "norm_num_groups",
        )
    }
    extra = {"_class_name": "UNet2DConditionModel", "_anything": 1, "inv_gamma": 1.0}
    written(tmp_path, model, GraphOptions(), {**old, **extra})


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    key = "mid_block.resnets.1.conv2.bias"
    with pytest.raises(CheckpointError, match=key):
        written(tmp_path, tiny_unet(), GraphOptions(), without=[key])


def test_an_unused_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="add_embedding"):
        written(tmp_path, tiny_unet(), GraphOptions(), extra={"add_embedding.w": torch.ones(3)})


@pytest.mark.parametrize(
    ("number", "precision"), [(float("inf"), "fp32"), (float("nan"), "fp16"), (70000.0, "fp16")]
)
def test_a_weight_that_is_not_finite_is_named(
    tmp_path: Path, number: float, precision: Any
) -> None:
    model = tiny_unet()
    model.conv_out.weight.data[0, 0, 0, 0] = number
    with pytest.raises(CheckpointError, match=r"conv_out\.weight"):
        written(tmp_path, model, GraphOptions(precision=precision))
    assert not list(tmp_path.glob("unet.onnx*")), "half a graph was left behind"


def test_a_weight_of_integers_is_named(tmp_path: Path) -> None:
    wrong = {"conv_in.bias": torch.zeros(16, dtype=torch.int64)}
    with pytest.raises(CheckpointError, match=r"conv_in\.bias"):
        written(tmp_path, tiny_unet(), GraphOptions(), without=list(wrong), extra=wrong)
