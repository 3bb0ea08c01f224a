"""Stage one: the autoencoder, and the latents of the training set."""

from pathlib import Path
from typing import Final

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from tqdm import trange

from sld_edge.benchmarks.miniworld.training.models import new_vae
from sld_edge.benchmarks.miniworld.training.stage import Recipe, train_modules

BATCH: Final = 8
RECIPE: Final = Recipe(lr=4e-3, flat=0.3, muon_steps=5, decay=0.998, clip=1.0)
EDGE_WEIGHT: Final = 0.5
KL_WEIGHT: Final = 5e-4
FULL_PRECISION_FROM: Final = 0.8
"""The share of steps after which bfloat16 gives way to float32."""


def tensor_from_pixels(pixels: NDArray[np.uint8]) -> Tensor:
    """Turn [B,H,W,3] bytes into [B,3,H,W] floats in [-1,1], channels last in memory."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def pixels_from_tensor(images: Tensor) -> NDArray[np.uint8]:
    """Turn [B,3,H,W] floats in [-1,1] into [B,H,W,3] bytes."""
    scaled = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).contiguous().numpy()


def picture_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """L1 + L2 + the L1 distance of the gradients along both axes."""
    error = decoded - images
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + EDGE_WEIGHT * edges


def train_vae(pixels: NDArray[np.uint8], folder: Path, *, steps: int, seed: int) -> AutoencoderKL:
    """Train, or go on training, the autoencoder on pixels [N,64,64,3]."""
    torch.manual_seed(seed)
    vae = new_vae().to(memory_format=torch.channels_last)

    def loss_of(step: int, rng: np.random.Generator) -> Tensor:
        images = tensor_from_pixels(pixels[rng.integers(len(pixels), size=BATCH)])
        with torch.autocast("cpu", torch.bfloat16, enabled=step < FULL_PRECISION_FROM * steps):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return picture_loss(decoded.float(), images) + KL_WEIGHT * kl

    train_modules([vae], loss_of, folder / "vae.pt", RECIPE, steps=steps, seed=(seed, 1))
    return vae.eval()


@torch.no_grad()
def latents_from_pixels(vae: AutoencoderKL, pixels: NDArray[np.uint8]) -> Tensor:
    """Encode pixels [N,64,64,3] to the means of their latents [N,4,16,16], not yet scaled."""
    means = [
        vae.encode(tensor_from_pixels(pixels[start : start + 64])).latent_dist.mean
        for start in trange(0, len(pixels), 64, desc="latents", mininterval=5.0)
    ]
    return torch.cat(means).contiguous()


@torch.no_grad()
def pixels_from_latents(vae: AutoencoderKL, latents: Tensor) -> NDArray[np.uint8]:
    """Decode latents [N,4,16,16], not scaled, to pixels [N,64,64,3]."""
    parts = [
        pixels_from_tensor(vae.decode(latents[start : start + 64]).sample)
        for start in range(0, len(latents), 64)
    ]
    return np.concatenate(parts)
