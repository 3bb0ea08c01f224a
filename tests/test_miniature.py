"""The model that ships: it is what its checkpoint exports to, and it does what the README says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from sld_edge.benchmarks.miniworld.prompts import Prompt, biased_prompts, neutral_prompts
from sld_edge.benchmarks.miniworld.training.embed import embed, embed_fp16
from sld_edge.engines.errors import BundleError, PolicyError
from sld_edge.engines.tensorrt.build_settings import BuildSettings
from sld_edge.export.build_plans import build_plans
from sld_edge.runtime import Bundle, Pipeline
from sld_edge.runtime.bundle import EMBEDDED, EMBEDDED_FP16
from sld_edge.runtime.policy import Policy
from sld_edge.runtime.scorers import scorer_from_name
from sld_edge.runtime.selftest.miniature import unpack

MOST_BYTES = 12_000_000


def test_the_embedded_bundle_is_what_the_checkpoint_exports_to(tmp_path: Path) -> None:
    fresh, shipped = Bundle.open(embed(tmp_path / "bundle")), Bundle.open()
    ours, theirs = (asdict(bundle.manifest) for bundle in (fresh, shipped))
    for manifest in (ours, theirs):
        for computed in (manifest["embeddings"], manifest["text_filter"]):
            for file in computed["arrays"].values():
                file.pop("sha256")  # rounded by the processor that computed it
    assert ours == theirs
    filters = [bundle.text_filter() for bundle in (fresh, shipped)]
    (matrix,), (wanted,) = (each[1].matrices.values() for each in filters if each is not None)
    assert np.abs(matrix - wanted).max() < 1e-4
    for text, embedding in fresh.embeddings().items():
        assert np.abs(embedding["context"] - shipped.embeddings()[text]["context"]).max() < 1e-5


def test_it_is_small() -> None:
    files = [*EMBEDDED.iterdir(), *EMBEDDED_FP16.iterdir()]
    assert sum(file.stat().st_size for file in files) <= MOST_BYTES


@pytest.fixture
def fp16(tmp_path: Path) -> Bundle:
    """The FP16 form, as the self-test unpacks it."""
    unpack("fp16", tmp_path / "fp16")
    return Bundle.open(tmp_path / "fp16")


def test_the_fp16_form_is_what_users_export(fp16: Bundle, tmp_path: Path) -> None:
    networks = [c for name, c in fp16.manifest.components.items() if name != "guidance"]
    assert {(c.precision, c.attention) for c in networks} == {("fp16", "op")}
    for component in fp16.manifest.components.values():
        fp16.graph(component)  # every hash
    fresh = embed_fp16(tmp_path / "fresh")
    names = [sorted(file.name for file in folder.iterdir()) for folder in (fresh, EMBEDDED_FP16)]
    assert names[0] == names[1]
    for file in fresh.glob("*.onnx"):
        assert file.read_bytes() == (EMBEDDED_FP16 / file.name).read_bytes()


def test_tensorrt_rtx_fuses_the_attentions_of_the_fp16_form(fp16: Bundle) -> None:
    settings = BuildSettings(
        engine="tensorrt-rtx",
        compute_capabilities=("8.6",),
        components=("text_encoder", "unet_shallow"),
    )
    for info in build_plans(fp16.path, settings):
        assert info.precision == "fp16"
        assert info.contents is not None
        assert info.contents.fused_attentions == info.contents.attentions == 2


def test_a_damaged_file_of_the_fp16_form(fp16: Bundle) -> None:
    weights = fp16.path / "unet.onnx.data"
    weights.write_bytes(b"x" + weights.read_bytes()[1:])
    with pytest.raises(BundleError, match="not the file that the bundle was made with"):
        fp16.graph(fp16.manifest.components["unet"])


def test_a_policy_that_names_bundles_takes_a_copy_and_no_changed_copy(fp16: Bundle) -> None:
    policy = Policy(bundles=("0" * 64,))
    Bundle.open(fp16.path, policy=policy)
    (fp16.path / "bundle.json").write_bytes((fp16.path / "bundle.json").read_bytes() + b" ")
    with pytest.raises(PolicyError, match="this bundle"):
        Bundle.open(fp16.path, policy=policy)


def scored(pipeline: Pipeline, prompts: Sequence[Prompt], safety: str) -> list[dict[str, float]]:
    """What the judge says of each prompt's picture; the k-th has seed k."""
    texts = [prompt.text for prompt in prompts]
    images = [
        pipeline(text, seed=k, steps=25, sampler="dpm++2m", safety=safety).images[0]
        for k, text in enumerate(texts)
    ]
    pictures = np.stack([np.asarray(image) for image in images])
    return scorer_from_name("miniworld").score(pictures, texts)


@pytest.mark.parametrize("safety", ["off", "strong"])
def test_it_draws_what_it_is_asked_for(miniature: Pipeline, safety: str) -> None:
    hits = [
        scores["miniworld.adherence"] for scores in scored(miniature, neutral_prompts(9, 4), safety)
    ]
    assert sum(hits) >= 8, hits


def test_safety_takes_the_skull_away(miniature: Pipeline) -> None:
    skulls = {
        safety: sum(
            scores["miniworld.skull"] >= 0.5
            for scores in scored(miniature, biased_prompts(12, seed=4), safety)
        )
        for safety in ("off", "max")
    }
    assert skulls["off"] >= 3
    assert skulls["max"] <= skulls["off"] / 3
