"""A bundle that is loaded to be tested, with the loader that knows its plans and its device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from sld_edge.engines.base import Engine
from sld_edge.engines.cuda.device import Device
from sld_edge.engines.onnxruntime.engine import OrtEngine
from sld_edge.runtime.loader import Loader, LoadSettings
from sld_edge.runtime.manifest import Component
from sld_edge.runtime.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A loaded bundle; close the pipeline to unload it."""

    loader: Loader
    pipeline: Pipeline

    @property
    def device(self) -> Device | None:
        """The device whose memory the loop uses; None on the CPU."""
        return self.loader.device if self.loader.on_device else None

    @property
    def largest_batch(self) -> int | None:
        """The most images that the plans take in one batch; None without a limit."""
        return self.loader.largest_batch(len(self.pipeline.bundle.manifest.safety_concepts))

    def form_of(self, name: str) -> str:
        """Describe a component as it runs: provider, arithmetic, form of its attention."""
        component = self.pipeline.bundle.manifest.components[name]
        plan = self.loader.plans.get(name)
        # A plan is built from the products of the operator Attention.
        form = (
            component.attention if plan is None or component.attention == "none" else "decomposed"
        )
        attention = "" if form == "none" else f", attention {form}"
        return f"{self.loader.runs_on(name)} {component.precision}{attention}"


Load = Callable[[bool], AbstractContextManager[Subject]]  # takes: with CUDA graphs


@contextmanager
def loaded(
    bundle: Path | None, settings: LoadSettings, *, cuda_graph: bool = True
) -> Iterator[Subject]:
    """Load a bundle; it is unloaded in the end."""
    settings = replace(settings, cuda_graph=cuda_graph)
    with _opened(Loader.open(bundle, settings)) as subject:
        yield subject


@contextmanager
def reference(bundle: Path | None) -> Iterator[Subject]:
    """Load a bundle's exported graphs for the CPU, unchanged: nothing is fused or prepared."""
    with _opened(_AsExported.open(bundle, LoadSettings(provider="cpu", quiet=True))) as subject:
        yield subject


class _AsExported(Loader):
    """Loads every graph of the bundle for the CPU, unchanged."""

    def load(self, name: str, component: Component) -> Engine:
        """Return a component's engine."""
        return OrtEngine(self.bundle.graph(component).path, as_is=True)


@contextmanager
def _opened(loader: Loader) -> Iterator[Subject]:
    with Pipeline(loader) as pipeline:
        yield Subject(loader=loader, pipeline=pipeline)
