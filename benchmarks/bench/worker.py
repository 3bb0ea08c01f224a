"""The measured process of sld-edge: loads a bundle, makes pictures, times each stage.

Started by `sld-bench`: python -m sld_edge.benchmarks.bench.worker TASK
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sld_edge.benchmarks.bench.child import MARK
from sld_edge.benchmarks.bench.memory import PhaseMeter
from sld_edge.engines.cuda.device import Device
from sld_edge.engines.openvino.target import CpuPrecision
from sld_edge.engines.providers import ON_HOST
from sld_edge.runtime.commands.console import run_command
from sld_edge.runtime.pipeline import Pipeline
from sld_edge.runtime.request import Request, Sampling


@dataclass(frozen=True, kw_only=True)
class Task:
    """The work of the process.

    Attributes:
        bundle: a bundle's directory; None is the miniature.
        provider: runs the bundle.
        device: of OpenVINO.
        cpu_precision: of OpenVINO on the CPU.
        prompt: of the first batch; later batches add a number, so that the text is encoded again.
        safety: a preset's name.
        sampler: None is the bundle's own.
        steps: denoising steps.
        size: width and height in pixels.
        seed: of the first picture of the batch.
        batch: pictures at once.
        warmup: batches after the first; the memory of the first is watched, the last is timed.
        picture: file of the first picture; None keeps no picture.
    """

    bundle: str | None
    provider: str
    prompt: str
    safety: str
    steps: int
    size: int
    batch: int
    warmup: int
    device: str = "CPU"
    cpu_precision: CpuPrecision = "fp32"
    seed: int = 7
    sampler: str | None = None
    picture: str | None = None


def measure(task: Task) -> dict[str, Any]:
    """Run a task and return its measurements, ready for JSON."""
    meter = PhaseMeter()
    with Pipeline.load(
        task.bundle,
        provider=task.provider,
        device=task.device,
        cpu_precision=task.cpu_precision,
        evaluation=True,
    ) as pipeline:
        pipeline.warm_up(width=task.size, height=task.size)
        meter.end("start")
        device = Device() if pipeline.provider not in ON_HOST else None
        batch = make(pipeline, task, task.prompt, meter, device)
        first_done = batch["done"]
        for number in range(task.warmup):
            batch = make(pipeline, task, f"{task.prompt} {number + 1}")
    return {**batch, "phases": [asdict(phase) for phase in meter.phases], "first_done": first_done}


def make(
    pipeline: Pipeline,
    task: Task,
    prompt: str,
    meter: PhaseMeter | None = None,
    device: Device | None = None,
) -> dict[str, Any]:
    """Make one batch, stage by stage as `Pipeline.run` does, and return the times of the stages."""

    def end(phase: str) -> None:
        if meter is not None:
            meter.end(phase, device=device)

    request = Request(
        prompts=(prompt,),
        safety=task.safety,
        sampling=Sampling(steps=task.steps, sampler=task.sampler),
        seed=task.seed,
        count=task.batch,
        width=task.size,
        height=task.size,
    )
    run = pipeline.resolve(request)
    clock = time.monotonic
    begin, cpu = clock(), time.process_time()
    steps = pipeline.steps(run)
    end("text")
    encoded = clock()
    branches, step_ends = [], []
    for step in steps:
        branches.append(step.branches)
        step_ends.append(clock())
        last = step
    latents, seconds = last.latents, last.figures.seconds
    end("denoise")
    denoised = clock()
    pictures = pipeline.decode(latents)
    end("decode")
    done, cpu_done = clock(), time.process_time()
    if task.picture is not None and not Path(task.picture).exists():
        Image.fromarray(np.asarray(pictures[0])).save(task.picture)
    return {
        "text_s": encoded - begin,
        "steps_s": list(seconds),
        "decode_s": done - denoised,
        "image_s": done - begin,
        "image_cpu_s": cpu_done - cpu,
        "done": done,
        "branches": branches,
        "step_ends": step_ends,
    }


def main(task: Mapping[str, Any]) -> None:
    """Run a task and answer; wait until the answer has been read."""
    answer = measure(Task(**task))
    print(f"{MARK}{json.dumps(answer)}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(json.loads(sys.argv[1]))))
