"""Options and reporting of the suites. Results go into pytest-benchmark's JSON, and bench/report.py makes tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench import contestants
from bench.harness import Refused

REFUSED = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("t2v-fast")
    group.addoption("--rounds", type=int, default=7, help="pairs of runs of each contestant")
    group.addoption("--limit", type=float, default=10, help="seconds a run; slower contestants run on a part")
    group.addoption("--images", type=int, help="length of the streams (default: 50,000 at 32, 10,000 at 64)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "contract: the cells of the performance contract")
    config.stash[REFUSED] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Turn a refusal into a skipped test that the JSON remembers, and say how each contestant did."""
    where = item.name.partition("[")[2].rstrip("]")
    terminal = item.config.pluginmanager.get_plugin("terminalreporter")
    terminal.ensure_newline()
    try:
        result = yield
    except Refused as refused:
        suite = item.path.stem
        item.config.stash[REFUSED].append({"suite": suite, "params": item.callspec.params, "verdict": str(refused)})
        terminal.write_line(f"{where}: {refused}")
        pytest.skip(str(refused))
    benchmark = item.funcargs["benchmark"]
    seconds = f"{benchmark.stats.stats.median:.3g} s, " if benchmark.stats else ""
    terminal.write_line(f"{where}: {seconds}{benchmark.extra_info['verdict'] or 'a yardstick'}")
    return result


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.update(torch=torch.__version__, threads=torch.get_num_threads())


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    output_json["refused"] = config.stash[REFUSED]
    output_json["contestants"] = contestants.NAMES
