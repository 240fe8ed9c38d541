"""No public name is lost: the names of version 0.1.0, in tests/data/public_names.json, keep their parameters."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import pickle
import pkgutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from signatures import signature

import t2v_fast
from t2v_fast.tasks import stages

NAMES: dict[str, dict[str, str | None]] = json.loads((Path(__file__).parent / "data" / "public_names.json").read_text())
# Internals whose parameters changed, each with its reason; CHANGELOG.md says so to whoever calls them.
_ENTRIES = "its first field is entries, which values_ still reads; only the library makes these objects"
_SEGMENTS = "it takes segments last, for rows of packed sequences"
_TEXTS = "shift_labels, packed and cuda_graphs, keywords of their own"
CHANGED: dict[str, str] = {
    **dict.fromkeys(("t2v_fast.fisher", "t2v_fast.fisher.fisher"), _TEXTS),
    **dict.fromkeys(
        (
            *("t2v_fast.FisherRecorder.backward", "t2v_fast.FisherRecorder.check"),
            *("t2v_fast.recorder.FisherRecorder.backward", "t2v_fast.recorder.FisherRecorder.check"),
            *("t2v_fast.graph.find_taps", "t2v_fast.ownership.Ownership", "t2v_fast.rules.taps_of"),
            "t2v_fast.selfcheck.SelfCheck.batch",
        ),
        _SEGMENTS,
    ),
    **dict.fromkeys(
        (f"{place}.{name}" for place in ("t2v_fast.Bank", "t2v_fast.bank.Bank") for name in ("add", "claim")),
        "they take replace and again, by name, whose defaults are what they were",
    ),
    "t2v_fast.run.Summary": "changed, the last, with a default",
    "t2v_fast.run.run_job": "redo_changed, by name, whose default is what it was",
    **dict.fromkeys(
        ("t2v_fast.FisherRecorder.backward_groups", "t2v_fast.recorder.FisherRecorder.backward_groups"),
        "it takes retain_graph last, as backward does",
    ),
    "t2v_fast.selfcheck.SelfCheck": "purpose, the last, with a default: fisher hands over squares of its first batch",
    "t2v_fast.cotangents.cotangents": "checks, more and segments, the last, and with defaults",
    **dict.fromkeys(
        ("t2v_fast.cotangents.Likelihood.deflated", "t2v_fast.cotangents.Softmax.deflated"),
        "most and known, the last, and with defaults; a likelihood of someone else needs neither",
    ),
    "t2v_fast.moments.DrawnExamples.add": "it takes factors that are computed once a batch, for all parameters",
    "t2v_fast.transfers.transfer": "its default was the table itself, so that each new transfer changed the parameters",
    "t2v_fast.allocation.until": "visit takes the seed of each draw, so that draws are independent and can be averaged",
    "t2v_fast.allocation.Allocation": "strata and more, whose defaults are what it was: a draw can be refined",
    "t2v_fast.allocation.draw": "least, the last, whose default is what it was: later draws may be small",
    "t2v_fast.head.fit_heads": "temperature, by name only",
    "t2v_fast.rules.factors_of": "alone, the last, and with a default",
    "t2v_fast.rules.register_rule": "segments, by name only, and with a default",
    "t2v_fast.rules.Rule": "segments, the last: register_rule makes these objects",
    "t2v_fast.page.write_map": "alpha, by name only",
    **dict.fromkeys(
        ("t2v_fast.selection.check_errors", "t2v_fast.selection.compare"),
        "names of tasks for messages, the last, and with a default",
    ),
    "t2v_fast.cotangents.check_estimator": "estimators that are known, the last, and with a default",
    "t2v_fast.graph.Use.parameter": "a cached property: it is looked up once",
    "t2v_fast.graph.Use": "stack, the last: only the library makes these objects",
    "t2v_fast.FisherDiagonal": _ENTRIES,
    "t2v_fast.fisher.FisherDiagonal": _ENTRIES,
    "t2v_fast.adapters.continual.compute_importances": "batch_scale, which keeps the meaning of a plugin's ewc_lambda",
    "t2v_fast.adapters.continual.online_ewc_fisher": "mode, whose default gives Mammoth's numbers",
    "t2v_fast.layers.FastLayers": "on_cpu, the last, whose default is what it was",
    "t2v_fast.ops.backend_for": "path, the last, and with a default",
    "t2v_fast.load_probe": "size, whose default is the network's own",
    "t2v_fast.probe.load_probe": "size, whose default is the network's own",
}
# Names that are gone because nobody can have used them, each with the reason.
REMOVED: dict[str, str] = {
    "t2v_fast.allocation.Allocation.is_sample": "neither the library nor a document ever used it",
}


def find(module: str, name: str) -> Any:
    found: Any = importlib.import_module(module)
    *owners, last = name.split(".")
    for owner in owners:
        found = getattr(found, owner)
    return inspect.getattr_static(found, last) if owners else getattr(found, last)


@pytest.mark.parametrize("module", NAMES)
def test_names_of_a_module(module: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for name, before in NAMES[module].items():
            if f"{module}.{name}" in REMOVED:
                continue
            found = find(module, name)
            if f"{module}.{name}" not in CHANGED:
                assert signature(found) == before, f"{module}.{name}"


def test_changed_and_removed_names_are_among_those() -> None:
    for name in CHANGED | REMOVED:
        assert any(name == f"{module}.{key}" for module, keys in NAMES.items() for key in keys), name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", REMOVED)
def test_a_removed_name_is_gone(name: str) -> None:
    module = next(m for m in sorted(NAMES, key=len, reverse=True) if name.startswith(f"{m}."))
    with pytest.raises(AttributeError):
        find(module, name.removeprefix(f"{module}."))


def test_a_former_module_warns_and_names_the_new_one() -> None:
    with pytest.warns(DeprecationWarning, match=r"t2v_fast\.selection\.Model2Vec is now t2v_fast\.analysis\.selection"):
        from t2v_fast.selection import Model2Vec
    assert Model2Vec.__module__ == "t2v_fast.analysis.selection"
    with pytest.raises(ImportError, match="nothing_like_it"):
        from t2v_fast.selection import nothing_like_it  # noqa: F401


def test_no_function_hides_a_module() -> None:
    """Each module of a sub-package is an attribute of the sub-package, even where it defines a function of its name."""
    for package in (info.name for info in pkgutil.iter_modules(t2v_fast.__path__) if info.ispkg):
        parent = importlib.import_module(f"t2v_fast.{package}")
        for info in pkgutil.iter_modules(parent.__path__):
            if not info.name.startswith("_"):
                module = importlib.import_module(f"{parent.__name__}.{info.name}")
                assert getattr(parent, info.name) is module, module.__name__


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_constants_of_a_former_module() -> None:
    former = importlib.import_module("t2v_fast.task2vec")
    assert (former.LEAST, former.MOST) == (stages.MIN_BATCH_SIZE, stages.MAX_BATCH_SIZE)
    assert {"LEAST", "MOST", "PIXELS", "Task2Vec", "family_of"} <= set(dir(former))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_star_import_of_a_former_module() -> None:
    names: dict[str, Any] = {}
    exec("from t2v_fast.selection import *", names)
    assert {"Model2Vec", "leep", "logme", "read_errors"} <= set(names)
    assert "_Moved" not in names


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_patches_of_a_former_name_change_what_the_library_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    fisher, layers = stages.fisher, (torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 2))
    network = torch.nn.Sequential(*layers)
    with mock.patch("t2v_fast.task2vec.fisher") as patched:
        assert stages.fisher is patched
    assert stages.fisher is fisher
    with monkeypatch.context() as context:
        context.setattr("t2v_fast.task2vec.load_probe", lambda name: t2v_fast.Probe(network))
        assert t2v_fast.Task2Vec("nothing like it").probe.network is network
        context.setattr("t2v_fast.task2vec.MOST", 3)
        assert stages.MAX_BATCH_SIZE == 3
    assert stages.load_probe is t2v_fast.load_probe
    assert stages.MAX_BATCH_SIZE == 32


def test_a_former_module_can_be_found() -> None:
    assert importlib.util.find_spec("t2v_fast.shared").name == "t2v_fast.shared"


def test_public_names_do_not_warn() -> None:
    program = (
        "import t2v_fast; from t2v_fast import *; from t2v_fast.distance import pdist; from t2v_fast.bank import Bank"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert not done.stderr


def test_pickles_of_former_results_load() -> None:
    ones = {"weight": torch.ones(2)}
    former = t2v_fast.FisherDiagonal(ones, ones, "filter", "exact", 1, 2)
    former.__dict__["values_"] = former.__dict__.pop("entries")
    data = pickle.dumps(former, protocol=0).replace(b"t2v_fast.estimation.diagonal", b"t2v_fast.fisher")
    with pytest.warns(DeprecationWarning, match="FisherDiagonal"):
        found = pickle.loads(data)
    assert found.entries.keys() == found.keys() == {"weight"}
    assert found.vector().tolist() == [1, 1]
