"""Whether a change of the code changed a picture: record before it, compare after it.

    PYTHONPATH=tests python tests/same_pictures.py record FILE.npz [BUNDLE [SIZE]]
    PYTHONPATH=tests python tests/same_pictures.py compare FILE.npz [BUNDLE [SIZE]]

Without a bundle: 120 pictures of the miniature, over samplers, presets, batches and providers, the
stand-in of TensorRT among them. With one: 8 pictures of it, on the CPU. Both runs need the same
processor and the same packages, since the comparison is to the last bit.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import standin
from sld_edge.runtime import Pipeline
from standin.plans import VERSIONS, make_plans

PROMPTS = ["a red star at a party", "a blue heart in an alley"]
SAMPLERS = ("ddim", "pndm", "euler", "euler-a", "dpm++2m", "dpm++2m-karras", "lcm", "unipc", "lms")
PRESETS = ("off", "weak", "medium", "strong", "max")
OTHERS: list[dict[str, Any]] = [
    {"count": 3, "batch_size": 3},
    {"safety": ["weak", "max"], "guidance_scale": [1.0, 7.5]},
    {"guidance_scale": 1, "safety": "off"},
    {"negative_prompt": "blue", "safety": "strong"},
    {"width": 96, "height": 64},
    {"sampler": "ddim", "eta": 0.5},
    {"rng": "philox"},
    {"safety_concept": ("a skull", "the colour red", "snow")},
    {"cache_interval": 2},
]
DEVICE: list[dict[str, Any]] = [
    {"safety": "strong"},
    {"sampler": "euler-a"},
    {"safety": ["off", "max"], "guidance_scale": [1.0, 7.5]},
    {"cache_interval": 3, "safety": "weak"},
]

Pictures = dict[str, NDArray[np.uint8]]


def pictures_of(pipeline: Pipeline, settings: list[dict[str, Any]], **given: Any) -> Pictures:
    """Make the two prompts' pictures for each setting."""
    made = {}
    for one in settings:
        result = pipeline(PROMPTS, **{"steps": 8, "seed": 3, **given, **one})
        made[f"{pipeline.provider} {one}"] = np.stack([np.asarray(x) for x in result.images])
    return made


def miniature() -> Iterator[Pictures]:
    """Make the miniature's pictures, on the CPU and on the stand-in."""
    every = [{"sampler": name, "safety": preset} for name, preset in product(SAMPLERS, PRESETS)]
    with Pipeline.load(provider="cpu") as pipeline:
        yield pictures_of(pipeline, [*every, *OTHERS])
        mini = pipeline.bundle.path
        with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
            standin.install(patch)
            planned = Path(shutil.copytree(mini, Path(folder, "mini")))
            make_plans(planned, engine="tensorrt", version=VERSIONS["tensorrt"], size=(64, 64, 96))
            with Pipeline.load(planned, provider="tensorrt") as device:
                yield pictures_of(device, DEVICE, batch_size=2)


def of_bundle(bundle: str, size: int) -> Iterator[Pictures]:
    """Make a bundle's pictures on the CPU."""
    few = [{"sampler": name, "safety": "max"} for name in ("ddim", "euler-a", "unipc", "pndm")]
    with Pipeline.load(bundle, provider="cpu") as pipeline:
        yield pictures_of(pipeline, few, steps=2, width=size, height=size)


def main(word: str, file: str, bundle: str = "", size: str = "256") -> int:
    """Record pictures, or compare them with recorded ones; 1 where one differs."""
    made: Pictures = {}
    for part in of_bundle(bundle, int(size)) if bundle else miniature():
        made |= part
    count = sum(len(pictures) for pictures in made.values())
    if word == "record":
        np.savez_compressed(file, **made)  # type: ignore[arg-type]  # numpy's stub: a keyword named so
        print(f"{count} pictures in {file}")
        return 0
    with np.load(file) as recorded:
        differ = [
            name
            for name in made.keys() | set(recorded)
            if name not in made
            or name not in recorded
            or not np.array_equal(made[name], recorded[name])
        ]
    print("\n".join(["these differ:", *sorted(differ)] if differ else [f"{count} are the same"]))
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
