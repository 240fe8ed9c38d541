"""Fisher merging by r-three/mats, unmodified, against the merge of checkpoints in pieces.

    python -m bench.studies.frontends.merging CHECKOUT [--rounds 5]

CHECKOUT is a clone of github.com/r-three/mats, or its bare git directory. Packages that its modules import for other
purposes (promptsource, wandb, ...) are replaced by empty ones. Two GPT-2 models of 4 layers and width 512 are
merged. The code's time contains reading both models and Fishers and writing the result, with torch's files, as its
script does.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
import transformers
from torch import Tensor

from bench.studies.frontends.table import Row, checkout, main, times
from t2v_fast.adapters.checkpoints import Checkpoint, save_sharded
from t2v_fast.adapters.merging import merge_checkpoints

ABSENT = ("evaluate", "promptsource", "promptsource.templates", "wandb")
SHARD = 30 * 2**20
# Runs in a process of its own: the peak of memory over what the imports take. Pages of the files that are mapped do not
# count, because the system takes them back when it needs memory.
PEAK = """
import sys, threading, time
from bench.harness import memory
from t2v_fast.adapters.merging import merge_checkpoints
folder, seen = sys.argv[1], [memory("RssAnon")]

def watch():
    while True:
        seen.append(memory("RssAnon"))
        time.sleep(0.002)

threading.Thread(target=watch, daemon=True).start()
merge_checkpoints([f"{folder}/m0", f"{folder}/m1"], [f"{folder}/f0", f"{folder}/f1"], f"{folder}/peak")
print(max(seen) - seen[0])
"""


@contextmanager
def absent_packages() -> Iterator[None]:
    """Stand in for packages that are not installed and that merging does not use."""
    mocked: set[str] = set()
    with ExitStack() as stack:
        for name in ABSENT:
            if name.partition(".")[0] in mocked or importlib.util.find_spec(name) is None:
                mocked.add(name)
                empty = mock.MagicMock(__path__=[], __all__=[], __spec__=None)
                stack.enter_context(mock.patch.dict(sys.modules, {name: empty}))
        yield


def models(folder: Path) -> tuple[int, dict[str, dict[str, Tensor]]]:
    """Write two models and their Fishers, sharded and as torch's files; return a model's bytes and all tensors."""
    found: dict[str, dict[str, Tensor]] = {}
    for k in range(2):
        torch.manual_seed(k)
        config = transformers.GPT2Config(
            bos_token_id=0, eos_token_id=0, vocab_size=20_000, n_embd=512, n_layer=4, n_head=8, n_positions=128
        )
        model = transformers.GPT2LMHeadModel(config)
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        squares = {name: torch.rand_like(p) ** 8 * 1e-4 for name, p in weights.items()}
        for letter, tensors in (("m", weights), ("f", squares)):
            save_sharded(tensors, folder / f"{letter}{k}", SHARD)
            torch.save(tensors, folder / f"{letter}{k}.pt")
            found[f"{letter}{k}"] = tensors
    return sum(t.nbytes for t in found["m0"].values()), found


def measure(folder: Path, rounds: int) -> list[Row]:
    """Merge by both, and compare."""
    size, _ = models(folder)  # which imports transformers before anything stands in for a package
    with absent_packages():
        merging = importlib.import_module("src.merging.diagonal_fisherMerging")
    # Its names of data sets are the second and third part of a path.
    names = [f"x/task{k}/y/z.pt" for k in range(2)]

    def theirs() -> dict[str, Tensor]:
        loaded, fishers = ({n: torch.load(folder / f"{x}{k}.pt") for k, n in enumerate(names)} for x in "mf")
        merged, _ = merging.diagonal_fisherMerging(0.3, loaded, fishers)
        torch.save(merged, folder / "merged.pt")
        return merged

    count = 0

    def ours() -> Path:
        nonlocal count
        count += 1
        merge_checkpoints(
            [folder / "m0", folder / "m1"],
            [folder / "f0", folder / "f1"],
            output := folder / f"merged{count}",
            [0.3, 0.7],
            normalize=False,
            floor=0,
            minimum=1e-8,
        )
        return output

    wanted = theirs()
    with Checkpoint(ours()) as checkpoint:
        assert checkpoint.entries.keys() == wanted.keys()
        worst = max(float((checkpoint.read(k) - v).norm() / v.norm()) for k, v in wanted.items() if float(v.norm()))
    measured = times(theirs, ours, rounds)
    result = subprocess.run([sys.executable, "-c", PEAK, str(folder)], check=True, capture_output=True, text=True)
    peak = int(result.stdout)
    return [
        Row(
            f"r-three/mats, `diagonal_fisherMerging`, two models of {size / 2**20:.0f} MiB and their Fishers",
            1,
            f"{worst:.1e} apart in the worst tensor (`normalize=False, floor=0, minimum=1e-8`); "
            f"{peak / 2**20:.0f} MiB of memory besides mapped files, and {6 * size / 2**20:.0f} or more for the code",
            measured.ratio,
        )
    ]


def rows(arguments: argparse.Namespace) -> list[Row]:
    """Measure the first checkout."""
    with checkout(arguments.checkout[0]), tempfile.TemporaryDirectory() as folder:
        return measure(Path(folder), arguments.rounds)


if __name__ == "__main__":
    main(__doc__.splitlines()[0], rows)
