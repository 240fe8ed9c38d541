"""The report for GPUs is rehearsed on a CPU: every line runs, and what is wrong is called wrong."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import subprocess
import sys
import time
import types
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend_cuda import moved, pretended
from pretend_graphs import with_graphs

from bench.gpu import ROOT, measure, networks, page, pool, single, tools, verify
from bench.gpu.card import KINDS
from bench.gpu.pool import Job
from bench.gpu.report import Absent, OutOfTime, Report
from bench.studies import gpu_model
from t2v_fast import UnsupportedError, ops

main = importlib.import_module("bench.gpu.__main__")


class Here:
    """A module's ``main`` as a process, in this process, which has imported torch."""

    def __init__(self, command: Sequence[str], log: Path | None = None, **settings: str) -> None:
        self.args, self.returncode = command, None
        at = list(command).index("-m")
        self.name, self.arguments = command[at + 1], command[at + 2 :]

    def wait(self) -> int | None:
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        said = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
            patch.setattr(sys, "argv", [self.name, *self.arguments])
            importlib.import_module(self.name).main()
        self.returncode = 0
        return said.getvalue(), None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.communicate()
        return self.returncode

    def kill(self) -> None:
        self.returncode = -9


def rehearse(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr(tools, "start", Here)
    monkeypatch.setattr(sys, "argv", ["gpu", "--rehearse", "--output", str(folder), *arguments])
    with pytest.raises(SystemExit) as done:
        main.main()
    return done.value.code, json.loads((folder / "gpu.json").read_text())


def test_a_rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, results = rehearse(monkeypatch, tmp_path)
    assert results["wrong"] == []
    assert code == 0
    assert list(results["steps"]) == list(main.STEPS)
    assert len(results["ops"]) == 8
    assert len(results["against_float64"]) == 10
    assert set(results["opcheck"]) == set(ops.SCHEMAS)
    assert set(results["waits"]) == {"small resnet", "small vit"}
    assert set(results["cuda_graphs"]) == {"ops, cpu", "small resnet, backward", "small vit, backward"}
    assert set(results["sanitizer"]) == {"padding, cpu, memcheck", "padding, cpu, racecheck"}
    assert len(results["compiled ahead"]) == 13
    assert len(results["seconds"]) == 20
    cell = "small resnet, 32, batch 2, TF32: "
    own = {"fisher()", "fisher(), as it is"}  # "replayed" is left out on a CPU
    timed = {name.removeprefix(cell) for name in results["networks"] if name.startswith(cell)}
    assert timed == {"floor", "step", "compiled step", "squares, cpu", "squares replayed, cpu", *own}
    assert all(
        {"ms", "host", "busy"} <= value.keys() for name, value in results["networks"].items() if "fisher" not in name
    )
    what = ("floor", "squares, cpu")
    assert set(results["kernels"]) == {f"small resnet, 32, batch 2, {kind}: {w}" for kind in KINDS for w in what}
    assert {f"{cell}naive", f"{cell}vmap_chunked"} <= set(results["peers"])
    # What is left out says why. Only peers, tools and what needs a card can be.
    replayed = [
        text for text in results["left_out"] if "no CUDA graphs are used: the network has tensors on cpu" in text
    ]
    names = [text.split(": ")[1] for text in replayed]
    timed_ones = [f"small resnet, 32, batch 2, {kind}" for kind in KINDS]
    assert names == ["small resnet, fisher()", "small vit, fisher()", *timed_ones]
    others = {text.partition(":")[0] for text in results["left_out"] if text not in replayed}
    assert others <= {"rates", "peers", "counters"}
    assert any("ncu measured nothing" in text for text in results["left_out"])
    text = (tmp_path / "gpu.md").read_text()
    assert all(f"## {title}" in text for title in ("Ops", "Ceilings", "Layers", "Networks", "Left out"))


@pytest.mark.slow
def test_a_rehearsal_with_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.gpu", "--rehearse", "--output", str(tmp_path)]
    done = subprocess.run([*command, "--only", "verification", "counters"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert len(results["compiled ahead"]) == 13
    assert len(results["ops"]) == 8
    assert len(results["sanitizer"]) == 2


def test_what_the_report_calls_wrong(tmp_path: Path) -> None:
    """A network that the library refuses is no more left out than a wrong result; a peer that refuses one is."""
    report = Report(tmp_path, minutes=1)

    def fail(error: BaseException) -> None:
        raise error

    for name, error, excused in (
        ("refused", UnsupportedError("refused"), False),
        ("memory", torch.OutOfMemoryError("memory"), False),
        ("number", AssertionError("relative error"), False),
        ("unsaid", AssertionError(), False),
        ("peer", UnsupportedError("refused"), True),
        ("tool", Absent("this machine has no ncu"), False),
    ):
        assert report.line("networks", name, lambda error=error: fail(error), excused) is None
    with report.step("layers", 0.2):
        report.line("layers", "endless", lambda: time.sleep(30))
        report.line("layers", "late", lambda: None)
        report.line("peers", "late", lambda: None, excused=True)
    assert report.line("layers", "next step", lambda: 3) == 3
    wrong = [text.split(": ")[1] for text in report.results["wrong"]]
    assert wrong == ["refused", "memory", "number", "unsaid", "endless", "late"]
    assert "raise error" in report.results["wrong"][3]
    assert [text.split(": ")[1] for text in report.results["left_out"]] == ["peer", "tool", "late"]
    assert json.loads((tmp_path / "gpu.json").read_text()) == report.results  # written after each line
    with pytest.raises(OutOfTime):
        raise OutOfTime


def test_a_step_that_is_not_finished_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, results = rehearse(monkeypatch, tmp_path, "--only", "ceilings", "--minutes", "0")
    assert code == 1
    assert all("no time was left" in text for text in results["wrong"])
    assert len(results["wrong"]) == 4


def test_a_machine_without_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Sequence[str]] = []

    class Built:
        returncode = 0

        def __init__(self, command: Sequence[str], **settings: str) -> None:
            built.append((command, settings))

        def communicate(self, timeout: float | None = None) -> tuple[str, None]:
            return "compiling\nbuilt backends: cpu, cuda", None

    monkeypatch.setattr(tools, "start", Built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", "--build", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="torch finds no CUDA device"):
        main.main()
    ((command, settings),) = built
    assert command[1:] == ["setup.py", "build_ext", "--inplace"]
    assert settings["T2V_FAST_CUDA"] == "1"
    assert "built backends: cpu, cuda" in json.loads((tmp_path / "gpu.json").read_text())["environment"]["build"]


def test_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report(tmp_path, 1)
    monkeypatch.setattr(tools.shutil, "which", lambda name, path=None: None)
    report.line("sanitizer", "7x7, cuda", partial(tools.sanitized, "7x7", "cuda", "memcheck", []))
    tools.counters(report, ["stem"], ["cuda"], 1, [])
    reasons = ["this machine has no compute-sanitizer", "this machine has no ncu"]
    assert [text.rpartition(": ")[2] for text in report.results["left_out"]] == reasons

    def program(text: str, code: int = 0) -> Callable[..., subprocess.Popen]:
        script = f"print({text!r}); raise SystemExit({code})"
        return lambda command, **settings: subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    monkeypatch.setattr(tools.shutil, "which", lambda name, path=None: f"/bin/{name}")
    for text, code in (("Error: Device not supported", 1), ("ERROR SUMMARY: 3 errors", 9), ("fine", 0)):
        monkeypatch.setattr(tools, "start", program(text, code))
        for check in ("memcheck", "racecheck"):
            run = partial(tools.sanitized, "padding", "cuda", check, [])
            report.line("sanitizer", f"padding, cuda, {check}", run)
    assert sum("cannot work on this machine" in text for text in report.results["left_out"]) == 2
    assert sum("3 errors" in text for text in report.results["wrong"]) == 2
    assert report.results["sanitizer"] == {"padding, cuda, memcheck": "fine", "padding, cuda, racecheck": "fine"}
    header = '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
    rows = [
        '"0","cast","gpu__time_duration.sum","us","3.5"',
        '"1","squares","gpu__time_duration.sum","ms","1.25"',
        '"1","squares","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","41.7"',
        '"1","squares","another","%","1"',
    ]
    monkeypatch.setattr(tools, "start", program("\n".join(["==PROF== Connected", header, *rows])))
    tools.counters(report, ["squares"], ["cuda"], 30, [])
    found = report.results["counters"]["squares, cuda"]
    assert found == {"kernel": "squares", "us": "1250", "% of the memory's peak": "41.7"}
    with pytest.raises(AssertionError, match="printed none"):
        tools.longest(header)


def test_programs_that_take_too_long() -> None:
    process = tools.start([sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(subprocess.TimeoutExpired):
        tools.finish(process, 1)
    assert process.poll() is not None


def test_jobs_in_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that fails leaves the others alone. A process that dies, or does not end, is reported by name."""
    report = Report(tmp_path, 1)

    def fail(error: Exception) -> None:
        raise error

    every = [
        Job("ops", "room", lambda: fail(OSError("no room"))),
        Job("ops", "fine", lambda: 3),
        Job("cuda_graphs", "none", lambda: fail(Absent("no graph"))),
        Job("compiled ahead", "excused", lambda: fail(OSError("no compiler")), excused=True),
        Job("ops", "broken", lambda: fail(RuntimeError("CUDA error: an illegal memory access was encountered"))),
        Job("ops", "after", lambda: 4),
    ]

    broken: list[bool] = []

    def works(where: Path, log: Path) -> int:
        broken.append(pool.work(every, where))  # where the context broke, the process starts anew
        return 0

    def dies(where: Path, log: Path) -> int:
        (where / "0.taken").touch()
        log.write_text("Segmentation fault")
        return -11

    def hangs(where: Path, log: Path) -> None:
        pass

    class Worker:
        """A process whose program is a function."""

        def __init__(self, program: Callable, command: Sequence[str], log: Path, **settings: str) -> None:
            self.run = partial(program, Path(command[-1]), log)

        def poll(self) -> int | None:
            return self.run()

        def wait(self) -> None:
            pass

        kill = wait

    monkeypatch.setattr(tools, "start", partial(Worker, works))
    spent = pool.run(report, every, 1, 20)
    assert broken[:2] == [True, False]
    assert set(spent) == {"room", "fine", "none", "excused", "broken", "after"}
    assert report.results["ops"] == {"fine": 3, "after": 4}
    wrong = ["ops: room: OSError: no room", "ops: broken: RuntimeError: CUDA error: an illegal memory access was"]
    assert [text[: len(start)] for text, start in zip(report.results["wrong"], wrong, strict=True)] == wrong
    left_out = ["cuda_graphs: none: Absent: no graph", "compiled ahead: excused: OSError: no compiler"]
    assert report.results["left_out"] == left_out
    monkeypatch.setattr(tools, "start", partial(Worker, dies))
    pool.run(report, every[:2], 1, 20)
    assert report.results["wrong"][-2:] == [
        "ops: room: its process ended early: Segmentation fault",
        "ops: fine: no process took it: each ended early: Segmentation fault",
    ]
    monkeypatch.setattr(tools, "start", partial(Worker, hangs))
    pool.run(report, every[1:2], 1, 0.3)
    assert report.results["wrong"][-1] == "ops: fine: not done within 0 s"


def test_triton_verifies_twelve_geometries(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(verify.geometries("triton")) == 12
    monkeypatch.setattr(verify, "TWELVE", ("3x3", "gone"))
    with pytest.raises(AssertionError, match="lacks"):
        verify.geometries("triton")


def test_verification_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    real = ops.sq_conv
    monkeypatch.setattr(ops, "sq_conv", lambda *args: 1.01 * real(*args))
    with pytest.raises(AssertionError):
        verify.convolutions("cpu", torch.float32, cpu, verify.geometries("cpu", 20))
    with pytest.raises(AssertionError, match="relative error"):
        verify._bounded(1e-2, torch.float32)
    monkeypatch.setattr(ops, "sq_conv", lambda *args: 2 * real(*args))
    monkeypatch.setattr(sys, "argv", ["single", "padding", "--backend", "cpu", "--device", "cpu"])
    with pytest.raises(AssertionError, match="explicit"):
        single.main()
    monkeypatch.setattr(verify, "backends", lambda device: [])
    monkeypatch.setattr(ops, "SCHEMAS", {})
    (job,) = [job for job in verify.jobs(cpu, main.Sizes(1, [], 1, [], 4, 2, 1, True)) if job.section == "ops"]
    with pytest.raises(AssertionError, match="no backend but the reference runs on cpu"):
        job.run()


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is a CPU build: it builds other graphs")
def test_replays_are_verified_and_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The lines that a rehearsal leaves out run on a pretended card."""
    cpu, made = torch.device("cpu"), networks.network
    for module in (measure, verify):
        monkeypatch.setattr(module, "network", lambda *args, **options: moved(made(*args, **options)))
    report = Report(tmp_path, 5)
    with pretended(), with_graphs():
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        said = verify.replayed("small resnet", 32, cpu)
        measure.replays(report, cpu, [("small resnet", 32, 2)], 8)
    assert re.fullmatch(r"relative difference 0.0e\+00: CUDA graphs: \d+ of 14 batches were replayed, from 4 .*", said)
    assert report.results["wrong"] == report.results["left_out"] == []
    assert [set(value) for value in report.results["networks"].values()] == 6 * [
        {"ms", "first call's own", "later call's own"}
    ]


def test_the_networks_are_those_of_torchvision() -> None:
    models = pytest.importorskip("torchvision.models")
    x = torch.randn(2, 3, 64, 64)
    for name in ("resnet18", "resnet50", "vit_b_16"):
        own = networks.network(name, 64, torch.device("cpu")).float()
        settings = {"image_size": 64} if name == "vit_b_16" else {}
        with torch.device("meta"):
            theirs = getattr(models, name)(num_classes=10, **settings)
        theirs = theirs.eval()
        theirs.load_state_dict(own.state_dict(), assign=True)
        with torch.no_grad():
            torch.testing.assert_close(own(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["small resnet", "small vit"])
def test_the_floor_has_no_gradient_of_weights_and_none_of_the_images(name: str) -> None:
    model = networks.network(name, 32, torch.device("cpu"))
    x = torch.randn(2, 3, 32, 32)
    with measure.frozen(model) as outputs:
        y = model(x)
        (g,) = torch.autograd.grad(y, outputs, torch.ones_like(y))
        assert g.shape == outputs[0].shape
        assert not any(p.requires_grad for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert not model.first._forward_hooks


def test_rates_of_the_planner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, rates = Report(tmp_path, 1), types.ModuleType("t2v_fast.ops.gpu_rates")
    found = types.SimpleNamespace(products={("cuda", "half", "explicit"): 150.0}, bandwidth=4000.0, measured=True)
    rates.measure = lambda device: found
    monkeypatch.setitem(sys.modules, "t2v_fast.ops.gpu_rates", rates)
    measure.planner_rates(report, torch.device("cpu"))
    assert report.results["rates"]["measured"] == {"cuda, half, explicit": 150.0, "GB/s": 4000.0, "measured": True}


def test_the_tables_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["page", *arguments])
        page.main()
        return capsys.readouterr().out

    nothing = run(str(tmp_path / "none.json"))
    assert nothing.count(page.NONE) > 100
    title = "vit_b_16, 224, batch 64, TF32: "
    results = {
        "machine": {"device": "NVIDIA H200"},
        "ceilings": {"copy, GB/s": 4300.0},
        "networks": {
            f"{title}floor": {"ms": 21.0, "busy": 20.0},
            f"{title}step": {"ms": 41.0, "busy": 40.0},
            f"{title}squares, cuda": {"ms": 61.0, "busy": 31.0, "host": 60.0},
            f"{title}squares, triton": {"ms": 59.0, "busy": 29.0, "host": 58.0},
            f"{title}squares replayed, triton": {"ms": 29.5},
            f"{title}fisher()": {"ms": 99.0},
        },
        "peers": {f"{title}opacus": {"ms": 300.0, "examples": 16, "error": 1e-5}},
        "layers": {"7x7 stem, 224x224, bfloat16, cuda, explicit": {"us an example": 12.5}},
    }
    later = {"networks": {f"{title}fisher()": {"ms": 30.0}}, "wrong": []}
    reports = [tmp_path / "gpu.json", tmp_path / "later.json"]
    for path, report in zip(reports, (results, later), strict=True):
        path.write_text(json.dumps(report))
    target = tmp_path / "page.md"
    target.write_text("# GPUs\n")
    run(*map(str, reports), "--write", str(target))
    text = target.read_text()
    assert "| copy, GB/s | 4800 | 4300 |" in text
    row = next(line for line in text.splitlines() if line.startswith("| vit_b_16 | TF32 |"))
    floor, _, own = gpu_model.predictions()["vit_b_16", "TF32"]
    measured = "29 | 58 | 29.5 | 1.45 | 0.72 | not measured | 30 | 1.43 |"
    assert row == f"| vit_b_16 | TF32 | {floor:.1f} | 20 | 40 | not measured | {floor + own:.1f} | {measured}"
    assert "| vit_b_16 | opacus | 300 | 10.17 | 1e-05 | 16 |" in text
    assert any(line.endswith("| 12.5 | not measured |") for line in text.splitlines())
    results["machine"]["device"] = "NVIDIA A100"
    (tmp_path / "gpu.json").write_text(json.dumps(results))
    with pytest.raises(SystemExit, match="from NVIDIA A100"):
        run(str(tmp_path / "gpu.json"))
