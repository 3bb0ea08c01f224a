from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from oracles.models import (
    POOLED_WIDTH,
    TEXT_LENGTH,
    config_of,
    tiny_pooled_text_encoder,
    tiny_text_encoder,
    weights_of,
)
from oracles.running import outputs_of, relative_error
from sld_edge.engines.errors import CheckpointError
from sld_edge.export.graphs.builder import GraphOptions
from sld_edge.export.graphs.clip import write_text_encoder

TOLERANCES = {"fp32": 1e-6, "fp16": 2e-3}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def ids(seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 100, (2, TEXT_LENGTH), np.int64)


def written(
    tmp_path: Path, model: Any, options: GraphOptions, config: dict[str, Any] | None = None,
    layer: Any = "last", pooled: bool = False, **weight_changes: Any,
) -> Path:  # fmt: skip
    weights = weights_of(
        model, tmp_path / "model.safetensors", name="text_encoder", **weight_changes
    )
    path = tmp_path / "text_encoder.onnx"
    config = config if config is not None else config_of(model)
    write_text_encoder(config, weights, options, path, layer=layer, pooled=pooled)
    return path


@pytest.mark.parametrize("prefix", ["", "text_model."])
@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("attention", ["op", "decomposed"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_encodes_as_transformers_does(
    tmp_path: Path, precision: Any, attention: Any, hidden_act: Any, prefix: str
) -> None:
    model = tiny_text_encoder(hidden_act)
    # Published files carry the prefix and a buffer that later versions dropped.
    buffer = {f"{prefix}embeddings.position_ids": torch.arange(TEXT_LENGTH)[None]}
    options = GraphOptions(precision=precision, attention=attention)
    path = written(tmp_path, model, options, prefix=prefix, extra=buffer if prefix else None)
    got = outputs_of(path, {"input_ids": ids()})["hidden_states"]
    wanted = model(torch.from_numpy(ids())).last_hidden_state.numpy()
    assert got.dtype == np.float32
    assert relative_error(got, wanted) <= TOLERANCES[precision]


def prompts(end_token: int, *, pad: int = 3) -> np.ndarray[Any, Any]:
    """Tokens of two prompts of other lengths, each ended once and then padded."""
    tokens = np.random.default_rng(5).integers(10, 90, (2, TEXT_LENGTH), np.int64)
    for row, length in enumerate((9, 76)):
        tokens[row, length] = end_token
        tokens[row, length + 1 :] = pad
    return tokens


@pytest.mark.parametrize("attention", ["op", "decomposed"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_penultimate_layer_is_that_of_transformers(
    tmp_path: Path, precision: Any, attention: Any, layers: int
) -> None:
    model = tiny_text_encoder(num_hidden_layers=layers)
    options = GraphOptions(precision=precision, attention=attention)
    path = written(tmp_path, model, options, layer="penultimate")
    outputs = outputs_of(path, {"input_ids": ids()})
    assert outputs.keys() == {"hidden_states"}
    states = model(torch.from_numpy(ids()), output_hidden_states=True).hidden_states
    assert len(states) == layers + 1
    error = relative_error(outputs["hidden_states"], states[-2].numpy())
    assert error <= TOLERANCES[precision]
    # Nothing of the last layer is in the file.
    names = {tensor.name for tensor in onnx.load(path, load_external_data=False).graph.initializer}
    assert not [n for n in names if f"layers.{layers - 1}." in n or "final_layer_norm" in n]


@pytest.mark.parametrize("layer", ["last", "penultimate"])
@pytest.mark.parametrize("hidden_act", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("attention", ["op", "decomposed"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_pooled_text_is_that_of_transformers(
    tmp_path: Path, precision: Any, attention: Any, hidden_act: Any, layer: Any
) -> None:
    model = tiny_pooled_text_encoder(hidden_act)
    options = GraphOptions(precision=precision, attention=attention)
    path = written(tmp_path, model, options, layer=layer, pooled=True)
    tokens = prompts(99)
    outputs = outputs_of(path, {"input_ids": tokens})
    wanted = model(torch.from_numpy(tokens), output_hidden_states=True)
    states = wanted.last_hidden_state if layer == "last" else wanted.hidden_states[-2]
    for name, tensor in (("hidden_states", states), ("pooled", wanted.text_embeds)):
        assert outputs[name].dtype == np.float32
        assert relative_error(outputs[name], tensor.numpy()) <= TOLERANCES[precision], name
    assert outputs["pooled"].shape == (2, POOLED_WIDTH)


@pytest.mark.parametrize(
    ("end_token", "said"),
    [(99, 99), (99, 2), (60, 60)],
    ids=["the largest id", "the slip of old configs", "with tokens added after it"],
)
@pytest.mark.parametrize("pad", [0, None], ids=["other padding", "padded with end tokens"])
def test_the_end_token_is_found_as_transformers_does(
    tmp_path: Path, end_token: int, said: int, pad: int | None
) -> None:
    model = tiny_pooled_text_encoder(eos_token_id=said)
    tokens = prompts(end_token, pad=pad if pad is not None else end_token)
    tokens[:, 4] = 61  # larger than one of the end tokens
    path = written(tmp_path, model, GraphOptions(), layer="penultimate", pooled=True)
    got = outputs_of(path, {"input_ids": tokens})["pooled"]
    wanted = model(torch.from_numpy(tokens)).text_embeds.numpy()
    assert relative_error(got, wanted) <= TOLERANCES["fp32"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"projection_dim": POOLED_WIDTH + 1}, r"text_projection\.weight"),
        ({"projection_dim": None}, "projection_dim"),
        ({"eos_token_id": [1, 2]}, "eos_token_id"),
        ({"num_hidden_layers": 1}, r"layers\.1"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_pooling_is_named(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    model = tiny_pooled_text_encoder()
    config = {**config_of(model), **changes}
    with pytest.raises(CheckpointError, match=named):
        written(tmp_path, model, GraphOptions(), config, layer="penultimate", pooled=True)
    assert not list(tmp_path.glob("text_encoder.onnx*")), "half a graph was left behind"


def test_a_projection_that_is_not_asked_for_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"text_projection\.weight"):
        written(tmp_path, tiny_pooled_text_encoder(), GraphOptions(), layer="penultimate")


@pytest.mark.parametrize("attention", ["op", "decomposed"])
def test_a_token_sees_only_those_before_it(tmp_path: Path, attention: Any) -> None:
    path = written(tmp_path, tiny_text_encoder(), GraphOptions(attention=attention))
    changed = ids()
    changed[:, 40:] = ids(seed=1)[:, 40:]
    before, after = (
        outputs_of(path, {"input_ids": each})["hidden_states"] for each in (ids(), changed)
    )
    assert np.abs(before - after)[:, :40].max() < 1e-5
    assert np.abs(before - after)[:, 40:].max() > 1e-2


def test_fp16_storage_casts_the_rows_it_looks_up_not_the_table(tmp_path: Path) -> None:
    model = tiny_text_encoder()
    path = written(tmp_path, model, GraphOptions(storage="fp16"))
    nodes = onnx.load(path, load_external_data=False).graph.node
    (gather,) = (node for node in nodes if node.op_type == "Gather")
    assert gather.input[0] == "embeddings.token_embedding.weight"
    got = outputs_of(path, {"input_ids": ids()})["hidden_states"]
    wanted = model.half().float()(torch.from_numpy(ids())).last_hidden_state.numpy()
    assert relative_error(got, wanted) <= TOLERANCES["fp32"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"model_type": "bert"}, "model_type"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"num_hidden_layers": 1}, "layers.1"),
        ({"num_hidden_layers": 3}, "layers.2"),
        ({"vocab_size": 90}, "token_embedding"),
        ({"max_position_embeddings": 64}, "position_embedding"),
        ({"rope_theta": 1e4}, "rope_theta"),
    ],
    ids=str,
)
def test_a_config_that_is_not_known_is_named(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    model = tiny_text_encoder()
    with pytest.raises(CheckpointError, match=named):
        written(tmp_path, model, GraphOptions(), {**config_of(model), **changes})


def test_a_missing_and_an_unused_tensor_are_named(tmp_path: Path) -> None:
    model = tiny_text_encoder()
    with pytest.raises(CheckpointError, match=r"final_layer_norm\.bias"):
        written(tmp_path, model, GraphOptions(), without=["final_layer_norm.bias"])
    extra = {"text_projection.weight": torch.ones(3, 3)}
    with pytest.raises(CheckpointError, match=r"text_projection\.weight"):
        written(tmp_path, model, GraphOptions(), extra=extra)
