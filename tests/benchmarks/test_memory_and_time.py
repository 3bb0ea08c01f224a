"""The measuring scripts: what they put together, on the miniature."""

from __future__ import annotations

import pytest

from sld_edge.benchmarks import cpu_memory, profile_run
from sld_edge.runtime.bundle import EMBEDDED


def test_ratios_are_taken_round_by_round() -> None:
    def figures(value: float) -> dict[str, float]:
        return dict.fromkeys(cpu_memory.FIGURES, value)

    rounds = [
        {"diffusers": figures(2), "half": figures(1)},
        {"diffusers": figures(4), "half": figures(1)},
        {"diffusers": figures(4), "half": figures(4)},
    ]
    lines = cpu_memory.table(rounds).splitlines()
    assert lines[0] == "| | diffusers | half |"
    assert all(line.endswith("| 4.00 | 1.00, **0.50** (0.25 to 1.00) |") for line in lines[2:])
    assert len(lines) == 2 + len(cpu_memory.FIGURES)


def test_decoding_in_tiles_and_whole(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(EMBEDDED), "--decode", "272", "288", "--whole-up-to", "272", "--threads", "1"]
    assert cpu_memory.main(arguments) == 0
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in capsys.readouterr().out.splitlines()[2:5]
    ]
    assert [row[:2] for row in rows] == [["272", "whole"], ["272", "tiles"], ["288", "tiles"]]
    assert 20 < float(rows[1][-1]) < 70
    assert all(0 < float(row[3]) < float(row[2]) for row in rows)
    assert cpu_memory.main(["nowhere"]) == 2


def test_a_profile_counts_the_loop_as_often_as_asked() -> None:
    few, many = (profile_run.profile(None, size=64, steps=2, of_steps=steps) for steps in (2, 200))
    assert {"unet", "guidance", "vae_decoder", "the rest"} <= set(few)
    assert many["unet"] / few["unet"] > 30
    assert many["vae_decoder"] / few["vae_decoder"] < 10
    assert max(many, key=many.__getitem__) == "unet"
    last = profile_run.table({"unet": 3.0, "guidance": 0.5, "the rest": 0.5}).splitlines()[-1]
    assert last == "| **all but the UNet** | 1.00 | **25.00%** |"
    assert profile_run.main(["--size", "64", "--steps", "0"]) == 2
