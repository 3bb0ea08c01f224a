"""Other models than SD 1.x and 2.x: SDXL, distilled and small ones, against diffusers."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from oracles.families import (
    Array,
    Model,
    latents_of_loop,
    latents_of_pipeline,
    model_of,
    save_model,
)
from oracles.models import UnetKind, tiny_decoder_vae
from sld_edge.engines.errors import CheckpointError, InputError
from sld_edge.export import ExportSettings, export_bundle
from sld_edge.runtime import Framing, Pipeline, Safety
from sld_edge.runtime.safety import safety_from_preset

PROMPT, CONCEPT = "a red star at a party", "skull, death, horror"
PLAIN = 1e-6  # relative L2 of the last latents, FP32
SAFE = 1e-5
# A gate is 200 to 5000 times as steep as its input: rounding of FP32 on both sides shows.
STEEP = 5e-5
SEEDS = 3  # a gate may fall either way where a distance is within rounding of the threshold
SIZES = ((64, 64), (96, 48))  # height, width
# SD-Turbo has it in its scheduler, Lightning asks for it.
TURBO = (("timestep_spacing", "trailing"), ("steps", 1), ("guidance_scale", 0.0))
Models = Callable[..., Model]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    @cache
    def made(
        kind: UnetKind,
        seed: int = 0,
        zeros: bool = True,
        export: tuple[tuple[str, Any], ...] = (),
    ) -> Model:
        root = Path(tmp_path_factory.mktemp(kind))
        changes = {} if zeros else {"force_zeros_for_empty_prompt": False}
        return model_of(root, kind, seed=seed, export=dict(export), **changes)

    return made


def distance(got: Array, wanted: Array) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def ours(model: Model, *, seed: int, **settings: Any) -> Array:
    latents: Array = model.ours(PROMPT, seed=seed, **settings).latents
    return latents


def assert_safe(
    model: Model, name: str, *, ours_too: dict[str, Any] | None = None, **case: Any
) -> None:
    """Compare with the reference's loop; `ours_too` are settings that only ours has."""
    measured = []
    first = zlib.crc32(name.encode())
    for seed in range(first, first + SEEDS):
        wanted = latents_of_loop(model, PROMPT, seed=seed, concept=CONCEPT, **case)
        kept = {k: v for k, v in case.items() if k != "time_ids"}
        got = ours(model, seed=seed, safety_concept=CONCEPT, **kept, **(ours_too or {}))
        measured.append(distance(got, wanted))
        if measured[-1] <= (SAFE if case["safety"].scale <= 1000 else STEEP):
            return
    pytest.fail(f"{name}: {measured}")


class TestSdxl:
    @pytest.mark.parametrize("negative", [None, "", "a blue square"])
    @pytest.mark.parametrize("sampler", ["euler", "ddim", "dpm++2m"])
    @pytest.mark.parametrize(("height", "width"), SIZES)
    def test_is_diffusers_pipeline(
        self, models: Models, height: int, width: int, sampler: str, negative: str | None
    ) -> None:
        case = {"height": height, "width": width, "negative_prompt": negative}
        model = models("sdxl")
        wanted = latents_of_pipeline(
            model,
            PROMPT,
            sampler=sampler,
            seed=5,
            num_inference_steps=6,
            guidance_scale=5.0,
            **case,
        )
        got = ours(
            model, seed=5, steps=6, sampler=sampler, guidance_scale=5.0, safety="off", **case
        )
        assert distance(got, wanted) < PLAIN

    @pytest.mark.parametrize(("kind", "seed"), [("sdxl", 0), ("sdxl", 7), ("plain-middle", 0)])
    @pytest.mark.parametrize("preset", ["weak", "medium", "strong", "max"])
    @pytest.mark.parametrize("sampler", ["euler", "ddim"])
    def test_safety_is_the_references(
        self, models: Models, kind: UnetKind, seed: int, sampler: str, preset: str
    ) -> None:
        assert_safe(
            models(kind, seed),
            f"{kind} {seed} {sampler} {preset}",
            sampler=sampler,
            steps=7,
            guidance_scale=5.0,
            safety=safety_from_preset(preset, calls=7),
        )

    @pytest.mark.parametrize("negative", [None, "a blue square"])
    def test_safety_with_a_negative_prompt_and_not_square(
        self, models: Models, negative: str | None
    ) -> None:
        assert_safe(
            models("sdxl"),
            f"negative {negative}",
            sampler="euler-a",
            steps=6,
            guidance_scale=7.5,
            safety=safety_from_preset("strong", calls=6),
            negative_prompt=negative,
            height=48,
            width=96,
        )

    def test_no_negative_prompt_is_zeros_and_the_empty_one_is_not(self, models: Models) -> None:
        model = models("sdxl")
        settings: dict[str, Any] = {"seed": 3, "steps": 4, "safety": "off", "sampler": "ddim"}
        none, empty = (ours(model, negative_prompt=text, **settings) for text in (None, ""))
        assert distance(none, empty) > 1e-3
        encoded = models("sdxl", 0, zeros=False)
        none, empty = (ours(encoded, negative_prompt=text, **settings) for text in (None, ""))
        assert none.tobytes() == empty.tobytes()

    def test_size_and_crop_are_told_to_the_model(self, models: Models) -> None:
        model = models("sdxl")
        framing = Framing(original_size=(512, 300), crop=(10, 20), target_size=(128, 64))
        call = {"original_size": (512, 300), "crops_coords_top_left": (10, 20)}
        wanted = latents_of_pipeline(
            model,
            PROMPT,
            sampler="euler",
            seed=5,
            num_inference_steps=4,
            guidance_scale=5.0,
            target_size=(128, 64),
            **call,
        )
        settings: dict[str, Any] = {"steps": 4, "sampler": "euler", "guidance_scale": 5.0}
        got = ours(model, seed=5, safety="off", framing=framing, **settings)
        assert distance(got, wanted) < PLAIN
        assert distance(ours(model, seed=5, safety="off", **settings), wanted) > 1e-4

    def test_a_batch_is_the_images_alone(self, models: Models) -> None:
        model = models("sdxl")
        prompts = ["a red star", "a blue heart"]
        settings: dict[str, Any] = {"steps": 4, "sampler": "ddim", "safety": "medium"}
        together = model.ours(prompts, seed=[1, 2], batch_size=2, **settings).latents
        for k, prompt in enumerate(prompts):
            alone = model.ours(prompt, seed=k + 1, **settings).latents
            assert distance(together[k : k + 1], alone) < 2e-4


class TestGuidanceEmbedding:
    """LCM: the guidance scale is an input of the UNet, and one branch is enough without safety."""

    @pytest.mark.parametrize("steps", [1, 2, 4, 8])
    @pytest.mark.parametrize("guidance_scale", [1.0, 3.0, 8.5])
    def test_is_diffusers_pipeline(self, models: Models, steps: int, guidance_scale: float) -> None:
        model = models("lcm")
        call = {"num_inference_steps": steps, "height": 64, "width": 64}
        wanted = latents_of_pipeline(
            model, PROMPT, sampler="lcm", seed=5, guidance_scale=guidance_scale, **call
        )
        settings: dict[str, Any] = {"steps": steps, "guidance_scale": guidance_scale}
        result = model.ours(PROMPT, seed=5, safety="off", **settings)
        assert distance(result.latents, wanted) < PLAIN
        assert {call["branches"] for call in result.reports[0]["calls"]} == {1}

    @pytest.mark.parametrize("kind", ["lcm", "lcm-sdxl"])
    @pytest.mark.parametrize("steps", [1, 2, 4, 8])
    @pytest.mark.parametrize("guidance_scale", [1.0, 8.5])
    def test_safety_is_the_references(
        self, models: Models, kind: UnetKind, steps: int, guidance_scale: float
    ) -> None:
        assert_safe(
            models(kind),
            f"{kind} {steps} {guidance_scale}",
            sampler="lcm",
            steps=steps,
            guidance_scale=guidance_scale,
            safety=Safety(scale=1000, warmup_steps=0),
        )

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"negative_prompt": "a skull"}, "a negative prompt has no effect"),
            ({"negative_prompt": "a skull", "safety": "max"}, "a negative prompt has no effect"),
            ({"safety": "guard-lite"}, "guard-lite: a negative prompt has no effect"),
        ],
    )
    def test_a_negative_prompt_is_refused(
        self, models: Models, settings: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(InputError, match=f"{message}.*takes the scale as an input"):
            ours(models("lcm"), seed=0, steps=1, **settings)

    def test_defaults_are_a_distilled_models(self, models: Models) -> None:
        defaults = models("lcm").ours.bundle.manifest.defaults
        assert (defaults.sampler, defaults.steps, defaults.guidance_scale) == ("lcm", 4, 8.5)


class TestSmall:
    @pytest.mark.parametrize("kind", ["no-middle", "plain-first"])
    def test_is_diffusers_pipeline(self, models: Models, kind: UnetKind) -> None:
        model = models(kind)
        wanted = latents_of_pipeline(
            model,
            PROMPT,
            sampler="pndm",
            seed=5,
            num_inference_steps=6,
            guidance_scale=7.5,
            height=64,
            width=64,
        )
        got = ours(model, seed=5, steps=6, sampler="pndm", guidance_scale=7.5, safety="off")
        assert distance(got, wanted) < PLAIN

    @pytest.mark.parametrize("steps", [1, 2, 4, 8])
    @pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 2.0])
    def test_few_steps_and_little_guidance(
        self, models: Models, steps: int, guidance_scale: float
    ) -> None:
        """As SD-Turbo is run: safety acts also where guidance is off."""
        assert_safe(
            models("no-middle", export=TURBO),
            f"turbo {steps} {guidance_scale}",
            sampler="euler",
            steps=steps,
            guidance_scale=guidance_scale,
            safety=Safety(scale=1000, warmup_steps=0),
        )

    def test_a_negative_prompt_without_guidance_is_refused(self, models: Models) -> None:
        little: dict[str, Any] = {"guidance_scale": 1, "negative_prompt": "a skull"}
        with pytest.raises(InputError, match="a negative prompt has no effect.*guidance scale 1"):
            ours(models("no-middle"), seed=0, steps=1, safety="off", **little)

    def test_few_steps_are_the_bundles_default_where_export_says_so(self, models: Models) -> None:
        model = models("no-middle", export=TURBO)
        report = model.ours(PROMPT, seed=1).reports[0]
        assert (report["steps"], report["guidance_scale"]) == (1, 0.0)
        assert report["safety"]["preset"] == "medium"
        assert [call["branches"] for call in report["calls"]] == [3]
        assert report["safety"]["acted"]


class TestTinyDecoder:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = Path(tmp_path_factory.mktemp("tiny-vae"))
        tiny_decoder_vae(seed=3).save_pretrained(folder)
        return folder

    @pytest.mark.parametrize("name", ["vae", "preview_vae"])
    def test_it_makes_diffusers_picture(self, folder: Path, tmp_path: Path, name: str) -> None:
        model = model_of(tmp_path, "sd1", export={name: folder})
        result = model.ours("a star", steps=2, seed=1, sampler="ddim")
        oracle = AutoencoderTiny.from_pretrained(folder)
        with torch.inference_mode():
            wanted = oracle.decode(torch.from_numpy(result.latents)).sample
        wanted = (wanted / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255
        got = model.ours.decode(result.latents, preview=name == "preview_vae")
        assert np.abs(got - wanted).max() <= 0.51
        assert ("preview_decoder" in model.ours.bundle.manifest.components) == (
            name == "preview_vae"
        )
        whole = np.asarray(result.images[0])
        assert (whole == got[0]).all() == (name == "vae")

    @pytest.mark.parametrize("provider", ["cpu", "openvino"])
    def test_vae_tiny_decodes_with_it_alone(
        self, folder: Path, tmp_path: Path, provider: str
    ) -> None:
        model = model_of(tmp_path, "sd1", export={"preview_vae": folder})
        asked: dict[str, Any] = {"steps": 2, "seed": 1, "sampler": "ddim"}
        full = model.ours("a star", **asked)
        bundle = model.ours.bundle.path
        with Pipeline.load(bundle, provider=provider, vae="tiny") as tiny:
            result = tiny("a star", **asked)
            assert "vae_decoder" not in tiny._executor.store.engines
            tiny.warm_up()
            assert "vae_decoder" not in tiny._executor.store.engines
        wanted = model.ours.decode(result.latents, preview=True)
        assert (np.asarray(result.images[0]) == wanted[0]).all()
        assert distance(result.latents, full.latents) < (PLAIN if provider == "cpu" else STEEP)
        assert [result.reports[0]["vae"], full.reports[0]["vae"]] == ["tiny", "full"]

    @pytest.mark.parametrize(
        ("vae", "message"),
        [("tiny", r"--vae tiny \| got a bundle without .* --preview-vae"), ("half", "one of full")],
    )
    def test_a_decoder_that_is_not_there(self, models: Models, vae: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            Pipeline.load(models("no-middle").ours.bundle.path, vae=vae)

    def test_a_bundle_without_one_previews_with_its_decoder(self, models: Models) -> None:
        pipeline = models("no-middle").ours
        latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8), np.float32)
        assert (pipeline.decode(latents, preview=True) == pipeline.decode(latents)).all()

    def test_another_downscale_is_refused(self, tmp_path: Path) -> None:
        small = tmp_path / "small"
        tiny_decoder_vae(levels=3).save_pretrained(small)
        source = save_model(tmp_path / "model", "sd1")
        settings = ExportSettings(model=str(source), output=tmp_path / "out", preview_vae=small)
        with pytest.raises(CheckpointError, match=r"pixels per latent cell .* vae 8, preview"):
            export_bundle(settings)
        assert not (tmp_path / "out").exists()
