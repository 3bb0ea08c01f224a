"""A bundle, a cache or a folder that was prepared by someone else: refused, or harmless."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from oracles.forgery import (
    edit_graph,
    edit_manifest,
    other_weights,
    rehash,
    relocate,
    replace_with,
)
from sld_edge.engines.onnx_files import externals
from sld_edge.engines.onnxruntime.engine import OrtEngine
from sld_edge.runtime import BundleError, Pipeline
from sld_edge.runtime.bundle import EMBEDDED, own_graph
from sld_edge.runtime.commands.run import main
from sld_edge.runtime.manifest import OWN_GRAPHS

FAST: dict[str, Any] = {"steps": 2, "seed": 3}


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("SLD_EDGE_CACHE", str(folder))
    return folder


def honest() -> np.ndarray:
    with Pipeline.load(provider="cpu") as pipeline:
        return pipeline("a red star", safety="max", **FAST).latents


def refused(bundle: Path, match: str) -> None:
    """Refused before a runtime opens the graph, and not only by the runtime."""
    with pytest.raises(BundleError, match=match) as caught:
        Pipeline.load(bundle, provider="cpu")("a red star", safety="max", **FAST)
    assert len(str(caught.value)) <= 300


class TestWeightsElsewhere:
    def test_an_unlisted_file_beside_the_graph(
        self, bundle_copy: Path, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The real weights are listed, in another folder; the graph reads those beside it."""
        (bundle_copy / "a").mkdir()
        (bundle_copy / "b").mkdir()
        (bundle_copy / "unet.onnx").rename(bundle_copy / "a/unet.onnx")
        shutil.copy(bundle_copy / "unet.onnx.data", bundle_copy / "a/unet.onnx.data")
        (bundle_copy / "unet.onnx.data").rename(bundle_copy / "b/unet.onnx.data")
        other_weights(bundle_copy / "a/unet.onnx.data")

        def move(body: Any) -> None:
            first, second = body["components"]["unet"]["files"]
            first["path"], second["path"] = "a/unet.onnx", "b/unet.onnx.data"
            del body["components"]["unet_shallow"]

        edit_manifest(bundle_copy, move)
        refused(bundle_copy, "reads data that bundle.json does not list")
        after = honest()
        monkeypatch.setenv("SLD_EDGE_CACHE", str(fresh_cache / "another"))
        np.testing.assert_array_equal(after, honest())  # the cache is not poisoned

    def test_weights_that_are_not_listed(self, bundle_copy: Path, fresh_cache: Path) -> None:
        other_weights(bundle_copy / "unet.onnx.data")
        edit_manifest(bundle_copy, lambda body: body["components"]["unet"]["files"].pop())
        edit_manifest(bundle_copy, lambda body: body["components"].pop("unet_shallow"))
        refused(bundle_copy, "reads data that bundle.json does not list")

    @pytest.mark.parametrize(
        "place", ["/etc/hostname", "../unet.onnx.data", "b/../unet.onnx.data", "", "bundle.json"]
    )
    def test_a_place_outside(self, place: str, bundle_copy: Path, fresh_cache: Path) -> None:
        edit_graph(bundle_copy / "unet.onnx", relocate(place))
        rehash(bundle_copy)
        refused(bundle_copy, "reads data that bundle.json does not list")

    def test_bytes_beyond_the_end(self, bundle_copy: Path, fresh_cache: Path) -> None:
        def far(model: onnx.ModelProto) -> None:
            entries = [e for t in model.graph.initializer for e in t.external_data]
            offset = next(entry for entry in entries if entry.key == "offset")
            offset.value = str(1 << 40)

        edit_graph(bundle_copy / "unet.onnx", far)
        rehash(bundle_copy)
        refused(bundle_copy, "reads data that bundle.json does not list")

    @pytest.mark.parametrize("where", ["attribute", "sparse", "subgraph", "function", "tensors"])
    def test_a_tensor_in_any_corner(self, where: str) -> None:
        tensor = onnx.TensorProto(name="t", data_type=1, dims=[1], data_location="EXTERNAL")
        tensor.external_data.add(key="location", value="/any/secret")
        model = onnx.ModelProto()
        node = model.graph.node.add(op_type="Constant")
        if where == "attribute":
            node.attribute.add(name="value", type=4).t.CopyFrom(tensor)
        elif where == "tensors":
            node.attribute.add(name="value", type=9).tensors.append(tensor)
        elif where == "sparse":
            model.graph.sparse_initializer.add().values.CopyFrom(tensor)
        elif where == "subgraph":
            node.attribute.add(name="then_branch", type=5).g.initializer.append(tensor)
        else:
            function = model.functions.add(name="f", domain="mine")
            function.node.add(op_type="Constant").attribute.add(name="value").t.CopyFrom(tensor)
        (found,) = externals(memoryview(model.SerializeToString()))
        assert found.location == "/any/secret"

    @pytest.mark.parametrize("op", [("EPContext", "com.microsoft"), ("Anything", "evil.library")])
    def test_an_operator_that_opens_files(self, op: tuple[str, str]) -> None:
        model = onnx.ModelProto()
        model.graph.node.add(op_type=op[0], domain=op[1])
        with pytest.raises(ValueError, match="operator"):
            list(externals(memoryview(model.SerializeToString())))

    def test_a_normalization_with_a_nameless_input(self, bundle_copy: Path) -> None:
        """ONNX Runtime's fusions of it end the process (found by the fuzz suite)."""

        def nameless(model: onnx.ModelProto) -> None:
            node = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
            node.input[2] = ""

        edit_graph(bundle_copy / "unet.onnx", nameless)
        rehash(bundle_copy)
        refused(bundle_copy, "LayerNormalization with an input that has no name")

    def test_every_weight_of_the_miniature_is_seen(self) -> None:
        for path in EMBEDDED.glob("*.onnx"):
            model = onnx.load(path, load_external_data=False)
            wanted = [t.name for t in model.graph.initializer if t.data_location == 1]
            assert len(list(externals(memoryview(path.read_bytes())))) == len(wanted)


class TestGuidance:
    @pytest.mark.parametrize("name", list(OWN_GRAPHS))
    def test_a_bundle_that_brings_its_own_is_refused(self, name: str, bundle_copy: Path) -> None:
        def never_act(model: onnx.ModelProto) -> None:
            model.graph.name = "mine"

        edit_graph(bundle_copy / f"{name}.onnx", never_act)
        rehash(bundle_copy)
        refused(bundle_copy, f"not the {name} graph of sld-edge")

    def test_the_packages_own_run_from_the_package(
        self, bundle_copy: Path, fresh_cache: Path
    ) -> None:
        with Pipeline.load(bundle_copy, provider="cpu") as pipeline:
            pipeline("a star", **FAST)
            engine = pipeline.engine("guidance")
            assert isinstance(engine, OrtEngine)
            assert engine.path == own_graph("guidance")
            assert engine.path.is_relative_to(EMBEDDED)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "circle"])
@pytest.mark.parametrize("name", ["unet.onnx", "context.npy", "tokenizer.json", "bundle.json"])
def test_only_regular_files(kind: str, name: str, bundle_copy: Path) -> None:
    replace_with(bundle_copy / name, kind)
    with pytest.raises(BundleError):
        Pipeline.load(bundle_copy, provider="cpu")


def test_a_link_out_of_the_bundle(bundle_copy: Path, tmp_path: Path) -> None:
    (bundle_copy / "unet.onnx.data").rename(tmp_path / "elsewhere")
    (bundle_copy / "unet.onnx.data").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="leaves the bundle"):
        Pipeline.load(bundle_copy, provider="cpu")


@pytest.mark.parametrize("cached", [True, False])
def test_a_file_that_is_swapped_between_hash_and_load(
    cached: bool, bundle_copy: Path, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not cached:
        monkeypatch.setenv("SLD_EDGE_CACHE", "off")
    data = bundle_copy / "unet.onnx.data"
    real = Pipeline.load(bundle_copy, provider="cpu").bundle.graph

    def swap(self: Any, component: Any) -> Any:
        checked = real(component)
        if checked.path.name == "unet.onnx":
            before = data.stat()
            other_weights(data)
            os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))  # covers its tracks
        return checked

    monkeypatch.setattr("sld_edge.runtime.bundle.Bundle.graph", swap)
    with (
        Pipeline.load(bundle_copy, provider="cpu") as pipeline,
        pytest.raises(BundleError, match="was changed while it was loaded"),
    ):
        pipeline("a red star", **FAST)


BROKEN: dict[str, Callable[[Path], object]] = {
    "deep JSON": lambda b: (b / "bundle.json").write_text('{"a":' * 50_000),
    "a long integer": lambda b: edit(b, "9" * 5000),
    "a huge integer": lambda b: edit(b, "1" + "0" * 400),
    "an infinite number": lambda b: edit(b, "1e999"),
    "NaN": lambda b: edit(b, "NaN"),
    "no UTF-8": lambda b: (b / "bundle.json").write_bytes(b"\xff\xfe{}"),
    "a list": lambda b: (b / "bundle.json").write_text("[]"),
    "a dtype of code": lambda b: set_dtype(b, "f4,(2,"),
    "a dtype of objects": lambda b: set_dtype(b, "O"),
    "NUL in a path": lambda b: set_path(b, "a\0b"),
    "half a surrogate pair": lambda b: set_path(b, "a\ud800"),
    "a path that is a folder": lambda b: set_path(b, "."),
    "a path to the manifest": lambda b: set_path(b, "bundle.json"),
    "a long path": lambda b: set_path(b, "a" * 300),
    "a zip as embeddings": lambda b: (b / "context.npy").write_bytes(b"PK\x03\x04" + b"0" * 99),
    "an array of 17 PiB": lambda b: (b / "context.npy").write_bytes(huge_npy()),
    "an array of objects": lambda b: np.save(b / "context.npy", np.array([{}]), True),
    "a tokenizer of bytes": lambda b: (b / "tokenizer.json").write_bytes(b"\xff" * 50),
    "components as a list": lambda b: edit_manifest(b, lambda m: m.update(components=[])),
    "files as a number": lambda b: edit_manifest(
        b, lambda m: m["components"]["unet"].update(files=3)
    ),
    "sizes below nothing": lambda b: edit_manifest(b, lambda m: m["size"].update(width=-64)),
    "sizes as text": lambda b: edit_manifest(b, lambda m: m["size"].update(width="64")),
    "a million texts": lambda b: edit_manifest(
        b, lambda m: m["embeddings"].update(texts=["x"] * 1000)
    ),
}


def edit(bundle: Path, number: str) -> None:
    file = bundle / "bundle.json"
    text = file.read_text()
    assert '"guidance_scale": 7.5' in text
    file.write_text(text.replace('"guidance_scale": 7.5', f'"guidance_scale": {number}'))


def set_dtype(bundle: Path, dtype: str) -> None:
    edit_manifest(bundle, lambda body: body["components"]["unet"]["inputs"][0].update(dtype=dtype))


def set_path(bundle: Path, path: str) -> None:
    edit_manifest(bundle, lambda body: body["texts"]["text_encoder"]["tokenizer"].update(path=path))


def huge_npy() -> bytes:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (999999999, 4999999), }\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


@pytest.mark.parametrize("name", list(BROKEN))
def test_a_broken_bundle_is_one_line(
    name: str, bundle_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    BROKEN[name](bundle_copy)
    if name not in ("no UTF-8", "deep JSON", "a list") and '"format"' in (
        bundle_copy / "bundle.json"
    ).read_text(errors="replace"):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            rehash(bundle_copy)
    picture = tmp_path / "s.png"
    assert main(["a", "--bundle", str(bundle_copy), "--steps", "2", "--output", str(picture)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1, said.err
    assert len(said.err) <= 310
    assert not picture.exists()


def test_six_writers_of_one_name(tmp_path: Path) -> None:
    """One picture is written; the other five say that the name is taken."""
    command = [sys.executable, "-m", "sld_edge.runtime.commands.run", "a star", "--output", "s.png"]
    processes = [
        subprocess.Popen(
            [*command, "--seed", str(seed), "--steps", "2", "--quiet"],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(6)
    ]
    said = [process.communicate()[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert sorted(codes) == [0, 2, 2, 2, 2, 2]
    assert all("s.png exists" in text for text, code in zip(said, codes, strict=True) if code)
    assert os.listdir(tmp_path) == ["s.png"]


def test_own_graphs_are_what_is_pinned() -> None:
    for name, sha256 in OWN_GRAPHS.items():
        assert hashlib.sha256(own_graph(name).read_bytes()).hexdigest() == sha256
    body = json.loads((EMBEDDED / "bundle.json").read_text())
    for name, sha256 in OWN_GRAPHS.items():
        assert [file["sha256"] for file in body["components"][name]["files"]] == [sha256]
