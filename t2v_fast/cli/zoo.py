"""``t2v-fast select FOLDER --zoo NAMES``: rank pretrained networks as feature extractors for a folder of images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from ..embedding import escaped
from .common import console, load_embeddings, print_files

SHORTLIST, IMAGES = 4, 120  # as in t2v_fast.zoo, which imports torch


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
        "--earlier",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="embeddings of the tasks of --errors: errors on tasks near the folder then count more",
    )
    group.add_argument(
        "--embedding", type=Path, metavar="FILE", help="the folder's embedding, made as the earlier ones"
    )
    group.add_argument(
        "--shortlist",
        type=int,
        default=SHORTLIST,
        help="how many of the networks in --errors run (default: %(default)s)",
    )
    group.add_argument(
        "--images",
        type=_images,
        default=IMAGES,
        metavar="N",
        help="images to score networks by, drawn with classes in equal parts, or 'all'; at least five of each class. "
        "A fifth of each class, and at most as many images, is held out to measure the choice (default: %(default)s)",
    )
    group.add_argument("--seed", type=int, default=0, help="of the draw of images (default: %(default)s)")
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


def _images(text: str) -> int | None:
    """A number of images, or None for ``all``."""
    return None if text == "all" else int(text)


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


def _prior(arguments: argparse.Namespace) -> dict[str, float] | None:
    """What to expect of networks: their errors on earlier tasks, near ones first if there are embeddings."""
    from ..analysis import selection
    from ..analysis.distance import centred_distance

    if arguments.errors is None:
        if arguments.earlier or arguments.embedding:
            raise ValueError(
                "--earlier and --embedding need the networks' errors on the earlier tasks: pass --errors too"
            )
        return None
    if (arguments.earlier is None) != (arguments.embedding is None):
        raise ValueError(
            "--earlier and --embedding go together: distances are from earlier tasks to the folder's embedding"
        )
    tasks, experts, errors = selection.read_errors(arguments.errors)
    tasks, errors = selection.with_errors(tasks, errors)  # the others say nothing of networks
    distances = None
    if arguments.earlier is not None:
        if arguments.embedding.is_dir():
            raise ValueError(f"--embedding is the file of one embedding, got the folder {arguments.embedding}")
        names, embeddings = load_embeddings([*arguments.earlier, arguments.embedding])
        known = dict(zip(names[:-1], embeddings[:-1], strict=True))
        if missing := [name for name in tasks if name not in known]:
            raise ValueError(f"no embedding of the earlier task {missing[0]!r}: there are {', '.join(known)}")
        if twice := [name for name in tasks if names[:-1].count(name) > 1]:
            raise ValueError(f"two embeddings of --earlier are of a task called {twice[0]!r}: pass one of them")
        earlier = [known[name] for name in tasks]
        distances = centred_distance(earlier, [embeddings[-1]])
    predicted = selection.predict_errors(errors, distances)[0]
    # Nothing is known of a network without any error: it runs, as networks do that are not in the table.
    met = (~np.isnan(errors)).any(0)
    return {name: -value for name, value, known in zip(experts, predicted.tolist(), met, strict=True) if known}


def run(arguments: argparse.Namespace) -> int:
    """Run the race, and report it."""
    from ..files import write_csv
    from ..zoo import rank_zoo

    if len(arguments.embeddings) != 1 or not arguments.embeddings[0].is_dir():
        raise ValueError("--zoo ranks networks for one folder of images, with one sub-folder for each class")
    ranking = rank_zoo(
        arguments.embeddings[0],
        parse_names(arguments.zoo),
        prior=_prior(arguments),
        shortlist=arguments.shortlist,
        images=arguments.images,
        seed=arguments.seed,
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
    console.print(
        f"scored by {ranking.images} of {ranking.available} images, drawn with seed {ranking.seed}; cost: "
        f"{100 * ranking.cost:.0f} % of running every network on them"
    )
    if arguments.csv is not None:
        write_csv(arguments.csv, [header, *rows])
    if arguments.plot is not None:
        from ..analysis.race_plot import race  # matplotlib takes a second to import

        race(ranking.entries, ranking.classes, arguments.plot)
    print_files((arguments.csv, arguments.plot))
    return 0
