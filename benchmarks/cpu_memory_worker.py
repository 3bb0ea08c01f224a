"""One measured process: makes images with ours or with diffusers and prints its figures as JSON.

Started by `cpu_memory.py`, which puts the moment of the start into the environment.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import dataclass
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


class Peaks:
    """The largest resident and anonymous memory, GiB, looked at every 5 ms by a thread."""

    def __init__(self) -> None:
        self._highest = {"resident": 0.0, "anonymous": 0.0}
        threading.Thread(target=self._watch, daemon=True).start()

    def take(self) -> dict[str, float]:
        """Return the peaks since the last call."""
        self._look()
        highest, self._highest = self._highest, dict.fromkeys(self._highest, 0.0)
        return highest

    def _watch(self) -> None:
        while True:
            self._look()
            time.sleep(0.005)

    def _look(self) -> None:
        now = memory()
        for name, highest in self._highest.items():
            self._highest[name] = max(highest, now[name])


def ours(job: dict[str, Any]) -> dict[str, Any]:
    """Run sld-edge."""
    from sld_edge.runtime import Pipeline

    pipeline = Pipeline.load(job["model"], provider="cpu")
    pipeline.warm_up()
    ready, at_ready, peaks = time.time() - STARTED, memory(), Peaks()
    marks: list[Mark] = []
    pipeline(
        job["prompt"],
        steps=job["steps"],
        sampler="ddim",
        safety="strong",
        seed=7,
        width=job["size"],
        height=job["size"],
        callback=lambda _step: marks.append(mark(peaks)),
    )
    return figures(ready, at_ready, marks, peaks)


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
    ready, at_ready, peaks = time.time() - STARTED, memory(), Peaks()
    marks: list[Mark] = []
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
        callback=lambda _i, _t, _latents: marks.append(mark(peaks)),
    )
    return figures(ready, at_ready, marks, peaks)


def decoding(job: dict[str, Any]) -> dict[str, Any]:
    """Decode one picture's latents with sld-edge, and nothing else; `tiling` says how."""
    import numpy as np

    from sld_edge.runtime import Pipeline

    pipeline = Pipeline.load(job["model"], provider="cpu", vae_tiling=job["tiling"])
    pipeline.engine("vae_decoder")
    cells = job["size"] // pipeline.bundle.manifest.latents.downscale
    latents = np.random.default_rng(0).standard_normal((1, 4, cells, cells), np.float32)
    peaks, begin = Peaks(), time.process_time()
    pictures = pipeline.decode(latents)
    used = time.process_time() - begin
    if "keep" in job:
        np.save(job["keep"], pictures)
    return {"cpu_s": used, **peaks.take()}


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A step's end: wall and processor seconds, and the peaks since the last one."""

    wall: float
    processor: float
    peaks: dict[str, float]


def mark(peaks: Peaks) -> Mark:
    """Mark the end of a step."""
    return Mark(wall=time.perf_counter(), processor=time.process_time(), peaks=peaks.take())


def figures(
    ready: float, at_ready: dict[str, float], marks: list[Mark], peaks: Peaks
) -> dict[str, Any]:
    """Put one run's figures together; the first step is left out of the step times."""
    end = peaks.take()
    loop = {name: max(each.peaks[name] for each in marks) for name in end}
    return {
        "loop_gib": loop["resident"],
        "loop_anonymous_gib": loop["anonymous"],
        "decode_gib": end["resident"],
        "decode_anonymous_gib": end["anonymous"],
        "peak_anonymous_gib": max(loop["anonymous"], end["anonymous"]),
        "ready_s": ready,
        "image_s": time.time() - STARTED,
        "ready_gib": at_ready["resident"],
        "ready_anonymous_gib": at_ready["anonymous"],
        "peak_gib": memory()["peak"],
        "anonymous_gib": memory()["anonymous"],
        "steps_s": [after.wall - before.wall for before, after in pairwise(marks)],
        "steps_cpu_s": [after.processor - before.processor for before, after in pairwise(marks)],
    }


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    workers = {"ours": ours, "diffusers": diffusers, "decoding": decoding}
    print(json.dumps(workers[task["who"]](task)))
