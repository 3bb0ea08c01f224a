"""The UNet of a file in the original layout."""

from __future__ import annotations

from collections.abc import Mapping

from sld_edge.engines.errors import CheckpointError
from sld_edge.export.checkpoints.checkpoint import Model
from sld_edge.export.checkpoints.ldm_keys import (
    count_of,
    renamed,
    rows_of,
    size_of,
    start_renamed,
    under,
)
from sld_edge.export.checkpoints.weights import Entry, Weights
from sld_edge.runtime.manifest import TIME_IDS

UNET = "model.diffusion_model."

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
}


def unet_from_ldm(
    entries: Mapping[str, Entry], *, size: int, head_width: int | None, pooled: int | None = None
) -> Model:
    """Return the UNet of a file, its config inferred from the shapes.

    The original layout has a flat list of blocks for the input side and one for the output side,
    level after level. A level of the input side has residual blocks and then, except for the last
    level, a downsampling. A level of the output side has one residual block more; its last block
    also holds the upsampling.

    Args:
        entries: all tensors of the file.
        size: of the latents that the UNet was trained for.
        head_width: channels of a head; None: 8 heads everywhere.
        pooled: width of the pooled text, for SDXL.

    Raises:
        CheckpointError: blocks or sizes that Stable Diffusion does not have.
    """
    old = under(entries, UNET)
    inputs = count_of(old, r"input_blocks\.(\d+)\.")
    outputs = count_of(old, r"output_blocks\.(\d+)\.")
    downs = [i for i in range(inputs) if f"input_blocks.{i}.0.op.weight" in old]
    levels = len(downs) + 1
    layers = (inputs - levels) // levels
    if inputs != levels * (layers + 1) or outputs != inputs or "input_blocks.0.0.weight" not in old:
        raise CheckpointError(
            "unet: the file's blocks are not those of Stable Diffusion",
            got=f"{inputs} input and {outputs} output blocks in {levels} levels",
        )
    names = dict(_UNET_ENDS)
    for i in range(1, inputs):
        level, layer = divmod(i - 1, layers + 1)
        down = f"down_blocks.{level}"
        names[f"input_blocks.{i}.0.op"] = f"{down}.downsamplers.0.conv"
        names[f"input_blocks.{i}.0"] = f"{down}.resnets.{layer}"
        names[f"input_blocks.{i}.1"] = f"{down}.attentions.{layer}"
    for i in range(outputs):
        level, layer = divmod(i, layers + 1)
        up = f"up_blocks.{level}"
        for part in (1, 2):  # the upsampling is second where the level has no attention
            names[f"output_blocks.{i}.{part}.conv"] = f"{up}.upsamplers.0.conv"
        names[f"output_blocks.{i}.0"] = f"{up}.resnets.{layer}"
        names[f"output_blocks.{i}.1"] = f"{up}.attentions.{layer}"
    new = {renamed(start_renamed(key, names), _RESNET): entry for key, entry in old.items()}
    firsts = range(1, inputs, layers + 1)  # the first block of each level
    widths = [rows_of(old, f"input_blocks.{first}.0.out_layers.3.weight") for first in firsts]
    attends = [f"input_blocks.{first}.1.norm.weight" in old for first in firsts]
    depths = [
        max(1, count_of(old, rf"input_blocks\.{first}\.1\.transformer_blocks\.(\d+)\."))
        for first in firsts
    ]
    middle = any(key.startswith("middle_block.") for key in old)
    kv = next((key for key in old if key.endswith("attn2.to_k.weight")), None)
    projection = next((e for k, e in old.items() if k.endswith("1.proj_in.weight")), None)
    if kv is None or projection is None:
        raise CheckpointError("unet: the file has no cross-attention")
    config = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": size,
        "in_channels": size_of(old, "input_blocks.0.0.weight", 1),
        "out_channels": rows_of(old, "out.2.weight"),
        "center_input_sample": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "down_block_types": ["CrossAttnDownBlock2D" if on else "DownBlock2D" for on in attends],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if middle else None,
        "up_block_types": ["CrossAttnUpBlock2D" if on else "UpBlock2D" for on in attends[::-1]],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "transformer_layers_per_block": depths if set(depths) != {1} else 1,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "act_fn": "silu",
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "cross_attention_dim": size_of(old, kv, 1),
        # Despite its name, diffusers' key holds the number of heads.
        "attention_head_dim": [width // head_width for width in widths] if head_width else 8,
        "use_linear_projection": len(projection.shape) == 2,
        **(_text_and_size(old, pooled) if pooled is not None else {}),
    }
    return Model(config=config, weights=Weights(new, name="unet"))


def _text_and_size(old: Mapping[str, Entry], pooled: int) -> dict[str, object]:
    """Return the config of SDXL's second embedding, of pooled text and six sizes."""
    key = "label_emb.0.0.weight"
    total = size_of(old, key, 1)
    dim, rest = divmod(total - pooled, TIME_IDS)
    if rest or dim <= 0:
        raise CheckpointError(
            f"unet: {UNET}{key} takes {total} numbers",
            expected=f"{pooled} for the pooled text and {TIME_IDS} times the numbers of a size",
        )
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": dim,
        "projection_class_embeddings_input_dim": total,
    }
