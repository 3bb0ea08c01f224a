"""The text filter of a bundle: fitted with the graphs just written, stored with its texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from sld_edge.engines.errors import InputError, NumericsError
from sld_edge.engines.files import npy_from_floats
from sld_edge.engines.onnxruntime.engine import OrtEngine
from sld_edge.export.output import written
from sld_edge.runtime.manifest import StoredFilter
from sld_edge.runtime.text_filter import (
    GUIDE,
    FilterTexts,
    Floats,
    everyday_texts,
    fitted_filter,
    require_progress,
)
from sld_edge.runtime.tokenizer import Tokenizer

PRESERVE = "text_filter.txt"


def filter_file(source: str) -> str:
    """Return the name of the file for a text encoder's output, "COMPONENT.OUTPUT"."""
    return f"text_filter.{source}.npy"


def write_text_filter(
    folder: Path,
    tokenizers: Mapping[str, Tokenizer],
    sources: Sequence[str],
    concepts: tuple[str, ...],
    *,
    preserve: tuple[str, ...] | None,
) -> StoredFilter:
    """Fit a filter with the text encoders in `folder`, and write it there.

    Args:
        folder: the bundle's folder.
        tokenizers: by text encoder.
        sources: the outputs of text encoders that the UNet reads, "COMPONENT.OUTPUT".
        concepts: words or phrases that the filter takes out of a prompt.
        preserve: texts whose embeddings stay; None is the package's list.

    Raises:
        InputError: the model does not know the concepts.
        NumericsError: NaN or infinity in a text encoder's output.
    """
    texts = FilterTexts(
        concepts=concepts,
        guide=GUIDE,
        preserve=everyday_texts() if preserve is None else ("", *preserve),
    )
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(OrtEngine(folder / f"{name}.onnx", as_is=True))
            for name in tokenizers
        }

        def outputs(text: str) -> dict[str, Floats]:
            arrays = {
                f"{name}.{output}": array[0]
                for name, engine in engines.items()
                for output, array in engine.run(
                    {"input_ids": tokenizers[name](text).ids[None]}
                ).items()
            }
            if not all(np.isfinite(array).all() for array in arrays.values()):
                raise NumericsError(
                    f"the embedding of {text!r} is not finite", do="try --precision fp32"
                )
            return {source: arrays[source] for source in sources}

        def ids(text: str, encoder: str) -> list[int]:
            numbers: list[int] = tokenizers[encoder](text).ids.tolist()
            return numbers

        text_filter = fitted_filter(texts, outputs, ids)
        require_progress(text_filter, texts, outputs, ids, error=InputError)
    return StoredFilter(
        concepts=concepts,
        guide=texts.guide,
        preserve=written(folder / PRESERVE, "\n".join((*texts.preserve[1:], "")).encode()),
        arrays={
            source: written(folder / filter_file(source), npy_from_floats(matrix))
            for source, matrix in text_filter.matrices.items()
        },
    )
