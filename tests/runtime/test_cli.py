"""`sld-run` as a user types it: files appear whole, mistakes are one line and exit code 2."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sld_edge.runtime import Pipeline
from sld_edge.runtime.commands.run import main
from sld_edge.runtime.picture import parameters_text

FAST = ["--steps", "2", "--sampler", "ddim", "--quiet"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def only_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line of an error; more or fewer is a failure."""
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    return lines[0]


def test_one_prompt_one_picture(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["a red star at a party", "--output", "star.png", "--steps", "2"]) == 0
    assert capsys.readouterr().out.startswith("star.png  safety ")
    with Image.open("star.png") as image:
        assert image.size == (64, 64)


def test_pictures_without_a_name_are_named_by_prompt_and_seed() -> None:
    assert main(["A red STAR!", "a heart", "--count", "2", "--seed", "7", *FAST]) == 0
    names = sorted(path.name for path in Path().iterdir())
    assert names == ["a-heart-7.png", "a-heart-8.png", "a-red-star-7.png", "a-red-star-8.png"]


def test_several_pictures_of_one_name_are_numbered() -> None:
    assert main(["a star", "--count", "3", "--output", "out.png", *FAST]) == 0
    assert sorted(path.name for path in Path().iterdir()) == [f"out-{k}.png" for k in (1, 2, 3)]


def test_the_same_prompt_twice_does_not_overwrite_itself() -> None:
    assert main(["a star", "a star", *FAST]) == 0
    assert len(list(Path().iterdir())) == 2


def test_prompts_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a star\na heart\n"))
    assert main(["-", *FAST]) == 0
    assert len(list(Path().glob("*.png"))) == 2


def test_the_picture_tells_its_story() -> None:
    arguments = ["a star", "--seed", "3", "--negative-prompt", "a heart", "--output", "s.png"]
    assert main([*arguments, "--report", "s.json", "--edit-map", "map.png", *FAST]) == 0
    report = json.loads(Path("s.json").read_text())["images"][0]
    with Image.open("s.png") as image:
        text = dict(image.info)
    assert json.loads(text["sld-edge"]) == report
    prompt, negative, settings = text["parameters"].splitlines()
    assert (prompt, negative) == ("a star", "Negative prompt: a heart")
    pairs = dict(pair.split(": ", 1) for pair in settings.split(", "))
    assert (pairs["Steps"], pairs["Seed"], pairs["Size"]) == ("2", "3", "64x64")
    assert pairs["Sampler"] == "DDIM"
    assert "trainedAlgorithmicMedia" in text["XML:com.adobe.xmp"]
    assert report["ai_generated"] is True
    assert parameters_text(report) == text["parameters"]
    with Image.open("map.png") as image:
        assert image.size == (64, 64)


def test_an_empty_prompt_is_the_unconditional_image(miniature: Pipeline) -> None:
    assert main(["", "--output", "empty.png", "--safety", "off", *FAST]) == 0
    with Image.open("empty.png") as image:
        made = np.asarray(image)
    latents = miniature("", guidance_scale=1, safety="off", steps=2, sampler="ddim").images[0]
    # prompt and empty prompt are one, so guidance changes nothing but rounding
    assert np.abs(made.astype(int) - np.asarray(latents)).max() <= 1


def test_an_over_long_prompt_is_cut_and_says_where(capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "a red star at a party " * 5 + "in the snow"
    assert main([prompt, "--output", "long.png", *FAST]) == 0
    assert "in the snow" in only_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--bundle", "nowhere"], "no bundle at nowhere"),
        (["--steps", "0"], "steps | got 0"),
        (["--sampler", "heun"], "sampler | got 'heun'"),
        (["--safety", "hard"], "safety preset | got 'hard'"),
        (["--provider", "tpu"], "provider | got 'tpu'"),
        (["--width", "63"], "width | got 63"),
        (["--width", "60000", "--height", "60000"], "more than this machine's memory"),
        (["--output", "no/such/folder.png"], "no such directory: no/such"),
        (["--output", "picture.jpg"], "a name ending in .png"),
        (["--report", "missing/report.json"], "no such directory: missing"),
        (["--batch-size", "0"], "batch_size | got 0"),
        (["--vae-tiling", "never"], "--vae-tiling | got 'never' | expected one of auto"),
        (["--seed", "-1"], "seed | got -1"),
        (["--rng", "dice"], "rng | got 'dice'"),
        (["--count", "many"], "--count: invalid int value: 'many'"),
        (["--sample", "ddim"], "unrecognized arguments"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["a star", "--quiet", *arguments]) == 2
    line = only_line(capsys)
    assert line.startswith("error: ")
    assert says in line
    assert list(Path().iterdir()) == []


def test_a_prompt_of_10000_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["star " * 10_000, *FAST]) == 2
    assert "far too long | got 50000 characters" in only_line(capsys)


def test_an_existing_file_is_kept_unless_forced(capsys: pytest.CaptureFixture[str]) -> None:
    Path("kept.png").write_text("mine")
    assert main(["a star", "--output", "kept.png", *FAST]) == 2
    assert "kept.png exists" in only_line(capsys)
    assert Path("kept.png").read_text() == "mine"
    assert main(["a star", "--output", "kept.png", "--force", *FAST]) == 0
    assert Path("kept.png").read_bytes().startswith(b"\x89PNG")


def test_a_full_disk_leaves_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main(["a star", "--output", "full.png", *FAST]) == 2
    assert "cannot write full.png | got No space left on device" in only_line(capsys)
    assert list(Path().iterdir()) == []


def test_interrupted_leaves_no_half_file_and_exit_code_130(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "sld_edge.runtime.commands.run",
        "a star",
        "--output",
        "never.png",
    ]
    command += ["--steps", "400", "--sampler", "ddim", "--preview", "preview.png"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (tmp_path / "preview.png").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["preview.png"]


def test_a_read_only_folder_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    # even root cannot make files there
    assert main(["a star", "--output", "/proc/x.png", *FAST]) == 2
    assert "cannot write" in only_line(capsys)


def test_help_names_every_preset_and_sampler(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for word in ("strong", "dpm++2m-karras", "--safety-concept", "--edit-map", "examples"):
        assert word in text
