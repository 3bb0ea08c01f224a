"""Native code of sld_edge.cpp_ext.safe_step."""

from typing import Annotated

import numpy
from numpy.typing import NDArray

def safe_step(
    *,
    noise_pred_uncond: Annotated[NDArray, dict(order="C", device="cpu", writable=False)],
    noise_pred_text: Annotated[NDArray, dict(order="C", device="cpu", writable=False)],
    noise_pred_safety: Annotated[NDArray, dict(order="C", device="cpu", writable=False)],
    latents: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)],
    momentum: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)],
    history: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)],
    noise: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)],
    edit_map: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)],
    row: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)],
    guidance_scale: Annotated[
        NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)
    ],
    safety: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu", writable=False)],
    latents_next: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu")],
    unet_latents: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu")],
    momentum_next: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu")],
    history_next: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu")],
    edit_map_next: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu")],
    share: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu")],
    strength: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu")],
    concept_strength: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu")],
    finite: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu")],
    threads: int,
) -> None:
    """Write the outputs of a step."""
