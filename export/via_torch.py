"""The fallback: torch.onnx.export of diffusers' modules, behind the same graph interfaces.

It is slow and large (minutes and 5 GiB for SD 1.5), but it knows every architecture of diffusers.
`--verify` compares with these modules, too. No other module of export imports torch.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx

from sld_edge.engines.base import Array
from sld_edge.engines.errors import CheckpointError, MissingPackageError
from sld_edge.export.checkpoints.checkpoint import Checkpoint, Model
from sld_edge.export.graphs.vae import OLD_NAMES

try:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from torch.export import Dim
    from transformers import CLIPTextConfig, CLIPTextModel
except ImportError as error:
    raise MissingPackageError(
        str(error.name), extra="torch", why="--verify and --via torch"
    ) from error

Precision = Literal["fp16", "fp32"]
_OPSETS = {"op": 23, "decomposed": 20}
_STEP = 8  # a UNet of four levels halves the latents three times


class TextEncoder(torch.nn.Module):
    """input_ids i64 [N,L] -> hidden_states f32 [N,L,C]."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Encode, after the last norm."""
        return self.inner(input_ids).last_hidden_state.float()


class UNet(torch.nn.Module):
    """latents f32 [B,4,h,w], timestep f32 [B], context f32 [K*B,L,C] -> noise_pred f32 [K*B,...].

    The whole network runs once a branch: there is no shared prefix here.
    """

    def __init__(self, inner: torch.nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self.dtype = inner, dtype

    def forward(
        self, latents: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor
    ) -> torch.Tensor:
        """Predict for every branch of every image; row i of the context belongs to image i % B."""
        # A tensor, because the exporter cannot divide by a size.
        images = torch.ones(latents.shape[0], dtype=torch.int64).sum()
        image = torch.arange(context.shape[0]) % images
        return self.inner(
            latents[image].to(self.dtype), timestep[image], context.to(self.dtype)
        ).sample.float()


class VaeDecoder(torch.nn.Module):
    """latents f32 [B,4,h,w] as the sampler leaves them -> images u8 [B,H,W,3], finite f32 [B]."""

    def __init__(self, inner: torch.nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self.dtype = inner, dtype

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode and round half to even, as numpy does; finite is 1 where all numbers are."""
        config = self.inner.config
        shift = config.shift_factor if config.shift_factor is not None else 0.0
        scaled = latents / config.scaling_factor + shift
        pictures = self.inner.decode(scaled.to(self.dtype)).sample.float()
        # TensorRT takes uint8 only at the boundary, so this conversion comes last.
        levels = ((pictures / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
        finite = (pictures.abs() <= torch.finfo(torch.float32).max).float().amin(dim=(1, 2, 3))
        return levels.to(torch.uint8), finite


# A UNet with these keys has inputs that the interface above lacks; diffusers runs without some of
# them, and makes another picture.
_DROPPED = (
    "addition_embed_type",
    "class_embed_type",
    "encoder_hid_dim_type",
    "num_class_embeds",
    "time_cond_proj_dim",
)


def require_plain(checkpoint: Checkpoint) -> None:
    """Refuse models that these modules do not cover: all but SD 1.x and 2.x.

    Raises:
        CheckpointError: an input of the UNet that torch's export would drop, or another model.
    """
    unet, kind = checkpoint.models["unet"].config, checkpoint.models["vae"].config
    odd = [f"config key {key} of the UNet" for key in _DROPPED if unet.get(key) is not None]
    odd += sorted(set(checkpoint.models) - {"unet", "vae", "text_encoder"})
    if kind.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        odd.append(f"the VAE {kind['_class_name']}")
    if odd:
        raise CheckpointError(
            "--via torch and --verify know plain Stable Diffusion 1.x and 2.x, and would drop an "
            "input or a model",
            got=", ".join(odd),
            do="leave them out",
        )


def graph_modules(checkpoint: Checkpoint, *, precision: Precision) -> dict[str, torch.nn.Module]:
    """Return a module with each graph's interface, by component.

    Raises:
        CheckpointError: the weights do not fit the architecture that the config names.
    """
    dtype = torch.float16 if precision == "fp16" else torch.float32
    text = checkpoint.models["text_encoder"]
    encoder = _loaded(CLIPTextModel(CLIPTextConfig(**text.config)), text, dtype)
    models = checkpoint.models
    unet = _loaded(_from_config(UNet2DConditionModel, models["unet"]), models["unet"], dtype)
    vae = _loaded(_from_config(AutoencoderKL, models["vae"]), models["vae"], dtype)
    return {
        "text_encoder": TextEncoder(encoder),
        "unet": UNet(unet, dtype),
        "vae_decoder": VaeDecoder(vae, dtype),
    }


def run_module(module: torch.nn.Module, inputs: Sequence[Array]) -> Array:
    """Run a module of `graph_modules` on arrays; return its first output."""
    with torch.inference_mode():
        output = module(*(torch.from_numpy(array) for array in inputs))
    first: Array = (output[0] if isinstance(output, tuple) else output).numpy()
    return first


def torch_writers(
    checkpoint: Checkpoint, *, precision: Precision, attention: Literal["op", "decomposed"]
) -> dict[str, Callable[[Path], None]]:
    """Return functions that write each component with torch.onnx.export, by component."""
    modules = graph_modules(checkpoint, precision=precision)
    return {
        name: partial(_write, name, module, checkpoint, _OPSETS[attention])
        for name, module in modules.items()
    }


def _from_config(kind: Any, model: Model) -> torch.nn.Module:
    try:
        module: torch.nn.Module = kind.from_config(model.config)
    except Exception as error:  # a constructor of diffusers can raise any exception
        raise CheckpointError(
            f"{model.weights.name}: diffusers refuses the config", got=error
        ) from error
    return module


def _loaded(module: torch.nn.Module, model: Model, dtype: torch.dtype) -> torch.nn.Module:
    """Fill a module with the checkpoint's tensors, under diffusers' present names and shapes."""
    wanted = module.state_dict()
    tensors = {}
    for key in model.weights.keys():  # noqa: SIM118 -- no mapping
        name = _new_name(key, wanted)
        if name in wanted:
            tensor = torch.from_numpy(np.ascontiguousarray(model.weights.take(key)))
            if tensor.numel() == wanted[name].numel():  # 1x1 convolutions are linear layers now
                tensors[name] = tensor.reshape(wanted[name].shape).to(dtype)
        elif not key.endswith("position_ids"):
            raise CheckpointError(f"{model.weights.name}: diffusers has no place for tensor {key}")
    missing = sorted(set(wanted) - set(tensors))
    if missing:
        raise CheckpointError(
            f"{model.weights.name}: missing, or of another shape than the config says",
            got=", ".join(missing[:3]),
        )
    module.load_state_dict(tensors, assign=True)
    return module.eval().requires_grad_(False)


def _new_name(key: str, wanted: Mapping[str, Any]) -> str:
    if key in wanted:
        return key
    for name in (key.removeprefix("text_model."), f"text_model.{key}"):
        if name in wanted:
            return name
    return re.sub(r"\.(query|key|value|proj_attn)\.", lambda match: f".{OLD_NAMES[match[1]]}.", key)


def _write(
    name: str, module: torch.nn.Module, checkpoint: Checkpoint, opset: int, path: Path
) -> None:
    """Export one module to `path` and `path`.data, with the interface's names."""
    text = checkpoint.models["text_encoder"].config
    length, width = text["max_position_embeddings"], text["hidden_size"]
    channels, images = checkpoint.models["unet"].config["in_channels"], 2
    # The network halves sizes; without these multiples torch.export would add guards.
    cells = {axis: _STEP * Dim(f"{axis}_{_STEP}", min=1, max=64) for axis in "hw"}
    batch = Dim("B", min=1, max=64)
    latents = torch.zeros(images, channels, 2 * _STEP, 3 * _STEP)  # a size of 1 would become fixed
    latent_axes = {0: batch, 2: cells["h"], 3: cells["w"]}
    examples: dict[str, tuple[tuple[Any, ...], dict[str, Any], list[str]]] = {
        "text_encoder": (
            (torch.zeros(images, length, dtype=torch.int64),),
            {"input_ids": {0: Dim("N", min=1, max=64)}},
            ["hidden_states"],
        ),
        "unet": (
            (latents, torch.zeros(images), torch.zeros(3 * images, length, width)),
            {
                "latents": latent_axes,
                "timestep": {0: batch},
                "context": {0: Dim("KB", min=1, max=256)},
            },
            ["noise_pred"],
        ),
        "vae_decoder": ((latents,), {"latents": latent_axes}, ["images", "finite"]),
    }
    inputs, dynamic, outputs = examples[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            module,
            inputs,
            input_names=list(dynamic),
            output_names=outputs,
            dynamic_shapes=dynamic,
            opset_version=opset,
            dynamo=True,
            verbose=False,
            external_data=True,
        )
    _strip(program.model)
    program.save(str(path), external_data=True)
    _name_sizes(name, path)


def _strip(model: Any) -> None:
    """Remove the exporter's stack traces, which hold paths of this machine."""
    model.metadata_props.clear()
    model.producer_name, model.doc_string = "sld-edge", None
    for graph in (model.graph, *model.functions.values()):
        graph.metadata_props.clear()
        for value in (*graph.inputs, *graph.outputs, *getattr(graph, "initializers", {}).values()):
            value.metadata_props.clear()
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()


# Names of the run-time sizes, as in the graphs that the builder writes.
_SIZES: dict[str, dict[str, tuple[str | None, ...]]] = {
    "text_encoder": {"input_ids": ("N", None), "hidden_states": ("N", None, None)},
    "unet": {
        "latents": ("B", None, "h", "w"),
        "timestep": ("B",),
        "context": ("K*B", None, None),
        "noise_pred": ("K*B", None, "h", "w"),
    },
    "vae_decoder": {
        "latents": ("B", None, "h", "w"),
        "images": ("B", "H", "W", None),
        "finite": ("B",),
    },
}


def _name_sizes(name: str, path: Path) -> None:
    model = onnx.load(str(path), load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        for dim, size in zip(dims, _SIZES[name][value.name], strict=True):
            if size is not None:
                dim.dim_param = size
    del model.graph.value_info[:]  # these use the exporter's own symbols
    path.write_bytes(model.SerializeToString(deterministic=True))
