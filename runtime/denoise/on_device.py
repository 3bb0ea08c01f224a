"""Runs a job on a device: latents, momentum, history and predictions stay in its memory.

A call is a launch between two small copies within the device: the numbers of the call (timestep,
sampler row, safety) come in, its figures go out. Every buffer is allocated once for a batch and
size, and guidance reads the buffer that the UNet writes. The state that guidance changes has two
buffers, read and written in turn, so a graph's inputs and outputs never overlap. There is a CUDA
graph for each turn and each kind of call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sld_edge.engines.base import Array
from sld_edge.engines.cuda.device import Arena, Bound, DeviceEngine, DeviceTensor, Event, Graph
from sld_edge.engines.errors import InputError
from sld_edge.runtime.contract import FIGURES, NUMBERS, PREDICTIONS, STATE, shape_of
from sld_edge.runtime.denoise.job import Conditioning, Floats, Job
from sld_edge.runtime.denoise.loop import Figures
from sld_edge.runtime.denoise.schedule import Call
from sld_edge.runtime.manifest import SHALLOW

_Layout = dict[str, tuple[str, tuple[int, ...]]]
_Key = tuple[Call, int]  # the work of a call, and its turn
_AHEAD = 2  # calls in the queue before the host waits: the device is never idle, Ctrl-C works


class DeviceStage:
    """Buffers, bindings and CUDA graphs for a batch and size; jobs use them one after another."""

    def __init__(
        self,
        engines: Mapping[str, DeviceEngine],
        *,
        latents: tuple[int, ...],
        conditioning: Conditioning,
    ) -> None:
        """Allocate the buffers.

        Args:
            engines: the engines of the first job's `components`; later jobs may add engines.
            latents: shape of the latents, [B,4,h,w].
            conditioning: gives the shapes of its inputs and the number of concepts.

        Raises:
            EngineError: out of device memory.
        """
        self.device = engines["unet"].device
        self.engines = dict(engines)
        self.latents = latents
        self.shapes = conditioning.shapes()
        self.concepts = conditioning.concepts
        count, _, height, width = latents
        self._count = count
        sizes = {"B": count, "n": self.concepts, "h": height, "w": width}
        rows = (2 + self.concepts) * count
        self._branch = tuple(conditioning.branch)
        self._image = tuple(conditioning.image)
        layout: _Layout = {
            f"{name}/{turn}": ("float32", shape_of(name, sizes))
            for turn in (0, 1)
            for name in STATE
        }
        layout |= {
            "unet_latents": ("float32", latents),
            "noise_pred": ("float32", (rows, *latents[1:])),
            **self._deep_layout(),
            "noise": ("float32", latents),
        }
        for name, array in conditioning.branch.items():
            layout[name] = ("float32", array.shape)
            # A call with only the prompt's branch reads its rows from an aligned address.
            layout[f"{name}/text"] = ("float32", (count, *array.shape[1:]))
        layout |= {name: ("float32", array.shape) for name, array in conditioning.image.items()}
        layout["guidance_scale"] = ("float32", (count,))
        layout["timestep"] = ("float32", (count,))
        layout |= {name: ("float32", shape_of(name, sizes)) for name in (*NUMBERS[1:], *FIGURES)}
        self.arena = Arena(self.device, layout)
        self.numbers = self.arena.span(NUMBERS[0], NUMBERS[-1])
        self.figures = self.arena.span(FIGURES[0], FIGURES[-1])
        self._unets: dict[tuple[str, int], Bound] = {}  # by component and number of branches
        self._bounds: dict[_Key, list[Bound]] = {}
        self._graphs: dict[_Key, Graph] = {}
        self._settled: dict[_Key, int] = {}  # the workspace of the key's last run
        self._job_memory: Arena | None = None
        self._marks: list[Event] = []
        self.owner: DeviceStepper | None = None  # the stepper of the job in the buffers

    def job_memory(self, calls: int, *, noisy: bool) -> Arena:
        """Return memory for every call's numbers, figures and, where `noisy`, fresh noise."""
        layout: _Layout = {
            "numbers": ("uint8", (calls, self.numbers.nbytes)),
            "figures": ("uint8", (calls, self.figures.nbytes)),
            "noise": ("float32", (calls if noisy else 1, *self.latents)),
        }
        if self._job_memory is None or not self._job_memory.holds(layout):
            if self._job_memory is not None:
                self._job_memory.close()
                self._job_memory = None  # where the next line fails, nothing uses it again
            self._job_memory = Arena(self.device, layout)
        return self._job_memory

    def marks(self, count: int) -> list[Event]:
        """Return `count` or more marks in time; every job uses the same marks."""
        self._marks += [self.device.event() for _ in range(count - len(self._marks))]
        return self._marks

    def launch(self, call: Call, turn: int) -> None:
        """Queue the UNet and guidance, which read the state of `turn` and write the other state."""
        key = (call, turn)
        if key not in self._bounds:
            self._bounds[key] = self._bind(call, turn)
        generation = self.device.workspace.generation
        if self._settled.get(key) != generation:
            # A CUDA graph holds the address of the old workspace, and the first run with a new
            # workspace may perform calls that are not allowed during capture.
            self._drop_graph(key)
            self._queue(key)
            self._settled[key] = generation
        elif all(self.engines[name].capturable for name in _components(call)):
            if key not in self._graphs:
                self._graphs[key] = self.device.capture(lambda: self._queue(key))
            self._graphs[key].launch()
        else:
            self._queue(key)

    def close(self) -> None:
        """Release buffers, marks and CUDA graphs."""
        self.owner = None
        self.device.synchronize()  # what is queued still uses all of them
        for key in list(self._graphs):
            self._drop_graph(key)
        self._bounds.clear()
        self._unets.clear()
        for mark in self._marks:
            mark.close()
        if self._job_memory is not None:
            self._job_memory.close()
        self.arena.close()

    def _queue(self, key: _Key) -> None:
        for bound in self._bounds[key]:
            bound.enqueue()

    def _drop_graph(self, key: _Key) -> None:
        if key in self._graphs:
            self._graphs.pop(key).close()

    def _deep_layout(self) -> _Layout:
        """Return the layout of the UNet's deep features; empty for a UNet without this output."""
        rows, (_, _, height, width) = (2 + self.concepts) * self._count, self.latents
        return {
            spec.name: (spec.dtype, (rows, int(spec.shape[1]), height, width))
            for spec in self.engines["unet"].outputs
            if spec.name == "deep"
        }

    def _bind(self, call: Call, turn: int) -> list[Bound]:
        unet, guidance = _components(call)
        key = (unet, call.branches)
        if key not in self._unets:  # both turns share it: only guidance reads and writes the state
            self._unets[key] = self.engines[unet].bind(self._unet_tensors(call))
        bound = self.engines[guidance].bind(self._guidance_tensors(call, turn))
        return [self._unets[key], bound]

    def _unet_tensors(self, call: Call) -> dict[str, DeviceTensor]:
        arena, rows = self.arena, call.branches * self._count
        alone = call.branches == 1
        return {
            "latents": arena["unet_latents"],
            "timestep": arena["timestep"],
            **{
                name: arena[f"{name}/text"] if alone else arena[name].part(0, rows)
                for name in self._branch
            },
            **{name: arena[name] for name in self._image},
            "noise_pred": arena["noise_pred"].part(0, rows),
            **{name: arena[name].part(0, rows) for name in self._deep_layout()},
        }

    def _guidance_tensors(self, call: Call, turn: int) -> dict[str, DeviceTensor]:
        arena, count, concepts = self.arena, self._count, self.concepts
        predicted = arena["noise_pred"]
        uncond, text = (predicted.part(min(k, call.branches - 1) * count, count) for k in (0, 1))
        safety = replace(uncond, shape=(1, *self.latents))
        if call.safe:
            rows = predicted.part(2 * count, concepts * count)
            safety = replace(rows, shape=(concepts, *self.latents))
        shared = ("unet_latents", "noise", "guidance_scale", "row", "safety", *FIGURES)
        return {
            **dict(zip(PREDICTIONS, (uncond, text, safety), strict=True)),
            **{name: arena[name] for name in shared},
            "concept_strength": arena["concept_strength"].part(0, safety.shape[0]),
            **{name: arena[f"{name}/{turn}"] for name in STATE},
            **{f"{name}_next": arena[f"{name}/{1 - turn}"] for name in STATE},
        }


def _components(call: Call) -> tuple[str, ...]:
    """Return the graphs that a call runs, in order."""
    return (SHALLOW if call.cached else "unet", "guidance")


class DeviceStepper:
    """Runs a job on a stage; latents, edit map and figures are copied to the host when read.

    A stage belongs to the job that started last. If an older job goes on, it raises an error,
    because the buffers hold the newer job's latents.
    """

    def __init__(self, stage: DeviceStage, job: Job) -> None:
        """Take over the stage and queue the copies of the job's first values."""
        stage.owner = self
        self._stage, self._job = stage, job
        self._device = device = stage.device
        self._calls = 0
        self._safe: list[bool] = []
        table = job.table
        noisy = bool((table.s > 0).any())
        self._memory = stage.job_memory(table.calls, noisy=noisy)
        device.upload(self._memory["numbers"], self._packed_numbers())
        if noisy:
            # Only calls that add noise draw from the sources, in order, as on the host.
            silence = np.zeros(stage.latents, np.float32)
            fresh = [job.fresh_noise() if s > 0 else silence for s in table.s]
            device.upload(self._memory["noise"], np.stack(fresh))
        self._noisy = noisy
        latents = job.starting_latents()
        conditioning, count = job.conditioning, len(latents)
        start = {
            "latents/0": latents,
            "unet_latents": latents * np.float32(table.c_in[0]),
            "guidance_scale": job.guidance_scale(),
            **conditioning.branch,
            **{
                f"{name}/text": rows[count : 2 * count]
                for name, rows in conditioning.branch.items()
            },
            **conditioning.image,
        }
        for name, array in start.items():
            device.upload(stage.arena[name], array)
        for name in ("momentum/0", "history/0", "edit_map/0", "noise"):
            device.clear(stage.arena[name])
        self._marks = stage.marks(table.calls + 1)
        self._marks[0].record()

    @property
    def calls(self) -> int:
        """The number of calls that were queued."""
        return self._calls

    def call(self, index: int, call: Call) -> None:
        """Queue the branches of a call, then guidance.

        Raises:
            InputError: another run has begun on the stage.
        """
        self._require_stage()
        stage, memory = self._stage, self._memory
        self._move(stage.numbers, memory["numbers"].part(index, 1))
        if self._noisy:
            self._move(stage.arena["noise"], memory["noise"].part(index, 1))
        stage.launch(call, index % 2)
        self._move(memory["figures"].part(index, 1), stage.figures)
        self._calls = index + 1
        self._safe.append(call.safe)
        self._marks[self._calls].record()
        if self._calls > _AHEAD:
            self._marks[self._calls - _AHEAD].wait()

    def read(self, name: Literal["latents", "edit_map"]) -> Floats:
        """Wait, and return the latents [B,4,h,w] or the edit map [B,h,w] after the last call.

        Raises:
            InputError: another run has begun on the stage.
            NumericsError: NaN or infinity in one of the calls so far.
        """
        self._require_stage()
        array = self._device.download(self._stage.arena[f"{name}/{self._calls % 2}"])
        self._figures()
        return array

    def figures(self) -> Figures:
        """Wait, and return the figures of all calls so far.

        Raises:
            InputError: another run has begun on the stage.
            NumericsError: NaN or infinity in one of the calls.
        """
        self._require_stage()
        figures = self._figures()
        marks = self._marks[: self._calls + 1]
        return Figures(
            share=figures["share"],
            strength=figures["strength"],
            concept_strength=figures["concept_strength"],
            seconds=[later.seconds_since(mark) for mark, later in pairwise(marks)],
        )

    def _require_stage(self) -> None:
        if self._stage.owner is not self:
            raise InputError(
                "another run has begun on this pipeline, and a device holds one run at a time",
                do="finish a run before the next run, or load a pipeline for each run",
            )

    def _figures(self) -> dict[str, Floats]:
        raw = self._device.download(self._memory["figures"].part(0, self._calls))
        first = self._stage.figures.address
        figures = {}
        for name in FIGURES:
            tensor = self._stage.arena[name]
            begin = tensor.address - first
            column = np.ascontiguousarray(raw[:, begin : begin + tensor.nbytes])
            figures[name] = column.view(np.float32).reshape(-1, *tensor.shape)
        unsafe = [not safe for safe in self._safe]
        figures["concept_strength"][unsafe] = 0  # without safety branches it is not all written
        for index, finite in enumerate(figures["finite"]):
            self._job.refuse(finite, index)
        return figures

    def _packed_numbers(self) -> NDArray[np.uint8]:
        """Return every call's numbers in the layout of the device, uint8 [calls,bytes]."""
        job, numbers = self._job, self._stage.numbers
        rows = job.table.rows()
        packed = np.zeros((job.table.calls, numbers.nbytes), np.uint8)
        for index, record in enumerate(packed):
            values: dict[str, Array] = {
                "timestep": job.timestep(index),
                "row": rows[index],
                "safety": job.safety(index),
            }
            for name, array in values.items():
                begin = self._stage.arena[name].address - numbers.address
                record[begin : begin + array.nbytes] = (
                    np.ascontiguousarray(array).view(np.uint8).reshape(-1)
                )
        return packed

    def _move(self, target: DeviceTensor, source: DeviceTensor) -> None:
        self._device.copy(target.address, source.address, target.nbytes)
