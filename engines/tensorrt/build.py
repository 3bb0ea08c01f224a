"""Building a plan from an ONNX graph, with both flavours of TensorRT. Loads neither torch nor onnx.

TensorRT-RTX builds for any devices on any machine, classic TensorRT for the device it runs on.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Self, TypeVar, cast

import numpy as np

from sld_edge.engines.base import TensorSpec
from sld_edge.engines.cache import TIMING, private_folder
from sld_edge.engines.errors import (
    EngineError,
    OutputError,
)
from sld_edge.engines.files import write_whole
from sld_edge.engines.tensorrt.api import TensorRT
from sld_edge.engines.tensorrt.build_settings import BuildSettings
from sld_edge.engines.tensorrt.builder_api import (
    Builder,
    BuilderConfig,
    NetworkDefinition,
    NetworkTensor,
    OnnxParser,
    TensorRTBuilder,
)
from sld_edge.engines.tensorrt.engine import Log
from sld_edge.engines.tensorrt.plan_info import PlanInfo, PlanTensor, info_path
from sld_edge.engines.tensorrt.target import Target, capabilities_taken, refused

Stage = Callable[[str], None]
T = TypeVar("T")
# What TensorRT says when a head is of a size that its Attention has no kernel for.
_NO_ATTENTION = ("is_decomposable", "not supported by a dedicated kernel")
_OUT_OF_MEMORY = re.compile(
    r"out of memory|outofmemory|memory allocation|bad_alloc|alloc\w* fail|insufficient\w* memory"
    r"|not enough memory|cudaError 2\b|insufficient workspace",
    re.IGNORECASE,
)
_DECOMPOSED = "export the bundle with --attention decomposed"
_SMALLER = (
    "build for a smaller --size and --batch, set --workspace (MiB) on classic TensorRT, close "
    "other programs, or add swap"
)


class AttentionError(EngineError):
    """TensorRT has no kernel for an Attention of this kind; the decomposed form builds."""


def build_plan(
    draft: PlanInfo,
    graph: AbstractContextManager[Path],
    path: Path,
    *,
    settings: BuildSettings,
    target: Target,
    stage: Stage | None = None,
) -> PlanInfo:
    """Build one plan, write it to `path` and its description beside it, each whole.

    Args:
        draft: the description but for hash, size and time; its inputs hold the profiles.
        graph: gives the ONNX file; it is left when TensorRT has read it.
        path: where the plan goes; what lies there is replaced.
        settings: how to build.
        target: from `build_target`.
        stage: is told "parsing" and "building".

    Raises:
        AttentionError: TensorRT has no kernel for the graph's Attention.
        EngineError: TensorRT cannot read or build the graph, or ran out of memory.
        OutputError: the plan cannot be written.
    """
    start = time.perf_counter()
    stage = stage if stage is not None else _silence
    with _Work(draft, target) as work:
        stage("parsing")
        with graph as source:
            work.parse(source)
        stage("building")
        content = memoryview(work.build(settings))
        info = replace(
            work.draft,
            sha256=hashlib.sha256(content).hexdigest(),
            bytes=content.nbytes,
            seconds=round(time.perf_counter() - start, 2),
        )
    write_whole(path, cast(bytes, content))  # bytes to a file, without a copy of gigabytes
    write_whole(info_path(path), info.to_json().encode())
    return info


class _Work:
    """One build: TensorRT's objects, which live until it is left."""

    def __init__(self, draft: PlanInfo, target: Target) -> None:
        self.draft, self.target = draft, target
        self._trt = trt = target.trt
        self._log = Log(cast(TensorRT, trt))  # one module, of two pages
        self._stopped = threading.Event()
        self._builder: Builder = trt.Builder(self._log.logger)
        # From TensorRT 11 on every network is strongly typed, and the flag may be gone.
        typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        self._network = self._builder.create_network(0 if typed is None else 1 << int(typed))
        self._parser: OnnxParser = trt.OnnxParser(self._network, self._log.logger)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        del self._parser, self._network, self._builder  # gigabytes, before the plan is written

    def parse(self, source: Path) -> None:
        """Read the graph and fill the draft's tensors in."""
        if not self._native(lambda: self._parser.parse_from_file(str(source))):
            raise self._unreadable()
        self.draft = _described(self.draft, self._network, self._trt)

    def build(self, settings: BuildSettings) -> bytes:
        """Return the plan, a buffer."""
        config = _config(self._builder, self.draft, settings, self.target)
        monitor = _monitor(self._trt, self._stopped)
        config.progress_monitor = monitor
        plan = self._native(lambda: self._builder.build_serialized_network(self._network, config))
        if plan is None:
            raise _failure(self.draft.component, self._log)
        if self.target.engine == "tensorrt":
            _keep_timings(config, self.target)
        return plan

    def _native(self, call: Callable[[], T]) -> T:
        """Make a long call where Ctrl-C can stop it: beside the main thread."""
        results: list[T] = []
        errors: list[BaseException] = []
        done = threading.Event()

        def work() -> None:
            try:
                results.append(call())
            except BaseException as error:
                errors.append(error)
            finally:
                done.set()

        thread = threading.Thread(target=work)
        with _silenced():
            thread.start()
            try:
                done.wait()  # joining a thread is not safe to interrupt in Python 3.11
            except BaseException:
                self._stopped.set()
                done.wait()
                raise
        thread.join()
        for error in errors:
            if isinstance(error, MemoryError):
                raise _out_of_memory(self.draft.component) from error
            raise error
        return results[0]

    def _unreadable(self) -> EngineError:
        what = f"{self.draft.component}: {self.target.name} cannot read the graph"
        if not self._parser.num_errors:
            return EngineError(what, got=self._log.last(), do=_DECOMPOSED)
        error = self._parser.get_error(0)
        reason = " ".join(error.desc().split())[:300]
        if _OUT_OF_MEMORY.search(reason):
            return _out_of_memory(self.draft.component, reason)
        what += f", node {error.node_name()!r} ({error.node_operator()})"
        return EngineError(what, got=reason, do=_DECOMPOSED)


def _monitor(trt: TensorRTBuilder, stopped: threading.Event) -> object:
    """Return what TensorRT asks at every step whether to go on."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]  # TensorRT has no types
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            pass

        def phase_finish(self, name: str) -> None:
            pass

        def step_complete(self, name: str, step: int) -> bool:
            return not stopped.is_set()

    return Monitor()


# --- network and config ---------------------------------------------------------------------------


def _described(draft: PlanInfo, network: NetworkDefinition, trt: TensorRTBuilder) -> PlanInfo:
    """Fill in the tensors as the network has them; they must be those the bundle names."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    found = replace(
        draft,
        inputs=tuple(_tensor(tensor, draft.inputs, trt) for tensor in inputs),
        outputs=tuple(_tensor(tensor, draft.outputs, trt) for tensor in outputs),
    )
    if found != draft:
        raise EngineError(
            f"{draft.component}: the graph is not as bundle.json describes it",
            got=", ".join(_shown(tensor) for tensor in found.inputs + found.outputs),
            expected=", ".join(_shown(tensor) for tensor in draft.inputs + draft.outputs),
            do="export the bundle again",
        )
    return found


def _tensor(tensor: NetworkTensor, known: Sequence[PlanTensor], trt: TensorRTBuilder) -> PlanTensor:
    named = next((each for each in known if each.spec.name == tensor.name), None)
    names = named.spec.shape if named is not None else ()
    # TensorRT forgets the names of an output's dimensions, so they come from the bundle.
    shape = tuple(
        size if size >= 0 else (names[axis] if axis < len(names) else "?")
        for axis, size in enumerate(tensor.shape)
    )
    dtype = np.dtype(trt.nptype(tensor.dtype)).name
    return PlanTensor(
        spec=TensorSpec(name=tensor.name, dtype=dtype, shape=shape),
        profile=named.profile if named is not None else None,
    )


def _shown(tensor: PlanTensor) -> str:
    return f"{tensor.spec.name} {tensor.spec.dtype} {list(tensor.spec.shape)}"


def _config(
    builder: Builder, draft: PlanInfo, settings: BuildSettings, target: Target
) -> BuilderConfig:
    trt, config = target.trt, builder.create_builder_config()
    # TF32 keeps 10 of FP32's 23 bits; who asks for FP32 asks for all.
    config.clear_flag(trt.BuilderFlag.TF32)
    if settings.optimization_level is not None:
        config.builder_optimization_level = settings.optimization_level
    if settings.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace)
    if settings.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if settings.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if settings.strip_weights:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)  # it gets the same weights back
    if target.engine == "tensorrt":
        _use_timings(config, target)
    else:
        _set_capabilities(config, target)
    shapes = builder.create_optimization_profile()
    for tensor in draft.inputs:
        if tensor.profile is not None:
            shapes.set_shape(tensor.spec.name, *tensor.profile)
    if config.add_optimization_profile(shapes) < 0:
        raise EngineError(f"{draft.component}: TensorRT refused the sizes", do="report this")
    return config


def _set_capabilities(config: BuilderConfig, target: Target) -> None:
    config.num_compute_capabilities = len(target.compute_capabilities)
    for index, name in enumerate(target.compute_capabilities):
        member = getattr(target.trt.ComputeCapability, "SM" + name.replace(".", ""))
        if not config.set_compute_capability(member, index):  # it only says False
            raise refused(name, [n for n in capabilities_taken(target.trt) if n != name])


# --- timings that are kept between builds ---------------------------------------------------------


def timing_cache_path(target: Target) -> Path | None:
    """Return where the timings of a version and device are kept; None where caching is off."""
    folder = private_folder(TIMING)
    if folder is None:
        return None
    identity = "\n".join((target.version, *target.devices, *target.compute_capabilities))
    return folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.cache"


def _use_timings(config: BuilderConfig, target: Target) -> None:
    path, kept = timing_cache_path(target), b""
    if path is not None:
        with contextlib.suppress(OSError):
            kept = path.read_bytes()
    for content in dict.fromkeys((kept, b"")):  # what it refuses, being damaged, is measured anew
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            return


def _keep_timings(config: BuilderConfig, target: Target) -> None:
    path, cache = timing_cache_path(target), config.get_timing_cache()
    if path is not None and cache is not None:
        with contextlib.suppress(OSError, OutputError):  # a cache costs only time
            write_whole(path, bytes(cache.serialize()))


# --- what goes wrong ------------------------------------------------------------------------------


def _failure(name: str, log: Log) -> EngineError:
    if any(sign in line for line in log.lines for sign in _NO_ATTENTION):
        return AttentionError(
            f"{name}: TensorRT has no kernel for its Attention",
            do=_DECOMPOSED,
        )
    for line in log.lines:
        if _OUT_OF_MEMORY.search(line):
            return _out_of_memory(name, line)
    return EngineError(f"{name}: TensorRT did not build it", got=log.last(), do="report this")


def _out_of_memory(name: str, line: str | None = None) -> EngineError:
    return EngineError(f"{name}: not built, out of memory", got=line, do=_SMALLER)


@contextmanager
def _silenced() -> Iterator[None]:
    """Send what native code prints to nowhere: the log has it, and we say it in one line."""
    with contextlib.ExitStack() as stack:
        for number in (1, 2):
            with contextlib.suppress(OSError):  # a service may run without one of them
                kept = os.dup(number)
                stack.callback(_restore, kept, number)
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)
        yield


def _restore(kept: int, number: int) -> None:
    os.dup2(kept, number)
    os.close(kept)


def _silence(line: str) -> None:
    pass
