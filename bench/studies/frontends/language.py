"""The forks of Task2Vec for text, unmodified, with and without this library.

    python -m bench.studies.frontends.language CHECKOUT [CHECKOUT] [--rounds 5]

A CHECKOUT is a clone of github.com/alycialee/beyond-scale-language-data-diversity or of github.com/OpenDCAI/DataFlow,
or a bare git directory. A GPT-2 of 4 layers and width 192 with random weights embeds 128 texts of 64 tokens. (The forks
take 512 texts by default.) beyond-scale copies the model for each embedding, so its times contain a whole self-check,
which costs as much for few texts as for many. DataFlow embeds with the model itself, which the self-check remembers.

The reference is the Fisher with a label for each token, the mean of many random-sign sketches. The forks draw the label
of a position from the prediction of the next position; the agreement contains what this changes. Errors are relative
to the reference after the best scaling. The number of passes that a fork needs follows from the spread of its passes,
without dropout.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset

from bench.studies.frontends.table import Row, checkout, main, times
from bench.studies.frontends.task2vec import accelerated, apart

TEXTS, TOKENS, BATCH, VOCABULARY = 128, 64, 8, 2000
SPREAD = 5
REFERENCE = 6
# Where the class is: the folder for sys.path, and the module. DataFlow's package imports all of its operators.
SOURCES = {
    "src/diversity/task2vec.py": ("src", "diversity.task2vec", "beyond-scale-language-data-diversity"),
    "dataflow/operators/general_text/eval/task2vec/task2vec.py": (
        "dataflow/operators/general_text/eval",
        "task2vec.task2vec",
        "DataFlow",
    ),
}


class Texts(Dataset):
    """Random tokens, a quarter of the texts padded to their length."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, VOCABULARY, (TEXTS, TOKENS), generator=generator)
        self.there = torch.ones_like(self.tokens)
        self.there[::4, TOKENS // 2 :] = 0

    def __len__(self) -> int:
        return TEXTS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "attention_mask": self.there[index]}


def probe() -> nn.Module:
    """A GPT-2 whose predictions are not uniform."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=192, n_layer=4, n_head=6, n_positions=TOKENS, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def measure(module: ModuleType, title: str, rounds: int) -> Row:
    """Compare one fork with its accelerated self."""
    model, texts = probe(), Texts()

    def squares(**made: Any) -> Tensor:
        task2vec = module.Task2Vec(model, loader_opts={"batch_size": BATCH}, **made)
        task2vec.montecarlo_fisher_autoregressive(texts)
        return torch.as_tensor(task2vec.extract_embedding(task2vec.model).hessian).double()

    def replaced(**options: Any) -> Tensor:
        with accelerated(module, **options):
            return squares()

    found = [replaced(seed=seed, self_check=seed == 0) for seed in range(REFERENCE)]
    reference = torch.stack(found).mean(0)
    # Each sketch is a part of the reference, so its distance to the mean of the others is what counts.
    errors = [apart(f, (reference * REFERENCE - f) / (REFERENCE - 1)) for f in found]
    error = math.sqrt(sum(e**2 for e in errors) / REFERENCE * (1 - 1 / REFERENCE))
    own = [squares() for _ in range(SPREAD)]
    trained = apart(torch.stack(own).mean(0), reference)
    measured = times(squares, replaced, rounds)
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    plain = torch.stack([squares() for _ in range(SPREAD)])
    mean = plain.mean(0)
    scale = float(mean @ reference / (mean @ mean))
    variance = float(plain.var(0).sum()) * scale**2 / float(reference.norm() ** 2)
    passes = variance / error**2
    cosine = float(torch.cosine_similarity(mean, reference, dim=0))
    return Row(
        f"{title}, `accelerate`, GPT-2 of 4 layers, {TEXTS} texts of {TOKENS} tokens",
        2,
        f"cosine {cosine:.4f} to {SPREAD} passes of the fork, whose mean "
        f"is 1/{scale:.0f} of this ({BATCH} x {TOKENS - 1} tokens a batch = {BATCH * (TOKENS - 1)}); errors: "
        f"{error:.3f} here, one pass of the fork {math.sqrt(variance):.2f}, {SPREAD} with its dropout {trained:.2f}",
        measured.ratio,
        measured.ratio * passes,
    )


def rows(arguments: argparse.Namespace) -> list[Row]:
    """Measure all checkouts."""
    found = []
    for path in arguments.checkout:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            found.append(of_checkout(path, arguments.rounds))
    return found


def of_checkout(path: Path, rounds: int) -> Row:
    """Find out which fork a checkout is, and measure it."""
    with checkout(path) as folder:
        (file,) = [name for name in SOURCES if (folder / name).is_file()]
        source, name, title = SOURCES[file]
        with checkout(folder, source):
            return measure(importlib.import_module(name), title, rounds)


if __name__ == "__main__":
    main(__doc__.splitlines()[0], rows)
