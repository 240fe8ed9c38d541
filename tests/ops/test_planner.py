"""The planner: counts of work, fitted costs, the file of costs, and equal Fishers from every forced path."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import relative_error
from torch import nn

from t2v_fast import fisher, ops
from t2v_fast.gradients import squares
from t2v_fast.ops import dispatch, planner
from t2v_fast.ops.planner import Conv, Costs

needs_extension = pytest.mark.skipif(
    ops.backend_status()["cpu"] != "available", reason="costs are those of the kernels"
)
K3 = {"kernel_size": (3, 3), "padding": (1, 1)}


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No costs are known at first, and measured costs are kept in a folder of the test."""
    monkeypatch.setenv("T2V_FAST_CACHE", str(tmp_path / "cache"))
    planner._costs.cache_clear()
    planner._best.cache_clear()
    yield tmp_path / "cache"
    planner._costs.cache_clear()
    planner._best.cache_clear()


def test_flops_are_those_of_the_formulas() -> None:
    conv = Conv(64, (56, 56), 32, **K3)
    assert planner.work(conv, "explicit").flops == 2 * 32 * 64 * 9 * 56 * 56
    assert planner.work(conv, "winograd").flops == 2 * 36 * 14 * 14 * 32 * 64  # 4x4 positions from 36 products
    assert planner.work(conv, "explicit", cotangents=3).flops == 3 * planner.work(conv, "explicit").flops
    tokens = Conv(96, (1, 50), 384)
    assert planner.work(tokens, "gram").flops == 50**2 * 96 + 50**2 * 384  # symmetric halves
    assert planner.work(tokens, "gram", cotangents=4).flops == 50**2 * 96 + 4 * 50**2 * 384
    assert planner.work(tokens, "explicit", itemsize=2).bytes == 2 * 50 * (96 + 384)
    depthwise = Conv(32, (10, 10), 64, groups=32, **K3)
    assert planner.work(depthwise, "explicit").flops == 2 * 64 * 9 * 100


def test_the_paths_of_a_layer() -> None:
    assert Conv(8, (6, 6), 8, **K3).paths() == ("explicit", "gram", "winograd")
    assert Conv(8, (6, 6), 8, **K3).paths(elementwise=True) == ("explicit", "winograd")
    assert Conv(8, (6, 6), 8, stride=(2, 2), **K3).paths() == ("explicit", "gram")
    assert Conv(8, (6, 6), 8, groups=8, **K3).paths() == ("explicit",)
    assert "gram" not in Conv(8, (200, 200), 8, **K3).paths()


def test_fitted_costs_are_found_again_and_never_negative() -> None:
    rng = np.random.default_rng(0)
    counts = rng.uniform(1, 100, (12, 5)) * [1e6, 1e4, 0, 1e3, 1]
    costs = np.array([2e-10, 3e-9, 0, 5e-9, 1e-5])
    np.testing.assert_allclose(planner.fit(counts, counts @ costs), costs, rtol=1e-6, atol=1e-15)
    noisy = planner.fit(counts, counts @ costs * rng.uniform(0.5, 2, 12))
    assert (noisy >= 0).all()
    assert noisy.any()


def test_more_cotangents_favour_the_gram_matrix() -> None:
    units = {"explicit": 4, "winograd": 4, "gram": 6, "depthwise": 4}
    costs = Costs(16, {kernel: (1e-10,) * (count - 1) + (0.0,) for kernel, count in units.items()})
    conv = Conv(256, (14, 14), 64)
    assert costs.best(conv) == "explicit"
    assert costs.best(conv, cotangents=50) == "gram"
    assert costs.best(conv, cotangents=50, elementwise=True) == "explicit"


@needs_extension
def test_measuring_leaves_the_random_state_alone(fresh: Path) -> None:
    before = torch.get_rng_state()
    planner.calibrate(repeats=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_costs_are_measured_once_and_kept(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    measured = planner.costs(torch.float32)
    assert torch.get_num_threads() == threads
    (file,) = fresh.iterdir()
    assert json.loads(file.read_text())["machine"] == planner.machine(torch.float32)
    monkeypatch.setattr(planner, "calibrate", lambda dtype: pytest.fail("measured again"))
    planner._costs.cache_clear()
    assert planner.costs(torch.float32) == measured
    small, large = (measured.predict(Conv(64, (s, s), 64, **K3), "explicit") for s in (14, 56))
    assert 4 < large / small < 40  # sixteen times the work


@pytest.mark.slow_unless(text=("[]",))
@needs_extension
@pytest.mark.parametrize(
    "text", ["", "[]", '{"width": 16}', '{"width": 16, "seconds": {"explicit": "x"}, "machine": 1}']
)
def test_a_broken_file_is_measured_again(fresh: Path, caplog: pytest.LogCaptureFixture, text: str) -> None:
    planner.costs(torch.float32)
    (file,) = fresh.iterdir()
    file.write_text(text)
    planner._costs.cache_clear()
    with caplog.at_level(logging.WARNING):
        planner.costs(torch.float32)
    assert "measuring again" in caplog.text
    assert json.loads(file.read_text())["width"] == ops.vector_width(torch.float32)


@needs_extension
def test_a_folder_that_cannot_be_written_is_said_so(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fresh.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert planner.costs(torch.float32).predict(Conv(8, (8, 8), 8), "explicit") > 0
    assert "cannot be kept" in caplog.text


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2),
        nn.Tanh(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Flatten(2),
        nn.Linear(20, 5),
        nn.Flatten(),
        nn.Linear(40, 4),
    ).double()


@pytest.mark.parametrize("granularity", ["filter", "parameter"])
@pytest.mark.parametrize("path", ops.CONV_PATHS)
def test_every_forced_path_gives_the_same_fisher(path: str, granularity: str) -> None:
    x = torch.randn(3, 3, 7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with ops.use_backend("reference"):
        want = fisher(network(), [x], "exact", granularity=granularity)
    with planner.force(path):
        got = fisher(network(), [x], "exact", granularity=granularity)
    for name in want:
        assert relative_error(got[name], want[name]) < 1e-10, name


def test_cotangents_share_a_gram_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Counter()

    def counting(name: str, *arguments: object, call=dispatch.call) -> torch.Tensor | None:
        calls[name] += 1
        return call(name, *arguments)

    monkeypatch.setattr(dispatch, "call", counting)
    monkeypatch.setattr(squares, "MAX_TOGETHER", 0)  # each pass has ops of its own
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.Tanh(), nn.Flatten(2), nn.Linear(9, 9), nn.Flatten(), nn.Linear(144, 4)
    )
    with planner.force("gram"):
        fisher(model, [torch.randn(2, 8, 3, 3)], "exact", self_check=False)
    assert calls["conv_gram"] == 2
    assert calls["sq_gram"] == 2 * 3  # four classes have a Fisher of rank three
    assert calls["sq_outer"] == 3  # the last layer sees one token


def test_unknown_paths() -> None:
    with (
        pytest.raises(ValueError, match="unknown path 'fast': expected one of explicit, gram, winograd"),
        planner.force("fast"),
    ):
        pass
