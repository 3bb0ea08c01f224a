"""The UNet's inputs other than latents and timestep: texts, sizes and guidance, by two rules.

An input per branch comes from text encoders, [(2+n)*B,...], branch-major. An input per image is
[B,...] and the same for every branch. The manifest says which; no code here is for a model family.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sld_edge.engines.base import Engine
from sld_edge.engines.cache import remember, remembered
from sld_edge.engines.errors import BundleError
from sld_edge.runtime.bundle import Bundle
from sld_edge.runtime.denoise.job import Conditioning, Floats
from sld_edge.runtime.filter_store import FilterStore
from sld_edge.runtime.manifest import SIZE, Condition
from sld_edge.runtime.numerics import not_finite
from sld_edge.runtime.request import ImageRun
from sld_edge.runtime.safety import empty_concept
from sld_edge.runtime.text_filter import FilterEffect, effect_on
from sld_edge.runtime.tokenizer import Tokenizer

Embedding = Mapping[str, Floats]  # the arrays of a text, by input per branch
_CACHED_TEXTS = 256  # texts whose embeddings are kept
_READ_TEXTS = 1024  # texts whose tokens are kept
# Largest distance between a stored embedding and the text encoder's, relative to its norm, by
# precision. Providers differ by rounding. Two texts differ by 0.3 and more with CLIP; the weakest
# words of the miniature differ by 0.003, and its encoder is FP32.
_SAME = {"fp32": 0.002, "fp16": 0.02}
_EMPTY = 1e-4  # a concept closer than this to the empty text says nothing to the text encoder


class Texts:
    """A bundle's tokenizers: the tokens that the model reads of a text."""

    def __init__(self, bundle: Bundle) -> None:
        """Read the tokenizers.

        Raises:
            BundleError: a tokenizer that is damaged or gives another length than its encoder takes.
        """
        self._tokenizers = {
            name: Tokenizer(bundle.tokenizer_json(name), length=text.length)
            for name, text in bundle.manifest.texts.items()
        }
        conditions = bundle.manifest.conditioning.values()
        self._empty_is_absent = all(item.absent == "encode" for item in conditions)
        self._read = lru_cache(_READ_TEXTS)(self._tokens)

    def ids(self, text: str) -> tuple[tuple[int, ...], ...]:
        """Return the token ids of a text, for each text encoder."""
        return tuple(ids for ids, _ in self._read(text).values())

    def ids_for(self, text: str, encoder: str) -> tuple[int, ...]:
        """Return the token ids [L] of a text for a text encoder."""
        return self._read(text)[encoder][0]

    def words(self, text: str) -> list[tuple[str, list[int]]]:
        """Return the words that the model reads, each with the places of its tokens."""
        return next(iter(self._tokenizers.values())).words(text)

    def input_ids(self, text: str, encoder: str) -> NDArray[np.int64]:
        """Return the token ids of a text for a text encoder, int64 [1,L]."""
        return np.array([self.ids_for(text, encoder)], np.int64)

    def cut(self, text: str) -> str:
        """Return the end of a text that no text encoder reads; empty for a short text."""
        return min((cut for _, cut in self._read(text).values()), key=len)

    def says_nothing(self, text: str) -> bool:
        """Whether a text says nothing to the model, like the empty text."""
        return all(tokenizer.says_nothing(text) for tokenizer in self._tokenizers.values())

    def is_absent(self, text: str) -> bool:
        """Whether a negative prompt has the same effect as no negative prompt."""
        return self._empty_is_absent and self.says_nothing(text)

    def _tokens(self, text: str) -> dict[str, tuple[tuple[int, ...], str]]:
        tokens = {name: tokenizer(text) for name, tokenizer in self._tokenizers.items()}
        return {name: (tuple(item.ids.tolist()), item.cut) for name, item in tokens.items()}


class Conditioner:
    """Encodes texts, each once, and joins them to the conditioning of images."""

    def __init__(
        self,
        bundle: Bundle,
        texts: Texts,
        engine: Callable[[str], Engine],
        *,
        identity: Callable[[], str],
        say: Callable[[str], None],
    ) -> None:
        """Read the stored embeddings.

        Args:
            bundle: the bundle of the text encoders and embeddings.
            texts: its tokenizers.
            engine: returns the engine of a component.
            identity: returns a text that is the same only if the text encoders' outputs are.
            say: called with a line for the user before something that takes seconds.
        """
        self._bundle, self._texts, self._engine, self._identity = bundle, texts, engine, identity
        conditions = bundle.manifest.conditioning
        self._branch = {name: item for name, item in conditions.items() if item.per == "branch"}
        self._image = {name: item for name, item in conditions.items() if item.per == "image"}
        self._stored: dict[str, Embedding] = dict(bundle.embeddings())
        self._encoded: OrderedDict[str, Embedding] = OrderedDict()  # the last used text last
        self._filters = FilterStore(
            bundle, self._outputs, texts.ids_for, identity=identity, say=say
        )
        self._checked = False

    def embedding(self, text: str) -> Embedding:
        """Return a text's arrays, float32 [...] by input; a repeated text is encoded once.

        Raises:
            NumericsError: a text encoder overflowed.
        """
        if text in self._stored:
            return self._stored[text]
        if text not in self._encoded:
            self._encoded[text] = self._encode(text)
            if len(self._encoded) > _CACHED_TEXTS:
                self._encoded.popitem(last=False)
        self._encoded.move_to_end(text)
        return self._encoded[text]

    def conditioning(self, images: Sequence[ImageRun], time_ids: Sequence[int]) -> Conditioning:
        """Return the conditioning of images that are denoised together.

        Args:
            images: B images; an image with fewer concepts than another repeats its first concept,
                which changes nothing.
            time_ids: `Run.time_ids`.

        Raises:
            BundleError: the stored embeddings are not the text encoders' outputs.
            InputError: a safety concept whose embedding is that of the empty text.
        """
        self._check_stored()
        for text in {concept for image in images for concept in image.acting_concepts}:
            if not _distance(self.embedding(text), self.embedding("")) > _EMPTY:
                raise empty_concept(text)
        uncond = [self._unconditional(image.unconditional_text) for image in images]
        prompts = [self._prompt(image) for image in images]
        count = most_concepts(images)
        safety = []
        for k in range(count):
            for index, image in enumerate(images):
                edited = image.edited_concepts
                concept = edited[k if k < len(edited) else 0] if edited else None
                safety.append(uncond[index] if concept is None else self.embedding(concept))
        rows = [*uncond, *prompts, *safety]
        return Conditioning(
            branch={name: np.stack([row[name] for row in rows]) for name in self._branch},
            image={
                name: _image_input(item, images, time_ids) for name, item in self._image.items()
            },
            concepts=count,
        )

    def filter_effect(self, image: ImageRun) -> FilterEffect | None:
        """Return the effect of the text filter on an image's prompt; None without a filter."""
        if not self._is_filtered(image):
            return None
        before, after = self.embedding(image.prompt), self._prompt(image)
        return effect_on(before, after, self._texts.words(image.prompt))

    def _prompt(self, image: ImageRun) -> Embedding:
        embedding = self.embedding(image.prompt)
        if not self._is_filtered(image):
            return embedding
        return self._filters.filter_for(image.acting_filter).applied(embedding, self._branch)

    def _is_filtered(self, image: ImageRun) -> bool:
        """Whether an image has a filter, and its prompt a word."""
        return bool(image.acting_filter) and not self._texts.says_nothing(image.prompt)

    def _unconditional(self, text: str | None) -> Embedding:
        if text is not None:
            return self.embedding(text)
        empty = self.embedding("")
        return {
            name: np.zeros_like(empty[name]) if item.absent == "zeros" else empty[name]
            for name, item in self._branch.items()
        }

    def _encode(self, text: str) -> Embedding:
        return embedding_from_outputs(self._branch, self._outputs(text))

    def _outputs(self, text: str) -> dict[str, Floats]:
        """Return the text encoders' outputs for a text, by "COMPONENT.OUTPUT"."""
        outputs: dict[str, Floats] = {}
        for encoder in self._bundle.manifest.texts:
            ids = self._texts.input_ids(text, encoder)
            for output, array in self._engine(encoder).run({"input_ids": ids}).items():
                if not np.isfinite(array).all():
                    component = self._bundle.manifest.components[encoder]
                    raise not_finite(encoder, precision=component.precision)
                outputs[f"{encoder}.{output}"] = array[0]
        return outputs

    def _check_stored(self) -> None:
        """Compare every stored embedding with the text encoders' output, once for a bundle.

        With a wrong embedding of the empty text or of a concept, safety would have no effect.
        """
        if self._checked:
            return
        known = self._identity()
        if not remembered("embeddings", known):
            for text, stored in self._stored.items():
                self._compare(text, stored)
            remember("embeddings", known)
        self._checked = True

    def _compare(self, text: str, stored: Embedding) -> None:
        components = self._bundle.manifest.components
        precisions = {components[name].precision for name in self._bundle.manifest.texts}
        most = max(_SAME.get(precision, _SAME["fp32"]) for precision in precisions)
        distance = _distance(stored, self._encode(text))
        if not distance <= most:
            raise BundleError(
                f"the stored embedding of {text[:60]!r} is not the text encoder's output",
                got=f"a distance of {distance:.2g}",
                expected=f"at most {most}",
                do="do not run this bundle; export it again",
            )


def embedding_from_outputs(
    conditions: Mapping[str, Condition], outputs: Mapping[str, Floats]
) -> dict[str, Floats]:
    """Join the outputs of text encoders ("COMPONENT.OUTPUT") to the arrays of inputs per branch."""
    return {
        name: np.concatenate([outputs[source] for source in item.sources], axis=-1)
        for name, item in conditions.items()
        if item.per == "branch"
    }


def most_concepts(images: Sequence[ImageRun]) -> int:
    """Count the safety branches of images in a batch, at least 1."""
    return max(1, *(len(image.edited_concepts) for image in images))


def _image_input(item: Condition, images: Sequence[ImageRun], time_ids: Sequence[int]) -> Floats:
    if SIZE in item.sources:
        return np.tile(np.array(time_ids, np.float32), (len(images), 1))
    scales = [image.guidance_scale for image in images]
    return np.array(scales, np.float32) + np.float32(item.offset)


def _distance(embedding: Embedding, reference: Embedding) -> float:
    """Return the largest distance between arrays, relative to the reference; NaN if any is NaN."""
    distances = [
        np.linalg.norm(array - reference[name]) / np.linalg.norm(reference[name])
        for name, array in embedding.items()
    ]
    return float(np.max(distances))
