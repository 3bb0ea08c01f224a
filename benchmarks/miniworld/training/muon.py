"""Muon: momentum whose update of a weight matrix is made orthogonal (Jordan et al., 2024)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonal(matrices: Tensor, steps: int) -> Tensor:
    """Bring the singular values of [B,M,N] near 1 by the quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    wide = x.size(-2) > x.size(-1)
    x = x.mT if wide else x
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if wide else x


class Muon(torch.optim.Optimizer):
    """Muon for weights of two or more dimensions; a convolution's input window is one row."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int = 4,
    ) -> None:
        """Take the weights; `lr` is scaled so that an update's RMS is 0.2 lr, as with Adam."""
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": steps}
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every weight that has a gradient; weights of one shape in one batch."""
        for group in self.param_groups:
            batches: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    batches.setdefault(tuple(weight.shape), []).append(weight)
            for weights in batches.values():
                self._step_batch(weights, group)

    def _step_batch(self, weights: list[nn.Parameter], group: dict[str, float]) -> None:
        updates = []
        for weight in weights:
            state = self.state[weight]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(weight)
            average = state["momentum"]
            gradient = weight.grad
            average.lerp_(gradient, 1 - group["momentum"])
            updates.append(torch.lerp(gradient, average, group["momentum"]).flatten(1))
        batch = orthogonal(torch.stack(updates), int(group["steps"]))
        scale = 0.2 * max(batch.shape[-2:]) ** 0.5 * group["lr"]
        for weight, update in zip(weights, batch, strict=True):
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(update.view_as(weight), alpha=-scale)
