"""Bundles that lie, with every hash right: what an attacker would hand to a user."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

Json = dict[str, Any]


def edit_manifest(bundle: Path, edit: Callable[[Json], object]) -> None:
    """Change `bundle.json`."""
    file = bundle / "bundle.json"
    body = json.loads(file.read_text())
    edit(body)
    file.write_text(json.dumps(body))


def rehash(bundle: Path) -> None:
    """Put the true hash and size of every listed file into the manifest."""

    def mend(body: Json) -> None:
        entries = [text["tokenizer"] for text in body["texts"].values()]
        entries += body["embeddings"]["arrays"].values()
        entries += [file for part in body["components"].values() for file in part["files"]]
        if body.get("text_filter"):
            entries += [body["text_filter"]["preserve"], *body["text_filter"]["arrays"].values()]
        for entry in entries:
            data = (bundle / entry["path"]).read_bytes()
            entry |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}

    edit_manifest(bundle, mend)


def edit_embeddings(bundle: Path, edit: Callable[[NDArray[np.float32], list[str]], object]) -> None:
    """Change the stored embeddings [texts,L,C], whose texts are given beside them."""
    file = bundle / "context.npy"
    array = np.load(file)
    edit(array, json.loads((bundle / "bundle.json").read_text())["embeddings"]["texts"])
    stream = io.BytesIO()
    np.save(stream, array)
    file.write_bytes(stream.getvalue())
    rehash(bundle)


def edit_graph(path: Path, edit: Callable[[onnx.ModelProto], object]) -> None:
    """Change a graph's file, its weights left where they are."""
    model = onnx.load(path, load_external_data=False)
    edit(model)
    path.write_bytes(model.SerializeToString())


def relocate(location: str) -> Callable[[onnx.ModelProto], None]:
    """Return an edit that takes every outside weight from another place."""

    def edit(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location

    return edit


def other_weights(path: Path) -> None:
    """Write weights of the same size that make another picture."""
    data = bytearray(path.read_bytes())
    weights = np.frombuffer(data, np.float16)
    path.write_bytes((weights[::-1] * np.float16(0.5)).tobytes())


def replace_with(path: Path, kind: str) -> None:
    """Put something that is no regular file in a file's place."""
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "circle":
        path.symlink_to(path.name)
