"""Replacing an exported folder: only its own files go, and no kill loses anything."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sld_edge.engines.errors import InputError, OutputError
from sld_edge.engines.files import umask
from sld_edge.export.output import Kind, check_output, recover, staged
from sld_edge.export.write_bundle import BUNDLE
from sld_edge.runtime.bundle import EMBEDDED


def _lines(root: Path) -> set[str]:
    lines = (root / "list").read_text().splitlines()
    if lines[0] != "a list":
        raise InputError("no list")
    return {"list", *lines[1:]}


KIND = Kind(name="box", manifest="list", listed=_lines, written={"list", "one", "new"})


def make(folder: Path, *own: str, others: tuple[str, ...] = ()) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "list").write_text("\n".join(["a list", *own]))
    for name in (*own, *others):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"old {name}")


def put(box: Path, *, force: bool = True) -> None:
    check_output(box, force=force, kind=KIND)
    with staged(box, force=force, kind=KIND) as part:
        (part / "new").write_text("new")
        (part / "list").write_text("a list\nnew")


def files(root: Path) -> list[str]:
    return sorted(
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.is_symlink() or not path.is_dir()
    )


def test_only_listed_files_go(tmp_path: Path) -> None:
    box = tmp_path / "box"
    make(box, "one", "a/two", others=("mine", "a/mine", "b/c/mine"))
    (box / "link").symlink_to("/nowhere")
    (box / "out").symlink_to(tmp_path)
    put(box)
    assert files(tmp_path) == [
        f"box/{name}" for name in ("a/mine", "b/c/mine", "link", "list", "mine", "new", "out")
    ]
    assert box.stat().st_mode & 0o777 == 0o777 & ~umask()


@pytest.mark.parametrize("content", ["", "{}", '{"format": "sld-edge-bundle"}', "[" * 100_000])
def test_a_folder_with_something_called_a_manifest_is_kept(tmp_path: Path, content: str) -> None:
    (tmp_path / "bundle.json").write_text(content)
    (tmp_path / "diary").write_text("dear diary")
    with pytest.raises(OutputError, match="not a whole bundle, so --force") as caught:
        check_output(tmp_path, force=True, kind=BUNDLE)
    assert len(str(caught.value)) <= 300
    assert files(tmp_path) == ["bundle.json", "diary"]


def test_a_pipe_as_manifest_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "bundle.json")
    with pytest.raises(OutputError, match="not a regular file"):
        check_output(tmp_path, force=True, kind=BUNDLE)


def test_a_file_of_anothers_under_a_new_name_is_refused_before_work(tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(EMBEDDED, tmp_path / "bundle"))
    check_output(bundle, force=True, kind=BUNDLE)
    (bundle / "guidance.onnx.data").mkdir()
    with pytest.raises(
        OutputError, match="holds a file of the same name .* got guidance.onnx.data"
    ):
        check_output(bundle, force=True, kind=BUNDLE)
    make(tmp_path / "box", "one", others=("new",))
    with pytest.raises(OutputError, match="holds a file of the same name .* got new"):
        check_output(tmp_path / "box", force=True, kind=KIND)
    assert (tmp_path / "box" / "new").read_text() == "old new"


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    box = tmp_path / "box"
    with (
        pytest.raises(OutputError, match="exists"),
        staged(box, force=False, kind=KIND),
    ):
        make(box, "one")
    assert files(tmp_path) == ["box/list", "box/one"]


_KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_output
calls = 0
def counted(name):
    real = getattr(os, name)
    def call(*arguments, **named):
        global calls
        calls += 1
        if calls == {at}:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **named)
    setattr(os, name, call)
for name in ("rename", "unlink", "rmdir"):
    counted(name)
test_output.put(Path({box!r}))
"""


@pytest.mark.parametrize("at", range(1, 14))
def test_a_kill_loses_nothing(tmp_path: Path, at: int) -> None:
    """Killed before each change of a name: the next command completes or undoes it."""
    box = tmp_path / "box"
    make(box, "one", "a/two", others=("mine", "a/mine"))
    code = _KILLED.format(tests=str(Path(__file__).parent), at=at, box=str(box))
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode in (-9, 0), process.stderr
    recover(box, KIND)
    assert (box / "mine").read_text() == "old mine"
    assert (box / "a" / "mine").read_text() == "old a/mine"
    whole = {"list", "mine", "a/mine"}
    assert set(files(box)) in (whole | {"one", "a/two"}, whole | {"new"})
    put(box)
    assert set(files(box)) == whole | {"new"}
    assert os.listdir(tmp_path) == ["box"]


def test_a_clash_after_a_kill_keeps_both(tmp_path: Path) -> None:
    box, old = tmp_path / "box", tmp_path / ".box.01234567.sld-old"
    make(old, "one", others=("mine",))
    make(box, "new", others=())
    (box / "mine").write_text("newer")
    recover(box, KIND)
    assert files(old) == ["mine"]
    assert (box / "mine").read_text() == "newer"
