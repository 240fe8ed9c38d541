"""An engine whose workers are Ray actors, on the machines of a cluster."""

from __future__ import annotations

import logging
from typing import Any

import torch

from .engines import Engine, Factory, Result, WorkerDied, perform
from .job import WorkItem


class _Actor:
    """A Ray actor, which makes its pipeline once and keeps it."""

    def prepare(self, factory: Factory, threads: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        self.task2vec = factory()
        return self.task2vec.fingerprint()

    def perform(self, work: WorkItem) -> Result:
        return perform(self.task2vec, work)


class RayActors(Engine):
    """Run workers as Ray actors, on machines where Ray finds room.

    The package and the job's files must be on every machine, under the same paths.

    Args:
        factory: Makes the pipeline of a worker. It travels to the workers.
        address: The address of a cluster, ``"auto"`` for the cluster that this machine belongs to, or ``"local"`` for a
            new one on this machine.
        threads: CPUs of a worker.
        gpus: GPUs of a worker.

    Raises:
        ImportError: Without Ray.
        RuntimeError: If there is no cluster at the address.
    """

    def __init__(self, factory: Factory, address: str, threads: int = 1, gpus: float = 0) -> None:
        try:
            import ray
        except ImportError as error:
            raise ImportError(f"--ray needs the package 'ray': pip install 'ray' ({error})") from error
        self._ray, self._factory, self._threads = ray, factory, threads
        self._ours = not ray.is_initialized()
        if self._ours:
            try:
                ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, ValueError) as error:
                raise RuntimeError(f"no Ray cluster at {address!r}: {error}") from error
        self._class: Any = ray.remote(num_cpus=threads, num_gpus=gpus, max_restarts=0)(_Actor)
        self._actors: dict[int, Any] = {}
        self._pending: dict[Any, int] = {}
        self._started = 0

    def cpus(self) -> int:
        """Return how many workers the cluster has room for."""
        return max(1, int(self._ray.cluster_resources().get("CPU", 1)) // self._threads)

    def start(self) -> int:
        self._started += 1
        actor = self._actors[self._started] = self._class.remote()
        self._pending[actor.prepare.remote(self._factory, self._threads)] = self._started
        return self._started

    def submit(self, worker: int, work: WorkItem) -> None:
        self._pending[self._actors[worker].perform.remote(work)] = worker

    def events(self, timeout: float) -> list[tuple[int, Any]]:
        if not self._pending:
            return []
        ready, rest = self._ray.wait(list(self._pending), num_returns=1, timeout=timeout)
        if ready and rest:  # and everything else that is ready
            ready += self._ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        found: list[tuple[int, Any]] = []
        for reference in ready:
            worker = self._pending.pop(reference)
            try:
                found.append((worker, self._ray.get(reference)))
            except (self._ray.exceptions.RayActorError, self._ray.exceptions.ObjectLostError) as error:
                self._drop(worker)
                found.append((worker, WorkerDied(str(error).splitlines()[0])))
            except self._ray.exceptions.RayTaskError as error:
                self._drop(worker)
                cause = error.cause if isinstance(error.cause, Exception) else error
                found.append((worker, RuntimeError(f"{type(cause).__name__}: {cause}")))
        return found

    def _drop(self, worker: int) -> None:
        self._ray.kill(self._actors.pop(worker))

    def close(self) -> None:
        for worker in list(self._actors):
            self._drop(worker)
        if self._ours:
            self._ray.shutdown()
