"""Distil the miniature into a model of few steps, in one command that may be run again.

    python -m sld_edge.benchmarks.miniworld.training.train_few_steps --output DIR

The twin is a latent consistency model (Luo et al., 2023, arXiv 2310.04378): LCM's scheduler and
boundary condition, and the guidance scale as an input. Its loss is not the consistency loss between
two neighbours of a trajectory: the miniature computes whole trajectories first, with DDIM and
guidance, and from every state of them the twin learns the last. That costs more of the teacher, and
needs no second network as a target.

Writes DIR/few_steps.safetensors, which `miniworld/few_steps.py` adds to the miniature's weights. A
stopped run goes on from DIR/state.
"""

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from diffusers import DDIMScheduler, LCMScheduler, UNet2DConditionModel
from diffusers.pipelines.latent_consistency_models.pipeline_latent_consistency_text2img import (
    LatentConsistencyModelPipeline,
)
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from sld_edge.benchmarks.miniworld.few_steps import (
    CHANGE,
    CHECKPOINT,
    CONDITION_WIDTH,
    SCHEDULER,
    write_change,
)
from sld_edge.benchmarks.miniworld.training.models import LATENT_SIZE
from sld_edge.benchmarks.miniworld.training.pictures import CaptionedDraws, pictures_at_random
from sld_edge.benchmarks.miniworld.training.stage import Recipe, train_modules
from sld_edge.benchmarks.miniworld.world import LATE_SKULL_SHARE

BATCH: Final = 32
GUIDANCE: Final = (2.0, 10.0)
RECIPE: Final = Recipe(lr=8e-4, flat=0.4, muon_steps=4, decay=0.995)
USED_SHARE: Final = 0.7
"""Of the training, at the timesteps of 1, 2, 4 and 8 steps; the rest is at all timesteps."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The lengths of the two stages.

    Attributes:
        seed: of everything.
        pictures: drawn, whose captions are used.
        trajectories: of the teacher.
        together: trajectories that are computed at once.
        steps: of the training.
    """

    seed: int = 11
    pictures: int = 20_000
    trajectories: int = 3_072
    together: int = 64
    steps: int = 2_000


class Teacher:
    """The miniature, frozen."""

    def __init__(self) -> None:
        """Load it from the repository."""
        self.unet: UNet2DConditionModel = _unet()
        self.text: CLIPTextModel = CLIPTextModel.from_pretrained(CHECKPOINT / "text_encoder")
        self.text.float().eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(CHECKPOINT / "tokenizer")
        self.scheduler = DDIMScheduler.from_pretrained(CHECKPOINT / "scheduler")

    @torch.no_grad()
    def embeddings(self, captions: list[str]) -> Tensor:
        """Return the embeddings of captions, [B,24,96]."""
        tokens = self.tokenizer(
            captions, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        hidden: Tensor = self.text(tokens).last_hidden_state
        return hidden

    @torch.no_grad()
    def trajectory(self, noise: Tensor, text: Tensor, scale: Tensor, times: Tensor) -> Tensor:
        """Follow DDIM with guidance from noise [B,4,h,w]; return every state, [T+1,B,4,h,w]."""
        signal = self.scheduler.alphas_cumprod
        uncond = self.embeddings([""]).expand_as(text)
        states = [noise]
        for index, time in enumerate(times):
            now = signal[time]
            then = signal[times[index + 1]] if index + 1 < len(times) else torch.tensor(1.0)
            x = states[-1]
            both = self.unet(torch.cat([x, x]), time, torch.cat([uncond, text])).sample
            without, with_text = both.chunk(2)
            predicted = without + scale.view(-1, 1, 1, 1) * (with_text - without)
            clean = (x - (1 - now).sqrt() * predicted) / now.sqrt()
            states.append(then.sqrt() * clean + (1 - then).sqrt() * predicted)
        return torch.stack(states)


def _unet(**changes: int) -> UNet2DConditionModel:
    """Return the miniature's UNet in FP32; a new layer starts at zero."""
    config = {**UNet2DConditionModel.load_config(CHECKPOINT / "unet"), **changes}
    unet: UNet2DConditionModel = UNet2DConditionModel.from_config(config)
    source = UNet2DConditionModel.from_pretrained(CHECKPOINT / "unet").float().state_dict()
    state = {name: source.get(name, torch.zeros_like(w)) for name, w in unet.state_dict().items()}
    unet.load_state_dict(state)
    return unet.to(memory_format=torch.channels_last)


def timesteps() -> Tensor:
    """Return the teacher's timesteps, which are LCM's at distillation, the noisiest first."""
    scheduler = LCMScheduler.from_config(SCHEDULER)
    scheduler.set_timesteps(scheduler.config.original_inference_steps)
    times: Tensor = scheduler.timesteps
    return times


def used_indices(times: Tensor) -> list[int]:
    """Return the positions of the timesteps that 1, 2, 4 and 8 steps use."""
    scheduler = LCMScheduler.from_config(SCHEDULER)
    used: set[int] = set()
    for steps in (1, 2, 4, 8):
        scheduler.set_timesteps(steps)
        used |= set(scheduler.timesteps.tolist())
    return [index for index, time in enumerate(times.tolist()) if time in used]


def trajectories(teacher: Teacher, folder: Path, settings: Settings) -> dict[str, object]:
    """Compute the trajectories, or go on; in parts, each a file."""
    draws = CaptionedDraws(
        pictures_at_random(settings.pictures, settings.seed), skull_share=LATE_SKULL_SHARE
    )
    times = timesteps()
    states, captions, scales = [], [], []
    for start in tqdm(range(0, settings.trajectories, settings.together), desc="trajectories"):
        path = folder / f"trajectories-{start}.pt"
        if not path.exists():
            rng = np.random.default_rng([settings.seed, 1, start])
            torch.manual_seed(int(rng.integers(2**31)))
            words = [draws.draw(rng)[1] for _ in range(settings.together)]
            scale = torch.from_numpy(rng.uniform(*GUIDANCE, settings.together).astype(np.float32))
            noise = torch.randn(settings.together, 4, LATENT_SIZE, LATENT_SIZE)
            made = teacher.trajectory(noise, teacher.embeddings(words), scale, times)
            part = {"states": made.half(), "captions": words, "scale": scale}
            torch.save(part, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)
        part = torch.load(path, weights_only=True)
        states.append(part["states"])
        captions += part["captions"]
        scales.append(part["scale"])
    return {"states": torch.cat(states, 1), "captions": captions, "scale": torch.cat(scales)}


def train(output: Path, settings: Settings) -> None:
    """Run or go on with both stages and write the change of the weights."""
    state = output / "state"
    state.mkdir(parents=True, exist_ok=True)
    teacher = Teacher()
    made = trajectories(teacher, state, settings)
    states, captions, scales = made["states"], made["captions"], made["scale"]
    assert isinstance(states, Tensor)
    assert isinstance(captions, list)
    assert isinstance(scales, Tensor)
    unet = _unet(time_cond_proj_dim=CONDITION_WIDTH).train()
    times, used = timesteps(), used_indices(timesteps())
    scheduler = LCMScheduler.from_config(SCHEDULER)
    signal = scheduler.alphas_cumprod

    def loss_of(step: int, rng: np.random.Generator) -> Tensor:
        rows = rng.integers(len(captions), size=BATCH)
        picks = np.where(
            rng.random(BATCH) < USED_SHARE,
            rng.choice(used, BATCH),
            rng.integers(len(times), size=BATCH),
        )
        noisy = states[picks, rows].float().contiguous(memory_format=torch.channels_last)
        clean = states[-1, rows].float()
        time = times[picks]
        text = teacher.embeddings([captions[row] for row in rows])
        condition = LatentConsistencyModelPipeline.get_guidance_scale_embedding(
            None, scales[rows] - 1, embedding_dim=CONDITION_WIDTH
        )
        predicted = unet(noisy, time, text, timestep_cond=condition).sample
        kept = signal[time].view(-1, 1, 1, 1)
        guess = (noisy - (1 - kept).sqrt() * predicted) / kept.sqrt()
        skip, out = scheduler.get_scalings_for_boundary_condition_discrete(time.view(-1, 1, 1, 1))
        error = skip * noisy + out * guess - clean
        return (error.square() + 0.03**2).sqrt().mean()

    train_modules(
        [unet], loss_of, state / "unet.pt", RECIPE, steps=settings.steps, seed=(settings.seed, 2)
    )
    weights = {name: weight.numpy() for name, weight in unet.state_dict().items()}
    write_change(output / CHANGE.name, weights)
    _log.info("wrote %s", output)


def main() -> None:
    """Train with the standard settings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    train(arguments.output, Settings())


if __name__ == "__main__":
    main()
