"""``t2v-fast fisher``: the diagonal Fisher of a language model's checkpoint, as a checkpoint of the same keys."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..adapters.checkpoints import SHARD_BYTES, Checkpoint, empty_folder, keys_of, save_sharded
from ..adapters.language import next_tokens
from ..adapters.squares import summed_squares
from ..estimation.batches import Schedule, default_forward
from ..estimation.cotangents import cotangents
from ..estimation.estimator import fisher
from ..estimation.packing import IGNORED
from .common import console

ESTIMATORS = ("hutchinson", "monte_carlo", "empirical", "exact", "deflated")


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("fisher")
    parser.add_argument("model", type=Path, help="folder of a causal language model, as transformers saves it")
    parser.add_argument(
        "texts",
        type=Path,
        help="a text file, one text a line; or *.safetensors with input_ids [N, T], and attention_mask if padded",
    )
    parser.add_argument("--output", type=Path, required=True, help="new folder for the Fisher")
    parser.add_argument(
        "--granularity",
        choices=("parameter", "filter"),
        default="parameter",
        help="one value for each entry, or for each index of the first axis (default: %(default)s)",
    )
    parser.add_argument("--estimator", choices=ESTIMATORS, default="hutchinson", help="default: %(default)s")
    parser.add_argument("--samples", type=int, default=1, help="cotangents a text (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="texts a batch (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=512, help="texts are cut there (default: %(default)s)")
    parser.add_argument(
        "--level", choices=("token", "sequence"), default="token", help="what the Fisher is a mean over"
    )
    parser.add_argument("--seed", type=int, default=0, help="of random signs or labels (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES, help="size of a file (default: %(default)s)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Compute the Fisher, and write it."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError("t2v-fast fisher loads models with transformers: pip install transformers") from error
    if arguments.batch_size < 1 or arguments.max_tokens < 2:
        raise ValueError(
            f"--batch-size is {arguments.batch_size} and --max-tokens {arguments.max_tokens}: expected at least 1 and 2"
        )
    with Checkpoint(arguments.model) as checkpoint:
        keys = list(checkpoint.entries)
    empty_folder(arguments.output)
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, local_files_only=True)
    model.eval().to(arguments.device)
    key_of = keys_of([name for name, _ in model.named_parameters()], keys)
    found, count = (_by_entry if arguments.granularity == "parameter" else _by_filter)(model, arguments)
    values = {key_of[name]: value.float().contiguous() for name, value in found.items()}
    files = save_sharded(values, arguments.output, arguments.shard_bytes)
    arguments.result.update(tensors=len(values), texts=count, files=[str(file) for file in files])
    console.print(
        f"{len(values)} tensors from {count} texts in {arguments.output} ({len(files)} files)",
        markup=False,
    )
    return 0


def _by_filter(model: nn.Module, arguments: argparse.Namespace) -> tuple[Mapping[str, Tensor], int]:
    """Return the Fisher of each filter, and the number of texts."""
    found = fisher(
        model,
        map(next_tokens, _batches(arguments)),
        arguments.estimator,
        arguments.samples,
        "filter",
        mask=lambda inputs, labels: None if labels is None else labels.cpu() != IGNORED,
        level=arguments.level,
        device=arguments.device,
        seed=arguments.seed,
        progress=arguments.progress,
        shift_labels=False,
    )
    return found, found.num_examples


def _by_entry(model: nn.Module, arguments: argparse.Namespace) -> tuple[Mapping[str, Tensor], int]:
    """Return the Fisher of each entry, and the number of texts.

    The values are those of :func:`t2v_fast.fisher`, whose standard errors and float64 take many times the model's
    memory. These sums take it once.
    """
    schedule, tokens = Schedule(arguments.samples, arguments.seed), 0

    def directions(logits: Tensor, labels: Tensor | None) -> Tensor:
        nonlocal tokens
        assert labels is not None  # next_tokens adds them
        counted = labels != IGNORED
        tokens += int(counted.sum())
        return cotangents(
            logits,
            arguments.estimator,
            arguments.samples,
            labels=labels,
            generator=schedule.take(len(logits)).source,
            mask=counted,
            level=arguments.level,
        )

    batches = tqdm(_batches(arguments), desc="Fisher", unit="batch", disable=not arguments.progress, leave=False)
    sums, texts = summed_squares(
        model, map(next_tokens, batches), directions, device=arguments.device, forward=default_forward
    )
    count = tokens if arguments.level == "token" else texts
    for value in sums.values():
        value /= count
    if bad := [name for name, value in sums.items() if not bool(value.isfinite().all())]:
        raise ValueError(f"the Fisher of {bad[0]!r} is not finite: load the model in a dtype with a larger range")
    return sums, texts


def _batches(arguments: argparse.Namespace) -> Iterator[dict[str, Tensor]]:
    """Yield the texts as a tokenizer makes them."""
    size = arguments.batch_size
    if arguments.texts.suffix == ".safetensors":
        with Checkpoint(arguments.texts) as file:
            if "input_ids" not in file.entries or len(file.entries["input_ids"].shape) != 2:
                raise ValueError(f"{arguments.texts} has {sorted(file.entries)}, expected input_ids [N, T]")
            wanted = [name for name in ("input_ids", "attention_mask") if name in file.entries]
            for begin in range(0, file.entries["input_ids"].shape[0], size):
                part = slice(begin, begin + size)
                yield {name: file.read(name, part)[:, : arguments.max_tokens].long() for name in wanted}
        return
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model, local_files_only=True)
    tokens = [
        tokenizer(line, truncation=True, max_length=arguments.max_tokens)["input_ids"]
        for line in arguments.texts.read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]
    tokens = [ids for ids in tokens if len(ids) > 1]
    if not tokens:
        raise ValueError(f"{arguments.texts} has no line of two tokens or more")
    for begin in range(0, len(tokens), size):
        some = tokens[begin : begin + size]
        longest = max(map(len, some))
        ids, there = (
            torch.zeros(len(some), longest, dtype=torch.long),
            torch.zeros(len(some), longest, dtype=torch.long),
        )
        for row, text in enumerate(some):
            ids[row, : len(text)], there[row, : len(text)] = torch.tensor(text), 1
        yield {"input_ids": ids, "attention_mask": there}
