"""Tiny models of the real architectures, from diffusers and transformers, with random weights.

Every one-dimensional parameter is drawn at random too: norms of ones and biases of zeros would
hide a graph that has them in the wrong place. The same arguments give the same weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ConfigMixin, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sld_edge.export.checkpoints.weights import Weights, entries_from_safetensors

Kind = Literal["sd1", "sd2", "plain-first", "four-level"]
KINDS: tuple[Kind, ...] = ("sd1", "sd2", "plain-first", "four-level")
UnetKind = Literal[Kind, "sdxl", "no-middle", "plain-middle", "lcm", "lcm-sdxl"]
UNET_KINDS: tuple[UnetKind, ...] = (
    *KINDS, "sdxl", "no-middle", "plain-middle", "lcm", "lcm-sdxl"
)  # fmt: skip
TEXT_WIDTH = 24
TEXT_LENGTH = 77
POOLED_WIDTH = 20

_CROSS, _PLAIN = "CrossAttn{}Block2D", "{}Block2D"

# Level 0 first. Heads and channels differ between levels, so that mixing them up shows.
_SDXL: dict[str, Any] = {
    "block_out_channels": (8, 16, 24),
    "attention_head_dim": (2, 4, 3),
    "layers_per_block": 2,
    "attends": (False, True, True),
    "transformer_layers_per_block": (1, 2, 3),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 6,
    "projection_class_embeddings_input_dim": POOLED_WIDTH + 6 * 6,
}
_UNETS: dict[UnetKind, dict[str, Any]] = {
    "sd1": {
        "block_out_channels": (16, 32),
        "attention_head_dim": 2,
        "layers_per_block": 2,
        "attends": (True, False),
    },
    "sd2": {
        "block_out_channels": (16, 24),
        "attention_head_dim": (2, 3),
        "layers_per_block": 1,
        "attends": (True, True),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "plain-first": {
        "block_out_channels": (8, 16),
        "attention_head_dim": 4,
        "layers_per_block": 1,
        "attends": (False, True),
    },
    "four-level": {
        "block_out_channels": (8, 16, 24, 24),
        "attention_head_dim": (2, 4, 3, 6),
        "layers_per_block": 2,
        "attends": (True, True, True, False),
    },
    "sdxl": _SDXL,
    # bk-sdm-tiny: three levels and nothing between down and up.
    "no-middle": {
        "block_out_channels": (8, 16, 24),
        "attention_head_dim": (2, 4, 3),
        "layers_per_block": 1,
        "attends": (True, True, True),
        "mid_block_type": None,
    },
    # SSD-1B: transformers of other depths on the way up, a middle without attention.
    "plain-middle": {
        **_SDXL,
        "transformer_layers_per_block": [1, [2, 1], [1, 2]],
        "reverse_transformer_layers_per_block": [[2, 1, 3], [2, 1, 1], 1],
        "mid_block_type": "UNetMidBlock2D",
    },
    "lcm": {
        "block_out_channels": (16, 32),
        "attention_head_dim": 2,
        "layers_per_block": 1,
        "attends": (True, False),
        "time_cond_proj_dim": 12,
    },
    "lcm-sdxl": {**_SDXL, "time_cond_proj_dim": 10},
}


def randomised(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Draw every one-dimensional parameter anew: scales around 1, biases around 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            noise = torch.randn(parameter.shape, generator=generator)
            centre = 1.0 if name.endswith("weight") else 0.0
            parameter.data = centre + 0.3 * noise
    return model.eval().requires_grad_(False)


def tiny_unet(
    kind: UnetKind = "sd1", *, seed: int = 0, text_width: int = TEXT_WIDTH, **changes: Any
) -> UNet2DConditionModel:
    """Return a UNet of some ten to a hundred thousand parameters; `changes` go to its config."""
    spec = dict(_UNETS[kind])
    attends = spec.pop("attends")
    names = [_CROSS if attend else _PLAIN for attend in attends]
    torch.manual_seed(seed)
    model = UNet2DConditionModel(
        **{
            **spec,
            "sample_size": 8,
            "cross_attention_dim": text_width,
            "norm_num_groups": 4,
            "down_block_types": tuple(name.format("Down") for name in names),
            "up_block_types": tuple(name.format("Up") for name in names[::-1]),
            **changes,
        }
    )
    return randomised(model, seed)


def tiny_text_encoder(
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu",
    *,
    seed: int = 0,
    text_width: int = TEXT_WIDTH,
    vocab_size: int = 100,
    **changes: Any,
) -> CLIPTextModel:
    """Return a text encoder of two layers and three heads, 77 tokens long."""
    config = _text_config(hidden_act, text_width, vocab_size, changes)
    return _text_encoder(CLIPTextModel, config, seed)


def tiny_pooled_text_encoder(
    hidden_act: Literal["quick_gelu", "gelu"] = "gelu",
    *,
    seed: int = 1,
    text_width: int = 2 * TEXT_WIDTH,
    vocab_size: int = 100,
    **changes: Any,
) -> CLIPTextModelWithProjection:
    """Return a text encoder with a projection to POOLED_WIDTH, as SDXL's second is."""
    changes = {"projection_dim": POOLED_WIDTH, **changes}
    config = _text_config(hidden_act, text_width, vocab_size, changes)
    return _text_encoder(CLIPTextModelWithProjection, config, seed)


def _text_config(
    hidden_act: str, text_width: int, vocab_size: int, changes: dict[str, Any]
) -> CLIPTextConfig:
    return CLIPTextConfig(
        **{
            "vocab_size": vocab_size,
            "hidden_size": text_width,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "max_position_embeddings": TEXT_LENGTH,
            "hidden_act": hidden_act,
            "bos_token_id": 0,
            "eos_token_id": vocab_size - 1,
            "pad_token_id": 1,
            **changes,
        }
    )


def _text_encoder(kind: Any, config: CLIPTextConfig, seed: int) -> Any:
    torch.manual_seed(seed)
    model = kind(config)
    # The default initialisation is too small to tell a causal mask from none.
    model.get_input_embeddings().weight.data.normal_(std=1.0)
    return randomised(model, seed)


def tiny_vae(*, seed: int = 0, levels: int = 4, **changes: Any) -> AutoencoderKL:
    """Return an autoencoder that, as the real one, makes images 2**(levels-1) times smaller."""
    torch.manual_seed(seed)
    model = AutoencoderKL(
        **{
            "block_out_channels": (8, 8, 16, 24)[:levels],
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "sample_size": 32,
            **changes,
        }
    )
    return randomised(model, seed)


def tiny_decoder_vae(*, seed: int = 0, levels: int = 4, **changes: Any) -> AutoencoderTiny:
    """Return diffusers' AutoencoderTiny, narrow."""
    torch.manual_seed(seed)
    model = AutoencoderTiny(
        **{
            "encoder_block_out_channels": (8,) * levels,
            "decoder_block_out_channels": (8,) * levels,
            "num_encoder_blocks": (1,) * levels,
            "num_decoder_blocks": (2, 3, 2, 1)[-levels:],
            **changes,
        }
    )
    return randomised(model, seed)


def config_of(model: torch.nn.Module) -> dict[str, Any]:
    """Return the config as it stands in the model's config.json."""
    owner = model if isinstance(model, ConfigMixin) else model.config
    return dict(json.loads(owner.to_json_string()))


def weights_of(
    model: torch.nn.Module,
    path: Path,
    *,
    name: str = "unet",
    prefix: str = "",
    without: Iterable[str] = (),
    extra: dict[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Weights:
    """Save the weights to `path` and open them: with a prefix, with tensors left out or added."""
    tensors = {
        prefix + key: value.to(dtype) if dtype is not None else value
        for key, value in model.state_dict().items()
        if key not in set(without)
    }
    save_file({k: v.contiguous() for k, v in {**tensors, **(extra or {})}.items()}, path)
    return Weights(entries_from_safetensors(path), name=name)


SD1_SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "clip_sample": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}


def save_diffusers_directory(
    path: Path,
    kind: Kind = "sd1",
    *,
    seed: int = 0,
    tokenizer: Any = None,
    vocab_size: int = 100,
    variant: str | None = None,
    half: bool = False,
) -> Path:
    """Save a whole tiny checkpoint as diffusers does; `tokenizer` is one of transformers, if any.

    Kind "sd2" predicts v and has a GELU text encoder. `half` saves FP16 weights.
    """
    v_prediction = kind == "sd2"
    models: dict[str, Any] = {
        "unet": tiny_unet(kind, seed=seed),
        "text_encoder": tiny_text_encoder(
            "gelu" if v_prediction else "quick_gelu", seed=seed, vocab_size=vocab_size
        ),
        "vae": tiny_vae(seed=seed),
    }
    for name, model in models.items():
        (model.half() if half else model).save_pretrained(path / name, variant=variant)
    scheduler = dict(SD1_SCHEDULER)
    if v_prediction:
        scheduler.update(_class_name="DDIMScheduler", prediction_type="v_prediction")
        scheduler.pop("skip_prk_steps")
    (path / "scheduler").mkdir(parents=True)
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2))
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if tokenizer is not None:
        tokenizer.save_pretrained(path / "tokenizer")
        index["tokenizer"] = ["transformers", "CLIPTokenizer"]
    (path / "model_index.json").write_text(json.dumps(index, indent=2))
    return path
