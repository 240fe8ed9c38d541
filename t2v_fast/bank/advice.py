"""What would make a job faster, from its measured times.

Each rule looks at one share of the time, and estimates what part of the whole a change would save. An estimate is a
model, not a measurement: its ``why`` says what it takes for granted.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..ops import planner
from .job_profile import JobProfile, RunTime

WORTH = 0.02  # of the time: smaller gains are not spoken of
PRODUCTS = ("convolution", "linear")  # the kinds of layers that a lower precision makes faster


@dataclass(frozen=True)
class Advice:
    """One change, and why.

    Args:
        change: What to do, with the setting's name.
        why: The measurement, and what the estimate takes for granted.
        gain: The share of the time of the job that it may save, from 0 to 1.
    """

    change: str
    why: str
    gain: float

    def __str__(self) -> str:
        return f"{self.change}: saves up to {100 * self.gain:.0f} % of the time. {self.why}"


def advice_for(profile: JobProfile) -> list[Advice]:
    """All advice that is worth it, the greatest gain first."""
    totals = profile.totals()
    if not totals or not profile.runs:
        return []
    run = max(profile.runs, key=lambda run: run.seconds)
    found = [a for rule in RULES for a in rule(profile, run)]
    return sorted((a for a in found if a.gain >= WORTH), key=lambda a: -a.gain)


def _shares(profile: JobProfile) -> dict[str, float]:
    totals = profile.totals()
    whole = sum(totals.values())
    return {stage: seconds / whole for stage, seconds in totals.items()}


def _loaders(profile: JobProfile, run: RunTime) -> Iterator[Advice]:
    """Loader processes decode while the network runs."""
    shares, loaders = _shares(profile), int(run.settings.get("num_workers") or 0)
    data = shares.get("decode", 0.0) + shares.get("wait", 0.0)
    network = sum(s for stage, s in shares.items() if stage.partition(".")[0] in ("features", "forward", "backward"))
    if loaders:
        # The loaders were busy all the time that they were waited for, and while the network ran.
        now = network + data
        gain = now - max(network, now * loaders / (loaders + 1))
        yield Advice(
            f"num_workers: {loaders + 1}",
            f"{100 * data:.0f} % of the time went into waiting for {loaders} loader(s). Taken for granted: a core for "
            "the new one.",
            gain,
        )
        return
    device = str(run.settings.get("device") or "cpu")
    spare = run.cores // max(run.workers, 1)
    if device.startswith("cpu"):
        if spare < 2:
            return  # a loader would take the time from the network that it gives to the images
        gain, why = data * (1 - 1 / spare), f"the {spare} cores of a worker share the loading and the network evenly"
    else:
        gain, why = min(data, network), "the host has a core for it, and the device does not wait for the host"
    yield Advice(
        "num_workers: 1", f"{100 * data:.0f} % of the time went into decoding images. Taken for granted: {why}.", gain
    )


def _cache(profile: JobProfile, run: RunTime) -> Iterator[Advice]:
    """With room for all decoded images, each file is decoded once."""
    decoded, images = sum(t.decoded for t in profile.tasks), sum(t.images for t in profile.tasks)
    if decoded <= 1.05 * images or not images:
        return
    gain = _shares(profile).get("decode", 0.0) * (1 - images / decoded)
    room = run.settings.get("cache_megabytes", 512)
    yield Advice(
        f"cache_megabytes: more than {room}",
        f"each image was decoded {decoded / images:.1f} times, because the cache had no room for it.",
        gain,
    )


def _batches(profile: JobProfile, run: RunTime) -> Iterator[Advice]:
    """A pass takes a + b n seconds for n images; larger batches have fewer passes."""
    lost = 0.0
    for name in ("forward", "backward"):
        sums = [0.0] * 6
        for one in profile.runs:
            sums = [a + b for a, b in zip(sums, one.sizes.get(name, [0.0] * 6), strict=True)]
        fixed, error = fixed_cost(sums)
        if fixed > 2 * error:
            lost += fixed * sums[0]
    whole = sum(profile.totals().values())
    size = run.settings.get("batch_size")
    yield Advice(
        f"batch_size: {2 * size}" if isinstance(size, int) else "batch_size: twice as large",
        f"{100 * lost / whole:.0f} % of the time does not depend on the number of images in a batch (a fit over "
        "batches of different sizes). Taken for granted: as fast for each image, and enough memory.",
        lost / 2 / whole,
    )


def fixed_cost(sums: list[float]) -> tuple[float, float]:
    """The time of a pass that does not depend on its number n of examples, and its standard error, by least squares.

    Args:
        sums: Over passes of t seconds: the sums of 1, n, n^2, t, n t and t^2.

    Returns:
        The constant a of t = a + b n, and its standard error. The error is infinite where sizes do not differ enough.

    >>> n, t = [8, 8, 4, 2, 1], [9.0, 9.0, 5.0, 3.0, 2.0]  # t = 1 + n
    >>> sums = [len(n), sum(n), sum(i * i for i in n), sum(t), sum(i * s for i, s in zip(n, t)), sum(s * s for s in t)]
    >>> fixed, error = fixed_cost(sums)
    >>> round(fixed, 6), error < 1e-6
    (1.0, True)
    """
    k, n, nn, t, nt, tt = sums
    if k < 5 or (spread := nn - n * n / k) <= 1e-3 * nn:
        return 0.0, math.inf
    slope = (nt - n * t / k) / spread
    fixed = (t - slope * n) / k
    left = max(tt - fixed * t - slope * nt, 0.0)
    return fixed, math.sqrt(left / (k - 2) * nn / (k * spread))


def _precision(profile: JobProfile, run: RunTime) -> Iterator[Advice]:
    """bfloat16, where this machine multiplies it faster."""
    if run.settings.get("dtype") not in (None, "float32"):
        return
    shares = _shares(profile)
    products = sum(shares.get(f"{name}.{kind}", 0.0) for name in ("forward", "backward") for kind in PRODUCTS)
    forward = sum(s for stage, s in shares.items() if stage.startswith("forward."))
    if forward:  # the features come from forward passes, too
        of_products = sum(shares.get(f"forward.{kind}", 0.0) for kind in PRODUCTS) / forward
        products += shares.get("features", 0.0) * of_products
    if products < WORTH:
        return
    times = bfloat16_times(str(run.settings.get("device") or "cpu"))
    yield Advice(
        "dtype: bfloat16",
        f"{100 * products:.0f} % of the time went into convolutions and linear layers, and this machine multiplies "
        f"matrices {times:.1f} times as fast in bfloat16. Embeddings of the two precisions cannot be compared.",
        products * (1 - 1 / times),
    )


@functools.cache
def bfloat16_times(device: str) -> float:
    """How many times as fast this machine multiplies matrices in bfloat16 as in float32; 1 where it cannot be said."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        return 1.0
    a = torch.randn(512, 512, device=device)
    seconds = []
    for x in (a, a.bfloat16()):

        def multiply(x: Any = x) -> None:
            (x @ x)[0, 0].item()  # waits for a device

        seconds.append(planner.fastest(multiply, 5))
    return max(seconds[0] / seconds[1], 1.0)


def _check(profile: JobProfile, run: RunTime) -> Iterator[Advice]:
    """The self-check comes with every task. The first one of a worker has other costs in it, which would stay."""
    first = {t.worker: k for k, t in reversed(list(enumerate(profile.tasks)))}.values()
    later = [t.seconds.get("check", 0.0) for k, t in enumerate(profile.tasks) if k not in first]
    if not later:
        return
    gain = sum(later) / len(later) * len(profile.tasks) / sum(profile.totals().values())
    yield Advice(
        "self_check: false",
        f"{100 * gain:.0f} % of the time went into it, without the first task of each worker. Taken for granted: a "
        "first job has shown that this probe passes.",
        gain,
    )


def _idle(profile: JobProfile, run: RunTime) -> Iterator[Advice]:
    """Workers without work: too few tasks, a long last one, or a driver that cannot store fast enough."""
    gain = _shares(profile).get("idle", 0.0)
    if run.workers < 2:
        return
    longest = max((sum(t.seconds.values()) for t in profile.tasks), default=0.0)
    store = sum(r.store for r in profile.runs)
    if store > 0.5 * profile.seconds:
        change, why = "several drivers", f"the driver stored embeddings for {store:.0f} of {profile.seconds:.0f} s."
    else:
        change = f"more tasks in a job, or fewer workers than {run.workers}"
        why = f"a task takes up to {longest:.1f} s, and at the end the other workers wait for it."
    yield Advice(change, f"Workers were idle for {100 * gain:.0f} % of their time: {why}", gain)


def _store(profile: JobProfile, run: RunTime) -> Iterator[Advice]:
    """One process cannot compute while it stores."""
    if run.in_driver:
        gain = _shares(profile).get("store", 0.0)
        yield Advice(
            "workers: 1", f"{100 * gain:.0f} % of the time went into storing, which the driver does meanwhile.", gain
        )


RULES: tuple[Callable[[JobProfile, RunTime], Iterator[Advice]], ...] = (
    _loaders,
    _cache,
    _batches,
    _precision,
    _check,
    _idle,
    _store,
)
