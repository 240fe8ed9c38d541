"""The scripts behind the estimates for GPUs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision", reason="this torch has no torchvision built for it")
from bench.studies import gpu_model, host_work, norms

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_model_of_whole_networks_is_current(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """What docs/gpu.md says is what the script prints, and every network is faster than before."""
    monkeypatch.setattr(sys, "argv", ["gpu_model.py"])
    gpu_model.main()
    table = capsys.readouterr().out.strip()
    assert table in (ROOT / "docs" / "gpu.md").read_text()
    for row in table.splitlines()[2:]:
        floor, before, now, ratio_before, ratio_now = map(float, row.split("|")[3:8])
        assert now < before
        assert ratio_now == pytest.approx((floor + now) / floor, abs=0.02)
        assert ratio_before == pytest.approx((floor + before) / floor, abs=0.02)


@pytest.mark.slow
def test_a_norm_by_the_product_loses_digits_in_float32(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The reason that docs/decisions.md gives: only in bfloat16 does the product of the convolution keep the digits."""
    monkeypatch.setattr(sys, "argv", ["norms.py"])
    norms.main()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.strip().splitlines()]
    medians = {row[0]: (float(row[1]), float(row[3])) for row in rows[2:]}
    assert medians["float32"][1] > 2 * medians["float32"][0]
    assert medians["TF32"][1] > 100 * medians["TF32"][0]
    assert medians["bfloat16"][1] < medians["bfloat16"][0]


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is a CPU build: it builds other graphs")
def test_the_hosts_work_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of the table in docs/gpu.md is what the script counts: no wait, and far fewer operators with graphs."""
    name = "two convolutions"
    monkeypatch.setattr(host_work, "NETWORKS", {name: host_work.NETWORKS[name]})
    row = host_work.page().splitlines()[-1]
    assert row in (ROOT / "docs" / "gpu.md").read_text()
    _, waits, *_, plain, replayed, _ = (cell.strip() for cell in row.split("|")[1:-1])
    assert waits == "0"
    assert int(replayed.split()[0]) < 0.75 * int(plain)
