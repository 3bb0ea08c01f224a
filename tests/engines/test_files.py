"""Reading what comes from outside, and writing so that nothing is half there or overwritten."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from sld_edge.engines.checks import exact_text, finite_number, whole_number
from sld_edge.engines.errors import LINE, BundleError, InputError, OutputError, UserError
from sld_edge.engines.files import (
    check_writable,
    floats_from_npy,
    json_from_bytes,
    read_limited,
    sha256_of_file,
    write_whole,
)
from sld_edge.engines.staging import part_file, part_folder, sweep


def npy(array: np.ndarray) -> bytes:
    import io

    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


class TestReading:
    def test_a_pipe_is_refused_at_once(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(BundleError, match="not a regular file"):
            read_limited(tmp_path / "pipe", 10, error=BundleError)

    @pytest.mark.parametrize("path", ["/dev/zero", "/", "a\0b"])
    def test_what_is_no_file_is_refused(self, path: str) -> None:
        with pytest.raises(BundleError):
            read_limited(Path(path), 10, error=BundleError)

    def test_the_limit_counts(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"12345")
        assert read_limited(tmp_path / "file", 5, error=BundleError) == b"12345"
        with pytest.raises(BundleError, match="too large"):
            read_limited(tmp_path / "file", 4, error=BundleError)

    @pytest.mark.parametrize(
        "text",
        [
            "[" * 100_000,
            '{"a":' * 100_000,
            '{"a": ' + "9" * 5000 + "}",
            '{"a": 1e999}',
            '{"a": NaN}',
            '{"a": 1, "a": 2}',
            '{"a": "\\ud800"}',
            "[1]",
            "",
            "{",
        ],
        ids=lambda text: text[:12],
    )
    def test_hostile_json_is_one_error(self, text: str) -> None:
        with pytest.raises(BundleError) as caught:
            json_from_bytes(text.encode(), origin="x.json", error=BundleError)
        assert len(str(caught.value)) <= LINE

    def test_bytes_that_are_not_utf8(self) -> None:
        with pytest.raises(BundleError):
            json_from_bytes(b'{"a": "\xff"}', origin="x.json", error=BundleError)

    @pytest.mark.parametrize("shape", [(2, 3, 4), (5,), (1, 77, 8)])
    def test_an_array_is_what_numpy_wrote(self, shape: tuple[int, ...]) -> None:
        array = np.random.default_rng(0).standard_normal(shape, np.float32)
        np.testing.assert_array_equal(floats_from_npy(npy(array)), array)

    @pytest.mark.parametrize(
        "data",
        [
            npy(np.zeros(3, np.float64)),
            npy(np.zeros((2, 2), np.float32).T.copy(order="F")),
            npy(np.zeros(3, np.float32))[:-1],
            npy(np.zeros(3, np.float32)) + b"\0",
            npy(np.zeros(3, np.float32)).replace(b"(3,)", b"(9,)"),
            b"PK\x03\x04",
            b"",
        ],
    )
    def test_another_array_is_refused(self, data: bytes) -> None:
        with pytest.raises(ValueError):  # noqa: PT011  # the caller says which file it was
            floats_from_npy(data)

    def test_a_hash_with_its_file(self, tmp_path: Path) -> None:
        import hashlib

        (tmp_path / "file").write_bytes(b"12345")
        digest, before = sha256_of_file(tmp_path / "file")
        assert digest == hashlib.sha256(b"12345").hexdigest()
        (tmp_path / "file").write_bytes(b"12346")
        os.utime(tmp_path / "file", ns=(before.modified, before.modified))
        assert sha256_of_file(tmp_path / "file")[1] != before


class TestWriting:
    def test_a_new_file_is_made_once(self, tmp_path: Path) -> None:
        path = tmp_path / "new"
        won, lost = [], []

        def write(number: int) -> None:
            try:
                write_whole(path, str(number).encode(), replace=False)
                won.append(number)
            except OutputError:
                lost.append(number)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert len(lost) == 5
        assert path.read_text() == str(won[0])
        assert os.listdir(tmp_path) == ["new"]

    def test_no_hard_links_here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_links(*_: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", no_links)
        write_whole(tmp_path / "new", b"1", replace=False)
        with pytest.raises(OutputError, match="exists"):
            write_whole(tmp_path / "new", b"2", replace=False)
        assert (tmp_path / "new").read_bytes() == b"1"

    def test_a_name_that_is_too_long(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError):
            check_writable(tmp_path / ("n" * 300), force=False)
        with pytest.raises(OutputError):
            write_whole(tmp_path / ("n" * 300), b"")
        write_whole(tmp_path / ("n" * 250), b"")

    def test_a_link_that_leads_nowhere_is_there(self, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(tmp_path / "nowhere")
        with pytest.raises(OutputError, match="exists"):
            check_writable(tmp_path / "link", force=False)


class TestSweeping:
    def test_what_is_at_work_stays(self, tmp_path: Path) -> None:
        with part_file(tmp_path / "a") as (file, _), part_folder(tmp_path / "b") as folder:
            sweep(tmp_path)
            assert file.exists()
            assert folder.exists()
        assert os.listdir(tmp_path) == []

    def test_a_dead_process_leaves_nothing_for_long(self, tmp_path: Path) -> None:
        code = (
            "import sys, time; from pathlib import Path\n"
            "from sld_edge.engines.staging import part_file, part_folder\n"
            "root = Path(sys.argv[1])\n"
            "with part_file(root / 'a'), part_folder(root / 'b') as folder:\n"
            "    (folder / 'large').write_bytes(b'1')\n"
            "    print('ready', flush=True); time.sleep(60)\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        sweep(tmp_path)
        assert len(os.listdir(tmp_path)) == 2
        process.send_signal(signal.SIGKILL)
        process.wait()
        (tmp_path / ".other.part").touch()  # not ours
        sweep(tmp_path)
        assert os.listdir(tmp_path) == [".other.part"]

    def test_makers_and_sweepers_at_once(self, tmp_path: Path) -> None:
        end = time.monotonic() + 1
        failures: list[BaseException] = []

        def make(number: int) -> None:
            count = 0
            while time.monotonic() < end:
                try:
                    write_whole(tmp_path / f"{number}-{count}", b"1", replace=False)
                except BaseException as error:
                    failures.append(error)
                count += 1

        threads = [threading.Thread(target=make, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert not list(tmp_path.glob(".*"))


class TestNumbers:
    @pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), np.array(3)])
    def test_whole_numbers(self, value: object) -> None:
        found = whole_number("n", value, 0, 10)
        assert found == 3
        assert type(found) is int

    @pytest.mark.parametrize(
        "value",
        ["3", 3.0, None, True, np.True_, 11, -1, 10**5000, [3]],
        ids=lambda v: type(v).__name__,
    )
    def test_what_is_none(self, value: object) -> None:
        with pytest.raises(InputError):
            whole_number("n", value, 0, 10)

    @pytest.mark.parametrize("value", [3, 3.0, np.float32(3), np.int64(3)])
    def test_finite_numbers(self, value: object) -> None:
        found = finite_number("n", value, 0, 10)
        assert found == 3
        assert type(found) is float

    @pytest.mark.parametrize(
        "value",
        ["3", None, True, float("nan"), float("inf"), 11, 10**400, [3], 3j],
        ids=lambda v: type(v).__name__,
    )
    def test_what_is_not_finite(self, value: object) -> None:
        with pytest.raises(InputError):
            finite_number("n", value, 0, 10)

    def test_a_number_cannot_change_its_mind(self) -> None:
        class Sly(int):
            def __index__(self) -> int:
                return 9

            def __ge__(self, other: object) -> bool:
                return True

        found = whole_number("n", Sly(3), 0, 10)
        assert type(found) is int

    def test_a_text_cannot_change_its_mind(self) -> None:
        class Sly(str):
            __slots__ = ()

            def __str__(self) -> str:
                return "other"

        assert exact_text("t", Sly("this")) == "this"
        assert type(exact_text("t", Sly("this"))) is str


def test_an_error_is_one_readable_line() -> None:
    error = UserError("x" * 1000, got="y\n\x1b[31m\ud800" * 1000, expected="a", do="b")
    text = str(error)
    assert len(text) <= LINE + 200
    assert text.isprintable()
    text.encode()
    assert text.endswith("expected a | b")
    assert json.dumps(text)
