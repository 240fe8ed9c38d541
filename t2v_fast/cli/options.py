"""The options that embed, demo and profile share: the probe, and the table in :mod:`t2v_fast.tasks.settings`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..tasks.head import CROSS_VALIDATED
from ..tasks.pipeline import Task2Vec
from ..tasks.probe import load_probe
from ..tasks.settings import (
    DEVICE,
    DTYPE,
    FOLDER,
    GROUPS,
    LAYERS,
    MAPPING,
    NUMBER,
    OPTIONS,
    SWITCH,
    WHOLE,
    SettingError,
    Settings,
)

# Options with other flags than --their-name. `--head` is the layer of the probe, `--head-method` the way to fit a head.
FLAGS = {
    "head": ("--head-method",),
    "num_workers": ("--num-workers", "--loaders"),
    "probe_weights": ("--probe-weights", "--weights"),
    "probe_head": ("--probe-head", "--head"),
    "progress": ("--quiet", "-q"),
}
SHORT_LIST = ("estimator", "samples", "device", "batch_size", "num_workers", "seed", "progress")
METAVARS = {WHOLE: "N", NUMBER: "NUMBER", FOLDER: "FOLDER", LAYERS: "LAYERS", DEVICE: "DEVICE", DTYPE: "DTYPE"}
PROBE_OPTIONS = ("probe", "probe_weights", "probe_head", "size")


def flags_of(name: str) -> tuple[str, ...]:
    """The flags of an option, the preferred one first."""
    return FLAGS.get(name, (f"--{name.replace('_', '-')}",))


def add_probe_options(parser: argparse.ArgumentParser) -> None:
    """Add the group of options that choose the probe."""
    group = parser.add_argument_group("probe")
    group.add_argument(
        "--probe",
        default="efficientnet-lite0",
        help="the packaged efficientnet-lite0, torchvision/NAME, timm/NAME, or a bare NAME (default: %(default)s)",
    )
    group.add_argument(
        *flags_of("probe_weights"),
        dest="probe_weights",
        default="default",
        metavar="WEIGHTS",
        help="weights of the probe: default (pretrained), none (random), or a file (default: %(default)s)",
    )
    group.add_argument(
        *flags_of("probe_head"),
        dest="probe_head",
        default=None,
        metavar="LAYER",
        help="name of the probe's last linear layer, where it cannot be found automatically",
    )
    group.add_argument("--size", type=int, help="side of the images in pixels (default: as the probe was trained)")


def add_settings(parser: argparse.ArgumentParser, names: Sequence[str] = tuple(OPTIONS)) -> None:
    """Add the options with these names, one group for each group of the table."""
    for key, title in GROUPS.items():
        chosen = [name for name in names if OPTIONS[name].group == key]
        if not chosen:
            continue
        group = parser.add_argument_group(key, title)
        for name in chosen:
            _add_setting(group, name)
            if name == "head_options":
                group.add_argument(
                    "--weight-decay",
                    type=_weight_decay,
                    metavar="NUMBER",
                    help=f"penalty of the head's weights, or {CROSS_VALIDATED} to choose it by cross-validation "
                    "(default: 1e-4); short for --head-options weight_decay=NUMBER",
                )


def _add_setting(group: Any, name: str) -> None:
    option, flags = OPTIONS[name], flags_of(name)
    text = option.help.replace("%", "%%")
    if name == "progress":  # on, unless the user asks for quiet
        group.add_argument(*flags, dest=name, action="store_false", help="show no progress bars")
    elif option.kind is SWITCH:
        text += f" (default: {'yes' if option.default else 'no'})"
        group.add_argument(*flags, dest=name, action=argparse.BooleanOptionalAction, default=option.default, help=text)
    elif option.kind is MAPPING:
        more = {"action": "append", "metavar": "KEY=VALUE", "type": _pair, "help": f"{text}; may be given repeatedly"}
        group.add_argument(*flags, dest=name, **more)
    else:
        if option.default is not None:
            text += f" (default: {option.default})"
        metavar = f"{{{','.join(option.choices)}}}" if option.choices else METAVARS[option.kind]
        reader = _reader(name)
        group.add_argument(*flags, dest=name, type=reader, default=option.default, metavar=metavar, help=text)


def _reader(name: str) -> Callable[[str], Any]:
    """Read the text of an option; the error is the one that Settings and job files give."""

    def read(text: str) -> Any:
        try:
            return OPTIONS[name].read(name, text)
        except SettingError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def _pair(text: str) -> tuple[str, Any]:
    """KEY=VALUE, in which the value may be a number, true or false; anything else is text."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: expected KEY=VALUE")
    for kind in (int, float):
        try:
            return key, kind(value)
        except ValueError:
            pass
    return key, {"true": True, "false": False}.get(value.lower(), value)


def _weight_decay(text: str) -> float | str:
    if text == CROSS_VALIDATED:
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0, or {CROSS_VALIDATED}") from None


def settings_of(arguments: argparse.Namespace) -> Settings:
    """The settings that a command line asks for; ValueError for those that cannot be used."""
    given = {name: getattr(arguments, name) for name in OPTIONS if hasattr(arguments, name)}
    for name in given:
        if OPTIONS[name].kind is MAPPING:
            given[name] = dict(given[name] or ())
    if getattr(arguments, "weight_decay", None) is not None:
        if "weight_decay" in given["head_options"]:
            raise ValueError("--weight-decay and --head-options weight_decay are the same option: give one of them")
        given["head_options"]["weight_decay"] = arguments.weight_decay
    return Settings(**given)


def task2vec_of(arguments: argparse.Namespace) -> Task2Vec:
    """The pipeline that a command line asks for."""
    settings = settings_of(arguments)
    if settings.device is not None and torch.device(settings.device).type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"--device {arguments.device}: this torch sees no CUDA device")
    probe = load_probe(arguments.probe, weights=arguments.probe_weights, head=arguments.probe_head, size=arguments.size)
    task2vec = Task2Vec.from_settings(probe, settings)
    task2vec.progress = settings.progress and sys.stderr.isatty()  # elsewhere, bars would be a wall of lines
    return task2vec
