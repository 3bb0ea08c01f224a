from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from oracles.models import TEXT_LENGTH, config_of, tiny_text_encoder, weights_of
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
    **weight_changes: Any,
) -> Path:  # fmt: skip
    weights = weights_of(
        model, tmp_path / "model.safetensors", name="text_encoder", **weight_changes
    )
    path = tmp_path / "text_encoder.onnx"
    write_text_encoder(config if config is not None else config_of(model), weights, options, path)
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
