"""`activation`: the effect of Safe Latent Diffusion, read from a run's report; no model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from sld_edge.engines.errors import InputError
from sld_edge.runtime.scorers.base import Pictures, Reports, Scores

_DEFINITION = b"activation: mean and maximum over the calls of share and strength, version 1"


def activation_scores(share: Sequence[float], strength: Sequence[float]) -> Scores:
    """Return the scores of a picture from its figures per UNet call (see docs/report.md).

    Raises:
        InputError: no call, or different numbers of shares and strengths.
    """
    if not share or len(share) != len(strength):
        raise InputError(
            "activation per call",
            got=f"{len(share)} shares, {len(strength)} strengths",
            expected="a share and a strength for each call",
        )
    return {
        "activation.share": sum(share) / len(share),
        "activation.strength": sum(strength) / len(strength),
        "activation.max-share": max(share),
        "activation.max-strength": max(strength),
    }


class Activation:
    """Keys `activation.share`, `.strength`, `.max-share` and `.max-strength`."""

    name = "activation"
    sha256 = hashlib.sha256(_DEFINITION).hexdigest()

    def score(
        self, pictures: Pictures, prompts: Sequence[str], reports: Reports | None = None
    ) -> list[Scores]:
        """Score pictures by their reports.

        Raises:
            InputError: no reports, or a run with safety off, which has no figures.
        """
        if reports is None:
            raise InputError("the scorer activation needs the run's reports", do="pass the reports")
        scores = []
        for report in reports:
            if not report["safety"]["scale"]:
                raise InputError(
                    "the scorer activation has nothing to read without an edit",
                    do="choose a preset, or a --safety-scale of 0.03, which edits very little",
                )
            calls = report["calls"]
            scores.append(
                activation_scores(
                    [call["share"] for call in calls], [call["strength"] for call in calls]
                )
            )
        return scores
