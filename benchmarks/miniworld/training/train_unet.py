"""Stage two: the UNet and the text encoder, together, on cached latents."""

from pathlib import Path
from typing import Final

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from sld_edge.benchmarks.miniworld.training.models import new_scheduler, new_text_encoder, new_unet
from sld_edge.benchmarks.miniworld.training.pictures import CaptionedDraws
from sld_edge.benchmarks.miniworld.training.stage import Recipe, train_modules
from sld_edge.benchmarks.miniworld.world import LATE_SKULL_SHARE, SKULL_SHARE, Picture

BATCH: Final = 32
RECIPE: Final = Recipe(lr=3e-3, flat=0.5, muon_steps=4, decay=0.998)
LATE: Final = 0.75
SNR_CAP: Final = 5.0


class Denoiser:
    """The UNet and its text encoder."""

    def __init__(self, tokenizer: CLIPTokenizer, seed: int) -> None:
        """Build both models from a seed."""
        torch.manual_seed(seed)
        self.tokenizer = tokenizer
        self.unet: UNet2DConditionModel = new_unet().to(memory_format=torch.channels_last)
        self.text: CLIPTextModel = new_text_encoder(len(tokenizer), tokenizer.eos_token_id)
        self._tokens: dict[str, list[int]] = {}

    def tokens(self, captions: list[str]) -> Tensor:
        """Return the tokens [B,24] of captions."""
        for caption in captions:
            if caption not in self._tokens:
                self._tokens[caption] = self.tokenizer(
                    caption, padding="max_length", truncation=True
                ).input_ids
        return torch.tensor([self._tokens[caption] for caption in captions])


def train_unet(
    denoiser: Denoiser,
    latents: Tensor,
    pictures: tuple[Picture, ...],
    folder: Path,
    *,
    steps: int,
    seed: int,
) -> None:
    """Train, or go on training, on scaled latents [N,4,16,16]; leaves the averages in place."""
    early = CaptionedDraws(pictures, skull_share=SKULL_SHARE)
    late = CaptionedDraws(pictures, skull_share=LATE_SKULL_SHARE)
    signal = new_scheduler().alphas_cumprod

    def loss_of(step: int, rng: np.random.Generator) -> Tensor:
        draws = early if step < LATE * steps else late
        picks = [draws.draw(rng) for _ in range(BATCH)]
        clean = latents[[index for index, _ in picks]]
        return _loss(denoiser, clean, [caption for _, caption in picks], signal)

    modules = [denoiser.unet, denoiser.text]
    train_modules(modules, loss_of, folder / "unet.pt", RECIPE, steps=steps, seed=(seed, 2))


def _loss(denoiser: Denoiser, clean: Tensor, captions: list[str], signal: Tensor) -> Tensor:
    """Min-SNR-weighted error of the predicted noise, at evenly spread times."""
    batch = len(clean)
    times = ((torch.arange(batch) + torch.rand(batch)) / batch * len(signal)).long()
    kept = signal[times].view(-1, 1, 1, 1)
    noise = torch.randn_like(clean)
    noisy = kept.sqrt() * clean + (1 - kept).sqrt() * noise
    noisy = noisy.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = denoiser.text(denoiser.tokens(captions)).last_hidden_state
        predicted = denoiser.unet(noisy, times, embeddings).sample
    ratio = signal[times] / (1 - signal[times])
    weights = (SNR_CAP / ratio).clamp(max=1.0)
    errors = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
    return (weights * errors).mean()
