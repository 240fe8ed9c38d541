"""``t2v-fast select FOLDER --zoo NAMES``: rank pretrained networks as feature extractors for a folder of images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ..embedding import Embedding, escaped
from .common import console, load_embeddings, print_files

SHORTLIST = 6  # as in t2v_fast.zoo, which imports torch


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a race to the parser of ``select``."""
    group: Any = parser.add_argument_group("zoo", "rank pretrained networks for one folder of images")
    group.add_argument(
        "--zoo",
        metavar="NAMES",
        help="networks, separated by commas: efficientnet-lite0, torchvision/NAME or timm/NAME; "
        "'timm:a,b' is short for 'timm/a,timm/b'; NAME=FILE takes the weights of a file",
    )
    group.add_argument(
        "--sources",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="embeddings of the tasks that networks were trained on, named as the networks; with --errors, of the tasks of "
        "the table too",
    )
    group.add_argument(
        "--embedding", type=Path, metavar="FILE", help="the folder's embedding, made as the sources were"
    )
    group.add_argument(
        "--shortlist",
        type=int,
        default=SHORTLIST,
        help="networks that run, of those of which --errors or --sources say what to expect (default: %(default)s)",
    )
    group.add_argument(
        "--budget",
        type=float,
        default=1.0,
        help="share of the time to run all networks on all images that may be spent (default: %(default)s)",
    )
    group.add_argument("--first-images", type=int, default=64, help="images of the first round (default: %(default)s)")
    group.add_argument("--cache", type=Path, help="folder that keeps features, so that a race continues")
    group.add_argument("--plot", type=Path, help="draw the ranking here (PNG or SVG)")
    group.add_argument("--device", default="cpu", help="where the networks run (default: %(default)s)")
    group.add_argument("--batch-size", type=int, default=32, help="images in a forward pass (default: %(default)s)")


def parse_names(text: str) -> list[str]:
    """Split names at commas. ``family:a,b`` gives each of them the family, until another family begins.

    >>> parse_names("efficientnet-lite0,timm:resnet18,convnext_atto,torchvision:resnet50")
    ['efficientnet-lite0', 'timm/resnet18', 'timm/convnext_atto', 'torchvision/resnet50']
    """
    names, family = [], ""
    for part in filter(None, (part.strip() for part in text.split(","))):
        head, colon, rest = part.partition(":")
        if colon:
            family, part = f"{head}/", rest
        names.append(part if "/" in part else family + part)
    return names


def _prior(names: Sequence[str], arguments: argparse.Namespace) -> dict[str, float] | None:
    """What to expect of networks: from the errors on earlier tasks, from the distances of their sources, or from both."""
    from ..analysis import selection
    from ..analysis.distance import centred_distance

    if (arguments.sources is None) != (arguments.embedding is None):
        raise ValueError(
            "--sources and --embedding go together: distances are from the sources to the folder's embedding"
        )
    known: dict[str, Embedding] = {}
    if arguments.sources is not None:
        found, embeddings = load_embeddings([*arguments.sources, arguments.embedding])
        known, folder = dict(zip(found[:-1], embeddings[:-1], strict=True)), embeddings[-1]
    if arguments.errors is None:
        if arguments.sources is None:
            return None
        bank = [known[name] for name in names if name in known]
        if len(bank) < 3:
            raise ValueError(
                f"{len(bank)} networks have a source of their name, expected at least 3: there are {', '.join(known)}"
            )
        distances = centred_distance(bank, [folder], bank=bank)[:, 0]
        return dict(zip((name for name in names if name in known), (-distances).tolist(), strict=True))
    tasks, experts, errors = selection.read_errors(arguments.errors)
    if arguments.sources is None:
        return dict(zip(experts, (-selection.predict_errors(errors)[0]).tolist(), strict=True))
    if missing := [name for name in (*experts, *tasks) if name not in known]:
        raise ValueError(f"no source of {missing[0]!r}: there are {', '.join(known)}")
    bank = [known[name] for name in experts]
    to_tasks = centred_distance(bank, [known[name] for name in tasks], bank=bank)
    predicted = selection.predict_errors(errors, [to_tasks], [centred_distance(bank, [folder], bank=bank)])
    return dict(zip(experts, (-predicted[0]).tolist(), strict=True))


def run(arguments: argparse.Namespace) -> int:
    """Run the race, and report it."""
    from ..files import write_csv
    from ..zoo import rank_zoo

    if len(arguments.embeddings) != 1 or not arguments.embeddings[0].is_dir():
        raise ValueError("--zoo ranks networks for one folder of images, with one sub-folder for each class")
    names = parse_names(arguments.zoo)
    ranking = rank_zoo(
        arguments.embeddings[0],
        names,
        prior=_prior(names, arguments),
        shortlist=arguments.shortlist,
        budget=arguments.budget,
        first_images=arguments.first_images,
        batch_size=arguments.batch_size,
        cache=arguments.cache,
        device=arguments.device,
        progress=arguments.progress,
    )
    arguments.result.update(ranking.as_dict())
    header, *rows = ranking.rows()
    if arguments.progress:
        table = Table(title=Text(f"networks for {escaped(ranking.task)}"))
        for column in header:
            table.add_column(column, no_wrap=True, overflow="fold")
        for row, entry in zip(rows, ranking.entries, strict=True):
            if entry.score is not None:
                table.add_row(*map(Text, row))
        console.print(table)
    for entry in ranking.entries:
        if entry.outcome == "unavailable":
            console.print(f"unavailable: {entry.name}: {escaped(entry.reason)}", markup=False)
    if unseen := [entry.name for entry in ranking.entries if entry.outcome == "not shortlisted"]:
        console.print(f"not shortlisted: {', '.join(unseen)}", markup=False)
    console.print(ranking.explain(), markup=False)
    console.print(f"cost: {100 * ranking.cost:.0f} % of running every network on all {ranking.images} images")
    if arguments.csv is not None:
        write_csv(arguments.csv, [header, *rows])
    if arguments.plot is not None:
        from ..analysis.race_plot import race  # matplotlib takes a second to import

        race(ranking.entries, ranking.classes, arguments.plot)
    print_files((arguments.csv, arguments.plot))
    return 0
