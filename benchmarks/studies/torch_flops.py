"""The same operations as torch's own counter has them, on diffusers' and transformers' models.

Nothing is loaded or computed: the models lie on torch's meta device, so a full-size one takes
seconds and no memory. Needs the extra `torch`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def torch_operations(checkpoint: Path, size: int) -> dict[str, int]:
    """Count a diffusers directory's components for one picture and one branch of the UNet.

    Torch counts convolutions and matrix products, two operations a multiplication and addition.
    """
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    def config(part: str) -> dict[str, Any]:
        return dict(json.loads((checkpoint / part / "config.json").read_text(encoding="utf-8")))

    text = CLIPTextConfig(**config("text_encoder"))
    with torch.device("meta"), torch.no_grad():
        unet = UNet2DConditionModel.from_config(config("unet"))
        vae = AutoencoderKL.from_config(config("vae"))
        cells = size // 2 ** (len(vae.config.block_out_channels) - 1)
        latents = torch.empty(1, unet.config.in_channels, cells, cells)
        context = torch.empty(1, text.max_position_embeddings, unet.config.cross_attention_dim)
        ids = torch.zeros(1, text.max_position_embeddings, dtype=torch.long)
        return {
            "text_encoder": _counted(CLIPTextModel(text), ids),
            "unet": _counted(unet, latents, torch.empty(1), context),
            "vae_decoder": _counted(vae.decode, latents),
        }


def _counted(model: Any, *inputs: Any) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    return int(counter.get_total_flops())
