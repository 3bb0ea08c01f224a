"""Building a plan from an ONNX graph, with both flavours of TensorRT, without torch or onnx.

TensorRT-RTX builds for any device on any machine; classic TensorRT builds for the device here.
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
from itertools import chain
from pathlib import Path
from typing import TypeVar, cast

import numpy as np

from sld_edge.engines.base import TensorSpec
from sld_edge.engines.cache import TIMING, entry_name, private_folder
from sld_edge.engines.errors import EngineError, OutputError
from sld_edge.engines.files import write_whole
from sld_edge.engines.tensorrt.api import TensorRT
from sld_edge.engines.tensorrt.build_log import BuildLog
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
from sld_edge.engines.tensorrt.plan_info import PlanInfo, PlanTensor, info_path, named_shape
from sld_edge.engines.tensorrt.target import Target, supported_capabilities, unsupported_capability

Stage = Callable[[str], None]
T = TypeVar("T")
_OUT_OF_MEMORY = re.compile(
    r"out of memory|outofmemory|memory allocation|bad_alloc|alloc\w* fail|insufficient\w* memory"
    r"|not enough memory|cudaError 2\b|insufficient workspace",
    re.IGNORECASE,
)
_RESIZE = "RUNTIME_ACTIVATION_RESIZE_10_10"  # smaller shapes take less activation memory
_WHERE_PRESENT = (
    "STRICT_NANS",  # guidance and decoder report NaN: no rule like 0 * x = 0 may hide it
    "REQUIRE_USER_ALLOCATION",  # TensorRT-RTX: a run allocates nothing, so it can be captured
)
_DECOMPOSED = "export the bundle with --attention decomposed"
_SMALLER = (
    "build for a smaller --size and --batch, set --workspace (MiB) on classic TensorRT, close "
    "other programs, or add swap"
)


def build_plan(
    draft: PlanInfo,
    graph: AbstractContextManager[Path],
    path: Path,
    *,
    settings: BuildSettings,
    target: Target,
    stage: Stage = lambda name: None,
    log: BuildLog | None = None,
) -> PlanInfo:
    """Build one plan, write it to `path` and its description beside it, each whole.

    Args:
        draft: the description without hash, size and time; its inputs hold the profiles.
        graph: gives the ONNX file, and ends when TensorRT has read the file.
        path: the plan's place; an existing plan is replaced.
        settings: how to build.
        target: from `build_target`.
        stage: called with "parsing" and "building".
        log: an empty one, for a caller who wants to know the plan's layers.

    Raises:
        EngineError: TensorRT cannot read or build the graph, or ran out of memory.
        OutputError: the plan cannot be written.
    """
    start = time.perf_counter()
    log = BuildLog() if log is None else log
    with _Work(draft, target, log) as work:
        stage("parsing")
        with graph as source:
            work.parse(source)
        stage("building")
        content = memoryview(work.build(settings))
        info = replace(
            draft,
            sha256=hashlib.sha256(content).hexdigest(),
            bytes=content.nbytes,
            contents=log.contents(),
            seconds=round(time.perf_counter() - start, 2),
        )
    write_whole(path, cast(bytes, content))  # a buffer: a copy would take gigabytes
    write_whole(info_path(path), info.to_json().encode())
    return info


class _Work:
    """One build: TensorRT's objects, which live until the end of the `with` block."""

    def __init__(self, draft: PlanInfo, target: Target, log: BuildLog) -> None:
        self.draft, self.target = draft, target
        self._trt = trt = target.trt
        self._log = Log(cast(TensorRT, trt), log.take)  # the module has both types
        self._stopped = threading.Event()
        self._builder: Builder = trt.Builder(self._log.logger)
        # From TensorRT 11 on every network is strongly typed, and the flag may be gone.
        typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        self._network = self._builder.create_network(0 if typed is None else 1 << int(typed))
        self._parser: OnnxParser = trt.OnnxParser(self._network, self._log.logger)

    def __enter__(self) -> _Work:
        return self

    def __exit__(self, *exc: object) -> None:
        del self._parser, self._network, self._builder  # gigabytes, before the plan is written

    def parse(self, source: Path) -> None:
        """Read the graph and compare its tensors with the draft's."""
        if not self._native(lambda: self._parser.parse_from_file(str(source))):
            raise self._unreadable()
        _check_described(self.draft, self._network, self._trt)

    def build(self, settings: BuildSettings) -> bytes:
        """Return the plan as a buffer."""
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
        """Make a long call in another thread, so that Ctrl-C can stop it."""
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
                done.wait()  # in Python 3.11 it is not safe to interrupt `join`
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
        problem = f"{self.draft.component}: {self.target.name} cannot read the graph"
        if not self._parser.num_errors:
            return EngineError(problem, got=self._log.last(), do=_DECOMPOSED)
        error = self._parser.get_error(0)
        reason = " ".join(error.desc().split())[:300]
        if _OUT_OF_MEMORY.search(reason):
            return _out_of_memory(self.draft.component, reason)
        problem += f", node {error.node_name()!r} ({error.node_operator()})"
        return EngineError(problem, got=reason, do=_DECOMPOSED)


def _monitor(trt: TensorRTBuilder, stopped: threading.Event) -> object:
    """Return a monitor, which TensorRT asks at every step whether to go on."""

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


def _check_described(draft: PlanInfo, network: NetworkDefinition, trt: TensorRTBuilder) -> None:
    """Refuse a network whose inputs or outputs are not as the draft describes them."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    got = [
        [_spec(tensor, described, trt) for tensor in tensors]
        for tensors, described in ((inputs, draft.inputs), (outputs, draft.outputs))
    ]
    expected = [[tensor.spec for tensor in tensors] for tensors in (draft.inputs, draft.outputs)]
    if got != expected:
        raise EngineError(
            f"{draft.component}: the graph is not as bundle.json describes it",
            got=_shown(got),
            expected=_shown(expected),
            do="export the bundle again",
        )


def _spec(
    tensor: NetworkTensor, described: Sequence[PlanTensor], trt: TensorRTBuilder
) -> TensorSpec:
    return TensorSpec(
        name=tensor.name,
        dtype=np.dtype(trt.nptype(tensor.dtype)).name,
        shape=named_shape(tensor.name, tensor.shape, described),
    )


def _shown(specs: Sequence[Sequence[TensorSpec]]) -> str:
    return ", ".join(f"{spec.name} {spec.dtype} {list(spec.shape)}" for spec in chain(*specs))


def _config(
    builder: Builder, draft: PlanInfo, settings: BuildSettings, target: Target
) -> BuilderConfig:
    trt, config = target.trt, builder.create_builder_config()
    # TF32 keeps only 10 of FP32's 23 bits.
    config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the log names every layer
    for flag in _WHERE_PRESENT:
        if hasattr(trt.BuilderFlag, flag):
            config.set_flag(getattr(trt.BuilderFlag, flag))
    if hasattr(trt.PreviewFeature, _RESIZE):
        config.set_preview_feature(getattr(trt.PreviewFeature, _RESIZE), True)
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
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)  # it is refitted with the same weights
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
        if not config.set_compute_capability(member, index):  # it returns False without a reason
            others = [each for each in supported_capabilities(target.trt) if each != name]
            raise unsupported_capability(name, others)


# --- timings kept between builds ---------------------------------------------------------


def timing_cache_path(target: Target) -> Path | None:
    """Return the file with the timings of a version and device; None where the cache is off."""
    folder = private_folder(TIMING)
    if folder is None:
        return None
    name = entry_name(target.version, *target.devices, *target.compute_capabilities)
    return folder / f"{name}.cache"


def _use_timings(config: BuilderConfig, target: Target) -> None:
    path, stored = timing_cache_path(target), b""
    if path is not None:
        with contextlib.suppress(OSError):
            stored = path.read_bytes()
    for content in dict.fromkeys((stored, b"")):  # TensorRT refuses a damaged file: start empty
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            return


def _keep_timings(config: BuilderConfig, target: Target) -> None:
    path, cache = timing_cache_path(target), config.get_timing_cache()
    if path is not None and cache is not None:
        with contextlib.suppress(OSError, OutputError):  # without the cache builds are only slower
            write_whole(path, bytes(cache.serialize()))


# --- errors ------------------------------------------------------------------------------


def _failure(name: str, log: Log) -> EngineError:
    for line in log.lines:
        if _OUT_OF_MEMORY.search(line):
            return _out_of_memory(name, line)
    return EngineError(f"{name}: TensorRT did not build it", got=log.last(), do="report this")


def _out_of_memory(name: str, line: str | None = None) -> EngineError:
    return EngineError(f"{name}: not built, out of memory", got=line, do=_SMALLER)


@contextmanager
def _silenced() -> Iterator[None]:
    """Discard the prints of native code: the log has its errors, reported in one line."""
    with contextlib.ExitStack() as stack:
        for number in (1, 2):
            with contextlib.suppress(OSError):  # a service may run without one of them
                original = os.dup(number)
                stack.callback(_restore, original, number)
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, number)
                os.close(null)
        yield


def _restore(original: int, number: int) -> None:
    os.dup2(original, number)
    os.close(original)
