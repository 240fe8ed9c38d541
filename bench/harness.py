"""Models, inputs, verdicts and memory readings: what the suites share."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import contestants
from bench.contestants import ESTIMATE, FISHER, LABELS, NOTHING, Contestant, Sums, filter_means
from t2v_fast import reduce_precision

CLASSES = 10
BATCH = {224: 8, 64: 32, 32: 64}
JUDGED = 3  # examples that a verdict rests on
# Largest relative error of a parameter. In float32 a rounded activation falls on the other side of a ReLU now and then,
# whoever computes; what is wrong is wrong in float64 too.
EXACT = {torch.float64: 1e-6, torch.float32: 0.1}


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
    model = getattr(torchvision.models, name)(num_classes=CLASSES, weights=None, **settings)
    if name.startswith("vit"):  # whose head is zero to begin with: nothing below it would have a gradient
        model.heads.head.reset_parameters()
    return model


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


def timed(run: Callable[..., Any], *arguments: Any) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - start


class Entry:
    """One contestant in one cell, prepared and judged. Raises what the contestant raises."""

    def __init__(self, cell: Cell, name: str) -> None:
        self.contestant = contestants.find(name)
        self.state = cell.prepare(self.contestant)
        x, y = cell.judged
        self.verdict = judge(self.contestant, self.run(x, y), cell)
        self.seconds = min(timed(self.run, x, y) for _ in range(2)) / len(x)

    def run(self, x: Tensor, y: Tensor) -> Sums | None:
        return self.contestant.run(self.state, x.to(self.contestant.dtype), y)

    def warm(self, x: Tensor, y: Tensor) -> None:
        """An untimed run, so that memory lies as it does from the second batch on; of what takes long, of a part."""
        n = self.part(len(x), 1)
        self.run(x[:n], y[:n])

    def timed(self, x: Tensor, y: Tensor) -> float:
        """Seconds of a batch among others."""
        with self.contestant.session():
            self.warm(x, y)
            return timed(self.run, x, y)

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
        # Statistics of the batch, as after training: fresh ones let activations vanish and hide errors in norms.
        for m in self.model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.momentum = None
        with torch.no_grad():
            self.model.train()(self.x)
        self.model.eval()

    @property
    def judged(self) -> tuple[Tensor, Tensor]:
        return self.x[:JUDGED], self.y[:JUDGED]

    def prepare(self, contestant: Contestant, dtype: torch.dtype | None = None) -> Any:
        """The contestant's own copy of the model, in its dtype or another, prepared."""
        return contestant.prepare(reduce_precision(copy.deepcopy(self.model), dtype or contestant.dtype))

    @functools.cache  # noqa: B019
    def plain_cosine(self, dtype: torch.dtype) -> float:
        """What plain autograd keeps of the truth in a reduced precision."""
        x, y = self.judged
        got = contestants.naive(copy.deepcopy(self.model).to(dtype), x.to(dtype), y)
        return compare(got, self.truth(LABELS))[2]

    @functools.cache  # noqa: B019
    def truth(self, target: str) -> Sums:
        """The judged examples in float64, one after the other by plain autograd."""
        model = copy.deepcopy(self.model).double()
        parameters = dict(model.named_parameters())
        sums = {name: torch.zeros(max(p.shape[:1], default=1), dtype=p.dtype) for name, p in parameters.items()}
        for image, label in zip(self.judged[0].double(), self.judged[1].tolist(), strict=True):
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


def compare(got: Sums, want: Sums) -> tuple[dict[str, float], float, float]:
    """Relative error of each parameter, and of everything; cosine of everything."""
    got = {name: got[name].detach().double() for name in want}
    errors = {name: float((got[name] - w).norm() / w.norm()) for name, w in want.items()}
    g, w = torch.cat(list(got.values())), torch.cat(list(want.values()))
    return errors, float((g - w).norm() / w.norm()), float(g @ w / (g.norm() * w.norm()))


def judge(contestant: Contestant, got: Sums | None, cell: Cell) -> dict[str, Any]:
    """{"verdict": in words, "error": largest relative error of a parameter, "cosine": of everything to the truth}."""
    if contestant.target == NOTHING:
        return {"verdict": ""}
    want = cell.truth(LABELS if contestant.target == LABELS else FISHER)
    missing = [name for name in want if name not in got]
    if missing:
        return {"verdict": f"incomplete: nothing for {len(missing)} of {len(want)} parameters, first {missing[0]}"}
    errors, whole, cosine = compare(got, want)
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))  # NaN is the worst of all
    found = {"error": errors[worst], "cosine": cosine}
    if contestant.target == ESTIMATE:
        return found | {"verdict": f"estimate, off by {whole:.2g}"}
    if contestant.target not in (LABELS, FISHER):
        return found | {"verdict": f"another quantity, cosine {cosine:.2f}"}
    if contestant.dtype != torch.float32:
        plain = cell.plain_cosine(contestant.dtype)
        good = 1 - cosine <= 2 * (1 - plain) + 1e-5
        return found | {"verdict": f"{'' if good else 'wrong: '}cosine {cosine:.4f}, plain autograd's {plain:.4f}"}
    if not errors[worst] <= EXACT[torch.float32]:
        return found | {"verdict": f"wrong: {worst} is off by {errors[worst]:.2g}"}
    x, y = cell.judged
    in_double = compare(contestant.run(cell.prepare(contestant, torch.float64), x.double(), y), want)[0]
    worst = max(in_double, key=in_double.get)
    if not in_double[worst] <= EXACT[torch.float64]:
        return found | {"verdict": f"wrong: {worst} is off by {in_double[worst]:.2g} in float64"}
    return found | {
        "error_float64": in_double[worst],
        "verdict": f"exact (float32 {found['error']:.0e}, float64 {in_double[worst]:.0e})",
    }


def memory(field: str = "VmRSS") -> int:
    """Bytes of this process, from Linux's process status: VmRSS now, VmHWM at the peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def forget_peak() -> None:
    """Let VmHWM begin anew."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def settled() -> int:
    """Bytes of this process after what was freed has gone back to the system; its peak begins anew."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    forget_peak()
    return memory()


def peak_memory(model: str, size: int, name: str) -> int:
    """Peak bytes over the model and its batch, of two batches. For a fresh process."""
    here, contestant = Cell(model, size), contestants.find(name)
    state, x = contestant.prepare(here.model.to(contestant.dtype)), here.x.to(contestant.dtype)
    if contestant.compiles:  # whose memory is none of a batch
        contestant.run(state, x, here.y)
    before = settled()
    with contestant.session():
        for _ in range(2):
            contestant.run(state, x, here.y)
    return memory("VmHWM") - before
