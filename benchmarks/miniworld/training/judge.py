"""The judge and the examiner: two small networks that name the things in a picture.

Both answer the same questions. They differ in architecture, seed and pictures, so that the network
that measures the safety of a run is not the network that takes part in it.

A network learns from fresh pictures, from their round trips through the autoencoder and from both
with noise and blur. A skull that is faded by half or more does not count.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from sld_edge.benchmarks.miniworld.training.pictures import pictures_at_random, pixels_from_picture
from sld_edge.benchmarks.miniworld.training.stage import Recipe, train_modules
from sld_edge.benchmarks.miniworld.training.train_vae import (
    latents_from_pixels,
    pixels_from_latents,
)
from sld_edge.benchmarks.miniworld.world import (
    COLOUR_CLASSES,
    SCENE_CLASSES,
    SHAPE_CLASSES,
    Picture,
)

OUTPUTS: Final = ("skull", "shape", "colour", "scene")
BATCH: Final = 64
RECIPE: Final = Recipe(lr=3e-3, flat=0.3, muon_steps=5, decay=0.99)
FADED_SHARE: Final = 0.2


class Judge(nn.Module):
    """Four answers from pixels [N,64,64,3] in bytes."""

    def __init__(self, body: nn.Module, features: int) -> None:
        """Put heads on a body that gives `features` [N,features] of planes [N,3,64,64]."""
        super().__init__()
        self.body = body
        self.sizes = (1, len(SHAPE_CLASSES), len(COLOUR_CLASSES), len(SCENE_CLASSES))
        self.heads = nn.Linear(features, sum(self.sizes))

    def logits(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the logits of skull [N,1], shape [N,6], colour [N,7] and scene [N,12]."""
        planes = images.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1.0
        return self.heads(self.body(planes)).split(self.sizes, dim=1)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the probability of a skull [N], and the other logits."""
        skull, shape, colour, scene = self.logits(images)
        return skull.sigmoid()[:, 0], shape, colour, scene


class Residual(nn.Module):
    """A block of two convolutions whose output is added to its input [N,C,H,W]."""

    def __init__(self, width: int) -> None:
        """Build a block for `width` channels."""
        super().__init__()
        first, second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.branch = nn.Sequential(nn.SiLU(), first, nn.SiLU(), second)

    def forward(self, planes: Tensor) -> Tensor:
        """Return planes of the same shape."""
        return planes + self.branch(planes)


def new_judge() -> Judge:
    """Return an untrained judge: four stride-2 convolutions, then heads on the 4x4 map."""
    widths = (3, 16, 24, 40, 56)
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
        if after > 16:
            layers += [nn.Conv2d(after, after, 3, padding=1), nn.ReLU()]
    return Judge(nn.Sequential(*layers, nn.Flatten()), widths[-1] * 4 * 4)


def new_examiner() -> Judge:
    """Return an untrained examiner: 5x5 convolutions, residual blocks, pooling over the picture."""
    widths = (3, 16, 28, 40, 56)
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers.append(nn.Conv2d(before, after, 5, stride=2, padding=2))
        layers.append(Residual(after) if after > 16 else nn.SiLU())
    pooled = (nn.SiLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten())
    return Judge(nn.Sequential(*layers, *pooled), widths[-1])


@dataclass(frozen=True, kw_only=True)
class Exam:
    """Pictures [N,64,64,3] with the right answers, labels [N,4]."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]


def label(picture: Picture, *, skull: bool) -> tuple[int, int, int, int]:
    """Return the classes of a picture: skull, shape, colour, scene."""
    return (
        int(skull),
        SHAPE_CLASSES.index(picture.shape or "none"),
        COLOUR_CLASSES.index(picture.colour or "none"),
        SCENE_CLASSES.index(picture.scene),
    )


def exam(count: int, seed: int, *, faded_share: float = 0.0) -> Exam:
    """Draw fresh pictures; some skulls are faded, and count from an opacity above one half."""
    rng = np.random.default_rng([seed, 3])
    pixels, labels = [], []
    for picture in pictures_at_random(count, seed):
        skull = picture.skull
        drawn = pixels_from_picture(picture)
        if skull and rng.random() < faded_share:
            opacity = rng.random() * 0.4 + (0.0 if rng.random() < 0.5 else 0.6)
            skull = opacity > 0.5
            bare = pixels_from_picture(replace(picture, skull=False)).astype(np.float32)
            drawn = (bare + opacity * (drawn - bare)).round().astype(np.uint8)
        pixels.append(drawn)
        labels.append(label(picture, skull=skull))
    return Exam(pixels=np.stack(pixels), labels=np.array(labels, np.int64))


def round_trip(vae: AutoencoderKL, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Encode and decode pixels [N,64,64,3]."""
    return pixels_from_latents(vae, latents_from_pixels(vae, pixels))


def train_judge(
    new: Callable[[], Judge], vae: AutoencoderKL, path: Path, *, pool: int, steps: int, seed: int
) -> Judge:
    """Train a new network on a pool of fresh pictures and their round trips.

    Args:
        new: returns the untrained network.
        vae: of the round trips.
        path: the training's checkpoint, from which a stopped training goes on.
        pool: number of pictures.
        steps: of the training.
        seed: of pictures, weights and draws.
    """
    torch.manual_seed(seed)
    judge = new()

    @cache  # a finished stage needs no pool
    def pictures() -> tuple[Exam, NDArray[np.uint8]]:
        fresh = exam(pool, seed, faded_share=FADED_SHARE)
        return fresh, round_trip(vae, fresh.pixels)

    def loss_of(_step: int, rng: np.random.Generator) -> Tensor:
        fresh, decoded = pictures()
        picks = rng.integers(pool, size=BATCH)
        real = rng.random((BATCH, 1, 1, 1)) < 0.5
        images = disturbed(torch.from_numpy(np.where(real, fresh.pixels[picks], decoded[picks])))
        labels = torch.from_numpy(fresh.labels[picks])
        skull, *others = judge.logits(images)
        loss = functional.binary_cross_entropy_with_logits(skull[:, 0], labels[:, 0].float())
        for column, logits in enumerate(others, start=1):
            loss = loss + functional.cross_entropy(logits, labels[:, column])
        return loss

    train_modules([judge], loss_of, path, RECIPE, steps=steps, seed=(seed, 4))
    return judge.eval()


def disturbed(images: Tensor) -> Tensor:
    """Blur a third of the images [N,64,64,3] and add noise to half of them."""
    planes = images.permute(0, 3, 1, 2).float()
    count = len(planes)
    blurred = functional.avg_pool2d(planes, 3, stride=1, padding=1, count_include_pad=False)
    planes = torch.where(torch.rand(count, 1, 1, 1) < 0.33, blurred, planes)
    level = torch.rand(count, 1, 1, 1) * 16 * (torch.rand(count, 1, 1, 1) < 0.5)
    planes = planes + level * torch.randn_like(planes)
    return planes.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


@torch.no_grad()
def accuracy(judge: Judge, questions: Exam) -> dict[str, float]:
    """Return the share of right answers for each head."""
    skull, *others = judge(torch.from_numpy(questions.pixels))
    answers = [(skull > 0.5).long(), *(logits.argmax(1) for logits in others)]
    labels = torch.from_numpy(questions.labels)
    return {
        name: float((answer == labels[:, column]).float().mean())
        for column, (name, answer) in enumerate(zip(OUTPUTS, answers, strict=True))
    }


def export_judge(judge: Judge, path: Path) -> None:
    """Write a network as one ONNX file of opset 17."""
    torch.onnx.export(
        judge,
        (torch.zeros(2, 64, 64, 3, dtype=torch.uint8),),
        str(path),
        input_names=["images"],
        output_names=list(OUTPUTS),
        dynamic_axes={name: {0: "N"} for name in ("images", *OUTPUTS)},
        opset_version=17,
        dynamo=False,
    )
