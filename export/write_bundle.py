"""Writing a bundle: graphs, tokenizers, constant embeddings and their manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from sld_edge.engines.errors import BundleError, InputError
from sld_edge.engines.files import JSON_LIMIT, npy_from_floats, read_limited
from sld_edge.engines.tensorrt.plan_info import info_path
from sld_edge.export.checkpoints.checkpoint import TOKENIZERS, Checkpoint, size_from_config
from sld_edge.export.checkpoints.sources import checkpoint_from_source
from sld_edge.export.families import FAMILIES, family_of
from sld_edge.export.families.family import Family, Part
from sld_edge.export.output import Kind, check_output, staged, written
from sld_edge.export.refuse import NOT_BUILT, ODD_VALUES, refusing
from sld_edge.export.settings import ExportSettings
from sld_edge.export.shape import Say, Shape, shape_of
from sld_edge.export.text_filter import PRESERVE, filter_file, write_text_filter
from sld_edge.export.verify import (
    GraphFacts,
    errors_against_diffusers,
    graph_facts,
    random_feeds,
    require_agreement,
    require_onnx,
    run_checked,
)
from sld_edge.runtime.conditioning import embedding_from_outputs
from sld_edge.runtime.manifest import (
    MANIFEST,
    OWN_GRAPHS,
    Component,
    Embeddings,
    Manifest,
    ModelInfo,
    StoredFilter,
    TextInput,
    file_entry,
)
from sld_edge.runtime.manifest_file import manifest_from_json
from sld_edge.runtime.plan_list import PLANS
from sld_edge.runtime.plans import plan_name
from sld_edge.runtime.policy_file import machine_policy
from sld_edge.runtime.safety import empty_concept
from sld_edge.runtime.signatures import SIGNATURE
from sld_edge.runtime.tokenizer import Tokenizer, input_ids

if TYPE_CHECKING:
    from sld_edge.export.graphs.builder import GraphOptions

Watch = Callable[[int, int], None]
Writers = Mapping[str, Callable[[Path], None]]
_PARTS = {part.name: part for family in FAMILIES for part in family.parts}
# The outputs of text encoders that the UNets of all families read.
_SOURCES = ("text_encoder.hidden_states", "text_encoder_2.hidden_states", "text_encoder_2.pooled")


def _bundle_files(root: Path) -> Set[str]:
    """Return the paths of a bundle's files, with the plans that were built for it.

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
    listed=_bundle_files,
    written={
        MANIFEST,
        *(f"{name}.json" for name in TOKENIZERS.values()),
        "context.npy",
        "pooled.npy",
        PRESERVE,
        *map(filter_file, _SOURCES),
        *(f"{name}.onnx{end}" for name in _PARTS for end in ("", ".data")),
    },
)


def export_bundle(
    settings: ExportSettings, *, say: Say = lambda line: None, watch: Watch | None = None
) -> Path:
    """Write a bundle and return its path; it appears whole or not at all.

    Args:
        settings: what to export, and how.
        say: called with each line of progress and each note.
        watch: called with the bytes of weights that were read so far, and with their total.

    Raises:
        CheckpointError: no such checkpoint, or a checkpoint that cannot be exported.
        InputError: an option that cannot be honoured.
        NumericsError: a graph gives NaN or infinity.
        OutputError: the output exists or cannot be written.
    """
    output = Path(settings.output).resolve()
    check_output(output, force=settings.force, kind=BUNDLE)
    require_onnx()  # before gigabytes are downloaded
    checkpoint = checkpoint_from_source(
        settings.model,
        variant=settings.variant,
        tokenizer=settings.tokenizer,
        prediction_type=settings.prediction_type,
        vae=settings.vae,
        preview_vae=settings.preview_vae,
    )
    family = family_of(checkpoint)
    shape = shape_of(checkpoint, family, settings, say)
    _check_components(checkpoint, family, settings)
    tokenizers = _tokenizers(checkpoint, shape)
    _check_safety(settings, tokenizers, say)
    writers = _writers(checkpoint, family, settings)
    if settings.verify:
        from sld_edge.export.via_torch import require_plain

        require_plain(checkpoint)  # before minutes of writing
    if watch is not None:
        _watch_weights(checkpoint, watch)
    with staged(output, force=settings.force, kind=BUNDLE) as folder:
        graphs = _write_graphs(checkpoint, writers, folder, shape, say)
        if settings.verify:
            _verify(checkpoint, settings, folder, graphs, shape, say)
        manifest = Manifest(
            created_by=created_by(),
            model=ModelInfo(
                id=settings.name if settings.name is not None else checkpoint.id,
                source=checkpoint.source,
            ),
            prediction_type=shape.prediction_type,
            latents=shape.latents,
            size=shape.size,
            scheduler=shape.scheduler,
            defaults=shape.defaults,
            safety_concepts=settings.safety_concepts,
            guidance=shape.inputs.guidance,
            texts={
                name: TextInput(
                    tokenizer=written(folder / f"{TOKENIZERS[name]}.json", text.encode()),
                    length=shape.text_length,
                )
                for name, text in checkpoint.tokenizers.items()
            },
            conditioning=shape.inputs.conditioning,
            embeddings=_write_embeddings(tokenizers, settings, folder, shape),
            components=_components(family, graphs, settings, folder),
            text_filter=_write_filter(tokenizers, settings, folder, shape, say),
        )
        written(folder / MANIFEST, _checked_json(manifest))
    return Path(settings.output)


def _check_components(checkpoint: Checkpoint, family: Family, settings: ExportSettings) -> None:
    parts = family.parts_of(checkpoint)
    names = [part.name for part in parts if part.folder and part.weights_of is None]
    for name in settings.fp32_components:
        if name not in names:
            raise InputError("fp32 component", got=repr(name), expected=", ".join(names))


def _tokenizers(checkpoint: Checkpoint, shape: Shape) -> dict[str, Tokenizer]:
    with refusing("tokenizer_config.json: model_max_length", BundleError):
        return {
            name: Tokenizer(text, length=shape.text_length)
            for name, text in checkpoint.tokenizers.items()
        }


def _check_safety(settings: ExportSettings, tokenizers: Mapping[str, Tokenizer], say: Say) -> None:
    """Refuse defaults that make a run unsafe.

    Raises:
        InputError: a safety concept without any word that the model knows.
        PolicyError: a preset below this device's minimum.
    """
    for concept in settings.safety_concepts:
        if all(tokenizer.says_nothing(concept) for tokenizer in tokenizers.values()):
            raise empty_concept(concept)
        cut = min((tokenizer(concept).cut for tokenizer in tokenizers.values()), key=len)
        if cut:
            say(f"note: the model does not read the end of the safety concept: “{cut}”")
    policy = machine_policy()
    policy.require(
        settings.preset in policy.allowed_presets,
        "the bundle's preset",
        got=settings.preset,
        expected=f"as strong as {policy.minimum}: {', '.join(policy.allowed_presets)}",
    )


def _checked_json(manifest: Manifest) -> bytes:
    """Return the bytes of `bundle.json`, read back with the checks of a run."""
    with refusing("the checkpoint gives no valid bundle", *ODD_VALUES, BundleError):
        data = manifest.to_json().encode()
        manifest_from_json(data, origin=MANIFEST)
    return data


def _watch_weights(checkpoint: Checkpoint, watch: Watch) -> None:
    weights = [model.weights for model in checkpoint.models.values()]
    total, read = sum(part.nbytes for part in weights), 0

    def count(nbytes: int) -> None:
        nonlocal read
        read += nbytes
        watch(min(read, total), total)

    for part in weights:
        part.watch = count


# --- graphs -------------------------------------------------------------------------------------


def _write_graphs(
    checkpoint: Checkpoint, writers: Writers, folder: Path, shape: Shape, say: Say
) -> dict[str, GraphFacts]:
    vocab_size = min(
        size_from_config(checkpoint.models[name], "vocab_size") for name in checkpoint.tokenizers
    )
    graphs = {}
    for name, write in writers.items():
        path = folder / f"{name}.onnx"
        say(f"{name}: writing")
        with refusing(f"{name}: {NOT_BUILT}", *ODD_VALUES):
            write(path)
        graphs[name] = facts = graph_facts(path)
        if name in checkpoint.tokenizers:
            continue  # `_write_embeddings` runs it
        feeds = random_feeds(facts.inputs, vocab_size=vocab_size, downscale=shape.latents.downscale)
        run_checked(path, feeds)
    return graphs


def _writers(checkpoint: Checkpoint, family: Family, settings: ExportSettings) -> Writers:
    """Return a function that writes each component, in the bundle's order.

    Raises:
        CheckpointError: an input of the UNet that torch's export would drop.
    """
    if settings.via == "torch":
        return _torch_writers(checkpoint, family, settings)
    return {
        part.name: partial(
            part.write, checkpoint.models.get(part.folder or ""), _options(part, settings)
        )
        for part in family.parts_of(checkpoint)
    }


def _options(part: Part, settings: ExportSettings) -> GraphOptions:
    from sld_edge.export.graphs.builder import GraphOptions

    return GraphOptions(
        precision=settings.precision_of(part),
        storage=settings.storage_of(part),
        attention=settings.attention,
    )


def _torch_writers(checkpoint: Checkpoint, family: Family, settings: ExportSettings) -> Writers:
    """Return functions that export diffusers' modules, loaded once for each precision."""
    from sld_edge.export.via_torch import require_plain, torch_writers

    require_plain(checkpoint)
    writers: dict[str, Callable[[Path], None]] = {}
    loaded: dict[str, Writers] = {}
    for part in family.parts_of(checkpoint):
        if part.folder is None:
            writers[part.name] = partial(part.write, None, _options(part, settings))
        elif part.weights_of is None:
            precision = settings.precision_of(part)
            if precision not in loaded:
                loaded[precision] = torch_writers(
                    checkpoint, precision=precision, attention=settings.attention
                )
            writers[part.name] = loaded[precision][part.name]
    return writers


def _verify(
    checkpoint: Checkpoint,
    settings: ExportSettings,
    folder: Path,
    graphs: Mapping[str, GraphFacts],
    shape: Shape,
    say: Say,
) -> None:
    errors = errors_against_diffusers(checkpoint, folder, graphs, downscale=shape.latents.downscale)
    for name, error in errors.items():
        say(f"{name}: relative L2 distance to diffusers {error:.1e}")
        require_agreement({name: error}, precision=settings.precision_of(_PARTS[name]))


def _components(
    family: Family, graphs: Mapping[str, GraphFacts], settings: ExportSettings, folder: Path
) -> dict[str, Component]:
    entry = cache(file_entry)  # the two graphs of a UNet share gigabytes
    components = {}
    for part in family.parts:
        if part.name not in graphs:
            continue
        facts = graphs[part.name]
        graph = folder / f"{part.name}.onnx"
        data = folder / f"{part.weights_of or part.name}.onnx.data"
        components[part.name] = Component(
            files=tuple(entry(path) for path in (graph, data) if path.exists()),
            precision=settings.precision_of(part),
            storage=settings.storage_of(part),
            attention="none" if part.name in OWN_GRAPHS else settings.attention,
            opset=facts.opset,
            inputs=facts.inputs,
            outputs=facts.outputs,
        )
    return components


# --- files --------------------------------------------------------------------------------------


def _write_embeddings(
    tokenizers: Mapping[str, Tokenizer], settings: ExportSettings, folder: Path, shape: Shape
) -> Embeddings:
    """Encode the constant texts with the graphs just written, as a run would."""
    texts = tuple(dict.fromkeys(("", *settings.safety_concepts)))
    outputs = {}
    for name, tokenizer in tokenizers.items():
        feeds = {"input_ids": input_ids([tokenizer(text) for text in texts])}
        for output, array in run_checked(folder / f"{name}.onnx", feeds).items():
            outputs[f"{name}.{output}"] = array
    arrays = {}
    for name, array in embedding_from_outputs(shape.inputs.conditioning, outputs).items():
        arrays[name] = written(folder / f"{name}.npy", npy_from_floats(array))
    return Embeddings(texts=texts, arrays=arrays)


def _write_filter(
    tokenizers: Mapping[str, Tokenizer],
    settings: ExportSettings,
    folder: Path,
    shape: Shape,
    say: Say,
) -> StoredFilter | None:
    concepts = settings.filter_concepts
    if not concepts:
        return None
    say(f"text filter: {'; '.join(concepts)}")
    conditions = shape.inputs.conditioning.values()
    sources = [source for item in conditions if item.per == "branch" for source in item.sources]
    return write_text_filter(
        folder, tokenizers, sources, concepts, preserve=settings.filter_preserve
    )


def created_by() -> str:
    """Return the entry `created_by` of a file: "sld-edge" and its version."""
    try:
        return f"sld-edge {version('sld-edge')}"
    except PackageNotFoundError:  # run from a checkout
        return "sld-edge"
