"""The engines of a loaded bundle: loaded when first needed, dropped after their last use."""

from __future__ import annotations

from itertools import zip_longest

from sld_edge.engines.base import Engine, TensorSpec
from sld_edge.engines.errors import BundleError, shortened
from sld_edge.runtime.loader import Loader


class Store:
    """Which components are loaded now."""

    def __init__(self, loader: Loader) -> None:
        """Hold nothing yet."""
        self._loader = loader
        self.engines: dict[str, Engine] = {}

    def engine(self, name: str) -> Engine:
        """Return a component's engine, loaded and checked against the manifest when first asked.

        Raises:
            BundleError: the bundle has no such component, or its graph has other tensors.
            EngineError: the engine does not take it.
        """
        if name not in self.engines:
            components = self._loader.bundle.manifest.components
            if name not in components:
                raise BundleError(f"this bundle has no {name}", do="export it again")
            engine = self._loader.load(name, components[name])
            _check_tensors(name, components[name].inputs, engine.inputs)
            _check_tensors(name, components[name].outputs, engine.outputs)
            self.engines[name] = engine
        return self.engines[name]

    def release(self, name: str) -> None:
        """Drop an engine after use, where memory is short or reloading costs nothing."""
        engine = self.engines.get(name)
        if engine is not None and (
            self._loader.settings.low_memory or self._loader.is_reloadable(name, engine)
        ):
            del self.engines[name]
            engine.close()

    def release_reloadable(self, name: str) -> None:
        """Drop an engine after use, but only where reloading costs nothing."""
        engine = self.engines.get(name)
        if engine is not None and self._loader.is_reloadable(name, engine):
            self.release(name)

    def close(self) -> None:
        """Drop every engine."""
        for engine in self.engines.values():
            engine.close()
        self.engines.clear()


def _check_tensors(name: str, said: tuple[TensorSpec, ...], found: tuple[TensorSpec, ...]) -> None:
    """Refuse a graph whose tensors are not those that `bundle.json` says."""
    for want, got in zip_longest(said, found):
        if want is None or got is None or not _alike(want, got):
            raise BundleError(
                f"{name}: the graph's tensors are not those that bundle.json says",
                got=_words(got),
                expected=shortened(_words(want), 80),
                do="export the bundle again",
            )


def _alike(one: TensorSpec, other: TensorSpec) -> bool:
    """Whether two specs agree in all but the names of run-time sizes."""
    return (one.name, one.dtype, len(one.shape)) == (
        other.name,
        other.dtype,
        len(other.shape),
    ) and all(
        isinstance(x, str) or isinstance(y, str) or x == y
        for x, y in zip(one.shape, other.shape, strict=True)
    )


def _words(spec: TensorSpec | None) -> str:
    return "no more" if spec is None else f"{spec.name} {spec.dtype} {list(spec.shape)}"
