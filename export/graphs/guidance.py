"""Safe Latent Diffusion and the sampler's step as one graph.

    g     = text - uncond                                    the prompt's own direction
    d_c   = unit * (text - safety_c)                         for each of n concepts, in noise
    mu_c  = 0 where d_c >= threshold, else min(|d_c| * scale, 1)
    e     = strongest over c of mu_c * unit * (safety_c - uncond)   element by element
    gamma = e + momentum_scale * momentum
    eps   = uncond + guidance_scale * (g - active * gamma / unit)
    m     = p * latents + q * eps                            the sampler's state
    next  = a * latents + b0 * m + b1..b4 * history + s * noise

Source: SLD, arXiv 2211.05105, equations 3 to 8. sld-edge adds several concepts: each has its own
gate, and for each element the strongest edit counts, so that a concept given twice acts once.
Settings and momentum are in units of noise: a difference of 1 in the UNet's output is `unit` of
noise, 1 for a UNet that predicts noise.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sld_edge.export.graphs.builder import GraphBuilder, GraphOptions, Value
from sld_edge.runtime.contract import INPUTS, OUTPUTS, PREDICTIONS, SAFETY, STATE

_LARGEST = float(np.finfo(np.float32).max)


def write_guidance(path: Path) -> None:
    """Write the guidance graph, all FP32; `runtime.contract` has inputs, outputs and columns.

    A skipped branch is fed another branch's prediction: with two branches, uncond is also fed as
    safety (n = 1); with one branch, text is also fed as uncond and safety. `history` has the newest
    state first.

    `edit_map_next` adds the mean |edit| over channels. For each image there are `share`, the share
    of the latents that were edited; `strength`, the edit's norm divided by the plain guidance's;
    and `finite`: 1 where all numbers are finite, -1 where a prediction is not, 0 where only
    latents_next is not. `concept_strength` is the strength of each concept's edit without momentum.
    """
    with GraphBuilder(path, GraphOptions(attention="decomposed")) as b:
        _Guidance(b).build()


class _Guidance:
    """The graph in the order of the formulas above."""

    def __init__(self, b: GraphBuilder) -> None:
        self.b = b

    def build(self) -> None:
        b = self.b
        inputs = {
            name: b.input(name, np.float32, axes, "none" if name == "row" else "narrow")
            for name, axes in INPUTS.items()
        }
        uncond, text, safety_pred = (inputs[name] for name in PREDICTIONS)
        latents, momentum, history, edit_map = (inputs[name] for name in STATE)
        row = b.split(inputs["row"], (1, 1, 1, 1, 4, 1, 1, 1), 0, "row/columns")
        *step, c_in, unit = row
        guidance_scale = self._image(inputs["guidance_scale"], (1, 2, 3))
        columns = b.split(inputs["safety"], [1] * len(SAFETY), 1, "safety/columns")
        scale, threshold, momentum_scale, beta, active = (
            self._image(column, (2, 3)) for column in columns
        )

        d = self._mul(unit, self._sub(text, safety_pred, "d/output"), "d")
        mu = self._mask(d, scale, threshold)
        direction = self._sub(safety_pred, uncond, "safety/output")
        edits = self._mul(mu, self._mul(unit, direction, "safety/direction"), "safety/edits")
        gamma = self._add(
            self._combined(edits), self._mul(momentum_scale, momentum, "gamma/before"), "gamma"
        )
        momentum_next = self._mul(self._sub(b.scalar(1), beta, "beta/rest"), gamma, "momentum/new")
        momentum_next = self._add(
            self._mul(beta, momentum, "momentum/old"), momentum_next, "momentum/kept"
        )

        plain = self._mul(guidance_scale, self._sub(text, uncond, "g"), "guided/direction")
        plain = self._add(uncond, plain, "guided")
        strength = self._mul(guidance_scale, active, "edit/scale")
        applied = self._div(self._mul(strength, gamma, "edit/noise"), unit, "edit")
        predicted = self._sub(plain, applied, "eps")

        moved, newest = self._step(step, latents, predicted, history, inputs["noise"])
        older = b.split(history, (3, 1), 0, "history/parts")[0]
        shifted = b.node("Concat", newest, older, name="history/shifted", axis=0)

        self._output(moved, "latents_next")
        self._output(self._mul(c_in, moved, "next/input"), "unet_latents")
        self._output(momentum_next, "momentum_next")
        self._output(shifted, "history_next")
        by_concept = self._div(self._mul(strength, edits, "edit/own_noise"), unit, "edit/own")
        self._report(mu, applied, by_concept, plain, active, edit_map)
        self._finite(moved, (uncond, text, safety_pred))

    def _mask(self, d: Value, scale: Value, threshold: Value) -> Value:
        """Return mu, not 0 where the prompt is near the concept or beyond it (with sign)."""
        b = self.b
        far = b.node("GreaterOrEqual", d, threshold, name="d/far")
        close = self._mul(b.node("Abs", d, name="d/size"), scale, "d/scaled")
        close = b.node("Min", close, b.scalar(1), name="d/saturated")
        return b.node("Where", far, b.scalar(0), close, name="mu")

    def _combined(self, edits: Value) -> Value:
        """Join the concepts' edits [n,B,4,h,w]; of opposite edits of one size the positive."""
        b = self.b
        most, least = (
            self._over_concepts(f"Reduce{name}", edits, f"safety/{name.lower()}")
            for name in ("Max", "Min")
        )
        positive = b.node(
            "GreaterOrEqual", self._add(most, least, "safety/both"), b.scalar(0), name="safety/sign"
        )
        return b.node("Where", positive, most, least, name="safety/strongest")

    def _step(
        self,
        step: list[Value],
        latents: Value,
        predicted: Value,
        history: Value,
        noise: Value,
    ) -> tuple[Value, Value]:
        """Return the next latents [B,4,h,w] and m [1,B,4,h,w]."""
        b = self.b
        p, q, a, b0, past, s = step
        m = self._add(self._mul(p, latents, "m/p"), self._mul(q, predicted, "m/q"), "m")
        moved = self._add(self._mul(a, latents, "next/a"), self._mul(b0, m, "next/b0"), "next/now")
        weights = b.node("Unsqueeze", past, b.ints(1, 2, 3, 4), name="row/past", rank=5)
        older = self._mul(weights, history, "next/past")
        older = b.node("ReduceSum", older, b.ints(0), name="next/b", rank=4, keepdims=0)
        moved = self._add(moved, older, "next/linear")
        moved = self._add(moved, self._mul(s, noise, "next/s"), "next")
        return moved, b.node("Unsqueeze", m, b.ints(0), name="m/newest", rank=5)

    def _output(self, value: Value, name: str) -> None:
        self.b.output(value, name, np.float32, OUTPUTS[name])

    def _report(
        self,
        mu: Value,
        applied: Value,
        by_concept: Value,
        plain: Value,
        active: Value,
        edit_map: Value,
    ) -> None:
        b = self.b
        size = b.node("Abs", applied, name="edit/size")
        size = b.node("ReduceMean", size, b.ints(1), name="edit/where", rank=3, keepdims=0)
        total = self._add(edit_map, size, "edit/total")
        self._output(total, "edit_map_next")

        mu = self._over_concepts("ReduceMax", mu, "mu/any")
        edited = b.node("Greater", mu, b.scalar(0), name="mu/edited")
        edited = b.cast(edited, np.float32, "mu/counted")
        share = self._per_image("ReduceMean", edited, "share/mean")
        flat = b.node("Squeeze", active, b.ints(1, 2, 3), name="active/flat", rank=1)
        self._output(self._mul(flat, share, "share/active"), "share")

        below = self._per_image("ReduceL2", plain, "guided/norm")
        nothing = b.node("Equal", below, b.scalar(0), name="strength/nothing")
        safe = b.node("Where", nothing, b.scalar(1), below, name="strength/below")
        for name, above in (
            ("strength", self._per_image("ReduceL2", applied, "edit/norm")),
            ("concept_strength", self._per_concept("ReduceL2", by_concept, "edit/norms")),
        ):
            ratio = b.node("Div", above, safe, name=f"{name}/ratio")
            ratio = b.node("Where", nothing, b.scalar(0), ratio, name=f"{name}/or_0")
            self._output(ratio, name)

    def _finite(self, moved: Value, predictions: tuple[Value, Value, Value]) -> None:
        """Write `finite`: the lower of 1 or 0 for the latents, and 1 or -1 for the predictions."""
        b = self.b
        uncond, text, safety_pred = map(self._each_finite, predictions)
        safety_pred = self._over_concepts("ReduceMin", safety_pred, "finite/concepts")
        every = b.node("Min", uncond, text, safety_pred, name="finite/each")
        fed = self._per_image("ReduceMin", every, "finite/predictions")
        fed = self._sub(self._mul(b.scalar(2), fed, "finite/doubled"), b.scalar(1), "finite/fed")
        whole = self._per_image("ReduceMin", self._each_finite(moved), "finite/latents")
        self._output(b.node("Min", whole, fed, name="finite/code"), "finite")

    def _each_finite(self, value: Value) -> Value:
        """Return 1 where a number is finite, else 0."""
        b = self.b
        # NaN fails every comparison; infinity fails this comparison.
        size = b.node("Abs", value, name=f"{value.name}/size")
        finite = b.node("LessOrEqual", size, b.scalar(_LARGEST), name=f"{value.name}/finite")
        return b.cast(finite, np.float32, f"{value.name}/counted")

    def _image(self, value: Value, axes: tuple[int, ...]) -> Value:
        """Return one number per image in a shape that multiplies the image."""
        name = f"{value.name}/image"
        return self.b.node("Unsqueeze", value, self.b.ints(*axes), name=name, rank=4)

    def _per_image(self, op: str, value: Value, name: str) -> Value:
        """Reduce [B,4,h,w] to [B]."""
        return self.b.node(op, value, self.b.ints(1, 2, 3), name=name, rank=1, keepdims=0)

    def _per_concept(self, op: str, value: Value, name: str) -> Value:
        """Reduce [n,B,4,h,w] to [n,B]."""
        return self.b.node(op, value, self.b.ints(2, 3, 4), name=name, rank=2, keepdims=0)

    def _over_concepts(self, op: str, value: Value, name: str) -> Value:
        """Reduce [n,B,4,h,w] to [B,4,h,w]."""
        return self.b.node(op, value, self.b.ints(0), name=name, rank=4, keepdims=0)

    def _add(self, x: Value, y: Value, name: str) -> Value:
        return self.b.node("Add", x, y, name=name)

    def _sub(self, x: Value, y: Value, name: str) -> Value:
        return self.b.node("Sub", x, y, name=name)

    def _div(self, x: Value, y: Value, name: str) -> Value:
        return self.b.node("Div", x, y, name=name)

    def _mul(self, x: Value, y: Value, name: str) -> Value:
        return self.b.node("Mul", x, y, name=name)
