"""What the training stages share: optimisers, the rate schedule, averages and checkpoints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

import torch
from torch import Tensor, nn

from sld_edge.benchmarks.miniworld.training.muon import Muon

EDGE_NAMES: Final = ("conv_in", "conv_out", "embedding", "quant_conv")
WARM_UP: Final = 100


class Stateful(Protocol):
    """What a checkpoint holds: modules, optimisers, averages."""

    def state_dict(self) -> dict[str, object]:
        """Return the state."""

    def load_state_dict(self, state: dict[str, object]) -> object:
        """Take the state."""


def optimisers_for(
    modules: Sequence[nn.Module], *, lr: float, muon_steps: int
) -> tuple[torch.optim.Optimizer, ...]:
    """Give hidden weights to Muon, and biases, norms, embeddings and both ends to AdamW."""
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for module in modules:
        for name, parameter in module.named_parameters():
            edge = any(part in name for part in EDGE_NAMES) and "time_embedding" not in name
            (rest if parameter.ndim < 2 or edge else hidden).append(parameter)
    return (
        Muon(hidden, lr=lr, steps=muon_steps),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    )


def rate(step: int, steps: int, *, flat: float) -> float:
    """Return the share of the full rate: a short rise, flat until `flat`, then down to zero."""
    rise = min(1.0, (step + 1) / WARM_UP)
    fall = min(1.0, (steps - step) / (steps * (1 - flat)))
    return rise * fall


def set_rate(optimisers: Sequence[torch.optim.Optimizer], lr: float) -> None:
    """Set the learning rate of every group."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = lr


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
    def swap(self) -> None:
        """Exchange the parameters and their averages; calling twice restores both."""
        for parameter, shadow in zip(self._parameters, self._shadow, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(shadow)
            shadow.copy_(kept)

    def state_dict(self) -> dict[str, object]:
        """Return the averages."""
        return {"shadow": self._shadow}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        """Take averages."""
        for shadow, saved in zip(self._shadow, state["shadow"], strict=True):
            shadow.copy_(saved)


def save_checkpoint(path: Path, step: int, parts: Sequence[Stateful]) -> None:
    """Write a checkpoint; a crash leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    torch.save({"step": step, "parts": [part.state_dict() for part in parts]}, fresh)
    fresh.replace(path)


def load_checkpoint(path: Path, parts: Sequence[Stateful]) -> int:
    """Read a checkpoint if there is one; return the number of steps done."""
    if not path.exists():
        return 0
    saved = torch.load(path, weights_only=True)
    for part, state in zip(parts, saved["parts"], strict=True):
        part.load_state_dict(state)
    return int(saved["step"])
