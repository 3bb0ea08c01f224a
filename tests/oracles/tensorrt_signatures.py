"""Makes tensorrt_signatures.json: how the bindings of several versions take the calls we make.

    python tests/oracles/tensorrt_signatures.py

It downloads the wheels of `WHEELS`, imports each in a fresh interpreter over a library that has the
names of TensorRT's and does nothing, and writes the signature of everything that the code uses.
The libraries themselves and a GPU are not needed. Run it again when a page of Protocols changes.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

ENGINES = Path(__file__).parents[2] / "engines"
PAGES = (ENGINES / "tensorrt" / "api.py", ENGINES / "tensorrt" / "builder_api.py")  # the Protocols
USERS = tuple(sorted(ENGINES.rglob("*.py")))
TABLE = Path(__file__).with_suffix(".json")
WHEELS = (  # JetPack 6; the first with Attention; the newest; the lowest that pyproject.toml allows
    "tensorrt_cu12_bindings==10.3.0",
    "tensorrt_cu12_bindings==10.13.3.9",
    "tensorrt_cu13_bindings==11.4.0.106",
    "tensorrt_rtx_cu13_bindings==1.6.1.120",
)

# Protocol to class; the pages' own docstrings say the same in words.
CLASSES = {
    "ExecutionContext": "IExecutionContext",
    "RuntimeConfig": "IRuntimeConfig",
    "RuntimeCache": "IRuntimeCache",
    "CudaEngine": "ICudaEngine",
    "RtxCudaEngine": "ICudaEngine",
    "Runtime": "Runtime",
    "Refitter": "Refitter",
    "OnnxParserRefitter": "OnnxParserRefitter",
    "NetworkTensor": "ITensor",
    "NetworkDefinition": "INetworkDefinition",
    "ParserError": "ParserError",
    "OnnxParser": "OnnxParser",
    "OptimizationProfile": "IOptimizationProfile",
    "TimingCache": "ITimingCache",
    "BuilderConfig": "IBuilderConfig",
    "Builder": "Builder",
    "TensorRT": "",  # the module itself
    "TensorRTBuilder": "",
}

Signatures = dict[str, list[str] | None]  # by `Class.member`; None: the version lacks it


# --- what the code uses --------------------------------------------------------------------------


def protocol_members(page: Path) -> Iterator[tuple[str, str]]:
    """Yield protocol and member, for all members of all protocols of a page."""
    for node in ast.parse(page.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.FunctionDef):
                    yield node.name, part.name
                elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                    yield node.name, part.target.id


def enum_members(source: Path, roots: tuple[str, ...]) -> set[tuple[str, str]]:
    """Return X and Y of every `root.X.Y`, and of every `getattr(root.X, "Y", ...)`.

    A root is a plain name (`trt`), or the last name of a chain that leads to it (`self._trt`); what
    was given another name first, `severity = trt.ILogger`, is followed too.
    """
    tree = ast.parse(source.read_text(encoding="utf-8"))
    other_names = dict(_other_names(tree, roots))
    found = set()
    for node in ast.walk(tree):
        owner, member = _access(node)
        if isinstance(owner, ast.Name) and owner.id in other_names:
            found.add((other_names[owner.id], member))
        elif isinstance(owner, ast.Attribute) and _last(owner.value) in roots:
            found.add((owner.attr, member))
    return {(owner, member) for owner, member in found if member and not member.startswith("__")}


def constructions(source: Path, roots: tuple[str, ...]) -> set[tuple[str, int]]:
    """Return X and the number of arguments of every `root.X(...)`."""
    return {
        (node.func.attr, len(node.args))
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr[0].isupper()
        and _last(node.func.value) in roots
    }


def assignments(source: Path) -> set[str]:
    """Return Y of every `x.Y = ...`."""
    return {
        target.attr
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Attribute)
    }


def used_names() -> set[str]:
    """Return `Class`, `Class.member`, `Enum.member` and `function` of everything we use."""
    pairs = {(CLASSES[p], member) for page in PAGES for p, member in protocol_members(page)}
    pairs |= {pair for source in USERS for pair in enum_members(source, ("trt", "_trt"))}
    names = {f"{owner}.{member}".removeprefix(".") for owner, member in pairs}
    return names | {owner for owner, _ in pairs if owner}


def _access(node: ast.AST) -> tuple[ast.expr | None, str]:
    """Return what is looked into and for which member."""
    if isinstance(node, ast.Attribute):
        return node.value, node.attr
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
        member = node.args[1]
        if isinstance(member, ast.Constant) and isinstance(member.value, str):
            return node.args[0], member.value
    return None, ""


def _other_names(tree: ast.AST, roots: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield name and X of every `name = root.X`, also in `a, b = c, root.X`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                both = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                pairs = (
                    zip(target.elts, node.value.elts, strict=False)  # type: ignore[attr-defined]
                    if both
                    else [(target, node.value)]
                )
                for name, value in pairs:
                    if (
                        isinstance(name, ast.Name)
                        and isinstance(value, ast.Attribute)
                        and _last(value.value) in roots
                        and value.attr[0].isupper()
                    ):
                        yield name.id, value.attr


def _last(node: ast.expr) -> str:
    """Return the last name of `a`, `self.a` or `target.a`."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


# --- what a version has --------------------------------------------------------------------------


def signatures(trt: Any, names: Iterable[str]) -> Signatures:
    """Return the signatures that the docstrings of a version's bindings state, by name."""
    return {name: _stated(trt, name) for name in sorted(names)}


def _stated(trt: Any, name: str) -> list[str] | None:
    thing = trt
    for part in name.split("."):
        thing = getattr(thing, part, None)
    if thing is None:
        return None
    if isinstance(thing, property):
        both = ((thing.fget, "get"), (thing.fset, "set"))
        return [word + _overloads(call)[0] for call, word in both if call is not None]
    if inspect.isfunction(thing):  # of the Python around the bindings
        return [str(inspect.signature(thing))]
    if inspect.isclass(thing):  # an enum or abstract class states nothing of use
        return _overloads(thing.__init__)
    return _overloads(thing) if callable(thing) else []


def _overloads(function: Any) -> list[str]:
    """Return every signature in a docstring of pybind11, without `self`, modules and defaults."""
    text = re.sub(r"\btensorrt(_rtx)?(_bindings)?\.(tensorrt(_rtx)?\.)?", "", function.__doc__)
    text = re.sub(r" = (<[^>]*>|[^,)]+)", " = ...", text)
    found = re.findall(r"^(?:\d+\. )?\w*\((?:self|arg0): \w+(?:, )?(.*\) -> .+)$", text, re.M)
    return [f"({signature}" for signature in found]


def _read_wheel(wheel: str, folder: Path) -> tuple[str, Signatures]:
    """Download a wheel and read it in a fresh interpreter; return its name and signatures."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*pip, wheel], check=True)
    zipfile.ZipFile(next(folder.glob("*.whl"))).extractall(folder)
    library = next(folder.glob("*_bindings/tensorrt*.so"))
    needed = set(re.findall(rb"lib(?:nvinfer|nvonnx|tensorrt)\w*\.so\.\d+", library.read_bytes()))
    source = folder / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in _ENTRIES))
    for name in needed:
        output = str(folder / name.decode())
        subprocess.run(["cc", "-shared", "-fPIC", "-o", output, str(source)], check=True)
    paths = {"PYTHONPATH": str(folder), "LD_LIBRARY_PATH": str(folder)}
    # -S: no other packages, so no real library of another version.
    command = [sys.executable, "-S", __file__, library.parent.name]
    done = subprocess.run(command, env={**os.environ, **paths}, check=True, capture_output=True)
    product = library.parent.name.removesuffix("_bindings")
    return f"{product} {wheel.partition('==')[2]}", json.loads(done.stdout)


_ENTRIES = (  # of TensorRT's libraries: all that the bindings need to be loaded
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)


def main(arguments: list[str]) -> None:
    """Write the table; with a module's name, print the signatures of that module."""
    if arguments:
        print(json.dumps(signatures(import_module(arguments[0]), used_names())))
        return
    table = {}
    for wheel in WHEELS:
        with tempfile.TemporaryDirectory() as folder:
            name, table[name] = _read_wheel(wheel, Path(folder))
    versions = []
    for version, names in table.items():  # a name on a line
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in names.items()]
        versions.append(f' "{version}": {{\n' + ",\n".join(lines) + "\n }")
    TABLE.write_text("{\n" + ",\n".join(versions) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
