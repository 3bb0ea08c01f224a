"""The cache: believed only where it is private, checked at every load, as large as told."""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from oracles.prepared import prepared_engine
from sld_edge.engines import cache, prepared
from sld_edge.engines.errors import BundleError, EngineError, InputError
from sld_edge.engines.files import Identity, sha256_of_file
from sld_edge.engines.onnxruntime import engine as ort
from sld_edge.engines.onnxruntime.engine import OrtEngine
from sld_edge.engines.settings import cache_limit
from sld_edge.runtime import Pipeline
from sld_edge.runtime.bundle import EMBEDDED
from sld_edge.runtime.commands.run import main
from sld_edge.runtime.conditioning import Conditioner

GRAPH = EMBEDDED / "vae_decoder.onnx"
SHA = "cd" * 32


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLD_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_noted", set())
    return tmp_path / "cache"


def never() -> Path:
    raise AssertionError("prepared anew")


def picture(engine: OrtEngine) -> np.ndarray:
    latents = np.random.default_rng(0).standard_normal((1, 4, 16, 16), np.float32)
    return engine.run({"latents": latents})["images"]


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
@pytest.mark.parametrize("how", ["written over", "exchanged", "cut short"])
def test_a_forged_copy_is_prepared_anew(
    how: str, name: str, small: bool, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size and the times that a user can set are those of the honest file."""
    if not small:
        monkeypatch.setattr(prepared, "_SMALL", 0)
    engine = prepared_engine(SHA, lambda: GRAPH)
    wanted = picture(engine)
    folder = engine.path.parent
    engine.close()
    prepared_engine(SHA, never).close()
    file = folder / name
    before, data = file.stat(), bytearray(file.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    if how == "cut short":
        data = data[:-1]
    if how == "exchanged":
        (folder.parent / "other").write_bytes(data)
        (folder.parent / "other").replace(file)
    else:
        file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(AssertionError, match="prepared anew"):
        prepared_engine(SHA, never)
    np.testing.assert_array_equal(picture(prepared_engine(SHA, lambda: GRAPH)), wanted)
    prepared_engine(SHA, never)


def test_a_large_copy_is_hashed_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "_SMALL", 0)
    folder = prepared_engine(SHA, lambda: GRAPH).path.parent
    hashed: list[Path] = []

    def counted(path: Path) -> tuple[str, Identity]:
        hashed.append(path)
        return sha256_of_file(path)

    monkeypatch.setattr(prepared, "sha256_of_file", counted)
    prepared_engine(SHA, never)
    assert hashed == []
    copy = shutil.copytree(folder, folder.with_name("copy"))  # a backup, restored
    shutil.rmtree(folder)
    Path(copy).rename(folder)
    prepared_engine(SHA, never)
    assert len(hashed) == 2
    prepared_engine(SHA, never)
    assert len(hashed) == 2


def test_what_changed_while_it_was_prepared_is_not_kept(root: Path) -> None:
    def changed() -> None:
        raise BundleError("changed")

    with pytest.raises(BundleError, match="changed"):
        prepared_engine(SHA, lambda: GRAPH, confirm=changed)
    assert list((root / "sessions").iterdir()) == []


class TestPrivate:
    @pytest.mark.parametrize("which", ["", "sessions"])
    def test_a_folder_that_others_may_write_to(
        self, which: str, root: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        prepared_engine(SHA, lambda: GRAPH)
        (root / which).chmod(0o777)
        engine = prepared_engine(SHA, lambda: GRAPH)
        assert engine.path == GRAPH
        prepared_engine(SHA, lambda: GRAPH)
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1
        assert "the cache is not used" in said[0]
        assert "can be written by others" in said[0]

    def test_a_folder_of_another_user(
        self, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        root.mkdir(mode=0o700)
        real = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: real + 1)
        assert cache.private_folder("sessions") is None
        assert "belongs to another user" in capsys.readouterr().err

    def test_a_link(self, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        root.mkdir(mode=0o700)
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        (root / "sessions").symlink_to(tmp_path / "elsewhere")
        assert cache.private_folder("sessions") is None
        assert "is not a folder" in capsys.readouterr().err

    def test_new_folders_are_private(self, root: Path) -> None:
        folder = cache.private_folder("sessions")
        assert folder == root / "sessions"
        for each in (root, root / "sessions"):
            assert each.stat().st_mode & 0o777 == 0o700

    def test_said_by_the_command_even_when_quiet(
        self, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        root.mkdir()
        root.chmod(0o777)
        output = str(tmp_path / "s.png")
        assert main(["a star", "--steps", "2", "--quiet", "--output", output]) == 0
        assert capsys.readouterr().err.count("the cache is not used") == 1


class TestLimit:
    def test_the_least_recently_used_goes(
        self, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        size = sum(f.stat().st_size for f in (GRAPH, GRAPH.with_name("vae_decoder.onnx.data")))
        monkeypatch.setenv("SLD_EDGE_CACHE_LIMIT", str(3.9 * size / 1e9))
        folders = []
        for number in range(3):
            engine = prepared_engine(f"{number:064d}", lambda: GRAPH, keep_fp16=True)
            folders.append(engine.path.parent)
            engine.close()
            os.utime(folders[-1] / cache.STAMP, (number, number))
        prepared_engine(f"{0:064d}", never, keep_fp16=True).close()  # used again
        prepared_engine(f"{9:064d}", lambda: GRAPH, keep_fp16=True)
        assert [folder.exists() for folder in folders] == [True, False, True]

    def test_what_is_loaded_stays(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        engine = prepared_engine(SHA, lambda: GRAPH)
        monkeypatch.setenv("SLD_EDGE_CACHE_LIMIT", "0.000001")
        cache.make_room(1)
        assert engine.path.exists()
        engine.close()
        cache.make_room(1)
        assert not engine.path.exists()

    @pytest.mark.parametrize("text", ["x", "-1", "nan", "inf", "1e30"])
    def test_a_limit_that_is_none(self, text: str) -> None:
        with pytest.raises(InputError, match="SLD_EDGE_CACHE_LIMIT"):
            cache_limit({"SLD_EDGE_CACHE_LIMIT": text})

    def test_the_default(self) -> None:
        assert cache_limit({}) == 20_000_000_000
        assert cache_limit({"SLD_EDGE_CACHE_LIMIT": "0"}) == 0


def test_the_command_shows_and_clears(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["a star", "--steps", "2", "--quiet", "--output", str(tmp_path / "s.png")]) == 0
    (root / "notes.txt").write_text("of the user's own")
    capsys.readouterr()
    assert main(["--cache"]) == 0
    said = capsys.readouterr().out
    assert f"cache: {root}" in said
    assert "prepared graph: unet of " in said
    assert "at most 20 GB" in said
    assert "3 checks are remembered" in said
    assert main(["--clear-cache"]) == 0
    assert "MB freed" in capsys.readouterr().out
    assert sorted(os.listdir(root)) == ["CACHEDIR.TAG", "notes.txt"]
    assert main(["--clear-cache"]) == 0
    assert "0 entries removed" in capsys.readouterr().out


def test_stored_embeddings_are_checked_once(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[str] = []
    monkeypatch.setattr(Conditioner, "_compare", lambda self, text, stored: checked.append(text))
    for _ in range(3):
        with Pipeline.load(provider="cpu") as pipeline:
            pipeline("a star", steps=2)
    assert checked == list(pipeline.bundle.manifest.embeddings.texts)


def test_a_long_preparation_is_announced(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepared, "_LARGE", 0)
    prepared_engine(SHA, lambda: GRAPH, what="vae_decoder of mini")
    assert "note: preparing vae_decoder of mini for this processor, once" in (
        capsys.readouterr().err
    )
    prepared_engine("ef" * 32, lambda: GRAPH, quiet=True)
    assert capsys.readouterr().err == ""


def test_what_a_dead_process_left_is_swept(root: Path) -> None:
    prepared_engine(SHA, lambda: GRAPH)
    litter = root / "sessions" / ".abc.01234567.sld-part"
    litter.mkdir()
    (litter / "model.onnx.data").write_bytes(bytes(1000))
    prepared_engine("ef" * 32, lambda: GRAPH)
    assert not litter.exists()
    assert (
        json.loads(
            (root / "sessions").joinpath(os.listdir(root / "sessions")[0], cache.STAMP).read_text()
        )["what"]
        == "a graph"
    )
    assert time.time() - cache.entries()[0].used < 60


class TestNothingOfOthersIsRemoved:
    def test_a_folder_that_was_there_before(
        self, root: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """As with SLD_EDGE_CACHE=$HOME: folders of our names may be anyone's."""
        (root / "sessions").mkdir(parents=True)
        (root / "sessions" / "thesis").write_text("years of work")
        prepared_engine(SHA, lambda: GRAPH).close()
        assert main(["--clear-cache"]) == 2
        assert "was not made by sld-edge" in capsys.readouterr().err
        assert (root / "sessions" / "thesis").exists()

    def test_behind_a_link(self, root: Path, tmp_path: Path) -> None:
        prepared_engine(SHA, lambda: GRAPH).close()
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "thesis").write_text("years of work")
        (root / "jit").symlink_to(tmp_path / "elsewhere")
        cache.clear()
        assert (tmp_path / "elsewhere" / "thesis").exists()

    def test_what_a_process_has_loaded(self, root: Path) -> None:
        with prepared_engine(SHA, lambda: GRAPH) as engine:
            assert cache.clear() == (0, 0)
            assert engine.path.exists()
        assert cache.clear()[0] == 1


def test_what_does_not_fit_is_not_prepared_and_that_is_said_once(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLD_EDGE_CACHE_LIMIT", "0.000001")
    for _ in range(2):
        assert prepared_engine(SHA, lambda: GRAPH).path == GRAPH
    assert os.listdir(root / "sessions") == []
    assert capsys.readouterr().err.count("do not fit into the cache") == 1


def test_filters_make_room_for_newer_ones(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cache.private_folder(cache.FILTERS)
    assert folder is not None
    old, new, other = (folder / name for name in ("a" * 32, "b" * 32, "thesis"))
    for age, path in enumerate((new, old, other)):
        path.write_bytes(b"0" * 600)
        os.utime(path, (1e9 - age, 1e9 - age))
    monkeypatch.setenv("SLD_EDGE_CACHE_LIMIT", "0.000002")  # 2000 bytes
    assert cache.make_room(600)
    assert [path.exists() for path in (old, new, other)] == [False, True, True]


def test_a_read_only_cache_is_used(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = prepared_engine(SHA, lambda: GRAPH).path

    def refused(*arguments: object, **more: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", refused)
    assert prepared_engine(SHA, never).path == path


def test_a_file_system_without_locks_has_a_cache(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    path = prepared_engine(SHA, lambda: GRAPH).path
    assert prepared_engine(SHA, never).path == path


def test_a_prepared_graph_that_does_not_load_closes_its_handle_once(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closed twice, the second time could close a file of another thread."""
    prepared_engine(SHA, lambda: GRAPH).close()
    refused: list[OSError] = []
    close = os.close

    def watched(handle: int) -> None:
        try:
            close(handle)
        except OSError as error:
            refused.append(error)

    def failing(*arguments: object) -> None:
        raise EngineError("out of memory")

    monkeypatch.setattr(os, "close", watched)
    monkeypatch.setattr(ort, "create_session", failing)
    with pytest.raises(EngineError, match="out of memory"):
        prepared_engine(SHA, lambda: GRAPH)
    gc.collect()
    assert refused == []


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_a_link_is_not_loaded(root: Path, tmp_path: Path, name: str) -> None:
    with prepared_engine(SHA, lambda: GRAPH) as engine:
        file = engine.path.with_name(name)
    file.rename(tmp_path / name)
    file.symlink_to(tmp_path / name)
    prepared_engine(SHA, lambda: GRAPH)
    assert not file.is_symlink()


def test_a_graph_that_others_may_write_to_is_prepared_anew(root: Path) -> None:
    with prepared_engine(SHA, lambda: GRAPH) as engine:
        folder = engine.path.parent
    folder.chmod(0o777)
    with pytest.raises(AssertionError, match="prepared anew"):
        prepared_engine(SHA, never)
    assert prepared_engine(SHA, lambda: GRAPH).path.parent == folder
    assert folder.stat().st_mode & 0o777 == 0o700
