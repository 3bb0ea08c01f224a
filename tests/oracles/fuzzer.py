"""Damage files of every kind, and say which did not end in one line or the honest picture.

It stands beside the oracles, since its worker processes must find it by name: pytest puts `tests`
on the path, and not the folder above.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from oracles.forgery import rehash, relocate, replace_with
from sld_edge.engines.errors import UserError
from sld_edge.engines.tensorrt.plan_info import plan_info_from_file
from sld_edge.export.checkpoints.sources import checkpoint_from_source
from sld_edge.runtime import Pipeline
from sld_edge.runtime.bundle import EMBEDDED
from sld_edge.runtime.policy import POLICY_FILE
from sld_edge.runtime.policy_file import policy_from_json
from sld_edge.runtime.tokenizer import Tokenizer

_WORKERS = 2
SECONDS = 20.0  # that one mutation may take
MEMORY = 4 << 30
LINE = 300
CHECKPOINT = Path(__file__).parents[2] / "benchmarks" / "miniworld" / "checkpoint"
WORDS: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 1.5, 1e300, 10**18, 10**400, "", "x", "../x", "/etc/passwd"),
    *("a\0b", "\ud800", "é" * 300, [], {}, [[]], [1, 2], {"a": 1}, "unet.onnx", float("inf")),
]
Seen = list[str]


# --- mutations ------------------------------------------------------------------------------------


def bytes_mutated(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(out) or 1)
        kind = rng.randrange(5)
        if kind == 0 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + rng.randrange(1, 40)] = rng.randbytes(rng.randrange(0, 40))
        elif kind == 2:
            del out[at:]
        elif kind == 3:
            out[at:at] = out[: rng.randrange(1, 200)]
        else:
            out[at : at + 8] = rng.choice([b"\xff" * 8, b"\0" * 8, b"\x7f" * 8, b"\x80" * 8])
    return bytes(out)


def json_mutated(text: str, rng: random.Random) -> bytes:
    if rng.random() < 0.15:
        return bytes_mutated(text.encode(), rng)
    if rng.random() < 0.03:
        return rng.choice([b'{"a":' * 20_000, b"[" * 50_000, b"[]", b"", b'{"a": NaN}'])
    body = json.loads(text)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        place, key = body, rng.choice(list(body))
        while isinstance(place[key], dict | list) and place[key] and rng.random() < 0.85:
            place = place[key]
            key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        kind = rng.randrange(4)
        if kind == 0 and isinstance(place, dict) and len(place) > 1:
            del place[key]
        elif kind == 1 and isinstance(place[key], int | float):
            place[key] = place[key] * rng.choice([-1, 0, 2, 1000, 10**9])
        else:
            place[key] = copy.deepcopy(rng.choice(WORDS))  # later changes stay out of WORDS
    return json.dumps(body).encode("utf-8", "surrogatepass")


def replace(path: Path, data: bytes) -> None:
    """Put a new file in the place of one that is shared with the honest folder."""
    path.unlink()
    path.write_bytes(data)


class Worker:
    """What the mutations share: an honest picture, and an eye on what is opened."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.allowed: tuple[str, ...] = ()
        self.watching = False
        self.folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        self.canary = self.folder / "secret"
        self.canary.write_text("a secret")
        # A file of the right size for the UNet's weights, which no bundle may read.
        shutil.copy(EMBEDDED / "unet.onnx.data", self.folder / "unet.onnx.data")
        # Links are made from copies: a link changes a file's identity for all who load it now.
        self.sources = {
            source: Path(shutil.copytree(source, self.folder / f"source-{source.name}"))
            for source in (EMBEDDED, CHECKPOINT)
        }
        self.honest = self.picture(EMBEDDED)
        places = (sys.prefix, sys.base_prefix, *sys.path, Path(__file__).parents[2], EMBEDDED)
        self.allowed = (
            *(os.path.realpath(str(place)) for place in places if str(place)),
            *(str(self.folder / name) for name in ("work", "source-", "unet.plan.json")),
            *("/proc/", "/sys/", "/dev/null", "/dev/urandom", str(POLICY_FILE)),
        )
        os.chdir(self.folder / "source-miniature")
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.watching and event == "open" and isinstance(arguments[0], str | bytes | Path):
            self.opened.append(os.fsdecode(arguments[0]))

    def picture(self, bundle: Path) -> bytes:
        with Pipeline.load(bundle, provider="cpu") as pipeline:
            return bytes(pipeline("a red star", steps=1, seed=3, safety="max").images[0].tobytes())

    def copy(self, source: Path) -> Path:
        target = self.folder / "work"
        shutil.rmtree(target, ignore_errors=True)
        source = self.sources[source]
        return Path(shutil.copytree(source, target, copy_function=os.link))

    def manifest(self, rng: random.Random) -> None:
        bundle = self.copy(EMBEDDED)
        replace(bundle / "bundle.json", json_mutated((EMBEDDED / "bundle.json").read_text(), rng))
        self.picture(bundle)

    def behind_the_hash(self, rng: random.Random) -> None:
        """A file that is damaged under its old hash: refused, or never used."""
        bundle = self.copy(EMBEDDED)
        names = [p.name for p in EMBEDDED.iterdir() if p.suffix in (".onnx", ".data", ".npy")]
        file = bundle / rng.choice([*names, "tokenizer.json"])
        replace(file, bytes_mutated(file.read_bytes(), rng))
        assert self.picture(bundle) == self.honest, "another picture"

    def graph(self, rng: random.Random) -> None:
        """A graph, an array, weights or a tokenizer that is damaged, its hash made right."""
        names = ["unet.onnx", "vae_decoder.onnx", "text_encoder.onnx", "context.npy"]
        name = rng.choice([*names, "unet.onnx.data", "tokenizer.json"])
        data = (EMBEDDED / name).read_bytes()
        if name == "tokenizer.json":
            data = json_mutated(data.decode("utf-8"), rng)
        elif name == "unet.onnx.data":
            at = rng.randrange(len(data) - 64)
            data = data[:at] + rng.choice([b"\xff\x7f" * 32, b"\x00\x7c" * 32]) + data[at + 64 :]
        else:
            data = bytes_mutated(data, rng)
        self.picture(self.forged({name: data}))

    def edited(self, rng: random.Random) -> None:
        """A graph that is whole ONNX and says something else, its hash made right."""
        name = rng.choice(["unet.onnx", "vae_decoder.onnx", "text_encoder.onnx"])
        model = onnx.load(EMBEDDED / name, load_external_data=False)
        for _ in range(rng.choice([1, 1, 3])):
            node, tensor = rng.choice(model.graph.node), rng.choice(model.graph.initializer)
            kind = rng.randrange(5)
            if kind == 0:
                node.op_type = rng.choice(["Add", "MatMul", "Reshape", "Identity", "Nothing"])
            elif kind == 1 and node.attribute:
                rng.choice(node.attribute).i = rng.choice([-1, 0, 3, 10**6])
            elif kind == 2 and tensor.dims:
                tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice([0, 1, 7, 10**9, -1])
            elif kind == 3 and node.input:
                node.input[rng.randrange(len(node.input))] = rng.choice(["", "nothing", "latents"])
            else:
                tensor.data_type = rng.choice([1, 7, 10, 11, 99])
        self.picture(self.forged({name: model.SerializeToString()}))

    def location(self, rng: random.Random) -> None:
        """A graph whose weights lie outside: always refused, and never opened."""
        name = rng.choice(["unet.onnx", "vae_decoder.onnx", "text_encoder.onnx"])
        place = rng.choice(["../unet.onnx.data", "/etc/hostname", "../secret", "a/../../secret"])
        model = onnx.load(EMBEDDED / name, load_external_data=False)
        relocate(rng.choice([place, str(self.folder / "unet.onnx.data"), str(self.canary)]))(model)
        self.picture(self.forged({name: model.SerializeToString()}))
        raise AssertionError("weights from elsewhere")

    def no_file(self, rng: random.Random) -> None:
        """Something that is no regular file in a file's place: always refused, at once."""
        bundle = self.copy(EMBEDDED)
        name = rng.choice([path.name for path in EMBEDDED.iterdir() if path.is_file()])
        replace_with(bundle / name, rng.choice(["pipe", "device", "folder", "circle"]))
        self.picture(bundle)
        raise AssertionError("no regular file")

    def forged(self, files: dict[str, bytes]) -> Path:
        bundle = self.copy(EMBEDDED)
        for name, data in {"bundle.json": _MANIFEST, **files}.items():
            replace(bundle / name, data)
        rehash(bundle)
        return bundle

    def tokenizer(self, rng: random.Random) -> None:
        data = json_mutated((EMBEDDED / "tokenizer.json").read_text(encoding="utf-8"), rng)
        Tokenizer(data.decode("utf-8", "surrogateescape"), length=24)("a red star at a party")

    def prompt(self, rng: random.Random) -> None:
        letters = [chr(rng.choice([rng.randrange(0x110000), rng.randrange(128), 0x200D, 0xD800]))]
        text = "".join(rng.choice([*letters, "a", " ", "<|endoftext|>"]) for _ in range(200))
        text = text[: rng.randrange(201)] * rng.choice([1, 1, 1, 1000])
        tokenizer = Tokenizer((EMBEDDED / "tokenizer.json").read_text(encoding="utf-8"), length=24)
        tokenizer(text)

    def policy(self, rng: random.Random) -> None:
        body = {
            "format": "sld-edge-policy",
            "format_version": 1,
            "safety": {"minimum": "strong", "concepts_always": ["a"], "guidance_scale": [1, 20]},
            "screening": {"scorers": {"opennsfw": "0" * 64}, "rule_at_least": "opennsfw.nsfw>=1"},
            "bundles": {"signers": ["ed25519:AAAA"], "sha256": ["0" * 64]},
        }
        policy_from_json(json_mutated(json.dumps(body), rng)).text()

    def plan(self, rng: random.Random) -> None:
        body = json.loads(_PLAN)
        path = self.folder / "unet.plan.json"
        path.write_bytes(json_mutated(json.dumps(body), rng))
        plan_info_from_file(path)

    def checkpoint(self, rng: random.Random) -> None:
        folder = self.copy(CHECKPOINT)
        files = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".md"]
        file = rng.choice(files)
        data = file.read_bytes()
        if file.suffix == ".json":
            data = json_mutated(data.decode(), rng)
        elif file.suffix == ".safetensors":
            size = int.from_bytes(data[:8], "little")
            header = json_mutated(data[8 : 8 + size].decode(), rng)
            data = len(header).to_bytes(8, "little") + header + data[8 + size :]
        else:
            data = bytes_mutated(data, rng)
        replace(file, data)
        checkpoint_from_source(str(folder))

    def one(self, kind: str, seed: int) -> str:
        """Return what went wrong with one mutation; empty where nothing did."""
        self.opened.clear()
        self.watching = True
        try:
            getattr(self, kind)(random.Random(f"{kind} {seed}"))
        except UserError as error:
            if len(str(error)) > LINE or "\n" in str(error):
                return f"a line of {len(str(error))} characters: {error}"
        except BaseException as error:
            return f"{type(error).__name__}: {str(error)[:200]}"
        finally:
            self.watching = False
        opened = {os.path.realpath(name) for name in self.opened}
        outside = sorted(name for name in opened if not name.startswith(self.allowed))
        if outside or self.canary.read_text() != "a secret":
            return f"outside: {outside[:3]}"
        return ""


_MANIFEST = (EMBEDDED / "bundle.json").read_bytes()
_PLAN = json.dumps(
    {
        "format": "sld-edge-plan",
        "format_version": 1,
        "component": "unet",
        "sha256": "0" * 64,
        "bytes": 5,
        "source_sha256": "0" * 64,
        "engine": "tensorrt",
        "engine_version": "10.3.0",
        "system": "linux x86_64",
        "devices": [],
        "compute_capabilities": ["8.6"],
        "precision": "fp16",
        "inputs": [
            {
                "spec": {"name": "latents", "dtype": "float32", "shape": ["B", 4, "h", "w"]},
                "profile": [[1, 4, 8, 8], [1, 4, 16, 16], [4, 4, 24, 24]],
            }
        ],
        "outputs": [{"spec": {"name": "y", "dtype": "uint8", "shape": [1]}, "profile": None}],
        "options": {"strip_weights": True},
        "seconds": 1.0,
        "created_by": "sld-edge",
    }
)
# How often each kind comes; pictures take longest.
_KINDS = {
    "manifest": 6,
    "behind_the_hash": 4,
    "graph": 4,
    "tokenizer": 6,
    "prompt": 4,
    "policy": 4,
    "plan": 4,
    "checkpoint": 6,
    "edited": 4,
    "location": 2,
    "no_file": 2,
}


def serve(pipe: Connection) -> None:
    """Answer mutations until the pipe is closed."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.environ |= {"SLD_EDGE_CACHE": "off", "SLD_EDGE_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # a panic's own words
    np.seterr(all="ignore")
    worker = Worker()
    pipe.send("ready")
    try:
        while True:
            kind, seed = pipe.recv()
            pipe.send(worker.one(kind, seed))
    except EOFError:
        shutil.rmtree(worker.folder, ignore_errors=True)


class Pool:
    """One worker process, replaced where it dies or hangs."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("spawn")
        self.start()

    def start(self) -> None:
        self.pipe, theirs = self.context.Pipe()
        self.process = self.context.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        assert self.pipe.poll(120)
        assert self.pipe.recv() == "ready"

    def one(self, kind: str, seed: int) -> str:
        self.pipe.send((kind, seed))
        try:
            if self.pipe.poll(SECONDS):
                return str(self.pipe.recv())
            wrong = f"no answer in {SECONDS:.0f} s"
        except (EOFError, ConnectionError):
            self.process.join(5)
            wrong = f"the process died, exit code {self.process.exitcode}"
        self.close()
        self.start()
        return wrong

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def run(count: int, until: float, first: int, ended: Callable[[], float] = time.monotonic) -> Seen:
    """Try mutations; return what went wrong, each with the kind and seed that repeat it."""
    rng = random.Random(first)
    kinds = rng.choices(list(_KINDS), list(_KINDS.values()), k=count)
    work = iter(list(enumerate(kinds, first)))
    wrong: Seen = []
    tried = Counter[str]()

    def serve_half() -> None:
        pool = Pool()
        try:
            for seed, kind in work:  # each takes the next
                if ended() > until:
                    break
                problem = pool.one(kind, seed)
                tried[kind] += 1
                if problem:
                    wrong.append(f"{kind} {seed}: {problem}")
        finally:
            pool.close()

    with ThreadPoolExecutor(_WORKERS) as threads:
        for half in [threads.submit(serve_half) for _ in range(_WORKERS)]:
            half.result()
    print(f"{sum(tried.values())} mutations: {dict(tried)}; {len(wrong)} wrong")
    return wrong
