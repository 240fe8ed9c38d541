"""profile(): the numbers add up, and every file can be read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from small import small_probe
from torch import nn

from t2v_fast import Profile, ops, profile
from t2v_fast.analysis import plot
from t2v_fast.cli import main
from t2v_fast.ops import planner


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.Flatten(),
        nn.Linear(16 * 49, 4),
    ).eval()


@pytest.fixture(scope="module")
def report(model: nn.Module) -> Profile:
    return profile(model, torch.randn(6, 3, 14, 14), "deflated", 2, rounds=3)


def test_every_parameter_is_there_once_with_its_work(report: Profile, model: nn.Module) -> None:
    layers = {layer.parameter: layer for layer in report.layers}
    assert len(report.layers) == len(layers)
    assert layers.keys() == dict(model.named_parameters()).keys()
    conv = layers["0.weight"]
    todo = planner.work(planner.Conv(3, (14, 14), 8, (3, 3), padding=(1, 1)), conv.path, cotangents=2)
    assert (conv.flops, conv.bytes) == (6 * todo.flops, 6 * todo.bytes)
    assert conv.node == "ConvolutionBackward0"
    assert layers["1.bias"].path == "pass"
    assert layers["1.weight"].bytes == 2 * layers["1.bias"].bytes == 2 * 2 * 6 * 8 * 14 * 14 * 4
    assert (conv.predicted is not None) == (ops.backend_status()["cpu"] == "available")
    assert layers["1.bias"].predicted is None


def test_times_add_up(report: Profile) -> None:
    inside = sum(layer.seconds for layer in report.layers)
    assert 0 < inside < report.backward < report.fisher
    assert report.forward < report.fisher
    assert report.images_per_second == pytest.approx(6 / report.fisher)
    assert report.totals()["fisher_over_step"] == pytest.approx(report.fisher / report.step)
    assert report.cotangents == 2
    assert min(report.floor, report.step, report.machine.flops_per_second, report.machine.bytes_per_second) > 0


def test_memory_is_told_on_linux(report: Profile) -> None:
    if Path("/proc/self/clear_refs").exists():
        activations = 6 * 8 * 14 * 14 * 4
        assert activations < report.peak_memory["step"] + 2**20
    assert report.peak_memory.keys() == {"fisher", "step"}


def test_what_is_printed(report: Profile) -> None:
    text = str(report)
    assert "3.weight" in text
    assert "images/s" in text
    assert len(report.table(slowest=2).rows) == 2


def test_files(report: Profile, tmp_path: Path) -> None:
    report.save_json(tmp_path / "p.json")
    stored = json.loads((tmp_path / "p.json").read_text())
    assert stored["totals"] == report.totals()
    assert len(stored["layers"]) == len(report.layers)
    report.save_trace(tmp_path / "t.json")
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    backward = next(e for e in events if e["name"] == "backward")
    inside = [e for e in events if e["cat"] == "fisher"]
    assert len(inside) == 2 * len(report.layers)
    assert all(e["dur"] >= 0 for e in events)
    assert all(backward["ts"] <= e["ts"] <= backward["ts"] + backward["dur"] for e in inside)
    plot.roofline(report, tmp_path / "r.png")
    assert Image.open(tmp_path / "r.png").size[0] > 500


def test_the_former_name_of_the_roofline_warns(report: Profile, tmp_path: Path) -> None:
    with pytest.warns(DeprecationWarning, match=r"is now t2v_fast\.analysis\.plot\.roofline"):
        report.save_roofline(tmp_path / "r.png")
    assert Image.open(tmp_path / "r.png").size[0] > 500


def test_the_model_is_left_as_it_was(model: nn.Module) -> None:
    model[0].weight.requires_grad_(False)
    profile(model, torch.randn(2, 3, 14, 14), "hutchinson", 1, rounds=1)
    assert not model[0].weight.requires_grad
    model[0].weight.requires_grad_(True)


def test_bad_arguments(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="rounds is 0"):
        profile(model, torch.randn(2, 3, 14, 14), rounds=0)
    with pytest.raises(ValueError, match="estimator"):
        profile(model, torch.randn(2, 3, 14, 14), "guess")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t2v_fast.cli.options.load_probe", lambda *args, **kwargs: small_probe())
    files = {"json": tmp_path / "j.out", "trace": tmp_path / "t.out", "plot": tmp_path / "p.png"}
    options = [f"--{key}={path}" for key, path in files.items()]
    assert main(["profile", "--batch-size=4", "--rounds=1", "--slowest=3", "--estimator=empirical", *options]) == 0
    assert "fisher / floor" in capsys.readouterr().out
    assert all(path.stat().st_size for path in files.values())
