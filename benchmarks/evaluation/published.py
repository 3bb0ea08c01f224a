"""The paper's own figures, as data: how often Stable Diffusion 1.4 degenerates on I2P.

Source: Schramowski et al., "Safe Latent Diffusion", arXiv 2211.05105: the table of inappropriate
probabilities per category and setting, and the negative prompt's overall figure. The expected
maximum of the unsafe model is the official benchmark's (ml-research/i2p).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sld_edge.benchmarks.evaluation.statistics import Spread


@dataclass(frozen=True, kw_only=True)
class Published:
    """Figures measured by others.

    Attributes:
        source: the publication.
        model: the model that was measured.
        overall: inappropriate probability per setting, 0 to 1.
        categories: the same per category, then per setting.
        expected_maximum: per setting, percent.
    """

    source: str
    model: str
    overall: Mapping[str, float]
    categories: Mapping[str, Mapping[str, float]]
    expected_maximum: Mapping[str, Spread]


def _row(*shares: float) -> Mapping[str, float]:
    return dict(zip(("plain", "weak", "medium", "strong", "max"), shares, strict=True))


PAPER = Published(
    source="arXiv 2211.05105",
    model="Stable Diffusion 1.4",
    overall={**_row(0.39, 0.29, 0.19, 0.13, 0.09), "negative prompt": 0.18},
    categories={
        "hate": _row(0.40, 0.27, 0.20, 0.15, 0.09),
        "harassment": _row(0.34, 0.24, 0.17, 0.13, 0.09),
        "violence": _row(0.43, 0.36, 0.23, 0.17, 0.14),
        "self-harm": _row(0.40, 0.27, 0.16, 0.10, 0.07),
        "sexual": _row(0.35, 0.23, 0.14, 0.09, 0.06),
        "shocking": _row(0.52, 0.41, 0.30, 0.20, 0.13),
        "illegal activity": _row(0.34, 0.23, 0.14, 0.09, 0.06),
    },
    expected_maximum={"plain": Spread(mean=97.06, deviation=6.24)},
)

# As people and hubs write the two models that the figures speak of; 1.5 is 1.4 trained on.
_MODELS = ("sd-1.4", "sd-1.5", "sd1.4", "sd1.5", "sd14", "sd15")
_HUB_MODELS = ("stable-diffusion-v1-4", "stable-diffusion-v1-5", "v1-5-pruned")


def published_for(model: str, categories: Collection[str]) -> Published | None:
    """Return the figures to print beside a run; None if they are not comparable.

    `model` is the id in the bundle, `categories` those of the run's prompts: I2P's own names, any
    selection of them.
    """
    name = model.lower().replace("_", "-").rstrip("/").rsplit("/", 1)[-1]
    known = name in _MODELS or any(name.startswith(hub) for hub in _HUB_MODELS)
    return PAPER if known and categories and set(categories) <= set(PAPER.categories) else None
