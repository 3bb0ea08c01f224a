"""The engines of a loaded bundle: each is loaded at its first use."""

from __future__ import annotations

from itertools import zip_longest

from sld_edge.engines.base import Engine, TensorSpec
from sld_edge.engines.errors import BundleError, shortened
from sld_edge.runtime.loader import Loader


class Store:
    """The engines that are loaded now, by component."""

    def __init__(self, loader: Loader) -> None:
        """Load nothing yet."""
        self._loader = loader
        self.engines: dict[str, Engine] = {}

    def engine(self, name: str) -> Engine:
        """Return a component's engine; the first call loads and checks it.

        Raises:
            BundleError: the bundle has no such component, or its graph has other tensors than the
                manifest.
            EngineError: the engine refuses it.
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
        """Unload an engine after use, if `low_memory` is set or loading it again is cheap."""
        engine = self.engines.get(name)
        if engine is not None and (
            self._loader.settings.low_memory or self._loader.is_reloadable(name, engine)
        ):
            del self.engines[name]
            engine.close()

    def release_reloadable(self, name: str) -> None:
        """Unload an engine after use, only if loading it again is cheap."""
        engine = self.engines.get(name)
        if engine is not None and self._loader.is_reloadable(name, engine):
            self.release(name)

    def close(self) -> None:
        """Unload every engine."""
        for engine in self.engines.values():
            engine.close()
        self.engines.clear()


def _check_tensors(
    name: str, expected: tuple[TensorSpec, ...], actual: tuple[TensorSpec, ...]
) -> None:
    """Refuse a graph whose tensors differ from those in `bundle.json`."""
    for want, got in zip_longest(expected, actual):
        if want is None or got is None or not _matches(want, got):
            raise BundleError(
                f"{name}: the graph's tensors are not those in bundle.json",
                got=_words(got),
                expected=shortened(_words(want), 80),
                do="export the bundle again",
            )


def _matches(want: TensorSpec, got: TensorSpec) -> bool:
    """Whether two specs agree; sizes that are known only at run time may have other names."""
    return (
        (want.name, want.dtype, len(want.shape)) == (got.name, got.dtype, len(got.shape))
    ) and all(
        isinstance(x, str) or isinstance(y, str) or x == y
        for x, y in zip(want.shape, got.shape, strict=True)
    )


def _words(spec: TensorSpec | None) -> str:
    return "no tensor" if spec is None else f"{spec.name} {spec.dtype} {list(spec.shape)}"
