"""The steps' table: what it varies, what it compares, and that it goes on where it stopped."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sld_edge.benchmarks.miniworld.prompts import biased_prompts
from sld_edge.benchmarks.studies.experiment import (
    FIRST_SEED,
    PROMPT_SEED,
    answers_from_log,
    psnr,
)
from sld_edge.benchmarks.studies.steps_table import (
    REFERENCE,
    VARIANTS,
    Answer,
    Cell,
    cells,
    main,
    picture_path,
    table,
)
from sld_edge.engines.errors import InputError
from sld_edge.runtime import Pipeline
from sld_edge.runtime.safety import PRESETS


def answer(
    index: int, *, skull: bool, sampler: str = "ddim", steps: int = 25, safety: str = "strong"
) -> Answer:
    return Answer(
        sampler=sampler,
        steps=steps,
        safety=safety,
        index=index,
        skull=0.9 if skull else 0.1,
        adherent=True,
        seconds=0.5,
    )


def test_psnr_by_hand() -> None:
    black = np.zeros((2, 2, 3), np.uint8)
    white = np.full((2, 2, 3), 255, np.uint8)
    assert psnr(black, white) == psnr(white, black) == 0
    assert psnr(black, np.full_like(black, 51)) == pytest.approx(20 * math.log10(5))
    assert psnr(white, white) == math.inf


def test_every_preset_has_the_reference_and_the_variants_do_not() -> None:
    asked = cells(["ddim", "unipc"], [10, 50], ["off", "strong, momentum matched"])
    pairs = [(cell.safety, cell.sampler, cell.steps) for cell in asked]
    assert pairs[0] == ("off", REFERENCE, 50)
    assert ("strong, momentum matched", REFERENCE, 50) not in pairs
    assert len(pairs) == len(set(pairs)) == 5 + 4


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_strong_at_50_steps_but_for_the_warm_up(name: str) -> None:
    ours, strong = asdict(VARIANTS[name](50)), asdict(PRESETS["strong"])
    if name == "strong, no warm-up":
        assert ours.pop("warmup_steps") == 0
        strong.pop("warmup_steps")
    assert ours == pytest.approx(strong)


def test_what_the_variants_change_at_25_steps() -> None:
    made = {name: make(25) for name, make in VARIANTS.items()}
    warmups = {name.removeprefix("strong, "): one.warmup_steps for name, one in made.items()}
    assert warmups == {
        "warm-up rounded to nearest": 4,
        "warm-up as printed": 7,
        "no warm-up": 0,
        "momentum matched": 3,
        "nearest and matched": 4,
    }
    # Momentum starts at 1: after all calls without a direction as much is left as after 50.
    for calls in (25, 40):
        left = []
        for safety, count in (
            (VARIANTS["strong, momentum matched"](calls), calls),
            (PRESETS["strong"], 50),
        ):
            beta, scale = safety.momentum_beta, safety.momentum_scale
            nu = 1.0
            for _ in range(count):
                nu = beta * nu + (1 - beta) * scale * nu
            left.append(nu)
        assert left[0] == pytest.approx(left[1])


def test_the_table_pairs_pictures_by_prompt(tmp_path: Path) -> None:
    answers = [
        *(answer(i, skull=i < 3, sampler="pndm", steps=50) for i in range(6)),
        *(answer(i, skull=i in (0, 4, 5), steps=25) for i in range(6)),
        *(answer(i, skull=False, steps=50) for i in range(4)),
    ]
    grey = {("pndm", 50): 100, ("ddim", 25): 110, ("ddim", 50): 105}
    for one in answers:
        path = picture_path(tmp_path, one.cell, one.index)
        path.parent.mkdir(parents=True, exist_ok=True)
        level = grey[one.sampler, one.steps]
        Image.fromarray(np.full((2, 2, 3), level, np.uint8)).save(path)
    lines = table(answers, tmp_path).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert [row[1:4] for row in rows] == [
        *(["pndm", "50", "6"], ["ddim", "25", "6"], ["ddim", "50", "4"])
    ]
    assert rows[0][4].startswith("50.0% (18.8% to 81.2%)")
    assert [row[5] for row in rows] == ["", "+2 -2 (p 1.00)", "+0 -3 (p 0.25)"]
    ten, five = (f"{20 * math.log10(255 / step):.1f}" for step in (10, 5))
    assert [row[7:9] for row in rows] == [
        *(["", ""], [f"{five} (4 of 4)", f"{ten} (0 of 6)"], ["", f"{five} (4 of 4)"])
    ]


def test_a_run_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], miniature: Pipeline
) -> None:
    arguments = ["--output", str(tmp_path), "--prompts", "1", "--processes", "1"]
    arguments += ["--samplers", "ddim", "--steps", "2"]
    assert main([*arguments, "--safety", "off"]) == 0
    log = tmp_path / "answers.jsonl"
    first = answers_from_log(log, Answer)
    plain = Cell(sampler="ddim", steps=2, safety="off")
    assert [one.cell for one in first] == [Cell(sampler="pndm", steps=50, safety="off"), plain]
    kept = np.asarray(Image.open(picture_path(tmp_path, plain, 0)), np.int16)
    prompt = biased_prompts(1, PROMPT_SEED)[0].text
    same = miniature(prompt, seed=FIRST_SEED, sampler="ddim", steps=2, safety="off").images[0]
    assert np.abs(kept - np.asarray(same)).max() <= 1  # another number of threads
    before = log.read_text()

    assert main([*arguments, "--safety", "off", "strong, no warm-up"]) == 0
    assert log.read_text().startswith(before)
    assert len(answers_from_log(log, Answer)) == 3
    assert capsys.readouterr().out.count("| strong, no warm-up |") == 1


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--output", str(tmp_path), "--prompts", "0"]) == 2
    assert "--prompts | got 0 | expected 1 or more" in capsys.readouterr().err
    (tmp_path / "answers.jsonl").write_text('{"sampler": "ddim"}\n')
    assert main(["--output", str(tmp_path), "--prompts", "1"]) == 2
    assert "line 1 of" in capsys.readouterr().err
    with pytest.raises(InputError, match="line 1 of"):
        answers_from_log(tmp_path / "answers.jsonl", Answer)
