"""Writing a bundle: graphs, tokenizer, constant embeddings and the manifest that names them."""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from sld_edge.engines.checks import finite_number, whole_number
from sld_edge.engines.errors import (
    BundleError,
    CheckpointError,
    InputError,
    printable,
)
from sld_edge.engines.files import JSON_LIMIT, read_limited
from sld_edge.engines.tensorrt.plan_info import info_path
from sld_edge.export.checkpoints.checkpoint import Checkpoint, Model, size_from_config
from sld_edge.export.checkpoints.config import MOST_LEVELS, MOST_POSITIONS
from sld_edge.export.checkpoints.scheduler import sampler_from_scheduler
from sld_edge.export.checkpoints.sources import PREDICTION_TYPES, checkpoint_from_source
from sld_edge.export.output import Kind, check_output, staged
from sld_edge.export.refuse import NOT_BUILT, ODD_VALUES, refusing
from sld_edge.export.verify import (
    GraphFacts,
    errors_against_diffusers,
    graph_facts,
    random_feeds,
    require_agreement,
    require_onnx,
    run_checked,
)
from sld_edge.runtime.bundle import (
    KEPT_SAFETY,
    MANIFEST,
    SHALLOW,
    Component,
    Defaults,
    Embeddings,
    File,
    LatentInfo,
    Manifest,
    ModelInfo,
    PredictionType,
    Size,
    TextInfo,
    manifest_from_json,
    own_graph,
)
from sld_edge.runtime.plan_list import PLANS
from sld_edge.runtime.plans import plan_name
from sld_edge.runtime.policy import machine_policy
from sld_edge.runtime.safety import PAPER_CONCEPT, PRESETS, empty_concept
from sld_edge.runtime.samplers import SAMPLERS, sampler_table
from sld_edge.runtime.signatures import SIGNATURE
from sld_edge.runtime.tokenizer import Tokenizer, input_ids

Say = Callable[[str], None]
Watch = Callable[[int, int], None]
Precision = Literal["fp16", "fp32"]
_MOST_CELLS = 4096  # of the latents' height or width
_GUIDANCE = ("guidance", KEPT_SAFETY)  # without weights, and FP32 always
COMPONENTS = ("text_encoder", "unet", SHALLOW, "vae_decoder", "vae_encoder", *_GUIDANCE)
_CHOOSABLE = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
_PARTS = {SHALLOW: "unet"}  # graphs that are part of another, with its weights


def _own_files(root: Path) -> Set[str]:
    """Return the paths of a bundle's own files, plans that were built for it included.

    Raises:
        BundleError: not a valid bundle.
    """
    raw = read_limited(root / MANIFEST, JSON_LIMIT, error=BundleError)
    manifest = manifest_from_json(raw, origin=str(root / MANIFEST))
    plans = [Path(plan_name(name)) for name in manifest.components]
    return {
        MANIFEST,
        SIGNATURE,
        PLANS,
        *(str(PurePosixPath(file.path)) for file in manifest.files()),
        *(name for plan in plans for name in (plan.name, info_path(plan).name)),
        *(f"{name}.decomposed.onnx" for name in manifest.components),
    }


BUNDLE = Kind(
    name="bundle",
    manifest=MANIFEST,
    listed=_own_files,
    written={
        MANIFEST,
        "tokenizer.json",
        "embeddings.npy",
        *(f"{name}.onnx{end}" for name in COMPONENTS for end in ("", ".data")),
    },
)


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What to export, and how.

    Attributes:
        model: alias, Hub id, diffusers directory or `.safetensors` file.
        output: the bundle's directory, which must not exist yet (but see `force`).
        precision: arithmetic of the graphs; guidance and the boundary are always FP32.
        fp32_components: those whose arithmetic is FP32 all the same, as where FP16 overflows.
        storage: of the weights on disk; None is as each component's precision.
        attention: "op" is ONNX's Attention (opset 23), "decomposed" plain products (opset 20).
        via: "builder" writes the graphs from the config, "torch" exports diffusers' modules.
        width: default picture width in pixels; None is what the model was trained for.
        height: likewise.
        safety_concept: what Safe Latent Diffusion steers away from where a run does not say; a
            tuple is several concepts, each with a branch and a gate of its own.
        preset: its strength where a run does not say.
        name: what the bundle calls the model; None is the checkpoint's own name.
        verify: compare every graph with diffusers' module (needs torch).
        force: replace an existing bundle.
        variant: "fp16" reads the half-size weight files of the checkpoint.
        tokenizer: directory or tokenizer.json, instead of the checkpoint's own.
        prediction_type: what the UNet predicts, instead of what the checkpoint says.
    """

    model: str
    output: Path
    precision: Precision = "fp16"
    fp32_components: tuple[str, ...] = ()
    storage: Literal["fp16", "fp32"] | None = None
    attention: Literal["op", "decomposed"] = "op"
    via: Literal["builder", "torch"] = "builder"
    width: int | None = None
    height: int | None = None
    safety_concept: str | tuple[str, ...] = PAPER_CONCEPT
    preset: str = "medium"
    name: str | None = None
    verify: bool = False
    force: bool = False
    variant: str | None = None
    tokenizer: Path | None = None
    prediction_type: str | None = None

    def __post_init__(self) -> None:
        if not self.safety_concepts:
            raise InputError("safety concept", got="none", expected="one or more")
        choices = {
            "precision": ("fp16", "fp32"),
            "storage": (None, "fp16", "fp32"),
            "attention": ("op", "decomposed"),
            "via": ("builder", "torch"),
            "preset": tuple(PRESETS),
            "prediction_type": (None, *PREDICTION_TYPES),
        }
        for name, values in choices.items():
            if getattr(self, name) not in values:
                expected = ", ".join(value for value in values if value is not None)
                raise InputError(name, got=repr(getattr(self, name)), expected=expected)
        if self.storage == "fp32" and self.precision == "fp16":
            raise InputError("storage fp32 with precision fp16", do="leave storage out")
        if self.storage is not None and self.via == "torch":
            raise InputError("storage cannot be chosen with via torch", do="leave it out")
        for name in self.fp32_components:
            if name not in _CHOOSABLE:
                raise InputError("fp32 component", got=repr(name), expected=", ".join(_CHOOSABLE))
        if self.fp32_components and self.precision == "fp32":
            raise InputError(
                "fp32 components with precision fp32, where all are", do="leave fp32 components out"
            )

    @property
    def safety_concepts(self) -> tuple[str, ...]:
        """The safety concepts, each once."""
        own = self.safety_concept
        return (own,) if isinstance(own, str) else tuple(dict.fromkeys(own))

    def precision_of(self, component: str) -> Precision:
        """Return the arithmetic of one component's graph."""
        component = _PARTS.get(component, component)
        own = component in _GUIDANCE or component in self.fp32_components
        return "fp32" if own else self.precision

    def storage_of(self, component: str) -> Precision:
        """Return the type of one component's weights on disk."""
        component = _PARTS.get(component, component)
        if component in _GUIDANCE or self.storage is None:
            return self.precision_of(component)
        return self.storage


def export_bundle(
    settings: ExportSettings, *, say: Say | None = None, watch: Watch | None = None
) -> Path:
    """Write a bundle and return its path; it appears whole or not at all.

    Args:
        settings: what and how.
        say: is told what is going on and what is worth knowing, a line each.
        watch: is told the bytes of weights read so far, and of all.

    Raises:
        CheckpointError: no such checkpoint, or one that cannot be exported.
        InputError: an option that cannot be honoured.
        NumericsError: a graph gives NaN or infinity.
        OutputError: the output exists or cannot be written.
    """
    say = say if say is not None else _silence
    output = Path(settings.output).resolve()
    check_output(output, force=settings.force, kind=BUNDLE)
    require_onnx()  # before gigabytes are downloaded
    checkpoint = checkpoint_from_source(
        settings.model,
        variant=settings.variant,
        tokenizer=settings.tokenizer,
        prediction_type=settings.prediction_type,
    )
    shape = _shape(checkpoint, settings)
    _check_safety(checkpoint, settings, shape)
    sampler, notes = sampler_from_scheduler(checkpoint.scheduler)
    for note in notes:
        say(f"note: {printable(note)}")
    defaults = _defaults(sampler, settings.preset)
    scheduler = {**checkpoint.scheduler, "prediction_type": shape.prediction_type}
    with refusing("scheduler_config.json", *ODD_VALUES):
        _check_scheduler(scheduler, defaults, say)
    if watch is not None:
        _watch_weights(checkpoint, watch)
    with staged(output, force=settings.force, kind=BUNDLE) as folder:
        graphs = _write_graphs(checkpoint, settings, folder, shape, say)
        if settings.verify:
            _verify(checkpoint, settings, folder, graphs, shape, say)
        tokenizer = _write(folder / "tokenizer.json", checkpoint.tokenizer_json.encode())
        embeddings = _write_embeddings(checkpoint, settings, folder, shape, say)
        manifest = Manifest(
            created_by=created_by(),
            model=ModelInfo(
                id=settings.name if settings.name is not None else checkpoint.id,
                source=checkpoint.source,
            ),
            prediction_type=shape.prediction_type,
            latents=shape.latents,
            text=shape.text,
            size=shape.size,
            scheduler={k: v for k, v in checkpoint.scheduler.items() if not k.startswith("_")},
            defaults=defaults,
            safety_concepts=settings.safety_concepts,
            tokenizer=tokenizer,
            embeddings=embeddings,
            components={
                name: _component(name, facts, settings, folder) for name, facts in graphs.items()
            },
        )
        _write(folder / MANIFEST, _checked_json(manifest))
    return Path(settings.output)


def _check_safety(checkpoint: Checkpoint, settings: ExportSettings, shape: _Shape) -> None:
    """Refuse defaults with which a run could not be safe.

    Raises:
        InputError: a safety concept that says nothing to the model.
        PolicyError: a preset below this device's minimum.
    """
    tokenizer = Tokenizer(checkpoint.tokenizer_json, length=shape.text.length)
    for concept in settings.safety_concepts:
        if tokenizer.says_nothing(concept):
            raise empty_concept(concept)
    policy = machine_policy()
    policy.require(
        policy.default_preset(settings.preset) == settings.preset,
        "the bundle's preset",
        got=settings.preset,
        expected=f"{policy.minimum} or stronger",
    )


def _checked_json(manifest: Manifest) -> bytes:
    """Return the bytes of `bundle.json`, which a run will take."""
    with refusing("the checkpoint gives no valid bundle", *ODD_VALUES, BundleError):
        data = manifest.to_json().encode()
        manifest_from_json(data, origin=MANIFEST)
    return data


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """The checkpoint's sizes, resolved."""

    prediction_type: PredictionType
    latents: LatentInfo
    text: TextInfo
    size: Size
    vocab_size: int


def _shape(checkpoint: Checkpoint, settings: ExportSettings) -> _Shape:
    widths = {
        "unet": size_from_config(checkpoint.unet, "cross_attention_dim"),
        "text_encoder": size_from_config(checkpoint.text_encoder, "hidden_size"),
    }
    channels = {
        "unet": size_from_config(checkpoint.unet, "in_channels"),
        "vae": size_from_config(checkpoint.vae, "latent_channels"),
    }
    downscale = 2 ** (_levels(checkpoint.vae) - 1)
    for what, sides in (("text width", widths), ("latent channels", channels)):
        if len(set(sides.values())) > 1:
            raise CheckpointError(
                f"the checkpoint's parts do not fit together: {what}",
                got=", ".join(f"{part} {value}" for part, value in sides.items()),
                expected="a plain text-to-image Stable Diffusion 1.x or 2.x",
            )
    predicts = str(checkpoint.scheduler.get("prediction_type", "epsilon"))  # diffusers' default
    if predicts not in PREDICTION_TYPES:
        raise CheckpointError(
            "scheduler: prediction_type", got=predicts, expected=", ".join(PREDICTION_TYPES)
        )
    pixels = _pixels(checkpoint, settings, downscale)
    for name, value in pixels.items():
        if value < downscale or value % downscale:
            raise InputError(name, got=value, expected=f"a multiple of {downscale}")
    return _Shape(
        prediction_type=cast(PredictionType, predicts),
        latents=LatentInfo(
            channels=channels["vae"],
            downscale=downscale,
            scaling_factor=_scaling_factor(checkpoint.vae),
        ),
        text=TextInfo(
            length=size_from_config(
                checkpoint.text_encoder, "max_position_embeddings", 2, MOST_POSITIONS
            ),
            width=widths["text_encoder"],
        ),
        size=Size(**pixels),
        vocab_size=size_from_config(checkpoint.text_encoder, "vocab_size"),
    )


def _levels(vae: Model) -> int:
    widths = vae.config.get("block_out_channels")
    if not isinstance(widths, list) or not 0 < len(widths) <= MOST_LEVELS:
        raise CheckpointError(
            "vae: config key block_out_channels",
            got=repr(widths),
            expected=f"a list, 1 to {MOST_LEVELS}",
        )
    return len(widths)


def _scaling_factor(vae: Model) -> float:
    given = vae.config.get("scaling_factor", 0.18215)  # diffusers' default
    try:
        return finite_number("vae: config key scaling_factor", given, 1e-6, 1e6)
    except InputError as error:
        raise CheckpointError(str(error)) from error


def _pixels(checkpoint: Checkpoint, settings: ExportSettings, downscale: int) -> dict[str, int]:
    """Return height and width of a picture: as asked for, else what the model was trained for."""
    asked = {"height": settings.height, "width": settings.width}
    native = checkpoint.unet.config.get("sample_size", 64)
    cells = native if isinstance(native, list) else [native, native]
    try:
        rows, columns = (whole_number("size", each, 1, _MOST_CELLS) for each in cells)
    except (InputError, ValueError) as error:
        if None not in asked.values():
            rows = columns = 0  # of no use then
        else:
            raise CheckpointError(
                "unet: config key sample_size",
                got=repr(native),
                expected=f"one or two whole numbers, 1 to {_MOST_CELLS}",
                do="give width and height",
            ) from error
    return {
        name: value if value is not None else side * downscale
        for (name, value), side in zip(asked.items(), (rows, columns), strict=True)
    }


def _check_scheduler(scheduler: Mapping[str, Any], defaults: Defaults, say: Say) -> None:
    """Refuse a scheduler that no sampler can run; say so where only the default one cannot."""
    names = (defaults.sampler, *(name for name in SAMPLERS if name != defaults.sampler))
    problems = [_problem(name, scheduler, defaults.steps) for name in names]
    if problems[0] is None:
        return
    if None not in problems:
        raise CheckpointError("scheduler_config.json", got=problems[0])
    say(f"note: {problems[0]}")


def _problem(sampler: str, scheduler: Mapping[str, Any], steps: int) -> str | None:
    try:
        sampler_table(sampler, scheduler, steps)
    except InputError as error:
        return str(error)
    return None


def _defaults(sampler: str, preset: str) -> Defaults:
    """Return the defaults of a run; a distilled model needs few steps and no guidance."""
    distilled = sampler == "lcm"
    return Defaults(
        sampler=sampler,
        steps=4 if distilled else 50,
        guidance_scale=1.0 if distilled else 7.5,
        safety=preset,
    )


def _watch_weights(checkpoint: Checkpoint, watch: Watch) -> None:
    weights = [
        model.weights for model in (checkpoint.text_encoder, checkpoint.unet, checkpoint.vae)
    ]
    total, read = sum(part.nbytes for part in weights), 0

    def count(nbytes: int) -> None:
        nonlocal read
        read += nbytes
        watch(min(read, total), total)

    for part in weights:
        part.watch = count


# --- graphs -------------------------------------------------------------------------------------


def _write_graphs(
    checkpoint: Checkpoint, settings: ExportSettings, folder: Path, shape: _Shape, say: Say
) -> dict[str, GraphFacts]:
    graphs = {}
    for name, write in _writers(checkpoint, settings).items():
        path = folder / f"{name}.onnx"
        say(f"{name}: writing")
        with refusing(f"{name}: {NOT_BUILT}", *ODD_VALUES):
            write(path)
        graphs[name] = facts = graph_facts(path)
        feeds = random_feeds(
            facts.inputs, vocab_size=shape.vocab_size, downscale=shape.latents.downscale
        )
        run_checked(path, feeds)
    return graphs


def _writers(checkpoint: Checkpoint, settings: ExportSettings) -> dict[str, Callable[[Path], None]]:
    """Return what writes each component, in the order of COMPONENTS."""
    from sld_edge.export.graphs.builder import GraphOptions
    from sld_edge.export.graphs.clip import write_text_encoder
    from sld_edge.export.graphs.unet import write_unet
    from sld_edge.export.graphs.vae import write_vae_decoder, write_vae_encoder

    guidance = {name: partial(shutil.copyfile, own_graph(name)) for name in _GUIDANCE}
    if settings.via == "torch":
        return {**_torch_writers(checkpoint, settings), **guidance}
    options = {
        name: GraphOptions(
            precision=settings.precision_of(name),
            storage=settings.storage_of(name),
            attention=settings.attention,
        )
        for name in _CHOOSABLE
    }
    text, unet, vae = checkpoint.text_encoder, checkpoint.unet, checkpoint.vae
    writers = {
        "text_encoder": partial(write_text_encoder, text.config, text.weights),
        "unet": partial(write_unet, unet.config, unet.weights),
        "vae_decoder": partial(write_vae_decoder, vae.config, vae.weights),
        "vae_encoder": partial(write_vae_encoder, vae.config, vae.weights),
    }
    everything: dict[str, Callable[[Path], None]] = {
        **{name: partial(write, options[name]) for name, write in writers.items()},
        SHALLOW: _write_shallow,  # out of the UNet, which comes before it
        **guidance,
    }
    return {name: everything[name] for name in COMPONENTS}


def _write_shallow(path: Path) -> None:
    from sld_edge.export.graphs.shallow import write_shallow_unet

    write_shallow_unet(path.with_name("unet.onnx"), path)


def _torch_writers(
    checkpoint: Checkpoint, settings: ExportSettings
) -> dict[str, Callable[[Path], None]]:
    """Return what exports diffusers' modules, loaded once for each precision asked for."""
    from sld_edge.export.via_torch import torch_writers

    precisions = {name: settings.precision_of(name) for name in _CHOOSABLE}
    writers = {
        precision: torch_writers(checkpoint, precision=precision, attention=settings.attention)
        for precision in dict.fromkeys(precisions.values())
    }
    return {name: writers[precision][name] for name, precision in precisions.items()}


def _verify(
    checkpoint: Checkpoint,
    settings: ExportSettings,
    folder: Path,
    graphs: Mapping[str, GraphFacts],
    shape: _Shape,
    say: Say,
) -> None:
    errors = errors_against_diffusers(checkpoint, folder, graphs, downscale=shape.latents.downscale)
    for name, error in errors.items():
        say(f"{name}: relative L2 distance to diffusers {error:.1e}")
    for precision in ("fp32", "fp16"):
        own = {
            name: error
            for name, error in errors.items()
            if settings.precision_of(name) == precision
        }
        require_agreement(own, precision=precision)


def _component(name: str, facts: GraphFacts, settings: ExportSettings, folder: Path) -> Component:
    graph = folder / f"{name}.onnx"
    data = folder / f"{_PARTS.get(name, name)}.onnx.data"
    files = tuple(file_entry(path) for path in (graph, data) if path.exists())
    return Component(
        files=files,
        precision=settings.precision_of(name),
        storage=settings.storage_of(name),
        attention="none" if name in _GUIDANCE else settings.attention,
        opset=facts.opset,
        inputs=facts.inputs,
        outputs=facts.outputs,
    )


# --- files --------------------------------------------------------------------------------------


def _write_embeddings(
    checkpoint: Checkpoint, settings: ExportSettings, folder: Path, shape: _Shape, say: Say
) -> Embeddings:
    """Encode the constant texts with the graph just written, as a run would."""
    with refusing("tokenizer_config.json: model_max_length", BundleError):
        tokenizer = Tokenizer(checkpoint.tokenizer_json, length=shape.text.length)
    texts = tuple(dict.fromkeys(("", *settings.safety_concepts)))
    tokens = [tokenizer(text) for text in texts]
    for item in tokens:
        if item.cut:
            say(f"note: the model does not read the end of the safety concept: “{item.cut}”")
    feeds = {"input_ids": input_ids(tokens)}
    states: NDArray[Any] = run_checked(folder / "text_encoder.onnx", feeds)["hidden_states"]
    stream = io.BytesIO()
    np.save(stream, states.astype(np.float32, copy=False))
    file = _write(folder / "embeddings.npy", stream.getvalue())
    return Embeddings(path=file.path, sha256=file.sha256, bytes=file.bytes, texts=texts)


def _write(path: Path, data: bytes) -> File:
    path.write_bytes(data)
    return file_entry(path)


def file_entry(path: Path) -> File:
    """Return what a manifest says of a file that lies beside it."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return File(path=path.name, sha256=digest, bytes=path.stat().st_size)


def created_by() -> str:
    """Return what wrote a file: "sld-edge" and its version."""
    try:
        return f"sld-edge {version('sld-edge')}"
    except PackageNotFoundError:  # run from a checkout
        return "sld-edge"


def _silence(line: str) -> None:
    pass
