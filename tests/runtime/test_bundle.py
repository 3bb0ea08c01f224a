"""A bundle that is not what it says is refused, in one line that names the file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sld_edge.runtime import Bundle, BundleError, NumericsError, Pipeline
from sld_edge.runtime.bundle import EMBEDDED
from sld_edge.runtime.manifest_file import manifest_from_json

Edit = Callable[[dict[str, Any]], None]


def edit(bundle: Path, change: Edit) -> None:
    file = bundle / "bundle.json"
    body = json.loads(file.read_text(encoding="utf-8"))
    change(body)
    file.write_text(json.dumps(body), encoding="utf-8")


def rehash(bundle: Path, entry: dict[str, Any]) -> None:
    data = (bundle / entry["path"]).read_bytes()
    entry.update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))


def generate(bundle: Path) -> None:
    Pipeline.load(bundle, provider="cpu")("a star", steps=1)


def test_the_manifest_survives_a_round_trip() -> None:
    text = (EMBEDDED / "bundle.json").read_text(encoding="utf-8")
    manifest = manifest_from_json(text.encode(), origin="bundle.json")
    assert manifest_from_json(manifest.to_json().encode(), origin="again") == manifest


def test_no_bundle_there(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle at .*sld-export"):
        Bundle.open(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["unet.onnx", "unet.onnx.data", "tokenizer.json"])
def test_a_file_cut_short_is_named(bundle_copy: Path, name: str) -> None:
    path = bundle_copy / name
    os.truncate(path, path.stat().st_size - 7)
    with pytest.raises(BundleError, match=f"{name} is cut short"):
        Bundle.open(bundle_copy)


def test_a_missing_file_is_named(bundle_copy: Path) -> None:
    (bundle_copy / "vae_decoder.onnx").unlink()
    with pytest.raises(BundleError, match=r"lacks vae_decoder\.onnx"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize("name", ["unet.onnx.data", "tokenizer.json", "context.npy"])
def test_an_altered_file_is_refused_when_it_is_first_used(bundle_copy: Path, name: str) -> None:
    path = bundle_copy / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    # No prepared session may stand in for what can no longer be checked.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLD_EDGE_CACHE", "off")
        with pytest.raises(BundleError, match=f"{name} is not the file .*SHA-256"):
            generate(bundle_copy)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda body: body.update(format_version=4), "format version | got 4 .*update sld-edge"),
        (lambda body: body.update(format_version=0), "export the bundle again"),
        (lambda body: body.update(format="other"), "not a bundle's manifest"),
        (lambda body: body.pop("texts"), "lacks the entry 'texts'"),
        (lambda body: body["components"].pop("guidance"), "lacks the entry 'guidance'"),
        (lambda body: body["latents"].update(channels="four"), "wrong kind"),
        (lambda body: body.update(prediction_type="noise"), "prediction_type"),
        (
            lambda body: body["texts"]["text_encoder"]["tokenizer"].update(
                path="../tokenizer.json"
            ),
            "leaves the bundle",
        ),
        (
            lambda body: body["texts"]["text_encoder"]["tokenizer"].update(path="/etc/passwd"),
            "leaves the bundle",
        ),
        (
            lambda body: body["texts"]["text_encoder"]["tokenizer"].update(path="C:\\tokenizer"),
            "leaves the bundle",
        ),
        (
            lambda body: body["embeddings"]["arrays"]["context"].update(path="a/../../b"),
            "leaves the bundle",
        ),
    ],
)
def test_a_wrong_manifest_says_what_is_wrong(bundle_copy: Path, change: Edit, says: str) -> None:
    edit(bundle_copy, change)
    with pytest.raises(BundleError, match=says.replace("|", r"\|")):
        Bundle.open(bundle_copy)


def test_a_manifest_cut_short(bundle_copy: Path) -> None:
    file = bundle_copy / "bundle.json"
    file.write_text(file.read_text()[:-40])
    with pytest.raises(BundleError, match="not whole JSON"):
        Bundle.open(bundle_copy)


def test_a_link_out_of_the_bundle_is_refused(bundle_copy: Path, tmp_path: Path) -> None:
    inside, outside = bundle_copy / "tokenizer.json", tmp_path / "elsewhere.json"
    inside.rename(outside)
    inside.symlink_to(outside)
    with pytest.raises(BundleError, match="link that leaves the bundle"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor.update(name="latent"),
        lambda tensor: tensor.update(dtype="float16"),
        lambda tensor: tensor.update(shape=["B", 5, "h", "w"]),
        lambda tensor: tensor.update(shape=["B", 4, "h"]),
    ],
)
def test_a_graph_with_other_tensors_than_it_says(bundle_copy: Path, change: Edit) -> None:
    def first_input(body: dict[str, Any]) -> None:
        change(body["components"]["unet"]["inputs"][0])

    edit(bundle_copy, first_input)
    with pytest.raises(BundleError, match="tensors are not those|UNet's inputs"):
        generate(bundle_copy)


def test_embeddings_of_another_shape(bundle_copy: Path) -> None:
    np.save(bundle_copy / "context.npy", np.zeros((2, 3, 4), np.float32))
    edit(bundle_copy, lambda body: rehash(bundle_copy, body["embeddings"]["arrays"]["context"]))
    with pytest.raises(BundleError, match=r"context\.npy"):
        Pipeline.load(bundle_copy, provider="cpu")


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder"])
def test_nan_in_the_weights_is_named_by_component(bundle_copy: Path, component: str) -> None:
    data = bundle_copy / f"{component}.onnx.data"
    weights = np.frombuffer(data.read_bytes(), np.float16).copy()
    weights[:] = np.nan
    data.write_bytes(weights.tobytes())

    def say(body: dict[str, Any]) -> None:
        for entry in body["components"][component]["files"]:
            rehash(bundle_copy, entry)

    edit(bundle_copy, say)
    at = r".*call 1 of 2" if component == "unet" else ""
    with pytest.raises(NumericsError, match=f"{component}: NaN or infinity{at}"):
        Pipeline.load(bundle_copy, provider="cpu")("a red star", steps=2, sampler="ddim")
