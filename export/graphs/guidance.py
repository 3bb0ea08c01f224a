"""Safe Latent Diffusion and the sampler's step as one graph.

    g     = text - uncond                                    what the prompt adds
    d_c   = text - safety_c                                  for each of n concepts
    mu_c  = 0 where d_c >= threshold, else min(|d_c| * scale, 1)
    e     = strongest over c of mu_c * (safety_c - uncond)   element by element
    gamma = e + momentum_scale * momentum
    eps   = uncond + guidance_scale * (g - active * gamma)
    m     = p * latents + q * eps                            what the sampler keeps
    next  = a * latents + b0 * m + b1..b4 * history + s * noise

Source: SLD, arXiv 2211.05105, equations 3 to 8. Several concepts are ours: each has its own gate,
and where they disagree the largest push counts, so that a concept given twice acts once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from sld_edge.export.graphs.builder import GraphBuilder, GraphOptions, Value

_LARGEST = float(np.finfo(np.float32).max)
_IMAGE: list[int | str] = ["B", 4, "h", "w"]
_HISTORY: list[int | str] = [4, "B", 4, "h", "w"]
_CONCEPTS: list[int | str] = ["n", "B", 4, "h", "w"]

Combine = Literal["strongest", "sum"]


def write_guidance(path: Path, *, combine: Combine = "strongest") -> None:
    """Write the guidance graph, all FP32, B images of latents [4,h,w], n concepts.

    Inputs: noise_pred_uncond, noise_pred_text, latents, momentum, noise [B,4,h,w];
    noise_pred_safety [n,B,4,h,w]; history [4,B,4,h,w], newest first; edit_map [B,h,w]; row [10] =
    p, q, a, b0..b4, s, c_in_next; guidance_scale [B]; safety [B,5] = scale, threshold,
    momentum_scale, momentum_beta, active (0 or 1). A branch that was not computed is bound to
    another: two branches, safety (n = 1) to uncond; one, all three to text.

    Outputs: latents_next, unet_latents (times c_in_next), momentum_next, history_next,
    edit_map_next (plus the mean |edit| over channels); and for each image [B] the share of the
    latents that was edited, the strength of the edit against the plain guidance, and finite: 1
    where all is, 0 where latents_next holds NaN or infinity though no prediction did, -1 where a
    prediction did. concept_strength [n,B] is each concept's own edit against the plain guidance.

    `combine="sum"` adds the concepts' edits; it is what "strongest" was measured against.
    """
    with GraphBuilder(path, GraphOptions(attention="decomposed")) as b:
        _Guidance(b, combine).build()


def write_kept_safety(path: Path) -> None:
    """Write the graph that carries safety predictions over to a later call, all FP32.

    Inputs: noise_pred_safety [n,B,4,h,w] and noise_pred_uncond_then [B,4,h,w] of one call,
    noise_pred_uncond [B,4,h,w] of a later one. Output: noise_pred_safety_now [n,B,4,h,w], which is
    as far from the later unconditional prediction as safety was from its own.
    """
    with GraphBuilder(path, GraphOptions(attention="decomposed")) as b:
        safety = b.input("noise_pred_safety", np.float32, _CONCEPTS)
        then = b.input("noise_pred_uncond_then", np.float32, _IMAGE)
        now = b.input("noise_pred_uncond", np.float32, _IMAGE)
        moved = b.node("Add", safety, b.node("Sub", now, then, name="since"), name="moved")
        b.output(moved, "noise_pred_safety_now", np.float32, _CONCEPTS)


class _Guidance:
    """The graph in the order of the formulas above."""

    def __init__(self, b: GraphBuilder, combine: Combine) -> None:
        self.b, self.combine = b, combine

    def build(self) -> None:
        b = self.b
        uncond, text = (
            b.input(f"noise_pred_{name}", np.float32, _IMAGE) for name in ("uncond", "text")
        )
        safety_pred = b.input("noise_pred_safety", np.float32, _CONCEPTS)
        latents, momentum = (b.input(name, np.float32, _IMAGE) for name in ("latents", "momentum"))
        history = b.input("history", np.float32, _HISTORY)
        noise = b.input("noise", np.float32, _IMAGE)
        edit_map = b.input("edit_map", np.float32, ["B", "h", "w"])
        row = b.input("row", np.float32, [10], "none")
        guidance_scale = self._image(b.input("guidance_scale", np.float32, ["B"]), (1, 2, 3))
        numbers = b.input("safety", np.float32, ["B", 5])
        scale, threshold, momentum_scale, beta, active = (
            self._image(column, (2, 3)) for column in b.split(numbers, [1] * 5, 1, "safety/columns")
        )

        mu = self._mask(text, safety_pred, scale, threshold)
        edits = self._mul(mu, self._sub(safety_pred, uncond, "safety/direction"), "safety/edits")
        gamma = self._add(
            self._combined(edits), self._mul(momentum_scale, momentum, "gamma/before"), "gamma"
        )
        kept = self._mul(self._sub(b.scalar(1), beta, "beta/rest"), gamma, "momentum/new")
        kept = self._add(self._mul(beta, momentum, "momentum/old"), kept, "momentum/kept")

        plain = self._mul(guidance_scale, self._sub(text, uncond, "g"), "guided/direction")
        plain = self._add(uncond, plain, "guided")
        strength = self._mul(guidance_scale, active, "edit/scale")
        applied = self._mul(strength, gamma, "edit")
        predicted = self._sub(plain, applied, "eps")

        moved, newest = self._step(row, latents, predicted, history, noise)
        older = b.split(history, (3, 1), 0, "history/parts")[0]
        shifted = b.node("Concat", newest, older, name="history/shifted", axis=0)

        self._outputs(row, moved, kept, shifted)
        own = self._mul(strength, edits, "edit/own")
        self._report(mu, applied, own, plain, active, edit_map)
        self._finite(moved, (uncond, text, safety_pred))

    def _mask(self, text: Value, safety: Value, scale: Value, threshold: Value) -> Value:
        """Where the prompt is close to the concept, or on its side; the comparison is signed."""
        b = self.b
        d = self._sub(text, safety, "d")
        far = b.node("GreaterOrEqual", d, threshold, name="d/far")
        close = self._mul(b.node("Abs", d, name="d/size"), scale, "d/scaled")
        close = b.node("Min", close, b.scalar(1), name="d/saturated")
        return b.node("Where", far, b.scalar(0), close, name="mu")

    def _combined(self, edits: Value) -> Value:
        """Join the concepts' edits [n,B,4,h,w]; of opposite ones equally large, the positive."""
        if self.combine == "sum":
            return self._over_concepts("ReduceSum", edits, "safety/sum")
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
        self, row: Value, latents: Value, predicted: Value, history: Value, noise: Value
    ) -> tuple[Value, Value]:
        """Return the next latents, and m [1,B,4,h,w]."""
        b = self.b
        p, q, a, b0, past, s, _ = b.split(row, (1, 1, 1, 1, 4, 1, 1), 0, "row/step")
        m = self._add(self._mul(p, latents, "m/p"), self._mul(q, predicted, "m/q"), "m")
        moved = self._add(self._mul(a, latents, "next/a"), self._mul(b0, m, "next/b0"), "next/now")
        weights = b.node("Unsqueeze", past, b.ints(1, 2, 3, 4), name="row/past", rank=5)
        kept = self._mul(weights, history, "next/past")
        kept = b.node("ReduceSum", kept, b.ints(0), name="next/b", rank=4, keepdims=0)
        moved = self._add(moved, kept, "next/linear")
        moved = self._add(moved, self._mul(s, noise, "next/s"), "next")
        return moved, b.node("Unsqueeze", m, b.ints(0), name="m/newest", rank=5)

    def _outputs(self, row: Value, moved: Value, kept: Value, shifted: Value) -> None:
        b = self.b
        c_in = b.split(row, (9, 1), 0, "row/input")[1]
        b.output(moved, "latents_next", np.float32, _IMAGE)
        b.output(self._mul(c_in, moved, "next/input"), "unet_latents", np.float32, _IMAGE)
        b.output(kept, "momentum_next", np.float32, _IMAGE)
        b.output(shifted, "history_next", np.float32, _HISTORY)

    def _report(
        self, mu: Value, applied: Value, own: Value, plain: Value, active: Value, edit_map: Value
    ) -> None:
        b = self.b
        size = b.node("Abs", applied, name="edit/size")
        size = b.node("ReduceMean", size, b.ints(1), name="edit/where", rank=3, keepdims=0)
        total = self._add(edit_map, size, "edit/total")
        b.output(total, "edit_map_next", np.float32, ["B", "h", "w"])

        mu = self._over_concepts("ReduceMax", mu, "mu/any")
        edited = b.node("Greater", mu, b.scalar(0), name="mu/edited")
        edited = b.cast(edited, np.float32, "mu/counted")
        share = self._per_image("ReduceMean", edited, "share/mean")
        flat = b.node("Squeeze", active, b.ints(1, 2, 3), name="active/flat", rank=1)
        b.output(self._mul(flat, share, "share/active"), "share", np.float32, ["B"])

        below = self._per_image("ReduceL2", plain, "guided/norm")
        nothing = b.node("Equal", below, b.scalar(0), name="strength/nothing")
        safe = b.node("Where", nothing, b.scalar(1), below, name="strength/below")
        for name, above, shape in (
            ("strength", self._per_image("ReduceL2", applied, "edit/norm"), ["B"]),
            ("concept_strength", self._per_concept("ReduceL2", own, "edit/norms"), ["n", "B"]),
        ):
            ratio = b.node("Div", above, safe, name=f"{name}/ratio")
            ratio = b.node("Where", nothing, b.scalar(0), ratio, name=f"{name}/or_0")
            b.output(ratio, name, np.float32, shape)

    def _finite(self, moved: Value, predictions: tuple[Value, Value, Value]) -> None:
        """The lower of 1 or 0 for the latents, and 1 or -1 for the predictions."""
        b = self.b
        uncond, text, safety_pred = map(self._each_finite, predictions)
        safety_pred = self._over_concepts("ReduceMin", safety_pred, "finite/concepts")
        every = b.node("Min", uncond, text, safety_pred, name="finite/each")
        fed = self._per_image("ReduceMin", every, "finite/predictions")
        fed = self._sub(self._mul(b.scalar(2), fed, "finite/doubled"), b.scalar(1), "finite/fed")
        whole = self._per_image("ReduceMin", self._each_finite(moved), "finite/latents")
        b.output(b.node("Min", whole, fed, name="finite/code"), "finite", np.float32, ["B"])

    def _each_finite(self, value: Value) -> Value:
        """1 where a number is finite, else 0."""
        b = self.b
        # NaN fails every comparison, infinity this one.
        size = b.node("Abs", value, name=f"{value.name}/size")
        finite = b.node("LessOrEqual", size, b.scalar(_LARGEST), name=f"{value.name}/finite")
        return b.cast(finite, np.float32, f"{value.name}/counted")

    def _image(self, value: Value, axes: tuple[int, ...]) -> Value:
        """A number an image, shaped to multiply it."""
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

    def _mul(self, x: Value, y: Value, name: str) -> Value:
        return self.b.node("Mul", x, y, name=name)
