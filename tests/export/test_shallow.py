"""The UNet's `deep` output and the shallow UNet that takes it, against diffusers' own blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from oracles.models import UNET_KINDS, UnetKind, config_of, tiny_unet, weights_of
from oracles.running import outputs_of, relative_error
from oracles.unet_calls import IMAGES, calls_of, feeds_for
from sld_edge.export.graphs.builder import GraphOptions
from sld_edge.export.graphs.decompose import decomposed_graph
from sld_edge.export.graphs.shallow import write_shallow_unet
from sld_edge.export.graphs.unet import write_unet

Array = np.ndarray[Any, Any]

# As in test_unet: the order of sums in FP32, eleven bits in FP16.
TOLERANCES = {"fp32": 2e-6, "fp16": 3e-3}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def both(folder: Path, model: Any, options: GraphOptions) -> tuple[Path, Path]:
    weights = weights_of(model, folder / "unet.safetensors")
    whole, shallow = folder / "unet.onnx", folder / "unet_shallow.onnx"
    write_unet(config_of(model), weights, options, whole)
    write_shallow_unet(whole, shallow)
    return whole, shallow


def deep_of(model: Any, feeds: dict[str, Array]) -> Array:
    """What diffusers' last up block hands to its last layer, branch by branch."""
    seen: list[Array] = []

    def watch(_: Any, given: tuple[Any, ...]) -> None:
        channels = given[0].shape[1] - model.conv_in.out_channels  # the skip is joined behind it
        seen.append(given[0][:, :channels].numpy())

    hook = model.up_blocks[-1].resnets[-1].register_forward_pre_hook(watch)
    try:
        for call in calls_of(model, feeds):
            model(**call)
    finally:
        hook.remove()
    return np.concatenate(seen)


def shallow_of(model: Any, feeds: dict[str, Array], deep: Array) -> Array:
    """DeepCache's outermost branch from diffusers' own blocks, branch by branch."""
    block, parts = model.up_blocks[-1], []
    for kept, call in zip(
        torch.from_numpy(deep).split(IMAGES), calls_of(model, feeds), strict=True
    ):
        latents, context = call["sample"], call["encoder_hidden_states"]
        embedding = model.time_embedding(
            model.time_proj(call["timestep"]), call.get("timestep_cond")
        )
        more = call.get("added_cond_kwargs")
        added = model.get_aug_embed(embedding, context, more)
        if added is not None:
            embedding = embedding + added
        x = block.resnets[-1](torch.cat([kept, model.conv_in(latents)], 1), embedding)
        if getattr(block, "attentions", None):
            x = block.attentions[-1](x, encoder_hidden_states=context).sample
        parts.append(model.conv_out(model.conv_act(model.conv_norm_out(x))).numpy())
    return np.concatenate(parts)


@pytest.mark.parametrize("attention", ["op", "decomposed"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", UNET_KINDS)
def test_both_are_diffusers_blocks(
    tmp_path: Path, kind: UnetKind, precision: Any, attention: Any
) -> None:
    model = tiny_unet(kind)
    options = GraphOptions(precision=precision, attention=attention)
    whole, shallow = both(tmp_path, model, options)
    for branches in (1, 2, 3):
        feeds = feeds_for(model, branches)
        out = outputs_of(whole, feeds)
        assert out["deep"].dtype == np.float32
        assert relative_error(out["deep"], deep_of(model, feeds)) <= TOLERANCES[precision]
        # Its own deep gives the whole UNet's answer ...
        again = outputs_of(shallow, {**feeds, "deep": out["deep"]})["noise_pred"]
        assert relative_error(again, out["noise_pred"]) <= TOLERANCES[precision] / 2
        # ... and another one what the blocks make of it.
        other = np.random.default_rng(9).standard_normal(out["deep"].shape, np.float32)
        got = outputs_of(shallow, {**feeds, "deep": other})["noise_pred"]
        error = relative_error(got, shallow_of(model, feeds, other))
        assert error <= TOLERANCES[precision], f"{branches} branches"
        assert relative_error(again, got) > 0.1


@pytest.mark.parametrize("shared_prefix", [True, False])
@pytest.mark.parametrize(("height", "width"), [(11, 14), (8, 24)])
def test_any_latent_size(tmp_path: Path, height: int, width: int, shared_prefix: bool) -> None:
    model = tiny_unet("four-level")
    whole, shallow = both(tmp_path, model, GraphOptions(shared_prefix=shared_prefix))
    feeds = feeds_for(model, 3, height, width)
    out = outputs_of(whole, feeds)
    again = outputs_of(shallow, {**feeds, "deep": out["deep"]})["noise_pred"]
    assert relative_error(again, out["noise_pred"]) <= 1e-6


@pytest.mark.parametrize("storage", ["fp32", "fp16"])
def test_the_weights_are_the_unets(tmp_path: Path, storage: Any) -> None:
    whole, shallow = both(tmp_path, tiny_unet("four-level"), GraphOptions(storage=storage))
    assert not shallow.with_name("unet_shallow.onnx.data").exists()
    all_places, own_places = (
        {
            tensor.name: {entry.key: entry.value for entry in tensor.external_data}
            for tensor in onnx.load(path, load_external_data=False).graph.initializer
        }
        for path in (whole, shallow)
    )
    assert own_places.items() <= all_places.items()
    assert {place["location"] for place in own_places.values() if place} == {"unet.onnx.data"}
    names = {name.split(".")[0] for name in own_places if name.endswith("weight")}
    assert names == {"conv_in", "time_embedding", "up_blocks", "conv_norm_out", "conv_out"}


def test_every_node_of_it_is_the_unets(tmp_path: Path) -> None:
    whole, shallow = both(tmp_path, tiny_unet("sd1"), GraphOptions())
    every, own = (
        [node.SerializeToString() for node in onnx.load(path, load_external_data=False).graph.node]
        for path in (whole, shallow)
    )
    assert set(own) < set(every)
    assert len(own) < 0.4 * len(every)


def test_its_decomposed_form_shares_the_weights_too(tmp_path: Path) -> None:
    _, shallow = both(tmp_path, tiny_unet("sd1"), GraphOptions())
    (tmp_path / "plans").mkdir()
    target = tmp_path / "plans" / shallow.name
    data = decomposed_graph(shallow, target)
    assert data == tmp_path / "plans" / "unet.onnx.data"
    content = data.read_bytes()
    data.unlink()  # ONNX's checker takes hard links for an attack
    data.write_bytes(content)
    feeds = feeds_for(tiny_unet("sd1"), 2)
    feeds["deep"] = np.random.default_rng(1).standard_normal((4, 16, 8, 8), np.float32)
    got, wanted = (outputs_of(path, feeds)["noise_pred"] for path in (target, shallow))
    assert relative_error(got, wanted) <= 1e-5


def test_decomposed_beside_the_bundle_it_makes_no_second_file(tmp_path: Path) -> None:
    _, shallow = both(tmp_path, tiny_unet("sd1"), GraphOptions())
    assert decomposed_graph(shallow, tmp_path / "other.onnx") is None
    assert not (tmp_path / "other.onnx.data").exists()
