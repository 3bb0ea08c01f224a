"""A bundle: what is in it, that it is whole or absent, and tells nothing of this machine."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from oracles.models import save_diffusers_directory
from oracles.tokenizers import VOCAB_SIZE, save_tokenizer
from sld_edge.engines.errors import (
    CheckpointError,
    InputError,
    NumericsError,
    OutputError,
    PolicyError,
)
from sld_edge.export import ExportSettings, export_bundle
from sld_edge.export import write_bundle as bundle
from sld_edge.export.checkpoints.scheduler import sampler_from_scheduler
from sld_edge.export.checkpoints.sources import checkpoint_from_source
from sld_edge.export.families.sd import SD
from sld_edge.export.graphs.guidance import write_guidance
from sld_edge.export.verify import require_agreement
from sld_edge.runtime.bundle import Bundle, own_graph
from sld_edge.runtime.policy_file import policy_from_json
from sld_edge.runtime.safety import PAPER_CONCEPT

CONCEPT = "a cat"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save_diffusers_directory(root, "sd1", vocab_size=VOCAB_SIZE)
    save_tokenizer(root / "tokenizer")
    return root


@pytest.fixture(scope="module")
def settings(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportSettings:
    return ExportSettings(
        model=str(folder),
        output=tmp_path_factory.mktemp("bundles") / "tiny",
        precision="fp32",
        safety_concept=CONCEPT,
        preset="strong",
    )


@pytest.fixture(scope="module")
def exported(settings: ExportSettings) -> Bundle:
    return Bundle.open(export_bundle(settings))


COMPONENTS = ("text_encoder", "unet", "unet_shallow", "vae_decoder", "guidance")


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to change."""
    return Path(shutil.copytree(folder, tmp_path / "tiny"))


def change(file: Path, **entries: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def test_the_guidance_graphs_are_the_packages_own(exported: Bundle, tmp_path: Path) -> None:
    """They are copied; their writer still gives the same graph."""
    ours = own_graph("guidance")
    assert (exported.path / "guidance.onnx").read_bytes() == ours.read_bytes()
    write_guidance(tmp_path / "guidance.onnx")
    assert onnx.load(tmp_path / "guidance.onnx") == onnx.load(ours)


def test_every_file_is_what_the_manifest_says(exported: Bundle) -> None:
    named = {file.path for file in exported.manifest.files()}
    assert named | {"bundle.json"} == {file.name for file in exported.path.iterdir()}
    for file in exported.manifest.files():
        exported.check(file)


def test_manifest(exported: Bundle) -> None:
    manifest = exported.manifest
    assert (manifest.model.id, manifest.model.source) == ("tiny", "diffusers-directory")
    assert manifest.prediction_type == "epsilon"
    assert (manifest.latents.channels, manifest.latents.downscale) == (4, 8)
    assert manifest.latents.scaling_factor == pytest.approx(0.18215)
    assert manifest.text_length == 77
    assert (manifest.size.width, manifest.size.height) == (64, 64)
    assert "_class_name" not in manifest.scheduler
    assert manifest.scheduler["beta_schedule"] == "scaled_linear"
    defaults = manifest.defaults
    assert (defaults.sampler, defaults.steps, defaults.safety) == ("pndm", 50, "strong")
    assert tuple(manifest.components) == COMPONENTS


def test_tensors_are_those_of_the_graphs(exported: Bundle) -> None:
    for name, part in exported.manifest.components.items():
        model = onnx.load(str(exported.path / part.files[0].path), load_external_data=False)
        assert [spec.name for spec in part.inputs] == [item.name for item in model.graph.input]
        assert part.opset == max(item.version for item in model.opset_import), name
    unet = exported.manifest.components["unet"]
    assert {spec.name: spec.shape for spec in unet.inputs}["latents"] == ("B", 4, "h", "w")
    assert unet.outputs[0].shape == ("K*B", 4, "h", "w")
    assert (unet.precision, unet.attention, unet.opset) == ("fp32", "op", 23)
    assert exported.manifest.components["guidance"].attention == "none"


def test_constant_embeddings_are_the_text_encoders(exported: Bundle, folder: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    embeddings = exported.embeddings()
    assert tuple(embeddings) == ("", CONCEPT)
    for text, got in embeddings.items():
        ids = tokenizer(text, padding="max_length", max_length=77, return_tensors="pt")
        with torch.inference_mode():
            want = encoder(ids["input_ids"]).last_hidden_state[0].numpy()
        # Two implementations of the same FP32 sums.
        np.testing.assert_allclose(got["context"], want, atol=1e-5)


def test_the_same_checkpoint_gives_the_same_bytes(
    exported: Bundle, settings: ExportSettings, tmp_path: Path
) -> None:
    again = export_bundle(replace(settings, output=tmp_path / "again"))
    for file in exported.path.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name


def test_nothing_of_this_machine_is_in_it(exported: Bundle, folder: Path) -> None:
    secrets = [str(folder.parent), str(exported.path.parent), str(Path(__file__).parents[2])]
    for file in exported.path.iterdir():
        raw = file.read_bytes()
        assert not any(secret.encode() in raw for secret in secrets), file.name


def test_storage_halves_the_file_of_a_fp32_graph(
    exported: Bundle, settings: ExportSettings, tmp_path: Path
) -> None:
    small = Bundle.open(export_bundle(replace(settings, output=tmp_path / "small", storage="fp16")))
    part = small.manifest.components["unet"]
    assert (part.precision, part.storage) == ("fp32", "fp16")
    size, whole = (
        sum(file.bytes for file in b.manifest.components["unet"].files) for b in (small, exported)
    )
    assert size < 0.7 * whole


@pytest.mark.parametrize("storage", [None, "fp16"])
def test_one_component_in_fp32(
    storage: Any, exported: Bundle, settings: ExportSettings, tmp_path: Path
) -> None:
    mixed = Bundle.open(
        export_bundle(
            replace(
                settings,
                output=tmp_path / "mixed",
                precision="fp16",
                storage=storage,
                fp32_components=("vae_decoder",),
            )
        )
    )
    parts = mixed.manifest.components
    assert {name: part.precision for name, part in parts.items()} == {
        "text_encoder": "fp16",
        "unet": "fp16",
        "unet_shallow": "fp16",
        "vae_decoder": "fp32",
        "guidance": "fp32",
    }
    assert parts["vae_decoder"].storage == ("fp32" if storage is None else "fp16")
    assert (parts["unet"].storage, parts["guidance"].storage) == ("fp16", "fp32")
    halves = [
        sum(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in graph.initializer)
        for graph in (
            onnx.load(mixed.path / f"{name}.onnx", load_external_data=False).graph
            for name in ("vae_decoder", "text_encoder")
        )
    ]
    assert (halves[0] > 0, halves[1] > 0) == (storage == "fp16", True)
    if storage is None:  # the very graph of an FP32 bundle
        for file in ("vae_decoder.onnx", "vae_decoder.onnx.data"):
            assert (mixed.path / file).read_bytes() == (exported.path / file).read_bytes()


def test_each_component_is_held_to_its_own_precision(
    settings: ExportSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = replace(
        settings,
        output=tmp_path / "x",
        precision="fp16",
        fp32_components=("unet",),
        verify=True,
    )
    errors = {"unet": 5e-5, "text_encoder": 1e-2}
    monkeypatch.setattr(bundle, "errors_against_diffusers", lambda *_, **__: errors)
    export_bundle(mixed)
    errors["unet"] = 1e-2  # enough for FP16 only
    with pytest.raises(CheckpointError, match=r"do not agree .* unet 1\.0e-02 .* unet <= 1e-04"):
        export_bundle(replace(mixed, force=True))


def test_torch_exports_one_component_in_fp32(
    settings: ExportSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def writers(checkpoint: Any, *, precision: str, attention: str) -> dict[str, str]:
        return dict.fromkeys(COMPONENTS, f"{precision} {attention}")

    monkeypatch.setattr("sld_edge.export.via_torch.torch_writers", writers)
    mixed = replace(settings, precision="fp16", via="torch", fp32_components=("vae_decoder",))
    made = bundle._torch_writers(checkpoint_from_source(mixed.model), SD, mixed)
    assert {name: str(write) for name, write in made.items() if name != "guidance"} == {
        "text_encoder": "fp16 op",
        "unet": "fp16 op",
        "vae_decoder": "fp32 op",
    }


def test_fp32_components_that_make_no_sense(settings: ExportSettings) -> None:
    for name in ("vae", "guidance"):
        with pytest.raises(InputError, match=f"fp32 component .* '{name}' .* text_encoder, unet"):
            replace(settings, precision="fp16", fp32_components=(name,))
    for name in ("text_encoder_2", "preview_decoder"):  # of other models
        expected = f"fp32 component .* '{name}' .* text_encoder, unet, vae_decoder$"
        chosen = replace(settings, precision="fp16", fp32_components=(name,), force=True)
        with pytest.raises(InputError, match=expected):
            export_bundle(chosen)
    with pytest.raises(InputError, match="where all are"):
        ExportSettings(
            model="sd-1.5", output=Path("x"), precision="fp32", fp32_components=("unet",)
        )


def test_size_concept_and_watch(settings: ExportSettings, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    lines: list[str] = []
    output = export_bundle(
        replace(
            settings,
            output=tmp_path / "deep" / "wide",
            width=128,
            height=72,
            safety_concept="a dog",
        ),
        say=lines.append,
        watch=lambda done, total: seen.append((done, total)),
    )
    opened = Bundle.open(output)
    assert (opened.manifest.size.width, opened.manifest.size.height) == (128, 72)
    assert tuple(opened.embeddings()) == ("", "a dog")
    done = [done for done, _ in seen]
    assert done == sorted(done)
    assert seen[-1][0] >= 0.8 * seen[-1][1] > 0  # all but the VAE's encoder
    assert any("unet" in line for line in lines)


@pytest.mark.parametrize("concept", ["", "  ", "<|endoftext|>"])
def test_a_concept_that_says_nothing_is_refused(
    settings: ExportSettings, tmp_path: Path, concept: str
) -> None:
    with pytest.raises(InputError, match="says nothing to the model"):
        export_bundle(replace(settings, output=tmp_path / "out", safety_concept=concept))
    assert list(tmp_path.iterdir()) == []


def test_a_preset_below_the_policys_is_refused(
    settings: ExportSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {
        "format": "sld-edge-policy",
        "format_version": 1,
        "safety": {"minimum": "max", "custom": "refuse"},
    }
    policy = policy_from_json(json.dumps(body).encode())
    monkeypatch.setattr(bundle, "machine_policy", lambda: policy)
    with pytest.raises(PolicyError, match="the bundle's preset"):
        export_bundle(replace(settings, output=tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_concept_that_is_too_long_is_said(settings: ExportSettings, tmp_path: Path) -> None:
    lines: list[str] = []
    long = replace(settings, output=tmp_path / "long", safety_concept=PAPER_CONCEPT)
    export_bundle(long, say=lines.append)
    assert any("does not read the end of the safety concept" in line for line in lines)


# --- whole or not at all ------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_nothing_is_left_of_a_bundle_that_failed(
    fault: Any, settings: ExportSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr(bundle, "_write_embeddings", fail)  # the graphs are written by then
    with pytest.raises((KeyboardInterrupt, OutputError)):
        export_bundle(replace(settings, output=tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_before_anything_is_read(
    exported: Bundle, settings: ExportSettings
) -> None:
    with pytest.raises(OutputError, match=r"exists .* --force"):
        export_bundle(replace(settings, model="no-such-model"))
    assert exported.path.exists()


def test_force_replaces_a_bundle_and_nothing_else(
    settings: ExportSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "page").write_text("dear diary")
    with pytest.raises(OutputError, match="not a bundle"):
        export_bundle(replace(settings, output=tmp_path / "diary", force=True))
    assert (tmp_path / "diary" / "page").exists()

    here = replace(settings, output=tmp_path / "here", force=True)
    export_bundle(here)
    (tmp_path / "here" / "notes").mkdir()
    (tmp_path / "here" / "notes" / "mine").write_text("mine")
    (tmp_path / "here" / "unet.plan").write_text("")
    export_bundle(replace(here, preset="max"))
    assert Bundle.open(tmp_path / "here").manifest.defaults.safety == "max"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["diary", "here"]
    assert (tmp_path / "here" / "notes" / "mine").read_text() == "mine"
    assert not (tmp_path / "here" / "unet.plan").exists()  # of the model that is gone

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bundle, "_write_embeddings", fail)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(here)
    assert Bundle.open(tmp_path / "here").manifest.defaults.safety == "max"  # the old one stands


def test_unwritable_output(settings: ExportSettings, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        export_bundle(replace(settings, output=tmp_path / "file" / "bundle"))


# --- what cannot be honoured --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("precision", "int8"),
        ("storage", "int4"),
        ("attention", "flash"),
        ("via", "magic"),
        ("preset", "extreme"),
        ("prediction_type", "noise"),
    ],
)
def test_unknown_choices_name_the_known_ones(option: str, value: str) -> None:
    with pytest.raises(InputError, match=f"{option} .* expected"):
        ExportSettings(model="sd-1.5", output=Path("x"), **{option: value})  # type: ignore[arg-type]  # wrong on purpose


def test_storage_that_makes_no_sense() -> None:
    with pytest.raises(InputError, match="storage fp32"):
        ExportSettings(model="sd-1.5", output=Path("x"), precision="fp16", storage="fp32")
    with pytest.raises(InputError, match="via torch"):
        ExportSettings(model="sd-1.5", output=Path("x"), storage="fp16", via="torch")


@pytest.mark.parametrize(("side", "value"), [("width", 100), ("height", 0), ("width", -64)])
def test_sizes_are_multiples_of_a_latent_cell(
    side: str, value: int, settings: ExportSettings, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"{side} .* multiple of 8"):
        export_bundle(replace(settings, output=tmp_path / "x", **{side: value}))  # type: ignore[arg-type]  # width or height


@pytest.mark.parametrize(
    ("file", "entries", "message"),
    [
        ("unet/config.json", {"cross_attention_dim": 32}, "text width"),
        ("unet/config.json", {"in_channels": 9}, "latent channels"),
        ("unet/config.json", {"flux_capacitor": 1}, "flux_capacitor is not known"),
        (
            "unet/config.json",
            {"layers_per_block": 1},
            "lacks tensor|does not fit the config",
        ),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type"),
    ],
)
def test_checkpoints_that_do_not_fit(
    file: str, entries: dict[str, Any], message: str, damaged: Path, tmp_path: Path
) -> None:
    change(damaged / file, **entries)
    with pytest.raises(CheckpointError, match=message) as caught:
        export_bundle(ExportSettings(model=str(damaged), output=tmp_path / "x"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("scheduler", "name", "noted"),
    [
        ({"_class_name": "PNDMScheduler"}, "pndm", False),
        ({"_class_name": "DDIMScheduler"}, "ddim", False),
        ({"_class_name": "EulerDiscreteScheduler"}, "euler", False),
        ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}, "euler", True),
        ({"_class_name": "EulerAncestralDiscreteScheduler"}, "euler-a", False),
        ({"_class_name": "DPMSolverMultistepScheduler"}, "dpm++2m", False),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True},
            "dpm++2m-karras",
            False,
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"},
            "dpm++2m",
            True,
        ),
        ({"_class_name": "LCMScheduler"}, "lcm", False),
        ({"_class_name": "UniPCMultistepScheduler"}, "unipc", False),
        ({"_class_name": "LMSDiscreteScheduler"}, "lms", False),
        ({}, "pndm", True),
    ],
)
def test_sampler_from_scheduler(scheduler: dict[str, Any], name: str, noted: bool) -> None:
    from sld_edge.runtime.samplers import SAMPLERS

    got, notes = sampler_from_scheduler(scheduler)
    assert (got, bool(notes)) == (name, noted)
    assert got in SAMPLERS


def test_a_scheduler_that_no_sampler_follows_is_refused_unless_one_is_chosen(
    damaged: Path, settings: ExportSettings, tmp_path: Path
) -> None:
    change(damaged / "scheduler" / "scheduler_config.json", _class_name="TCDScheduler")
    chosen = replace(settings, model=str(damaged), output=tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"got TCDScheduler .*--sampler NAME"):
        export_bundle(chosen)
    bundle = Bundle.open(export_bundle(replace(chosen, sampler="euler", steps=4)))
    assert (bundle.manifest.defaults.sampler, bundle.manifest.defaults.steps) == ("euler", 4)


# --- checks of the graphs -----------------------------------------------------------------------


def test_weights_that_overflow_are_refused(damaged: Path, tmp_path: Path) -> None:
    file = damaged / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_in.weight"][...] = 1e38  # finite, its sums are not
    save_file(tensors, file)
    with pytest.raises(NumericsError, match=r"vae_decoder.* not finite"):
        export_bundle(ExportSettings(model=str(damaged), output=tmp_path / "x", precision="fp32"))
    assert not (tmp_path / "x").exists()


def test_weights_beyond_fp16_are_refused(damaged: Path, tmp_path: Path) -> None:
    file = damaged / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.weight"][0, 0, 0, 0] = 1e5
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"conv_in\.weight"):
        export_bundle(ExportSettings(model=str(damaged), output=tmp_path / "x"))


def test_verify_agrees(settings: ExportSettings, tmp_path: Path) -> None:
    lines: list[str] = []
    export_bundle(replace(settings, output=tmp_path / "x", verify=True), say=lines.append)
    compared = [line.split(":")[0] for line in lines if "distance to diffusers" in line]
    assert compared == ["text_encoder", "unet", "vae_decoder"]


def test_verify_finds_a_wrong_graph(
    damaged: Path, settings: ExportSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = bundle._writers

    def wrong(checkpoint: Any, *others: Any) -> Any:
        """Write graphs with another number of heads, which no shape depends on."""
        unet = checkpoint.models["unet"]
        unet = replace(unet, config={**unet.config, "attention_head_dim": 1})
        models = {**checkpoint.models, "unet": unet}
        return write(replace(checkpoint, models=models), *others)

    monkeypatch.setattr(bundle, "_writers", wrong)
    with pytest.raises(CheckpointError, match=r"do not agree with diffusers .* unet"):
        export_bundle(replace(settings, model=str(damaged), output=tmp_path / "x", verify=True))
    assert not (tmp_path / "x").exists()


def test_tolerances() -> None:
    require_agreement({"unet": 9e-5, "vae_decoder": 9e-4}, precision="fp32")
    require_agreement({"unet": 1.9e-2, "vae_decoder": 1.9e-2}, precision="fp16")
    for error in (2e-4, float("nan")):
        with pytest.raises(CheckpointError, match="do not agree"):
            require_agreement({"unet": error}, precision="fp32")
