"""The race of networks on given likelihoods: who leaves when, what it costs, and what the budget allows."""

import numpy as np
import pytest

from t2v_fast.analysis.race import Runner, run_race

ROUNDS = [10, 20, 40]


def runners(scores: list[float], noise: float = 0.1, shared: float = 1.0, seed: int = 0) -> list[Runner]:
    """Networks with these mean likelihoods; hard images are hard for all of them."""
    rng = np.random.default_rng(seed)
    hard = shared * rng.normal(size=40)
    tables = [score + hard + noise * rng.normal(size=40) for score in scores]
    return [Runner(str(k), lambda n, table=table: table[:n]) for k, table in enumerate(tables)]


def test_sure_losers_leave_first_and_pairs_decide():
    left = []
    ranked, cost = run_race(runners([0, -3, -0.02, -1], seed=3), ROUNDS, leaves=lambda runner: left.append(runner.name))
    assert {runner.name for runner in ranked[:2]} == {"0", "2"}
    assert {runner.name: len(runner.likelihoods) for runner in ranked} == {"0": 40, "2": 40, "3": 10, "1": 10}
    assert sorted(left) == ["1", "3"]
    assert cost == pytest.approx((2 * 40 + 2 * 10) / (4 * 40))
    # Images differ much more than networks do, and still the paired difference is sure.
    for runner in ranked[2:]:
        assert runner.outcome == "dropped"
        assert runner.behind > 3 * runner.error
        assert np.ptp(runner.likelihoods) > 1


def test_the_paces_and_the_budget_count():
    equal = runners([0.0] * 6, noise=1.0)
    for k, runner in enumerate(equal):
        runner.pace = 1.0 + (k == 0)
    for budget in (0.3, 0.5, 0.8):
        ranked, cost = run_race(equal, ROUNDS, budget=budget)
        whole = sum(runner.pace * 40 for runner in equal)
        spent = sum(runner.pace * len(runner.likelihoods) for runner in equal)
        assert cost == pytest.approx(spent / whole)
        assert cost <= budget
    assert run_race(equal, ROUNDS, confidence=1e9)[1] == pytest.approx(1)
    # The first round runs whatever the budget is, and its leader is first.
    ranked, cost = run_race(runners([0.0, 0.5], noise=0.01), ROUNDS, budget=0.01)
    assert cost == pytest.approx(1 / 4)
    assert ranked[0].name == "1"


def test_one_network_sees_the_first_round_only():
    ranked, cost = run_race(runners([0.0]), ROUNDS)
    assert len(ranked[0].likelihoods) == 10
    assert cost == pytest.approx(1 / 4)
    assert ranked[0].behind == 0
