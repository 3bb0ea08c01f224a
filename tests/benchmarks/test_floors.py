"""Peaks as the vendors print them, and floors as the larger of two times."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sld_edge.benchmarks.studies.floors import (
    DEVICES,
    OTHERS,
    PUBLISHED,
    floor_table,
    main,
    picture_floor,
    published_table,
    step_floor,
)
from sld_edge.benchmarks.studies.flops import Work, works
from sld_edge.runtime.bundle import EMBEDDED, Bundle

KNOWN = {device.name: device for device in (*DEVICES, *OTHERS)}
# Dense FP16 TFLOPS with FP32 sums, as the documents print them, in their rounding.
PRINTED = {
    "Jetson Orin Nano 8 GB, before JetPack 6.1 (15 W)": 10,
    "Jetson Orin Nano 8 GB, super mode (25 W, MAXN)": 17,
    "RTX 4080": 97.5,
    "RTX 4090": 165.2,
    "RTX 5090": 209.5,
    "A100 80 GB, PCIe": 312,
    "H100 80 GB, SXM": 989.4,
}


@pytest.mark.parametrize("name", PRINTED)
def test_units_times_rate_times_clock_is_the_printed_peak(name: str) -> None:
    assert KNOWN[name].peak == pytest.approx(PRINTED[name], rel=0.03 if "Nano" in name else 1e-3)


def test_the_floor_is_the_larger_time() -> None:
    device = replace(DEVICES[0], tensor_cores=1, products=500, clock=1.0, bandwidth=100.0)
    assert device.peak == 1.0
    heavy = Work(operations={"Conv": 4 * 10**12, "Add": 10**15}, weights=10**11, alone=9, fused=0)
    assert device.seconds(heavy) == pytest.approx((4.0, 1.0))
    assert device.floor(heavy) == 4.0
    wide = Work(operations={"MatMul": 10**12}, weights=10**11, alone=10**15, fused=4 * 10**11)
    assert device.floor(wide) == pytest.approx(5.0)
    parts = {"unet": heavy, "guidance": wide, "text_encoder": wide, "vae_decoder": heavy}
    assert step_floor(device, parts) == pytest.approx(9.0)
    assert picture_floor(device, parts, steps=2) == pytest.approx(5 + 4 + 18)


def test_nobody_is_faster_than_the_floor_of_their_device() -> None:
    assert {one.device for one in PUBLISHED} <= set(KNOWN)
    # The operations of SD-1.5 at two branches, from torch's counter: 2 x 803.27, less the prefix.
    for one in PUBLISHED:
        if one.size == 512 and one.per_step:
            assert one.seconds > 2 * 803.27e9 * 0.97 / (KNOWN[one.device].peak * 1e12)


def test_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    bundle = Bundle.open()
    lines = floor_table(bundle, [64, 128]).splitlines()
    assert len(lines) == 2 + 2 * len(DEVICES)
    first = [cell.strip("* ") for cell in lines[2].split("|")[1:-1]]
    parts = works(bundle, 64, branches=3, width=2)
    assert first[0] == DEVICES[0].name
    assert float(first[9]) == pytest.approx(1e3 * step_floor(DEVICES[0], parts), abs=0.05)
    assert len(published_table(bundle).splitlines()) == 2 + len(PUBLISHED)

    assert main([str(EMBEDDED), "--size", "64"]) == 0
    assert capsys.readouterr().out.startswith("Computed, not measured.")
    assert main([str(EMBEDDED), "--size", "30"]) == 2
    assert main(["nowhere"]) == 2
