"""The loop's calls on a device: latents, momentum, history and predictions never leave it.

A call is two small copies within the device around one launch: this call's numbers (timestep,
sampler row, safety) in, its figures out. Every buffer is laid out once for a batch and size; the
UNet writes where guidance reads. The state that guidance changes has two buffers that take turns,
so a graph's inputs and outputs never overlap; each turn and number of branches is one CUDA graph.
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
_Key = tuple[Call, int]  # a call's work, and its turn
_AHEAD = 2  # calls that are queued before the host waits: the device never idles, Ctrl-C works


class DeviceStage:
    """The buffers, bindings and graphs for one batch and size, used by one job after another."""

    def __init__(
        self,
        engines: Mapping[str, DeviceEngine],
        *,
        latents: tuple[int, ...],
        conditioning: Conditioning,
    ) -> None:
        """Lay out the buffers.

        Args:
            engines: those that the first job's `components` names; later ones may bring more.
            latents: shape [B,4,h,w].
            conditioning: whose shapes and number of concepts.

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
            # A run of the prompt's branch alone reads its rows from an aligned place.
            layout[f"{name}/text"] = ("float32", (count, *array.shape[1:]))
        layout |= {name: ("float32", array.shape) for name, array in conditioning.image.items()}
        layout["guidance_scale"] = ("float32", (count,))
        layout["timestep"] = ("float32", (count,))
        layout |= {name: ("float32", shape_of(name, sizes)) for name in (*NUMBERS[1:], *FIGURES)}
        self.arena = Arena(self.device, layout)
        self.numbers = self.arena.span(NUMBERS[0], NUMBERS[-1])
        self.figures = self.arena.span(FIGURES[0], FIGURES[-1])
        self._bounds: dict[_Key, list[Bound]] = {}
        self._graphs: dict[_Key, Graph] = {}
        self._settled: dict[_Key, int] = {}  # workspace that a key has run with
        self._job_memory: Arena | None = None
        self._marks: list[Event] = []
        self.owner: DeviceStepper | None = None  # whose job the buffers hold

    def job_memory(self, calls: int, *, noisy: bool) -> Arena:
        """Return memory for every call's numbers, figures and, where `noisy`, fresh noise."""
        layout: dict[str, tuple[str, tuple[int, ...]]] = {
            "numbers": ("uint8", (calls, self.numbers.nbytes)),
            "figures": ("uint8", (calls, self.figures.nbytes)),
            "noise": ("float32", (calls if noisy else 1, *self.latents)),
        }
        if self._job_memory is None or not self._job_memory.holds(layout):
            if self._job_memory is not None:
                self._job_memory.close()
            self._job_memory = Arena(self.device, layout)
        return self._job_memory

    def marks(self, count: int) -> list[Event]:
        """Return `count` marks, the same ones for every job."""
        self._marks += [self.device.event() for _ in range(count - len(self._marks))]
        return self._marks

    def launch(self, call: Call, turn: int) -> None:
        """Queue the UNet and guidance; from `turn`'s state to the other's."""
        key = (call, turn)
        if key not in self._bounds:
            self._bounds[key] = self._bind(call, turn)
        generation = self.device.workspace.generation
        if self._settled.get(key) != generation:
            # A graph would hold the address of the old workspace, and the first run with a new
            # one may perform calls that are not allowed during capture.
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
        """Give everything back."""
        self.owner = None
        for key in list(self._graphs):
            self._drop_graph(key)
        self._bounds.clear()
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

    def _deep_layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Lay out the UNet's deep features; a UNet that was exported without them has none."""
        branches, (_, _, height, width) = (2 + self.concepts) * self._count, self.latents
        found = [spec for spec in self.engines["unet"].outputs if spec.name == "deep"]
        return {
            spec.name: (spec.dtype, (branches, int(spec.shape[1]), height, width)) for spec in found
        }

    def _bind(self, call: Call, turn: int) -> list[Bound]:
        tensors = {
            "unet": self._unet_tensors(call),
            SHALLOW: self._unet_tensors(call),
            "guidance": self._guidance_tensors(call, turn),
        }
        return [self.engines[name].bind(tensors[name]) for name in _components(call)]

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
            behind = predicted.part(2 * count, concepts * count)
            safety = replace(behind, shape=(concepts, *self.latents))
        same = ("unet_latents", "noise", "guidance_scale", "row", "safety", *FIGURES)
        return {
            **dict(zip(PREDICTIONS, (uncond, text, safety), strict=True)),
            **{name: arena[name] for name in same},
            "concept_strength": arena["concept_strength"].part(0, safety.shape[0]),
            **{name: arena[f"{name}/{turn}"] for name in STATE},
            **{f"{name}_next": arena[f"{name}/{1 - turn}"] for name in STATE},
        }


def _components(call: Call) -> tuple[str, ...]:
    """The graphs that a call runs, in order."""
    return (SHALLOW if call.cached else "unet", "guidance")


class DeviceStepper:
    """Runs a job on a stage; what it is asked for is copied to the host then, and only then.

    A stage belongs to the job that began last. An older one that goes on is refused: the buffers
    hold the newer job's latents.
    """

    def __init__(self, stage: DeviceStage, job: Job) -> None:
        """Take the stage over and queue what a job starts from."""
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
            # One after another, as a loop would draw them: only calls that add noise draw.
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
        """How many calls it has queued."""
        return self._calls

    def call(self, index: int, call: Call) -> None:
        """Queue what a call has of the UNet, then guidance.

        Raises:
            InputError: another run has begun on the stage since.
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
            InputError: another run has begun on the stage since.
            NumericsError: NaN or infinity in one of the calls so far.
        """
        self._require_stage()
        array = self._device.download(self._stage.arena[f"{name}/{self._calls % 2}"])
        self._figures()
        return array

    def figures(self) -> Figures:
        """Wait, and return the figures of all calls so far.

        Raises:
            InputError: another run has begun on the stage since.
            NumericsError: NaN or infinity in one of them.
        """
        self._require_stage()
        found = self._figures()
        marks = self._marks[: self._calls + 1]
        return Figures(
            share=found["share"],
            strength=found["strength"],
            concept_strength=found["concept_strength"],
            seconds=[later.seconds_since(mark) for mark, later in pairwise(marks)],
        )

    def _require_stage(self) -> None:
        if self._stage.owner is not self:
            raise InputError(
                "another run has begun on this pipeline since, and a device holds one at a time",
                do="finish a run before the next, or load a pipeline for each",
            )

    def _figures(self) -> dict[str, Floats]:
        raw = self._device.download(self._memory["figures"].part(0, self._calls))
        first = self._stage.figures.address
        found = {}
        for name in FIGURES:
            tensor = self._stage.arena[name]
            begin = tensor.address - first
            bytes_of = np.ascontiguousarray(raw[:, begin : begin + tensor.nbytes])
            found[name] = bytes_of.view(np.float32).reshape(-1, *tensor.shape)
        without = [not safe for safe in self._safe]
        found["concept_strength"][without] = 0  # such a call writes only the first concept's
        for index, finite in enumerate(found["finite"]):
            self._job.refuse(finite, index)
        return found

    def _packed_numbers(self) -> NDArray[np.uint8]:
        """Every call's numbers as they lie on the device, uint8 [calls,bytes]."""
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
