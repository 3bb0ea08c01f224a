"""The measuring scripts: what they put together, on the miniature."""

from __future__ import annotations

import pytest

from sld_edge.benchmarks import decode_tiles, profile_run
from sld_edge.runtime.bundle import EMBEDDED


def test_decoding_in_tiles_and_whole(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(EMBEDDED), "--sizes", "336", "352", "--whole-up-to", "336"]
    assert decode_tiles.main(arguments) == 0
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in capsys.readouterr().out.splitlines()[2:5]
    ]
    assert [row[:2] for row in rows] == [["336", "whole"], ["336", "tiles"], ["352", "tiles"]]
    assert 20 < float(rows[1][-1]) < 70
    assert all(0 < float(row[3]) < float(row[2]) for row in rows)
    assert decode_tiles.main(["nowhere"]) == 2


def test_a_profile_counts_the_loop_as_often_as_asked() -> None:
    few, many = (profile_run.profile(None, size=64, steps=2, of_steps=steps) for steps in (2, 200))
    assert {"unet", "guidance", "vae_decoder", "the rest"} <= set(few)
    assert many["unet"] / few["unet"] > 30
    assert many["vae_decoder"] / few["vae_decoder"] < 10
    assert max(many, key=many.__getitem__) == "unet"
    last = profile_run.table({"unet": 3.0, "guidance": 0.5, "the rest": 0.5}).splitlines()[-1]
    assert last == "| **all but the UNet** | 1.00 | **25.00%** |"
    assert profile_run.main(["--size", "64", "--steps", "0"]) == 2
