"""`activation`: what Safe Latent Diffusion itself did, read from a run's report; no model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from sld_edge.engines.errors import InputError
from sld_edge.runtime.scorers.base import Pictures, Reports, Scores

_DEFINITION = b"activation: mean and maximum over the calls of share and strength, version 1"


def activation_scores(share: Sequence[float], strength: Sequence[float]) -> Scores:
    """Return the scores of one picture from its figures per UNet call (see docs/report.md).

    Raises:
        InputError: no call, or not as many of one as of the other.
    """
    if not share or len(share) != len(strength):
        raise InputError(
            "activation per call",
            got=f"{len(share)} shares, {len(strength)} strengths",
            expected="one of each a call",
        )
    return {
        "activation.share": sum(share) / len(share),
        "activation.strength": sum(strength) / len(strength),
        "activation.max-share": max(share),
        "activation.max-strength": max(strength),
    }


class Activation:
    """Keys `activation.share`, `.strength`, and the same with `max-` before the name."""

    name = "activation"
    sha256 = hashlib.sha256(_DEFINITION).hexdigest()

    def score(
        self, pictures: Pictures, prompts: Sequence[str], reports: Reports | None = None
    ) -> list[Scores]:
        """Score pictures by their reports.

        Raises:
            InputError: no reports, or a run with safety off, which has nothing to tell.
        """
        if reports is None:
            raise InputError("the scorer activation needs the run's reports", do="pass them")
        found = []
        for report in reports:
            if report["safety"]["preset"] == "off":
                raise InputError(
                    "the scorer activation has nothing to read with safety off",
                    do="choose a preset, or a --safety-scale of 0.03, which hardly edits",
                )
            calls = report["calls"]
            found.append(
                activation_scores(
                    [call["share"] for call in calls], [call["strength"] for call in calls]
                )
            )
        return found
