"""`sld-export --scorer`: CLIP's graphs and a small head, from the user's weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sld_edge.engines.errors import CheckpointError, InputError
from sld_edge.engines.files import floats_from_npy, read_limited
from sld_edge.export.checkpoints.checkpoint import (
    Model,
    read_json,
    refuse_pickle,
    tokenizer_json_for,
)
from sld_edge.export.checkpoints.config import count
from sld_edge.export.checkpoints.weights import Entry, Weights, entries_from_safetensors
from sld_edge.export.output import Kind, check_output, staged
from sld_edge.export.refuse import NOT_BUILT, ODD_VALUES, refusing
from sld_edge.export.shape import Say
from sld_edge.export.verify import graph_facts, require_onnx, run_checked
from sld_edge.export.write_bundle import created_by
from sld_edge.runtime.manifest import file_entry
from sld_edge.runtime.scorers.clip_heads import CONCEPTS, SPECIAL_CARE
from sld_edge.runtime.scorers.folder import (
    HEAD,
    IMAGE_ENCODER,
    MANIFEST,
    TEXT_ENCODER,
    TOKENIZER,
    ScorerFolder,
    ScorerManifest,
)
from sld_edge.runtime.scorers.preprocess import CLIP_MEAN, CLIP_STD

SCORERS = ("q16", "sd-checker", "clip-score")
Q16_PROMPTS = "prompts.npy"
_Q16_BYTES = 2**20  # the most bytes of a prompt file; 2 vectors of 768 numbers take 6 thousand
_CONVERT = (  # also shown to users
    "convert Q16's prompts.p where you trust it, since a pickle can run any code: "
    "np.save('prompts.npy', np.array(np.load('prompts.p', allow_pickle=True), 'f4', order='C'))"
)
_IMAGE_PREFIXES = ("vision_model.vision_model.", "vision_model.")
_TEXT_PREFIXES = ("text_model.text_model.", "text_model.")
_PROJECTIONS = ("visual_projection.weight", "text_projection.weight")
# The checker's vectors, and CLIP's temperature, which no score depends on.
_CHECKER = (
    "concept_embeds",
    "concept_embeds_weights",
    "special_care_embeds",
    "special_care_embeds_weights",
)
_UNUSED = ("logit_scale",)


@dataclass(frozen=True, kw_only=True)
class ScorerSettings:
    """The settings of a scorer's export.

    Attributes:
        scorer: "q16", "sd-checker" or "clip-score".
        model: directory of a CLIP model, of a safety checker, or of a diffusers checkpoint with a
            folder `safety_checker`.
        output: the scorer's directory; it must not exist yet, except with `force`.
        q16_prompts: Q16's prompts as `.npy`; None: `prompts.npy` in the model's directory.
        storage: type of the weights on disk; None: "fp32". Arithmetic is always FP32.
        attention: "op" is ONNX's Attention (opset 23), "decomposed" plain products (opset 20).
        force: replace an existing scorer.
    """

    scorer: str
    model: Path
    output: Path
    q16_prompts: Path | None = None
    storage: Literal["fp16", "fp32"] | None = None
    attention: Literal["op", "decomposed"] = "op"
    force: bool = False

    def __post_init__(self) -> None:
        if self.scorer not in SCORERS:
            raise InputError(
                "scorer to export", got=repr(self.scorer), expected=f"one of {', '.join(SCORERS)}"
            )
        if self.q16_prompts is not None and self.scorer != "q16":
            raise InputError("Q16's prompts are of no use to", got=self.scorer, expected="q16")
        if self.storage not in (None, "fp16", "fp32"):
            raise InputError("storage", got=repr(self.storage), expected="fp16, fp32")
        if self.attention not in ("op", "decomposed"):
            raise InputError("attention", got=repr(self.attention), expected="op, decomposed")


def export_scorer(settings: ScorerSettings, *, say: Say = lambda line: None) -> Path:
    """Write a scorer's folder and return its path; it appears whole or not at all.

    Raises:
        CheckpointError: no such model, an unknown model, or weights that are missing or bad.
        InputError: a setting that cannot be honoured.
        OutputError: the output exists or cannot be written.
    """
    output = settings.output.resolve()
    kind = _kind(settings.scorer)
    check_output(output, force=settings.force, kind=kind)
    require_onnx()
    with refusing(f"cannot read {settings.model}", *ODD_VALUES, OSError):
        clip = _clip(settings.model, checker=settings.scorer == "sd-checker")
        head = _head(settings, clip)
    with staged(output, force=settings.force, kind=kind) as folder:
        image = _write_image(clip, settings, folder / IMAGE_ENCODER, say)
        length = 0
        if settings.scorer == "clip-score":
            length = _write_text(clip, settings, folder, say)
        if head is not None:
            say("head: writing")
            head(folder / HEAD)
            _try(folder / HEAD, {"embedding": image})
        manifest = ScorerManifest(
            scorer=settings.scorer,
            source=settings.model.resolve().name,
            created_by=created_by(),
            image_size=clip.image["image_size"],
            text_length=length,
            files=tuple(file_entry(path) for path in sorted(folder.iterdir())),
        )
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return settings.output


def _kind(scorer: str) -> Kind:
    """Return the kind of folder that --force may replace: the same scorer's."""
    models = (IMAGE_ENCODER, TEXT_ENCODER, HEAD)
    return Kind(
        name="scorer",
        manifest=MANIFEST,
        listed=lambda root: {
            MANIFEST,
            *(file.path for file in ScorerFolder(root, scorer).manifest.files),
        },
        written={MANIFEST, TOKENIZER, *models, *(f"{name}.data" for name in models)},
    )


@dataclass(frozen=True, kw_only=True)
class _Clip:
    """A CLIP model: its folder, width, image tower's settings, config, and tensors by part."""

    folder: Path
    name: str
    dim: int
    image: dict[str, Any]
    config: dict[str, Any]
    image_tensors: dict[str, Entry]
    text_tensors: dict[str, Entry]
    checker: dict[str, Entry]

    def vector(self, key: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Read a tensor of the checker."""
        if key not in self.checker:
            raise CheckpointError(
                f"{self.name}: the checkpoint lacks tensor {key}",
                do="name the directory of Stable Diffusion's safety checker",
            )
        array = self.checker[key].read()
        if array.shape != shape or array.dtype.kind != "f" or not np.isfinite(array).all():
            raise CheckpointError(
                f"{self.name}: tensor {key}",
                got=f"{array.dtype} {list(array.shape)}",
                expected=f"finite floats {list(shape)}",
            )
        return array.astype(np.float32)


def _clip(model: Path, *, checker: bool) -> _Clip:
    from sld_edge.export.graphs.clip_towers import image_settings

    refuse_pickle(model)
    folder = model / "safety_checker"
    folder = folder if folder.is_dir() else model
    if not os.path.lexists(folder / "config.json"):
        raise CheckpointError(
            f"no model with a config.json at {model}",
            expected="a CLIP model or a safety checker, as transformers and diffusers save them",
        )
    name = folder.resolve().name
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind == "clip_vision_model":
        image, dim = config, config.get("projection_dim", 512)
    elif kind == "clip":
        image, dim = _part(config, "vision_config", name), config.get("projection_dim", 512)
    else:
        raise CheckpointError(
            f"{name}: config key model_type", got=repr(kind), expected="clip or clip_vision_model"
        )
    if not count(None).accepts(dim):
        raise CheckpointError(
            f"{name}: config key projection_dim", got=repr(dim), expected="a positive integer"
        )
    _check_preprocessing(model, folder)
    images: dict[str, Entry] = {}
    texts: dict[str, Entry] = {}
    vectors: dict[str, Entry] = {}
    for key, entry in _entries(folder).items():
        part, short = _place(key, name)
        {"image": images, "text": texts, "checker": vectors, "unused": {}}[part][short] = entry
    if checker and not vectors:
        raise CheckpointError(
            f"{name} is not a safety checker",
            got="no concept_embeds",
            do="name the folder safety_checker of a Stable Diffusion checkpoint",
        )
    return _Clip(
        folder=folder,
        name=name,
        dim=dim,
        image=image_settings({"model_type": "clip_vision_model", **image}, name=name),
        config=config,
        image_tensors=images,
        text_tensors=texts,
        checker=vectors,
    )


def _part(config: Mapping[str, Any], key: str, name: str) -> dict[str, Any]:
    """Return a tower's config; old files have a second config of it, which takes precedence."""
    merged: dict[str, Any] = {}
    for part in (config.get(key), config.get(f"{key}_dict")):
        if part is not None and not isinstance(part, dict):
            raise CheckpointError(f"{name}: config key {key}", got=type(part).__name__)
        merged.update(part or {})
    return merged


def _place(key: str, name: str) -> tuple[str, str]:
    """Return the part that a tensor belongs to, and its name there."""
    for part, prefixes in (("image", _IMAGE_PREFIXES), ("text", _TEXT_PREFIXES)):
        for prefix in prefixes:
            if key.startswith(prefix):
                return part, key.removeprefix(prefix)
    if key in _PROJECTIONS:
        return ("image" if key.startswith("visual") else "text"), key
    if key in _CHECKER:
        return "checker", key
    if key in _UNUSED:
        return "unused", key
    raise CheckpointError(
        f"{name}: tensor {key} fits no place", expected="a CLIP model or a safety checker"
    )


def _entries(folder: Path) -> dict[str, Entry]:
    for stem in ("model", "model.fp16"):
        file = folder / f"{stem}.safetensors"
        if os.path.lexists(file):
            return entries_from_safetensors(file)
    for file in sorted(folder.iterdir()):
        refuse_pickle(file)
    raise CheckpointError(f"no weights in {folder}", expected="model.safetensors")


def _check_preprocessing(model: Path, folder: Path) -> None:
    """Refuse a model whose pictures are prepared in another way than CLIP's."""
    for file in (
        folder / "preprocessor_config.json",
        model / "feature_extractor" / "preprocessor_config.json",
    ):
        if not os.path.lexists(file):
            continue
        preprocessing = read_json(file)
        for key, numbers in {"image_mean": CLIP_MEAN, "image_std": CLIP_STD}.items():
            value = preprocessing.get(key)
            if value is not None and not _equal(value, numbers):
                raise CheckpointError(f"{file}: {key}", got=value, expected=list(numbers))


def _equal(value: Any, numbers: tuple[float, ...]) -> bool:
    try:
        return bool(np.allclose(value, numbers, rtol=0, atol=1e-6))
    except ODD_VALUES:
        return False


# --- graphs -------------------------------------------------------------------------------------


def _write_image(
    clip: _Clip, settings: ScorerSettings, path: Path, say: Say
) -> NDArray[np.float32]:
    """Write the image encoder; return its embeddings of two pictures of noise."""
    from sld_edge.export.graphs.clip_towers import write_image_encoder

    say("image encoder: writing")
    weights = Weights(clip.image_tensors, name=f"{clip.name}, image tower")
    with refusing(f"{clip.name}: {NOT_BUILT}", *ODD_VALUES):
        write_image_encoder(clip.image, weights, clip.dim, _options(settings), path)
    side = clip.image["image_size"]
    noise = np.random.default_rng(0).standard_normal((2, 3, side, side), np.float32)
    embedding: NDArray[np.float32] = _try(path, {"pixels": noise})["embedding"]
    return embedding


def _write_text(clip: _Clip, settings: ScorerSettings, folder: Path, say: Say) -> int:
    """Write the prompt encoder and its tokenizer; return the tokens of a prompt."""
    from sld_edge.export.graphs.clip_towers import text_settings, write_prompt_encoder

    if not clip.text_tensors:
        raise CheckpointError(
            f"{clip.name} has no text tower", do="name the directory of a whole CLIP model"
        )
    say("text encoder: writing")
    name = f"{clip.name}, text tower"
    config = {"model_type": "clip_text_model", **_part(clip.config, "text_config", clip.name)}
    text = text_settings(config, name=name)
    weights = Weights(clip.text_tensors, name=name)
    with refusing(f"{clip.name}: {NOT_BUILT}", *ODD_VALUES):
        write_prompt_encoder(text, weights, clip.dim, _options(settings), folder / TEXT_ENCODER)
    tokenizer = tokenizer_json_for(Model(config=text, weights=weights), clip.folder)
    (folder / TOKENIZER).write_text(tokenizer, encoding="utf-8")
    length = int(text["max_position_embeddings"])
    ids = np.random.default_rng(0).integers(0, text["vocab_size"], (2, length), np.int64)
    _try(folder / TEXT_ENCODER, {"input_ids": ids})
    return length


def _head(settings: ScorerSettings, clip: _Clip) -> Callable[[Path], None] | None:
    """Read a head's vectors, before anything is written; return a function that writes it."""
    from sld_edge.export.graphs.scorer_heads import write_checker_head, write_q16_head

    if settings.scorer == "q16":
        path = settings.q16_prompts
        prompts = read_q16_prompts(
            path if path is not None else settings.model / Q16_PROMPTS, clip.dim
        )
        return lambda path: write_q16_head(prompts, path)
    if settings.scorer == "sd-checker":
        sizes = {"concept_embeds": CONCEPTS, "special_care_embeds": SPECIAL_CARE}
        vectors = np.concatenate([clip.vector(key, (n, clip.dim)) for key, n in sizes.items()])
        thresholds = np.concatenate(
            [clip.vector(f"{key}_weights", (n,)) for key, n in sizes.items()]
        )
        return lambda path: write_checker_head(vectors, thresholds, path)
    return None


def read_q16_prompts(path: Path, width: int) -> NDArray[np.float32]:
    """Return the vectors of "appropriate" and "inappropriate" from an `.npy` file.

    Returns:
        float32 [2,width].

    Raises:
        CheckpointError: no such file, another format or shape, or vectors that are not finite or
            are zero. Q16 publishes a pickle, which is refused.
    """
    data = read_limited(path, _Q16_BYTES, error=CheckpointError, do=_CONVERT)
    try:
        prompts = floats_from_npy(data)
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not an .npy file of floats",
            got=str(error),
            expected=f"float32 [2,{width}]",
            do=_CONVERT,
        ) from error
    if prompts.shape != (2, width):
        raise CheckpointError(
            f"{path}", got=list(prompts.shape), expected=f"[2,{width}], as CLIP's image embedding"
        )
    if not np.isfinite(prompts).all() or not (np.linalg.norm(prompts, axis=1) > 0).all():
        raise CheckpointError(f"{path}", got="NaN, infinity or zeros", expected="two vectors")
    return prompts


def _options(settings: ScorerSettings) -> Any:
    from sld_edge.export.graphs.builder import GraphOptions

    return GraphOptions(precision="fp32", storage=settings.storage, attention=settings.attention)


def _try(path: Path, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Check a graph's structure, run it once, and return its outputs."""
    graph_facts(path)
    return run_checked(path, feeds)
