"""Stage two: the UNet and the text encoder, together, on cached latents."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from sld_edge.benchmarks.miniworld.training.models import new_scheduler, new_text_encoder, new_unet
from sld_edge.benchmarks.miniworld.training.pictures import CaptionedDraws
from sld_edge.benchmarks.miniworld.training.stage import (
    Average,
    load_checkpoint,
    optimisers_for,
    rate,
    save_checkpoint,
    set_rate,
)
from sld_edge.benchmarks.miniworld.world import Picture

BATCH: Final = 32
RATE: Final = 3e-3
FLAT: Final = 0.5
LATE: Final = 0.75
SNR_CAP: Final = 5.0
SAVE_EVERY: Final = 250


class Denoiser:
    """The UNet and its text encoder, with their optimisers and averages."""

    def __init__(self, tokenizer: CLIPTokenizer, seed: int) -> None:
        """Build both models from a seed."""
        torch.manual_seed(seed)
        self.tokenizer = tokenizer
        self.unet: UNet2DConditionModel = new_unet().to(memory_format=torch.channels_last)
        self.text: CLIPTextModel = new_text_encoder(len(tokenizer), tokenizer.eos_token_id)
        modules = [self.unet, self.text]
        self.optimisers = optimisers_for(modules, lr=RATE, muon_steps=4)
        self.average = Average(modules, 0.998)
        self.parts = (*modules, *self.optimisers, self.average)
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
    skull_share: Mapping[str, float],
    late_skull_share: Mapping[str, float],
) -> None:
    """Train, or go on training, on scaled latents [N,4,16,16]; leaves the averages in place."""
    early = CaptionedDraws(pictures, skull_share=skull_share)
    late = CaptionedDraws(pictures, skull_share=late_skull_share)
    signal = new_scheduler().alphas_cumprod
    path = folder / "unet.pt"
    done = load_checkpoint(path, denoiser.parts)
    smooth = 0.0
    bar = tqdm(range(done, steps), desc="unet", initial=done, total=steps, mininterval=5.0)
    for step in bar:
        rng = np.random.default_rng([seed, 2, step])
        torch.manual_seed(int(rng.integers(2**31)))
        draws = early if step < LATE * steps else late
        picks = [draws.draw(rng) for _ in range(BATCH)]
        clean = latents[[index for index, _ in picks]]
        loss = _loss(denoiser, clean, [caption for _, caption in picks], signal)
        set_rate(denoiser.optimisers, RATE * rate(step, steps, flat=FLAT))
        loss.backward()
        for optimiser in denoiser.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        denoiser.average.update(step)
        value = float(loss.detach())
        smooth = value if step == done else 0.99 * smooth + 0.01 * value
        if step % 20 == 0:
            bar.set_postfix(loss=f"{smooth:.4f}")
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            save_checkpoint(path, step + 1, denoiser.parts)
    denoiser.average.swap()


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
