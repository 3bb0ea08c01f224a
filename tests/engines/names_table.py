"""Makes tensorrt_names.json: which of the TensorRT names we use the classic bindings have.

The bindings keep the name of every class, method and member as a C string, so their libraries need
not load, and need not even be for this machine:

    python tests/engines/names_table.py 10.3.0=DIR/tensorrt_bindings/tensorrt.so 11.4.0.106=...

The wheels (`pip download tensorrt_cu12_bindings==10.3.0 --no-deps`) are zip files.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ENGINES = Path(__file__).parents[2] / "engines"
PAGES = (ENGINES / "tensorrt" / "api.py", ENGINES / "tensorrt" / "builder_api.py")  # the Protocols
USERS = tuple(sorted(ENGINES.rglob("*.py")))
TABLE = Path(__file__).with_name("tensorrt_names.json")

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
_PYTHON_NAME = re.compile(r"^(?:def )?(\w+)(?=\(| =)", re.MULTILINE)


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


def used_names() -> dict[str, set[str]]:
    """Return every name we use of TensorRT's, with the classes or enums it belongs to."""
    names: dict[str, set[str]] = {}
    for page in PAGES:
        for protocol, member in protocol_members(page):
            owner = CLASSES[protocol]
            names.setdefault(member, set()).add(owner)
            if owner:
                names.setdefault(owner, set()).add("")
    for source in USERS:
        for owner, member in enum_members(source, ("trt", "_trt")):
            names.setdefault(owner, set()).add("")
            names.setdefault(member, set()).add(owner)
    return names


def present(names: Iterable[str], library: Path) -> dict[str, bool]:
    """Say which names a library of bindings and the Python around it have.

    A linker stores `name` inside `get_tensor_name`, so the end of a C string is enough: a name that
    is said to be absent is, one that is said to be present is but for a coincidence.
    """
    content = library.read_bytes()
    package = library.with_name("__init__.py")
    text = package.read_text(encoding="utf-8") if package.is_file() else ""
    around = set(_PYTHON_NAME.findall(text))
    return {name: name in around or name.encode() + b"\0" in content for name in names}


def main(arguments: list[str]) -> None:
    """Write the table from VERSION=LIBRARY."""
    used = sorted(used_names())
    table = {}
    for argument in arguments:
        version, _, path = argument.partition("=")
        table[version] = present(used, Path(path))
    TABLE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


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


if __name__ == "__main__":
    main(sys.argv[1:])
