"""Every code block and every command of the guide runs, and every link of the documents leads somewhere."""

from __future__ import annotations

import csv
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mixtures import Mixture, tokens
from networks import Model
from small import shapes, small_probe, write_folder
from texts import Decoder, packed, padded, sequences
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils.parametrizations import weight_norm

from t2v_fast import Bank, Task2Vec, cli

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
GUIDE = sorted(p.stem for p in (DOCS / "guide").glob("*.md"))
PAGES = sorted(p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *DOCS.glob("*/*.md")])
PICTURES_OF = {"distances.png", "roofline.png", "tree.svg", "map.html"}


class Matcher(torch.nn.Module):
    """A network of two inputs [N, 3, 8, 8], with three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Linear(3 * 8 * 8, 3)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return self.embed(left.flatten(1)) * self.embed(right.flatten(1))


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / "guide" / f"{page}.md").read_text(), re.DOTALL)


def names_of(page: str) -> dict[str, Any]:
    """What a page takes for granted."""
    torch.manual_seed(0)
    images, labels = torch.randn(6, 3, 8, 8), torch.arange(6) % 3
    model = Model()
    names = {"model": model, "loader": [(images, labels)], "images": images, "weights": torch.ones(6)}
    if page == "embeddings":
        names |= {"tasks": {"a": shapes(6), "b": shapes(6, 2)}, "network": Model()}
    if page == "accuracy":
        names |= {"probe": small_probe(), "dataset": shapes(12)}
    if page in ("jobs", "distances"):
        task2vec = Task2Vec(small_probe())
        names["embeddings"] = [task2vec.embed(shapes(seed=seed), name=f"task {seed}") for seed in range(3)]
    if page == "language":
        texts = sequences((3, 6, 2, 4))
        batches, rows = [padded(texts[:2]), padded(texts[2:])], [packed(texts[:3]), packed(texts[3:])]
        names |= {"model": Decoder(), "torch": torch, "batches": batches, "packed": rows}
    if page == "fisher":
        names |= {"mixture": Mixture("loop"), "texts": [tokens(3, 4)], "matcher": Matcher(), "labels": labels}
    if page == "refusals":
        names["normalised"] = Model()
        weight_norm(names["normalised"].conv)
    if page == "sharded":
        names["model"] = fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return names


@pytest.fixture
def process_group(page: str) -> Iterator[None]:
    """This process alone, for the page on networks that several share."""
    own = page == "sharded" and not dist.is_initialized()
    if own:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if own:
        dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("page", [page for page in GUIDE if blocks(page, "python")])
def test_python(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    names = names_of(page)
    for block in blocks(page, "python"):
        exec(compile(block, f"{page}.md", "exec"), names)
    if page == "fisher":
        assert names["q"]["conv.weight"].shape == (6, 4)
        assert names["by_expert"]["up"].shape == names["by_expert"]["down"].shape == (4,)
        assert names["by_output"]["up"].shape == (32,)
    if page == "embeddings":
        assert names["D"].shape == (1, 2)
    if page == "distances":
        assert names["D"].shape == (3, 3)
        np.testing.assert_array_equal(np.diag(names["D"]), 0)
    if page == "jobs":
        assert Bank(tmp_path / "bank").tasks == ["task 0", "task 1", "task 2"]
    if page == "accuracy":
        assert names["embedding"].meta["relative_error"] <= 0.1
    if page == "sharded":
        assert names["whole"].num_examples == 6
        assert names["values"].keys() == names["F"].keys()
    if page == "language":
        assert names["F"].num_examples == 4
        assert names["q"]["tokens.weight"].shape == (3, 7)
        assert "must not attend to each other" in capsys.readouterr().out
    if page == "refusals":
        assert "conv.parametrizations.weight.original0" in capsys.readouterr().out


@pytest.mark.slow_unless(page=[page for page in GUIDE if page not in ("jobs", "distances")])
@pytest.mark.parametrize("page", [page for page in GUIDE if blocks(page, "sh")])
def test_commands(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("flowers", "birds", "fish")):
        write_folder(tmp_path / name, *shapes(6, seed=seed))
    with open(tmp_path / "attributes.csv", "w", newline="") as file:
        rows = [(f"flowers/class {k % 3}/{k:03}.png", k % 2, k % 3) for k in range(6)]
        csv.writer(file).writerows([("file", "wing", "beak"), *rows])
    for job in blocks(page, "yaml"):
        (tmp_path / "tasks.yaml").write_text(job)
    (tmp_path / "errors.csv").write_text("task,flowers,birds\nflowers,0.1,0.3\nbirds,0.2,0.1\n")
    (tmp_path / "zoo.csv").write_text("task,efficientnet-lite0,another\nbirds,0.1,0.3\nfish,0.2,0.1\n")
    commands = [line for block in blocks(page, "sh") for line in block.splitlines()]
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "t2v-fast"
        assert cli.main(arguments) == 0, command
    for picture in PICTURES_OF:
        assert (tmp_path / picture).exists() == any(picture in command for command in commands), picture
    if page == "jobs":
        # Several processes add them, in the order in which they finish, and flowers were taken out and embedded again.
        assert sorted(Bank(tmp_path / "tasks.bank").tasks) == ["birds/beak", "birds/wing", "flowers"]
        assert (tmp_path / "arrays" / "hessian.npy").exists()


def test_every_command_is_documented() -> None:
    documented = {line.split()[1] for page in GUIDE for block in blocks(page, "sh") for line in block.splitlines()}
    documented.add("demo")  # in the README
    documented |= set(re.findall(r"^t2v-fast (\w+)", (DOCS / "adapters.md").read_text(), re.MULTILINE))
    assert documented == set(cli._parser()._subparsers._group_actions[0].choices)


@pytest.mark.parametrize("page", PAGES)
def test_links(page: str) -> None:
    """Files exist, and the headings within them."""
    text = (ROOT / page).read_text()
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    for link in re.findall(r"\]\(((?!http)[^)\s]+)\)", text):
        name, _, heading = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        if heading:
            found = {_anchor(line) for line in target.read_text().splitlines() if line.startswith("#")}
            assert heading in found, link


def _anchor(line: str) -> str:
    """The name that GitHub and MyST give to a heading."""
    return re.sub(r"[^\w\- ]", "", line.lstrip("#").strip().lower()).replace(" ", "-")


def test_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"`make ([\w-]+)|^    make ([\w-]+)", (ROOT / page).read_text(), re.MULTILINE):
            name = "".join(target)
            assert re.search(rf"^{name}:", makefile, re.MULTILINE), f"{page}: make {name}"


def test_modules_that_the_pages_name() -> None:
    """``python -m NAME`` in a page is a module that is here."""
    for page in PAGES:
        for name in re.findall(r"python -m ((?:bench|t2v_fast)[\w.]*)", (ROOT / page).read_text()):
            path = ROOT / name.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"{page}: {name}"
