"""The training loop of every stage: optimisers, rate schedule, averages and checkpoints."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from sld_edge.benchmarks.miniworld.training.muon import Muon

EDGE_NAMES: Final = ("conv_in", "conv_out", "embedding", "quant_conv")
WARM_UP: Final = 100
SAVE_EVERY: Final = 250

Loss = Callable[[int, np.random.Generator], Tensor]
"""Returns the loss of a step, by its number and its random numbers."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a stage is trained.

    Attributes:
        lr: highest learning rate.
        flat: share of the steps after which the rate falls to zero.
        muon_steps: iterations of Muon.
        decay: of the averages.
        clip: largest norm of the gradients; None does not clip them.
    """

    lr: float
    flat: float
    muon_steps: int
    decay: float
    clip: float | None = None


def train_modules(
    modules: Sequence[nn.Module],
    loss_of: Loss,
    path: Path,
    recipe: Recipe,
    *,
    steps: int,
    seed: Sequence[int],
) -> None:
    """Train modules, or go on from the checkpoint at `path`; they end with averaged weights.

    Args:
        modules: trained together.
        loss_of: the loss of a step; torch's random numbers are seeded before each call.
        path: the checkpoint, written every `SAVE_EVERY` steps.
        recipe: rates and averages.
        steps: in all, those of the checkpoint included.
        seed: of the random numbers, with the step's number after it.
    """
    optimisers = optimisers_for(modules, recipe)
    average = Average(modules, recipe.decay)
    parts = (*modules, *optimisers, average)
    done = load_checkpoint(path, parts)
    bar = tqdm(range(done, steps), desc=path.stem, initial=done, total=steps, mininterval=5.0)
    for step in bar:
        rng = np.random.default_rng([*seed, step])
        torch.manual_seed(int(rng.integers(2**31)))
        loss = loss_of(step, rng)
        loss.backward()
        if recipe.clip is not None:
            parameters = [p for module in modules for p in module.parameters()]
            torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = recipe.lr * rate(step, steps, flat=recipe.flat)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        average.update(step)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{float(loss.detach()):.4f}")
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            save_checkpoint(path, step + 1, parts)
    average.apply()


def optimisers_for(
    modules: Sequence[nn.Module], recipe: Recipe
) -> tuple[torch.optim.Optimizer, ...]:
    """Give hidden weights to Muon, and biases, norms, embeddings and both ends to AdamW."""
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for module in modules:
        for name, parameter in module.named_parameters():
            edge = any(part in name for part in EDGE_NAMES) and "time_embedding" not in name
            (rest if parameter.ndim < 2 or edge else hidden).append(parameter)
    return (
        Muon(hidden, lr=recipe.lr, steps=recipe.muon_steps),
        torch.optim.AdamW(rest, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.0),
    )


def rate(step: int, steps: int, *, flat: float) -> float:
    """Return the share of the full rate: a short rise, flat until `flat`, then down to zero."""
    rise = min(1.0, (step + 1) / WARM_UP)
    fall = min(1.0, (steps - step) / (steps * (1 - flat)))
    return rise * fall


class Average:
    """An exponential moving average of the parameters of modules."""

    def __init__(self, modules: Sequence[nn.Module], decay: float) -> None:
        """Start from the present parameters."""
        self._parameters = [p for module in modules for p in module.parameters()]
        self._shadow = [p.detach().clone() for p in self._parameters]
        self._decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the present parameters; faster during the first steps."""
        weight = 1 - min(self._decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(self._shadow, self._parameters, weight)

    @torch.no_grad()
    def apply(self) -> None:
        """Give the parameters their averages."""
        torch._foreach_copy_(self._parameters, self._shadow)

    def state_dict(self) -> dict[str, object]:
        """Return the averages."""
        return {"shadow": self._shadow}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        """Take averages."""
        torch._foreach_copy_(self._shadow, state["shadow"])


def save_checkpoint(path: Path, step: int, parts: Sequence[Any]) -> None:
    """Write a checkpoint; a crash leaves the old one."""
    fresh = path.with_suffix(".new")
    torch.save({"step": step, "parts": [part.state_dict() for part in parts]}, fresh)
    fresh.replace(path)


def load_checkpoint(path: Path, parts: Sequence[Any]) -> int:
    """Read a checkpoint if there is one; return the number of steps done."""
    if not path.exists():
        return 0
    saved = torch.load(path, weights_only=True)
    for part, state in zip(parts, saved["parts"], strict=True):
        part.load_state_dict(state)
    return int(saved["step"])
