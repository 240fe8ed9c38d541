"""One table of settings behind three interfaces: Python, job files and the command line."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from small import shapes, small_probe, write_folder

from t2v_fast import Bank, Embedding, Task2Vec, cli
from t2v_fast.bank.job import SETTINGS, JobError, load_job
from t2v_fast.cli.options import flags_of, settings_of
from t2v_fast.estimation.variational import variational_fisher
from t2v_fast.tasks import probe as probes
from t2v_fast.tasks.head import fit_heads
from t2v_fast.tasks.settings import GROUPS, NAMES_IN, NOT_IN_JOBS, OPTIONS, SettingError, Settings, other_settings

# A value of each option that is not its default; as a command line has it; and options that go with it.
OTHERS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "estimator": ("hutchinson", "hutchinson", {}),
    "samples": (3, "3", {}),
    "tolerance": (0.25, "0.25", {}),
    "method": ("variational", "variational", {}),
    "method_options": ({"epochs": 2, "beta": 1e-3}, "epochs=2 beta=0.001", {"method": "variational"}),
    "task_type": ("multilabel", "multilabel", {}),
    "balanced": (False, "no", {}),
    "head": ("lbfgs", "lbfgs", {}),
    "head_options": ({"weight_decay": "cv"}, "weight_decay=cv", {}),
    "batch_size": (5, "5", {}),
    "num_workers": (1, "1", {}),
    "cache_megabytes": (7, "7", {}),
    "cache_folder": ("kept", "kept", {}),
    "activation_megabytes": (9, "9", {}),
    "device": ("cpu", "cpu", {}),
    "dtype": ("float64", "float64", {}),
    "skip_layers": (2, "2", {}),
    "feature_folder": ("features", "features", {"skip_layers": 2}),
    "unsupported": ("exact", "exact", {}),
    "seed": (4, "4", {}),
    "self_check": (False, "no", {}),
    "progress": (True, "", {}),
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.options, "load_probe", lambda name, **options: small_probe())
    monkeypatch.setattr(probes, "load_probe", lambda **options: small_probe())


def command_line(settings: dict[str, Any]) -> list[str]:
    """The settings as arguments of ``t2v-fast embed``."""
    found = []
    for name, value in settings.items():
        flag = flags_of(name)[0]
        if isinstance(value, bool):
            found.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, dict):
            found += [part for key, entry in value.items() for part in (flag, f"{key}={entry}")]
        else:
            found += [flag, str(value)]
    return found


def write_job(root: Path, settings: dict[str, Any]) -> Path:
    write_folder(root / "task", *shapes(12))
    (root / "job.yaml").write_text(yaml.safe_dump({"settings": settings, "tasks": [{"folder": "task"}]}))
    return root / "job.yaml"


def parsed(*arguments: str) -> Settings:
    return settings_of(cli._parser().parse_args(["embed", "folder", *arguments]))


def test_the_table_is_whole() -> None:
    assert set(OTHERS) == set(OPTIONS) == {f.name for f in fields(Settings)}
    assert set(SETTINGS) == set(OPTIONS) - set(NOT_IN_JOBS)
    assert list(NOT_IN_JOBS) == ["progress"]
    for option in OPTIONS.values():
        assert option.help
        assert option.group in GROUPS


def test_defaults_agree(tmp_path: Path) -> None:
    """`progress` is on in the command line, unless --quiet is given."""
    parameters = dict(inspect.signature(Task2Vec).parameters)
    del parameters["probe"]
    assert {name: p.default for name, p in parameters.items()} == {f.name: f.default for f in fields(Settings)}
    assert parsed("--quiet") == Settings()
    assert parsed() == Settings(progress=True)
    assert load_job(write_job(tmp_path, {})).settings == {}


@pytest.mark.parametrize("name", OTHERS)
def test_every_option_is_reached_from_every_face(name: str, tmp_path: Path) -> None:
    value, text, companions = OTHERS[name]
    want = Settings(**{name: value}, **companions)
    assert getattr(want, name) != getattr(Settings(), name) or name == "device"
    if name == "progress":
        assert parsed() == want
        with pytest.raises(JobError, match="settings: progress is not for a job: a job shows the progress of all"):
            load_job(write_job(tmp_path, {"progress": True}))
        return
    assert parsed(*command_line({name: value, **companions}), "--quiet") == want
    assert all(part in " ".join(command_line({name: value})) for part in text.split() if text != "no")
    content = {name: value, **companions}
    if name == "task_type":
        with pytest.raises(JobError, match="expected csv with labels"):  # a folder has one label an image
            load_job(write_job(tmp_path, content))
        return
    pipeline_settings = load_job(write_job(tmp_path, content)).settings
    if name.endswith("_folder"):
        assert pipeline_settings[name] == str(tmp_path / value)
        with pytest.raises(JobError, match=f"settings: {name}: '/tmp' leads out of"):
            load_job(write_job(tmp_path, {**content, name: "/tmp"}))
        pipeline_settings[name] = value
    assert Settings(**pipeline_settings) == want


def test_former_flags_still_answer() -> None:
    arguments = ["--loaders", "3", "--weight-decay", "cv", "--weights", "none", "--head", "fc"]
    found = cli._parser().parse_args(["embed", "folder", *arguments])
    assert (found.num_workers, found.probe_weights, found.probe_head) == (3, "none", "fc")
    assert settings_of(found).head_options == {"weight_decay": "cv"}
    assert settings_of(found).head == "newton"
    with pytest.raises(ValueError, match="are the same option"):
        parsed("--weight-decay", "1", "--head-options", "weight_decay=1")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("estimator", "best", "one of exact, deflated, hutchinson, monte_carlo, empirical, batch_mean"),
        ("samples", 0, "at least 1"),
        ("samples", "two", "a whole number"),
        ("tolerance", -1.0, "a positive number, with estimator='deflated' and method='fisher'"),
        ("tolerance", float("inf"), "a positive number, with estimator='deflated' and method='fisher'"),
        ("method", "robust", "one of fisher, variational"),
        ("task_type", "regression", "one of multiclass, multilabel"),
        ("head", "sgd", "one of newton, lbfgs, adam"),
        ("batch_size", 0, "at least 1"),
        ("num_workers", -1, "at least 0"),
        ("cache_megabytes", -1, "at least 0"),
        ("device", "abacus", "a device such as 'cpu', 'cuda' or 'cuda:1'"),
        ("dtype", "int8", "a floating-point one: float32, float64, bfloat16 or float16"),
        ("skip_layers", -2, "how many layers to skip, at least 0, or the name of the last one"),
        ("unsupported", "skip", "one of error, exact"),
    ],
)
def test_bad_values_give_the_same_error(
    name: str, value: Any, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SettingError) as caught:
        Task2Vec(small_probe(), **{name: value})
    assert (caught.value.option, caught.value.given, caught.value.expected) == (name, value, expected)
    message = str(caught.value)
    assert re.fullmatch(
        rf"(unknown )?{name} (is )?{re.escape(repr(value))}[,:] expected {re.escape(expected)}", message
    )
    with pytest.raises(JobError) as in_job:
        load_job(write_job(tmp_path, {name: value}))
    assert str(in_job.value) == f"{tmp_path}/job.yaml: settings: {name}: got {value!r}, expected {expected}"
    try:
        status = cli.main(["embed", str(tmp_path / "task"), *command_line({name: value})])
    except SystemExit as error:  # what argparse refuses
        status = error.code
    assert status in (1, 2)
    assert capsys.readouterr().err.rstrip().endswith(message)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method_options": {"epochs": 2}}, "method_options are for method='variational'"),
        ({"feature_folder": "features"}, "feature_folder is for what skipped layers make of the images"),
    ],
)
def test_options_that_do_not_go_together(
    settings: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(ValueError, match=message):
        Task2Vec(small_probe(), **settings)
    with pytest.raises(JobError, match=f"settings: {message}"):
        load_job(write_job(tmp_path, settings))
    assert cli.main(["embed", str(tmp_path / "task"), *command_line(settings)]) == 1
    assert message in capsys.readouterr().err


def test_values_of_other_types() -> None:
    settings = Settings(samples=np.int64(3), balanced=np.bool_(False), tolerance=1, dtype=torch.bfloat16)
    assert (settings.samples, settings.balanced, settings.tolerance) == (3, False, 1.0)
    assert type(settings.samples) is int
    assert Settings(cache_folder=Path("x")).cache_folder == Path("x")
    assert Settings(seed=-1).seed == -1
    if torch.version.cuda is not None:  # a CPU build of torch has no device of this number
        assert Settings(device=1).device == torch.device("cuda:1")
    for name, value in (
        ("samples", True),
        ("samples", 2.0),
        ("seed", 1 << 63),
        ("balanced", 1),
        ("tolerance", "0.1"),
        ("tolerance", float("nan")),
        ("head_options", [1]),
        ("head_options", {1: 2}),
        ("cache_folder", 3),
        ("skip_layers", ""),
        ("skip_layers", True),
        ("device", True),
        ("dtype", torch.int8),
        ("estimator", None),
        ("seed", 10**6000),
    ):
        with pytest.raises(SettingError, match=f"{name} .*expected"):
            Settings(**{name: value})
    with pytest.raises(SettingError, match=r"seed is 9223372036854775808, expected a number from -2\^63 to 2\^63 - 1"):
        Settings(seed=1 << 63)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"estimator": "batch_mean", "batch_size": 4},
        {"head": "adam", "head_options": {"epochs": 1, "draws": 100}},
        {"balanced": False, "dtype": "float64", "seed": 2},
        {"skip_layers": 2, "tolerance": 0.5},
    ],
)
def test_fingerprints_of_the_faces_agree(settings: dict[str, Any], tmp_path: Path) -> None:
    job = write_job(tmp_path, settings)
    plain = Task2Vec.from_settings(small_probe(), Settings(**settings)).embed(tmp_path / "task")
    assert cli.main(["embed", "--job", str(job), "--bank", str(tmp_path / "bank"), "--quiet"]) == 0
    in_bank = Bank(tmp_path / "bank")["task"]
    arguments = [str(tmp_path / "task"), "--output", str(tmp_path / "out"), "--quiet", *command_line(settings)]
    assert cli.main(["embed", *arguments]) == 0
    by_command = Embedding.load(tmp_path / "out" / "task.safetensors")
    assert plain.fingerprint == in_bank.fingerprint == by_command.fingerprint
    np.testing.assert_array_equal(in_bank.hessian, plain.hessian)
    np.testing.assert_array_equal(by_command.hessian, plain.hessian)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_options": {"weight": 1}}, "head_options has no 'weight': expected some of weight_decay, "),
        ({"head_options": {"epochs": "x"}}, "head_options: epochs is 'x', expected a number"),
        ({"method": "variational", "method_options": {"samples": 1}}, "method_options has no 'samples': expected some"),
    ],
)
def test_names_within_mappings_that_do_not_exist(
    options: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Settings(**options)
    (tmp_path / "birds").mkdir()
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"settings": options, "tasks": [{"folder": "birds"}]}))
    with pytest.raises(JobError, match=re.escape(message)):
        load_job(tmp_path / "job.yaml")
    flags = []
    for option, value in options.items():
        pairs = [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else [value]
        for pair in pairs:
            flags += [f"--{option.replace('_', '-')}", pair]
    assert cli.main(["embed", str(tmp_path / "birds"), "--output", str(tmp_path / "out"), *flags]) == 1
    assert message in capsys.readouterr().err


def test_names_within_mappings_are_those_of_the_functions() -> None:
    head, robust = (set(inspect.signature(f).parameters) for f in (fit_heads, variational_fisher))
    head -= {"features", "tasks", "likelihood", "method", "seed"}
    robust -= {"model", "batches", "parameters", "head", "likelihood", "generator"}
    assert {option: set(names) for option, names in NAMES_IN.items()} == {
        "head_options": head,
        "method_options": robust | {"num_samples"},
    }


def test_settings_that_decide_how_exact_an_embedding_is() -> None:
    """Those that an estimator does not use are no difference."""
    made = {"estimator": "deflated", "samples": 2, "seed": 0, "batch_size": 32}
    assert other_settings(Settings(), made) == []
    assert other_settings(Settings(seed=3, samples=4), made) == ["seed is 0, not 3", "samples is 2, not 4"]
    assert other_settings(Settings(tolerance=0.05), made) == ["tolerance is None, not 0.05"]
    within = {**made, "tolerance": 0.05, "samples": 1.7}
    assert other_settings(Settings(tolerance=0.05), within) == []
    assert other_settings(Settings(), within) == ["tolerance is 0.05, not None"]
    exact = {**made, "estimator": "exact"}
    assert other_settings(Settings(estimator="exact", seed=3, samples=4), exact) == []
    of_batches = {**made, "estimator": "batch_mean"}
    options = {"estimator": "batch_mean", "samples": 4}
    assert other_settings(Settings(**options), of_batches) == []
    assert other_settings(Settings(**options, batch_size=8), of_batches) == ["batch_size is 32, not 8"]
    variational = {"method": "variational", "seed": 0}
    assert other_settings(Settings(method="variational", samples=4), variational) == []
    assert other_settings(Settings(), {}) == []  # of a file that says nothing of it
