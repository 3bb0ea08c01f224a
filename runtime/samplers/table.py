"""A sampler as a table of numbers, a row for each UNet call."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from sld_edge.runtime.samplers.prediction import SafetyUnits, noise_unit

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class SamplerTable:
    """A sampler with N UNet calls; x are the latents, z is fresh noise of unit variance.

    Call i gives `c_in[i] * x` to the UNet at `timesteps[i]`, keeps `m_i = p[i] * x + q[i] * output`
    in the history, and sets x to `a[i] * x + sum_j b[i, j] * m_(i-j) + s[i] * z`, j from 0 to 4.

    Attributes:
        name: the sampler's name, one of `SAMPLERS`.
        timesteps: [N], in training timesteps, each exact in float32.
        c_in: [N]; p: [N]; q: [N]; a: [N]; s: [N]; b: [N,5].
        init_noise_sigma: the standard deviation of the first latents.
        alpha: [N], the share of the signal in x, with x scaled to variance 1.
        prediction_type: kind of the UNet's output: "epsilon", "v_prediction" or "sample".
        safety_units: units of the safety numbers: "noise" is their published meaning on every kind
            of output; "raw" is the unit of the output, as in diffusers.
    """

    name: str
    timesteps: Floats
    c_in: Floats
    p: Floats
    q: Floats
    a: Floats
    b: Floats
    s: Floats
    init_noise_sigma: float
    alpha: Floats
    prediction_type: str
    safety_units: SafetyUnits = "noise"

    @property
    def calls(self) -> int:
        """N, the number of UNet calls."""
        return len(self.timesteps)

    @property
    def finite(self) -> bool:
        """Whether every number is finite."""
        columns = (
            *(self.timesteps, self.c_in, self.p, self.q, self.a, self.b, self.s),
            *(self.alpha, self.init_noise_sigma),
        )
        return all(bool(np.isfinite(column).all()) for column in columns)

    def equals(self, other: SamplerTable) -> bool:
        """Whether every entry is the same."""
        return all(
            np.array_equal(getattr(self, entry.name), getattr(other, entry.name))
            for entry in fields(SamplerTable)
        )

    def rows(self) -> NDArray[np.float32]:
        """Return float32 [N,11], the columns of `contract.ROW`; after the last call c_in is 1."""
        c_in_next = np.append(self.c_in[1:], 1.0)
        unit = np.ones(self.calls)
        if self.safety_units == "noise":
            unit = noise_unit(self.prediction_type, self.alpha)
        columns = (self.p, self.q, self.a, *self.b.T, self.s, c_in_next, unit)
        return np.stack(columns, axis=1).astype(np.float32)
