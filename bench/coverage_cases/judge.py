"""The judge of the coverage study: compare the library's answer with plain autograd of a copy of the network.

The truth is the gradient of each example alone. The example is fed twice and the first output is taken, because torch's
batch norm on CPUs gives wrong gradients for a single image whose memory format differs from its gradient's. The truth
uses nothing of the library.
"""

from __future__ import annotations

import copy
import gc
import re
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import t2v_fast
from t2v_fast import FisherRecorder, SelfCheckError, UnsupportedError, fisher

from .case import EXACT, Case, Inputs

PACKAGE = str(Path(t2v_fast.__file__).parent)
# A parameter whose values are smaller than this, relative to all, counts by its absolute error: it holds rounding.
FLOOR = 1e-12
# What the rounding of float32 may make of a network that computes in it here and there.
FLOAT32_PARTS = 1e-4
GRANULARITIES = ("filter", "parameter", "tensor")

# Verdicts, the good ones first.
AGREES = "exact"
BY_REQUEST = 'exact with `unsupported="exact"`'
REFUSED = "refused"
NEEDLESS = "refused needlessly"
UNTRUE = "refused by an untrue error"
SILENT = "ends in an error that says nothing"
WRONG = "wrong"
BROKEN = "the case itself is broken"
ABSENT = "absent"
VERDICTS = (AGREES, BY_REQUEST, REFUSED, NEEDLESS, UNTRUE, SILENT, WRONG, BROKEN, ABSENT)


@dataclass
class Trial:
    """One call of the library for a case."""

    way: str
    unsupported: str
    granularity: str
    outcome: str  # "agrees", "differs", "refused" or "fails"
    error: float = float("nan")
    worst: str = ""  # the parameter with the largest error
    message: str = ""

    def __str__(self) -> str:
        where = f'{self.way}, unsupported="{self.unsupported}", {self.granularity}'
        if self.outcome == "differs":
            return f"{where}: {self.worst} differs by {self.error:.1e}"
        return f"{where}: {self.outcome} {self.message}".strip()


@dataclass
class Verdict:
    """What became of a case."""

    kind: str
    name: str
    expect: str
    verdict: str = BROKEN
    reason: str = ""
    error: float = float("nan")  # the largest of all numbers that the library gave
    numbers: int = 0  # of the wanted parameters
    tensors: int = 0
    without: int = 0  # wanted parameters whose gradient is zero in truth
    float32: bool = False  # whether a float64 network computes in float32 here and there
    seconds: float = 0.0
    trials: list[Trial] = field(default_factory=list)

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.name}"

    def record(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Verdict:
        known = {name: record[name] for name in cls.__dataclass_fields__ if name in record}
        return cls(**{**known, "trials": [Trial(**trial) for trial in record["trials"]]})


class Broken(Exception):
    """A case that cannot be judged; the message says why."""


class WithoutFloat32(TorchFunctionMode):
    """Computes in float64 wherever a network asks for float32, so that rounding hides nothing."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if function is Tensor.float:
            function = Tensor.double
        args, kwargs = tree_map(lambda a: torch.float64 if a is torch.float32 else a, (args, kwargs or {}))
        return function(*args, **kwargs)


def vary(network: nn.Module) -> None:
    """Draw anew what initialisation leaves constant or nearly so: norms, gates, scales, heads and thin weights."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                if module.running_mean is None:
                    continue
                module.running_mean.copy_(torch.randn(module.num_features) * 0.1)
                module.running_var.copy_(torch.rand(module.num_features) + 0.5)
                if module.affine:
                    module.weight.copy_(torch.rand(module.num_features) * 0.5 + 0.5)
                    module.bias.copy_(torch.randn(module.num_features) * 0.1)
        for p in network.parameters():
            if not p.is_floating_point():
                continue
            if p.numel() < 2:
                if not p.any():
                    p.fill_(0.5)
                continue
            spread = float(p.std())
            if spread < 1e-3:
                p.copy_(p.mean() + 0.1 * torch.randn(p.shape))
            elif p.dim() > 1 and spread < (usual := p[0].numel() ** -0.5) / 2:
                p.mul_(usual / spread)


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, inputs)


def twice(inputs: Inputs, n: int) -> Inputs:
    """Example n of a batch, two times."""
    return tree_map(lambda t: t[[n, n]].contiguous() if isinstance(t, Tensor) else t, inputs)


def count(inputs: Inputs) -> int:
    return len(next(t for t in tree_leaves(inputs) if isinstance(t, Tensor)))


@dataclass
class Question:
    """A case made: its network, its batches, the cotangents and labels, and how the network is called."""

    case: Case
    network: nn.Module
    batches: list[Inputs]
    cotangents: list[Tensor]  # [K, N, ...] for each batch
    labels: list[Tensor]  # [N]
    call: Callable[[nn.Module, Inputs], Tensor]
    wanted: list[str]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        everything = dict(self.network.named_parameters())
        return {name: everything[name] for name in self.wanted}

    def named(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """With the names that the network itself has. The library's have no part of a wrapper."""
        prefix = "module." if isinstance(self.network, nn.DataParallel) else ""
        return {prefix + name: q for name, q in found.items()}


def ask(case: Case, doubled: bool = False) -> Question:
    """Make a case, always the same."""
    torch.manual_seed(zlib.crc32(case.key.encode()))
    network, batches = case.make()
    if case.vary:
        vary(network)
    network.train(case.train)
    if case.double:
        network.double()
        batches = [cast(batch, torch.float64) for batch in batches]

    def call(network: nn.Module, inputs: Inputs) -> Tensor:
        if not doubled:
            return case.call(network, inputs)
        with WithoutFloat32():
            return case.call(network, inputs)

    found = {name: p for name, p in network.named_parameters() if p.is_floating_point() and case.wanted(name)}
    wanted = [name for name, p in found.items() if p.requires_grad or not case.trainable]
    if not wanted:
        raise Broken("no parameter is wanted")
    cotangents, labels = [], []
    for k, batch in enumerate(batches):
        n = count(batch)
        with torch.no_grad(), torch.random.fork_rng():
            output = call(network, batch)
        if output.shape[:1] != (n,) or output[0].numel() < 2:
            raise Broken(f"the output is {list(output.shape)} for {n} examples")
        if not output.isfinite().all():
            raise Broken("the output is not finite")
        cotangents.append(torch.randn(1 + k % 2, *output.shape, dtype=output.dtype))
        labels.append(torch.randint(0, output[0].numel(), (n,)))
    return Question(case, network, batches, cotangents, labels, call, wanted)


@dataclass
class Truth:
    """By plain autograd: filter means of each example, and the mean over examples of the empirical squares."""

    examples: list[dict[str, Tensor]]  # {name: [N, O]} for each batch
    whole: dict[str, Tensor]
    float32: bool
    apart: float  # by how much outputs change when an example is run alone


def squared(gradient: Tensor) -> Tensor:
    return (gradient.to_dense() if gradient.is_sparse else gradient).double().square()


def filters(square: Tensor) -> Tensor:
    if not square.numel():
        return square.new_zeros(max(square.shape[:1], default=1))
    rows = square.reshape(max(square.shape[:1], default=1), -1) if square.numel() else square.new_zeros(len(square), 1)
    return rows.mean(1)


def truth(question: Question, network: nn.Module) -> Truth:
    """The truth of a question by ``network``, a copy of the question's own that the library never saw."""
    parameters = dict(network.named_parameters())
    for name, p in parameters.items():
        p.requires_grad_(name in question.wanted)
    wanted = [parameters[name] for name in question.wanted]
    whole = {name: torch.zeros(parameters[name].shape, dtype=torch.float64) for name in question.wanted}
    examples, float32, total, apart = [], False, 0, 0.0
    for batch, cotangents, labels in zip(question.batches, question.cotangents, question.labels, strict=True):
        found = {name: [] for name in question.wanted}
        with torch.no_grad():
            together = question.call(network, batch)
        for n in range(count(batch)):
            output = question.call(network, twice(batch, n))[:1]
            apart = max(apart, float((output - together[n]).abs().max() / together.abs().max()))
            float32 = float32 or (question.case.double and computes_in_float32(output))
            score = output.detach().flatten(1).double().softmax(1)
            score[0, labels[n]] -= 1
            squares = dict.fromkeys(question.wanted, 0.0)
            for u in (*cotangents[:, n : n + 1], score.view(output.shape)):
                gradients = [torch.zeros_like(p) for p in wanted]
                if output.requires_grad:  # this example may depend on no wanted parameter, where others do
                    gradients = torch.autograd.grad(
                        output, wanted, u.to(output), retain_graph=True, allow_unused=True, materialize_grads=True
                    )
                latest = {name: squared(g) for name, g in zip(question.wanted, gradients, strict=True)}
                del gradients
                if u.data_ptr() != score.data_ptr():
                    squares = {name: squares[name] + filters(latest[name]) for name in latest}
            for name, square in latest.items():
                whole[name] += square
                found[name].append(squares[name])
            total += 1
        examples.append({name: torch.stack(each) for name, each in found.items()})
    for square in whole.values():
        square /= total
    return Truth(examples, whole, float32, apart)


def interacts(question: Question, true: Truth, network: nn.Module) -> str:
    """Why examples interact in a network of which it is said that they do not; empty where they do not.

    Inside a batch, the gradient of one example's output must be that of the example alone.
    """
    allowed = FLOAT32_PARTS if true.float32 or not question.case.double else 1e-7
    if not true.apart <= allowed:
        return f"outputs change by {true.apart:.1e} when an example is run alone"
    parameters = dict(network.named_parameters())
    wanted = [parameters[name] for name in question.wanted]
    for batch, cotangents, want in zip(question.batches, question.cotangents, true.examples, strict=True):
        output = question.call(network, batch)
        for n in range(len(output)):
            squares = dict.fromkeys(question.wanted, 0.0)
            for u in cotangents:
                single = torch.zeros_like(output)
                single[n] = u[n]
                gradients = torch.autograd.grad(
                    output, wanted, single, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                for name, g in zip(question.wanted, gradients, strict=True):
                    squares[name] = squares[name] + filters(squared(g))
            error, name = largest_error(squares, {name: w[n] for name, w in want.items()})
            if not error <= max(allowed, question.case.tolerance):
                return f"in a batch the gradient of {name} differs by {error:.1e} from that of the example alone"
    return ""


def computes_in_float32(output: Tensor) -> bool:
    seen, stack = set(), [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if any(m.dtype == torch.float32 for m in getattr(node, "_input_metadata", ())):
            return True
        stack.extend(child for child, _ in node.next_functions)
    return False


def largest_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, str]:
    """Relative to the norm of each parameter's values, and where that is."""
    if got.keys() != want.keys():
        return float("inf"), f"the names of the parameters ({len(got)} for {len(want)})"
    scale = sum(float(w.double().square().sum()) for w in want.values()) ** 0.5
    worst, where = 0.0, ""
    for name, w in want.items():
        if not w.numel():
            continue
        if got[name].shape != w.shape:
            return float("inf"), f"the shape of {name} ({list(got[name].shape)} for {list(w.shape)})"
        error = float((got[name].double() - w).norm()) / max(float(w.norm()), FLOOR * scale, 1e-300)
        if not error <= worst:
            worst, where = error, name
            if error != error:
                return float("inf"), f"{name}, which is not a number,"
    return worst, where


def by_recorder(question: Question, unsupported: str) -> list[dict[str, Tensor]]:
    found = []
    with FisherRecorder(question.network, question.wanted, unsupported=unsupported) as recorder:
        for batch, u in zip(question.batches, question.cotangents, strict=True):
            found.append(question.named(recorder.backward(question.call(question.network, batch), u)))
    return found


def by_fisher(question: Question, unsupported: str, granularity: str) -> dict[str, Tensor]:
    labels, forward = question.labels, lambda network, inputs: question.call(network, inputs).flatten(1)
    if question.case.labels is not None:
        labels, forward = [question.case.labels(count(batch)) for batch in question.batches], question.call
    found = fisher(
        question.network,
        list(zip(question.batches, labels, strict=True)),
        "empirical",
        granularity=granularity,
        parameters=question.wanted,
        unsupported=unsupported,
        forward=forward,
    )
    return question.named(found)


def reduced(whole: dict[str, Tensor], granularity: str) -> dict[str, Tensor]:
    if granularity == "parameter":
        return whole
    return {name: filters(s) if granularity == "filter" else s.sum() / max(1, s.numel()) for name, s in whole.items()}


def is_ours(error: BaseException) -> bool:
    """Whether the library refused on purpose: an error of its own kind, or one that it raised in its own lines."""
    if isinstance(error, (UnsupportedError, SelfCheckError)):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, (ValueError, TypeError)) and bool(frames) and frames[-1].filename.startswith(PACKAGE)


def attempt(question: Question, true: Truth | None, way: str, unsupported: str, granularity: str) -> Trial:
    trial = Trial(way, unsupported, granularity, "agrees")
    try:
        if way == "recorder":
            found = by_recorder(question, unsupported)
            if true is not None:
                pairs = list(zip(found, true.examples, strict=True))
        else:
            found = by_fisher(question, unsupported, granularity)
            if true is not None:
                pairs = [(found, reduced(true.whole, granularity))]
    except Exception as error:
        trial.outcome = "refused" if is_ours(error) else "fails"
        trial.message = " ".join(f"{type(error).__name__}: {error}".split())[:600]
        return trial
    if true is None:
        trial.outcome = "numbers"
        return trial
    trial.error, trial.worst = max(largest_error(got, want) for got, want in pairs)
    if not trial.error <= question.case.tolerance:
        trial.outcome = "differs"
    return trial


def trials(question: Question, true: Truth | None) -> Iterator[Trial]:
    """Every way of a case. Where the library refuses by default, ``unsupported="exact"`` is tried too."""
    case = question.case
    chosen = GRANULARITIES[zlib.crc32(case.key.encode()) % 3]
    for way in case.ways:
        for granularity in GRANULARITIES if way == "fisher" and case.thorough else (chosen,):
            for unsupported in case.unsupported:
                trial = attempt(question, true, way, unsupported, "filter" if way == "recorder" else granularity)
                yield trial
                if not (case.thorough or trial.outcome == "refused"):
                    break


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def judge(case: Case) -> Verdict:
    """The verdict of one case."""
    start = time.perf_counter()
    verdict = Verdict(case.kind, case.name, case.expect)
    with quiet():
        try:
            _judge(case, verdict)
        except ModuleNotFoundError as error:
            verdict.verdict, verdict.reason = ABSENT, f"{error}: pip install --no-deps -r requirements/coverage.txt"
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
            verdict.verdict, verdict.reason = BROKEN, " ".join(f"{type(error).__name__}: {error}".split())[:400] + where
    verdict.seconds = round(time.perf_counter() - start, 2)
    gc.collect()
    return verdict


def copied(question: Question, doubled: bool) -> nn.Module:
    """A copy that the library does not see; a network that cannot be copied is made again.

    It runs without activation checkpointing and torch.compile, which refuse some of the judge's backward passes.
    """
    try:
        network = copy.deepcopy(question.network)
    except Exception:
        network = ask(question.case, doubled).network
    for module in network.modules():
        if hasattr(module, "as_written"):
            module.as_written = True
    return network


def _judge(case: Case, verdict: Verdict) -> None:
    question = ask(case)
    verdict.numbers = sum(p.numel() for p in question.parameters.values())
    verdict.tensors = len(question.wanted)
    if case.expect != EXACT:
        verdict.trials = list(trials(question, None))
        _weigh_refusals(case, verdict)
        return
    network = copied(question, False)
    true = truth(question, network)
    if not all(square.isfinite().all() for square in true.whole.values()):
        raise Broken("the true gradient is not finite")
    verdict.without = sum(not square.any() for square in true.whole.values())
    verdict.float32 = true.float32
    verdict.trials = list(trials(question, true))
    if case.thorough or any(t.outcome == "refused" for t in verdict.trials):
        # Is the case itself right that an exact answer exists?
        why = interacts(question, true, network)
        if why:
            raise Broken(f"it expects an exact answer, but {why}")
    rounded = [t for t in verdict.trials if t.outcome == "differs" and t.error <= FLOAT32_PARTS]
    if rounded and true.float32:
        # The network itself rounds to float32 on the way. It must agree to the last digits where that is left out.
        again = ask(case, doubled=True)
        exact = truth(again, copied(again, True))
        for trial in rounded:
            other = attempt(again, exact, trial.way, trial.unsupported, trial.granularity)
            if other.outcome == "agrees":
                trial.outcome, trial.error, trial.worst = other.outcome, other.error, other.worst
    verdict.error = max((t.error for t in verdict.trials if t.error == t.error), default=float("nan"))
    _weigh_numbers(case, verdict)


def _weigh_refusals(case: Case, verdict: Verdict) -> None:
    """Where no exact answer exists, every way and mode must refuse, and say why."""
    for outcome, name in (("numbers", WRONG), ("fails", SILENT)):
        for trial in verdict.trials:
            if trial.outcome == outcome:
                verdict.verdict = name
                verdict.reason = f"{trial}: expected a refusal" if outcome == "numbers" else str(trial)
                return
    verdict.verdict, verdict.reason = REFUSED, verdict.trials[-1].message
    for trial in verdict.trials:
        # By default another true reason may come first: a parameter that is transformed before use, say.
        asks = trial.unsupported != case.unsupported[-1] and "unsupported='exact'" in trial.message
        if not asks and not re.search(case.message, trial.message, re.IGNORECASE):
            verdict.verdict, verdict.reason = UNTRUE, str(trial)
            return


def _weigh_numbers(case: Case, verdict: Verdict) -> None:
    for outcome, name in (("differs", WRONG), ("fails", SILENT)):
        for trial in verdict.trials:
            if trial.outcome == outcome:
                verdict.verdict, verdict.reason = name, str(trial)
                return
    # By way and granularity: the best that any mode gives, and the worst of those.
    refused = {(t.way, t.granularity): t for t in verdict.trials if t.outcome == "refused"}
    agrees = {(t.way, t.granularity): t for t in verdict.trials if t.outcome == "agrees"}
    for place, trial in refused.items():
        if place not in agrees:
            if case.may_refuse and re.search(case.may_refuse, trial.message, re.IGNORECASE):
                verdict.verdict, verdict.reason = REFUSED, trial.message
                continue
            verdict.verdict, verdict.reason = NEEDLESS, str(trial)
            return
    if verdict.verdict == REFUSED:
        return
    if not refused:
        verdict.verdict = AGREES
        return
    trial = next(iter(refused.values()))
    verdict.verdict, verdict.reason = BY_REQUEST, trial.message
    if trial.unsupported != "error":
        verdict.verdict, verdict.reason = NEEDLESS, str(trial)
