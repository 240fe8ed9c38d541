"""The coverage study: its judge tells right from wrong, and a part of its cases, drawn by the date, holds.

All cases: ``make coverage``, which writes docs/coverage.md.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench.coverage_cases import KINDS, cases, judge
from bench.coverage_cases.case import EXACT, Case
from bench.studies import coverage_study as study
from t2v_fast import FisherRecorder, UnsupportedError

AT_LEAST = {"timm": 150, "torchvision": 20, "transformers": 60, "peft": 24, "layers": 100}
# Of each kind; networks of full width take a minute for six.
DRAWN = {"timm": 6, "torchvision": 6, "transformers": 12, "peft": 12, "layers": 12}


def case(network: nn.Module, expect: str = EXACT, **options) -> Case:
    def make() -> tuple[nn.Module, list[Tensor]]:
        return network, [torch.randn(3, 5), torch.randn(2, 5)]

    return Case("layers", "a case of the tests", make, expect, **options)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return (y - y.mean(0)).tanh()


def test_there_are_enough_cases() -> None:
    for kind, number in AT_LEAST.items():
        assert len(cases([kind])) >= number, kind
    names = [c.key for c in cases()]
    assert len(names) == len(set(names))


def test_cases_that_must_be_refused_say_why() -> None:
    for c in cases():
        assert c.expect == EXACT or (len(c.expect.split()) > 3 and c.message), c.key
        re.compile(c.message)
        re.compile(c.may_refuse)


def test_judge_accepts_what_is_exact() -> None:
    verdict = judge.judge(case(perceptron(), thorough=True))
    assert verdict.verdict == judge.AGREES, verdict.reason
    assert verdict.error <= 1e-9
    assert verdict.tensors == 4
    assert {t.way for t in verdict.trials} == {"recorder", "fisher"}


def test_judge_finds_a_millionth(monkeypatch: pytest.MonkeyPatch) -> None:
    right = FisherRecorder.backward

    def wrong(self, *arguments, **options):
        found = right(self, *arguments, **options)
        found["2.bias"] = found["2.bias"] * (1 + 1e-6)
        return found

    monkeypatch.setattr(FisherRecorder, "backward", wrong)
    verdict = judge.judge(case(perceptron()))
    assert verdict.verdict == judge.WRONG
    assert "2.bias differs by 1.0e-06" in verdict.reason


def test_judge_finds_examples_that_are_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    right = FisherRecorder.backward
    monkeypatch.setattr(
        FisherRecorder, "backward", lambda *a, **k: {name: q.flip(0) for name, q in right(*a, **k).items()}
    )
    assert judge.judge(case(perceptron(), ways=("recorder",))).verdict == judge.WRONG


def refusing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(*arguments, **options):
        raise error

    monkeypatch.setattr(FisherRecorder, "backward", refuse)


def test_judge_finds_needless_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing(monkeypatch, UnsupportedError("the parameter '0.weight': examples interact"))
    assert judge.judge(case(perceptron())).verdict == judge.NEEDLESS
    assert judge.judge(case(perceptron(), may_refuse="0.weight")).verdict == judge.REFUSED


def test_judge_finds_errors_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing(monkeypatch, ValueError("not enough values to unpack"))  # raised here, and so not by the library
    assert judge.judge(case(perceptron())).verdict == judge.SILENT
    assert judge.judge(case(perceptron(), "it must be refused for a test", message="unpack")).verdict == judge.SILENT


def test_judge_of_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"message": "interact", "ways": ("recorder",)}
    assert judge.judge(case(Centred(), "outputs depend on the batch", **options)).verdict == judge.REFUSED
    assert judge.judge(case(perceptron(), "outputs depend on the batch", **options)).verdict == judge.WRONG
    refusing(monkeypatch, UnsupportedError("the moon is full"))
    assert judge.judge(case(Centred(), "outputs depend on the batch", **options)).verdict == judge.UNTRUE


def test_judge_finds_cases_that_expect_the_impossible() -> None:
    verdict = judge.judge(case(Centred()))
    assert verdict.verdict == judge.BROKEN
    assert "run alone" in verdict.reason


def test_judge_says_what_is_absent() -> None:
    def make():
        import no_such_library  # noqa: F401

    verdict = judge.judge(Case("peft", "absent", make))
    assert verdict.verdict == judge.ABSENT
    assert "no_such_library" in verdict.reason
    assert "requirements/coverage.txt" in verdict.reason
    assert not study.passes([verdict])


def test_study_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [c for c in cases(["layers"]) if c.name in ("linear", "conv1d", "batch norm in training mode")]
    results = tmp_path / "results.jsonl"
    first = study.study(chosen[:2], results, resume=False)
    with results.open("a") as file:
        file.write('{"kind": "layers", "na')  # cut off

    judged = []
    monkeypatch.setattr(study, "judge", lambda c: judged.append(c.name) or judge.judge(c))
    everything = study.study(chosen, results, resume=True)
    assert judged == [chosen[2].name]
    assert json.dumps([v.record() for v in everything[:2]]) == json.dumps([v.record() for v in first])

    study.study(chosen, results, resume=True)
    assert judged == [chosen[2].name]

    text = study.page(everything)
    assert "| linear | 24 in 2 | exact |" in text
    assert "no exact answer: its statistics are those of the batch" in text
    assert study.passes(everything)


def test_study_judges_again_what_changed(tmp_path: Path) -> None:
    chosen = [c for c in cases(["layers"]) if c.name == "linear"]
    results = tmp_path / "results.jsonl"
    study.study(chosen, results, resume=False)
    record = json.loads(results.read_text())
    assert study.known_results(results)
    results.write_text(json.dumps({**record, "fingerprint": "of another library"}))
    assert not study.known_results(results)


def test_draw_goes_by_the_date() -> None:
    names = [
        [c.name for c in study.drawn("timm", DRAWN["timm"], date)]
        for date in ("2026-01-01", "2026-01-01", "2026-01-02")
    ]
    assert names[0] == names[1] != names[2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_cases_of_today(kind: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A draw of each kind. To repeat it, set T2V_FAST_COVERAGE_DATE to the date that it prints."""
    date = study.today()
    chosen = study.drawn(kind, DRAWN[kind], date)
    with capsys.disabled():
        print(f"\ncoverage: cases drawn by T2V_FAST_COVERAGE_DATE={date}")
        verdicts = study.study(chosen, tmp_path / "results.jsonl", resume=False)
    good = (judge.AGREES, judge.BY_REQUEST, judge.REFUSED)
    needless = [v for v in verdicts if v.verdict == judge.NEEDLESS]
    bad = [f"{v.key}: {v.verdict}: {v.reason}" for v in verdicts if v.verdict not in (*good, judge.NEEDLESS)]
    assert not bad, f"drawn by T2V_FAST_COVERAGE_DATE={date}:\n" + "\n".join(bad)
    # 3 percent of all cases are allowed; of a draw, what chance may make of that.
    expected = study.ALLOWED_REFUSALS * len(verdicts)
    assert len(needless) <= expected + 2 * math.sqrt(expected), "\n".join(f"{v.key}: {v.reason}" for v in needless)
