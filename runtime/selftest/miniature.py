"""The miniature bundle in the two forms that the self-test runs, for a provider.

"fp16" is what `sld-export` writes by default: FP16 weights and arithmetic, the Attention operator.
"fp32" is `--precision fp32`, whose attention TensorRT builds decomposed. Both have the same
weights, to the last bit, so the FP32 graphs on the CPU are the reference of both.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sld_edge.engines.cache import SELF_TEST, private_folder
from sld_edge.engines.errors import BundleError, EngineError, InputError, OutputError
from sld_edge.engines.files import sha256_of_file
from sld_edge.engines.providers import status
from sld_edge.engines.tensorrt.plan_info import FLAVOURS
from sld_edge.runtime.bundle import EMBEDDED, EMBEDDED_FP16
from sld_edge.runtime.loader import LoadSettings
from sld_edge.runtime.manifest import MANIFEST
from sld_edge.runtime.selftest.checks import Say
from sld_edge.runtime.selftest.subject import Subject, loaded

Build = Callable[[Path, str], None]
Form = Literal["fp16", "fp32"]
FORMS: tuple[Form, ...] = ("fp16", "fp32")
_SOURCES: Mapping[Form, tuple[Path, ...]] = {
    "fp16": (EMBEDDED, EMBEDDED_FP16),
    "fp32": (EMBEDDED,),
}


@dataclass(frozen=True, kw_only=True)
class Miniature:
    """The miniature in one form for a provider; `bundle` None is the package's own folder."""

    form: Form
    settings: LoadSettings
    bundle: Path | None

    @property
    def provider(self) -> str:
        """The provider that is tested."""
        return self.settings.provider

    def load(self, cuda_graph: bool = True) -> AbstractContextManager[Subject]:
        """Load it; every call loads it again."""
        return loaded(self.bundle, self.settings, cuda_graph=cuda_graph)


def unpack(form: Form, folder: Path) -> None:
    """Write the miniature of a form into a new folder; opening it there checks every file's hash.

    Raises:
        OutputError: the folder cannot be written.
    """
    try:
        shutil.rmtree(folder, ignore_errors=True)
        for source in _SOURCES[form]:
            shutil.copytree(source, folder, dirs_exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot copy the miniature bundle to {folder}",
            got=error.strerror or error,
            do="free some space, or set SLD_EDGE_CACHE to another folder or to off",
        ) from error


@contextmanager
def miniature(
    form: Form, settings: LoadSettings, say: Say, build: Build | None
) -> Iterator[Miniature]:
    """Give the miniature for a provider, with plans that fit; build them where they are needed.

    Args:
        form: of the graphs.
        settings: the provider and how it runs, never "auto".
        say: prints a line.
        build: builds a bundle's plans for this device and a flavour of TensorRT; without it, only
            plans of an earlier self-test can be used.

    Raises:
        UserError: the provider does not work here, or its plans cannot be built.
    """
    provider = settings.provider
    works = status(provider)
    if not works.usable:  # checked before plans are built
        raise InputError(f"provider {provider} does not work here", got=works.reason)
    planned = provider in FLAVOURS
    if form == "fp32" and not planned:
        yield Miniature(form=form, settings=settings, bundle=None)
        return
    # The manifest has the hash of every other file, so its hash names the content.
    digest, _ = sha256_of_file(_SOURCES[form][-1] / MANIFEST)
    with _folder() as root:
        folder = root / f"{provider}-{form}-{digest[:16]}"
        made = Miniature(form=form, settings=settings, bundle=folder)
        try:
            with made.load() as subject:
                subject.pipeline.warm_up()
        except (BundleError, EngineError):  # missing, damaged, or for another version or device
            if planned and build is None:
                raise
            unpack(form, folder)
            if planned and build is not None:
                say(f"building the {form} miniature's plans for {provider} in {folder}")
                build(folder, provider)
        yield made


@contextmanager
def _folder() -> Iterator[Path]:
    """Give the folder for bundles: in the cache, or a temporary folder without a cache."""
    root = private_folder(SELF_TEST)
    if root is not None:
        yield root
        return
    with tempfile.TemporaryDirectory(prefix="sld-edge-") as folder:
        yield Path(folder)
