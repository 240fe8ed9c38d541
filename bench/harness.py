"""Models, inputs, verdicts and memory readings: what the suites share."""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import contestants
import torch
from contestants import ESTIMATE, FISHER, LABELS, NOTHING, Contestant, Sums, filter_means
from torch import Tensor, nn

CLASSES = 10
BATCH = {224: 8, 64: 32, 32: 64}
JUDGED = 3  # examples that a verdict rests on
EXACT = 1e-2  # float32: a rounded activation can fall on the other side of a ReLU; what is wrong is wrong by more
COSINE = 0.999  # bfloat16


def _toy(size: int) -> nn.Module:
    """For the tests of this folder."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, CLASSES),
    )


def _torchvision(name: str, size: int) -> nn.Module:
    import torchvision

    settings = {"image_size": size} if name.startswith("vit") else {}
    return getattr(torchvision.models, name)(num_classes=CLASSES, weights=None, **settings)


def _timm(name: str, size: int) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=CLASSES)


MODELS: dict[str, Callable[[int], nn.Module]] = {
    **{
        name: functools.partial(_torchvision, name)
        for name in ("resnet18", "resnet34", "resnet50", "convnext_tiny", "vit_b_16")
    },
    "efficientnet_lite0": functools.partial(_timm, "efficientnet_lite0"),
    "toy": _toy,
}
CELLS = [(model, size) for model in MODELS for size in BATCH if model != "toy"] + [("toy", 32)]


class Refused(Exception):
    """A contestant that cannot be measured; the message is its verdict."""


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Whatever a contestant raises becomes its verdict."""
    try:
        yield
    except Refused:
        raise
    except ImportError as error:
        raise Refused(f"absent: {error}") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise Refused(f"raises: {type(error).__name__}: {reason}") from error


class Entry:
    """One contestant in one cell, prepared and judged. Raises Refused where it cannot run."""

    def __init__(self, cell: Cell, name: str) -> None:
        self.cell, self.contestant = cell, contestants.find(name)
        model = copy.deepcopy(cell.model).to(self.contestant.dtype)
        self.state = self.contestant.prepare(model)
        x, y = cell.x[:JUDGED], cell.y[:JUDGED]
        start = time.perf_counter()
        got = self.run(x, y)
        self.seconds = (time.perf_counter() - start) / len(x)
        self.verdict = judge(self.contestant, got, cell.truth)

    def run(self, x: Tensor, y: Tensor) -> Sums | None:
        return self.contestant.run(self.state, x.to(self.contestant.dtype), y)

    def part(self, examples: int, limit: float) -> int:
        """How many of so many examples can be expected to run in ``limit`` seconds; at least those judged."""
        return min(examples, max(JUDGED, int(limit / self.seconds)))


class Cell:
    """A model in evaluation mode and one batch at one size."""

    def __init__(self, model: str, size: int) -> None:
        torch.manual_seed(0)
        with refusals():
            self.model = MODELS[model](size)
        self.x, self.y = torch.randn(BATCH[size], 3, size, size), torch.randint(0, CLASSES, (BATCH[size],))
        # Statistics of the batch, as after training: fresh ones let activations vanish, and hide errors in a norm layer.
        for m in self.model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.momentum = None
        with torch.no_grad():
            self.model.train()(self.x)
        self.model.eval()

    @functools.cache  # noqa: B019
    def truth(self, target: str) -> Sums:
        """The judged examples in float64, one after the other by plain autograd."""
        model = copy.deepcopy(self.model).double()
        parameters = dict(model.named_parameters())
        sums = {name: torch.zeros(max(p.shape[:1], default=1), dtype=p.dtype) for name, p in parameters.items()}
        for image, label in zip(self.x[:JUDGED].double(), self.y[:JUDGED].tolist(), strict=True):
            log_p = model(image[None])[0].log_softmax(0)
            for c in [label] if target == LABELS else range(CLASSES):
                gradients = torch.autograd.grad(log_p[c], list(parameters.values()), retain_graph=True)
                weight = 1.0 if target == LABELS else float(log_p[c].detach().exp())
                for s, g in zip(sums.values(), gradients, strict=True):
                    s += weight * filter_means(g.square())
        return sums

    @functools.cache  # noqa: B019
    def enter(self, name: str) -> Entry:
        with refusals():
            return Entry(self, name)

    @property
    def reference(self) -> Entry | None:
        """What each time is paired with: this library, if it can do this cell."""
        with contextlib.suppress(Refused):
            return self.enter("fisher")
        return None


@functools.lru_cache(maxsize=1)
def cell(model: str, size: int) -> Cell:
    return Cell(model, size)


def judge(contestant: Contestant, got: Sums | None, truth: Callable[[str], Sums]) -> dict[str, Any]:
    """{"verdict": in words, "error": largest relative error of a parameter, "cosine": of everything to the truth}."""
    if contestant.target == NOTHING:
        return {"verdict": ""}
    want = truth(LABELS if contestant.target == LABELS else FISHER)
    missing = [name for name in want if name not in got]
    if missing:
        return {"verdict": f"wrong: nothing for {len(missing)} of {len(want)} parameters, first {missing[0]}"}
    got = {name: got[name].detach().double() for name in want}
    errors = {name: float((got[name] - w).norm() / w.norm()) for name, w in want.items()}
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))  # NaN is the worst of all
    g, w = torch.cat(list(got.values())), torch.cat(list(want.values()))
    cosine, whole = float(g @ w / (g.norm() * w.norm())), float((g - w).norm() / w.norm())
    error = errors[worst]
    if contestant.target == ESTIMATE:
        verdict = f"estimate, off by {whole:.2g}"
    elif contestant.target not in (LABELS, FISHER):
        verdict = f"another quantity, cosine {cosine:.2f}"
    elif contestant.dtype != torch.float32:
        verdict = f"cosine {cosine:.5f}" if cosine >= COSINE else f"wrong: cosine {cosine:.5f}"
    elif error <= EXACT:
        verdict = f"exact ({error:.0e})"
    else:
        verdict = f"wrong: {worst} is off by {error:.2g}"
    return {"verdict": verdict, "error": error, "cosine": cosine}


def memory(field: str = "VmRSS") -> int:
    """Bytes of this process, from Linux's process status: VmRSS now, VmHWM at the peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def peak_memory(model: str, size: int, name: str) -> int:
    """Peak bytes over the model and its batch, of two batches. For a fresh process."""
    here, contestant = Cell(model, size), contestants.find(name)
    state, x = contestant.prepare(here.model.to(contestant.dtype)), here.x.to(contestant.dtype)
    before = memory()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    for _ in range(2):
        contestant.run(state, x, here.y)
    return memory("VmHWM") - before
