"""The safe step as native code; sld_edge.cpp_ext.safe_step is its door."""

from typing import Annotated, overload

import numpy
from numpy.typing import NDArray

ABI_VERSION: int = 1

MAX_CONCEPTS: int = 64

STRONGEST: int = 0

SUM: int = 1

@overload
def safe_step(
    *,
    noise_pred_uncond: Annotated[
        NDArray[numpy.float32],
        dict(shape=(None, 4, None, None), order="C", device="cpu", writable=False),
    ],
    noise_pred_text: Annotated[
        NDArray[numpy.float32],
        dict(shape=(None, 4, None, None), order="C", device="cpu", writable=False),
    ],
    noise_pred_safety: Annotated[
        NDArray[numpy.float32],
        dict(shape=(None, None, 4, None, None), order="C", device="cpu", writable=False),
    ],
    latents: Annotated[
        NDArray[numpy.float32],
        dict(shape=(None, 4, None, None), order="C", device="cpu", writable=False),
    ],
    momentum: Annotated[
        NDArray[numpy.float32],
        dict(shape=(None, 4, None, None), order="C", device="cpu", writable=False),
    ],
    history: Annotated[
        NDArray[numpy.float32],
        dict(shape=(4, None, 4, None, None), order="C", device="cpu", writable=False),
    ],
    noise: Annotated[
        NDArray[numpy.float32],
        dict(shape=(None, 4, None, None), order="C", device="cpu", writable=False),
    ],
    edit_map: Annotated[
        NDArray[numpy.float32],
        dict(shape=(None, None, None), order="C", device="cpu", writable=False),
    ],
    row: Annotated[
        NDArray[numpy.float32], dict(shape=(10), order="C", device="cpu", writable=False)
    ],
    guidance_scale: Annotated[
        NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)
    ],
    safety: Annotated[
        NDArray[numpy.float32], dict(shape=(None, 5), order="C", device="cpu", writable=False)
    ],
    latents_next: Annotated[
        NDArray[numpy.float32], dict(shape=(None, 4, None, None), order="C", device="cpu")
    ],
    unet_latents: Annotated[
        NDArray[numpy.float32], dict(shape=(None, 4, None, None), order="C", device="cpu")
    ],
    momentum_next: Annotated[
        NDArray[numpy.float32], dict(shape=(None, 4, None, None), order="C", device="cpu")
    ],
    history_next: Annotated[
        NDArray[numpy.float32], dict(shape=(4, None, 4, None, None), order="C", device="cpu")
    ],
    edit_map_next: Annotated[
        NDArray[numpy.float32], dict(shape=(None, None, None), order="C", device="cpu")
    ],
    share: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu")],
    strength: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu")],
    concept_strength: Annotated[
        NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu")
    ],
    finite: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu")],
    combine: int,
    threads: int,
) -> None:
    """Write a step's outputs, from FP32 predictions."""

@overload
def safe_step(
    *,
    noise_pred_uncond: Annotated[
        NDArray[numpy.float16],
        dict(shape=(None, 4, None, None), order="C", device="cpu", writable=False),
    ],
    noise_pred_text: Annotated[
        NDArray[numpy.float16],
        dict(shape=(None, 4, None, None), order="C", device="cpu", writable=False),
    ],
    noise_pred_safety: Annotated[
        NDArray[numpy.float16],
        dict(shape=(None, None, 4, None, None), order="C", device="cpu", writable=False),
    ],
    latents: Annotated[
        NDArray[numpy.float32],
        dict(shape=(None, 4, None, None), order="C", device="cpu", writable=False),
    ],
    momentum: Annotated[
        NDArray[numpy.float32],
        dict(shape=(None, 4, None, None), order="C", device="cpu", writable=False),
    ],
    history: Annotated[
        NDArray[numpy.float32],
        dict(shape=(4, None, 4, None, None), order="C", device="cpu", writable=False),
    ],
    noise: Annotated[
        NDArray[numpy.float32],
        dict(shape=(None, 4, None, None), order="C", device="cpu", writable=False),
    ],
    edit_map: Annotated[
        NDArray[numpy.float32],
        dict(shape=(None, None, None), order="C", device="cpu", writable=False),
    ],
    row: Annotated[
        NDArray[numpy.float32], dict(shape=(10), order="C", device="cpu", writable=False)
    ],
    guidance_scale: Annotated[
        NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)
    ],
    safety: Annotated[
        NDArray[numpy.float32], dict(shape=(None, 5), order="C", device="cpu", writable=False)
    ],
    latents_next: Annotated[
        NDArray[numpy.float32], dict(shape=(None, 4, None, None), order="C", device="cpu")
    ],
    unet_latents: Annotated[
        NDArray[numpy.float32], dict(shape=(None, 4, None, None), order="C", device="cpu")
    ],
    momentum_next: Annotated[
        NDArray[numpy.float32], dict(shape=(None, 4, None, None), order="C", device="cpu")
    ],
    history_next: Annotated[
        NDArray[numpy.float32], dict(shape=(4, None, 4, None, None), order="C", device="cpu")
    ],
    edit_map_next: Annotated[
        NDArray[numpy.float32], dict(shape=(None, None, None), order="C", device="cpu")
    ],
    share: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu")],
    strength: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu")],
    concept_strength: Annotated[
        NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu")
    ],
    finite: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu")],
    combine: int,
    threads: int,
) -> None:
    """Write a step's outputs, from FP16 predictions."""
