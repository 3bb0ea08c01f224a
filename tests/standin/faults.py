"""Faults that a device, a driver or the loop may have, planted into the stand-in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import onnx
import pytest

from sld_edge.engines.cuda.device import Device, Workspace
from sld_edge.engines.errors import EngineError
from sld_edge.engines.tensorrt.plan_info import Flavour
from sld_edge.runtime.executor import Executor
from sld_edge.runtime.selftest import pictures, stability, suite
from standin.cuda import FakeCuda
from standin.plans import make_plans, relist
from standin.tensorrt import ExecutionContext

Tensors = Mapping[str, Any]  # of one run, in the device's memory


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what only takes time: one form, one kind of image, few steps, small batches."""
    monkeypatch.setattr(suite, "FORMS", ("fp16",))
    monkeypatch.setattr(pictures, "IMAGES", (("euler-a", "medium"),))
    monkeypatch.setattr(pictures, "STEPS", 4)
    monkeypatch.setattr(pictures, "REPEATED_STEPS", 3)
    monkeypatch.setattr(stability, "_SIZES", (1, 4))


def build(bundle: Path, flavour: str) -> None:
    """Build right plans."""
    name: Flavour = "tensorrt" if flavour == "tensorrt" else "tensorrt-rtx"
    make_plans(bundle, engine=name)


def change_outputs(
    monkeypatch: pytest.MonkeyPatch, component: str, change: Callable[[Tensors, int], None]
) -> None:
    """Let `change` write into a plan's outputs after each run; it gets the number of the run."""
    right, numbers = ExecutionContext._compute, count()

    def compute(self: Any, inputs: Any, outputs: Any, shapes: Any, *more: Any) -> None:
        right(self, inputs, outputs, shapes, *more)
        if self._engine.plan["component"] == component:
            view = self._module.cuda.view
            tensors = {
                name: view(*span).view(self._dtype(name)).reshape(shapes[name])
                for name, span in outputs.items()
            }
            change(tensors, next(numbers))

    monkeypatch.setattr(ExecutionContext, "_compute", compute)


def branches_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exchange the UNet's branches of prompt and concept."""

    def change(tensors: Tensors, number: int) -> None:
        predicted = tensors["noise_pred"]
        third = len(predicted) // 3
        if third:  # a call without safety has fewer branches
            prompt = predicted[third : 2 * third].copy()
            predicted[third : 2 * third] = predicted[2 * third :]
            predicted[2 * third :] = prompt

    change_outputs(monkeypatch, "unet", change)


def nan_in_a_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give NaN in one number of the UNet, in the fifth run and after it."""

    def change(tensors: Tensors, number: int) -> None:
        if number >= 4:
            tensors["noise_pred"].reshape(-1)[0] = float("nan")

    change_outputs(monkeypatch, "unet", change)


def nan_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let guidance call everything finite, as a compiler's fast arithmetic does."""

    def change(tensors: Tensors, number: int) -> None:
        tensors["finite"][...] = 1

    change_outputs(monkeypatch, "guidance", change)


def drifting_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Change the last bit of one number in every second run of the UNet."""

    def change(tensors: Tensors, number: int) -> None:
        bits = tensors["noise_pred"].reshape(-1)[3:4].view("uint32")
        bits[0] = (bits[0] & 0xFFFFFFFE) | (number // 5 % 2)

    change_outputs(monkeypatch, "unet", change)


def stale_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a replayed CUDA graph leave out its first kernel: guidance reads old predictions."""
    right = FakeCuda.cudaGraphInstantiate

    def instantiate(self: FakeCuda, graph: Any, flags: int) -> Any:
        error, made = right(self, graph, flags)
        executable = self._handles[int(made)]
        object.__setattr__(executable, "work", executable.work[1:])
        return error, made

    monkeypatch.setattr(FakeCuda, "cudaGraphInstantiate", instantiate)


def old_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the generation of activation memory that was freed because no more was left."""

    def require(self: Workspace, nbytes: int) -> None:
        if nbytes > self.nbytes:
            self._device.free(self.address)
            self.address = self._device.allocate(nbytes)
            self.nbytes = nbytes
            self.generation += 1

    monkeypatch.setattr(Workspace, "require", require)


def stage_of_freed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a closed stage where there was no memory for the next one, as the executor once did."""
    right = Executor._stepper

    def stepper(self: Executor, job: Any) -> Any:
        before = self.stage
        try:
            return right(self, job)
        except EngineError:
            self.stage = before
            raise

    monkeypatch.setattr(Executor, "_stepper", stepper)


def endless_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no allocation fail: then the check of a full memory has seen nothing."""
    monkeypatch.setattr(Device, "full_after", lambda self, allocations: nullcontext())


def leak(monkeypatch: pytest.MonkeyPatch, nbytes: int = 512 << 10) -> None:
    """Keep some device memory at every picture."""
    right = Executor.make

    def make(self: Executor, *words: Any, **names: Any) -> Any:
        self._loader.device.allocate(nbytes)
        return right(self, *words, **names)

    monkeypatch.setattr(Executor, "make", make)


def build_without_a_bias(bundle: Path, flavour: str) -> None:
    """Build the UNet's plan from a graph that lacks one bias; its description is right."""
    build(bundle, flavour)
    source = bundle / "unet.onnx"
    model = onnx.load(str(source), load_external_data=True)
    bias = next(t for t in model.graph.initializer if t.name == "conv_in.bias")
    bias.raw_data = bytes(len(bias.raw_data))
    wrong = bundle.parent / "wrong.onnx"
    onnx.save(model, str(wrong))
    path = bundle / "unet.plan"
    plan = json.loads(path.read_bytes())
    plan |= {"graph": str(wrong), "digest": hashlib.sha256(wrong.read_bytes()).hexdigest()}
    path.write_bytes(json.dumps(plan).encode())
    relist(bundle)
