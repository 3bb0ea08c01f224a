"""One measured process: makes images with ours or with diffusers and prints its figures as JSON.

Started by `compare.py`, which puts the moment of the start into the environment.
"""

from __future__ import annotations

import json
import os
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

STARTED = float(os.environ["SLD_BENCH_STARTED"])  # time.time() just before this process


def memory() -> dict[str, float]:
    """Return this process's memory in GiB: resident, anonymous, and the peak so far."""
    wanted = {"VmRSS": "resident", "RssAnon": "anonymous", "VmHWM": "peak"}
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in wanted:
            found[wanted[name]] = int(rest.split()[0]) / 2**20
    return found


def ours(job: dict[str, Any]) -> dict[str, Any]:
    """Run sld-edge."""
    from sld_edge.runtime import Pipeline

    pipeline = Pipeline.load(job["model"], provider="cpu")
    pipeline.warm_up()
    ready, at_ready = time.time() - STARTED, memory()
    marks: list[float] = []
    pipeline(
        job["prompt"],
        steps=job["steps"],
        sampler="ddim",
        safety="strong",
        seed=7,
        width=job["size"],
        height=job["size"],
        callback=lambda _step: marks.append(time.perf_counter()),
    )
    return figures(ready, at_ready, marks)


def diffusers(job: dict[str, Any]) -> dict[str, Any]:
    """Run diffusers' safe pipeline."""
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipelineSafe

    pipeline = StableDiffusionPipelineSafe.from_pretrained(
        job["model"],
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        torch_dtype=torch.float32,
    )
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    ready, at_ready = time.time() - STARTED, memory()
    marks: list[float] = []
    pipeline(
        job["prompt"],
        num_inference_steps=job["steps"],
        width=job["size"],
        height=job["size"],
        generator=torch.Generator().manual_seed(7),
        sld_guidance_scale=2000,
        sld_warmup_steps=0,
        sld_threshold=0.025,
        sld_momentum_scale=0.5,
        sld_mom_beta=0.7,
        callback=lambda _i, _t, _latents: marks.append(time.perf_counter()),
    )
    return figures(ready, at_ready, marks)


def figures(ready: float, at_ready: dict[str, float], marks: list[float]) -> dict[str, Any]:
    """Put one run's figures together; the first step is left out of the step times."""
    return {
        "ready_s": ready,
        "image_s": time.time() - STARTED,
        "ready_gib": at_ready["resident"],
        "ready_anonymous_gib": at_ready["anonymous"],
        "peak_gib": memory()["peak"],
        "anonymous_gib": memory()["anonymous"],
        "steps_s": [after - before for before, after in pairwise(marks)],
    }


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    print(json.dumps({"ours": ours, "diffusers": diffusers}[task["who"]](task)))
