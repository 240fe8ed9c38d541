"""Worlds: images that can be labelled in many ways, such as what they show, by whom they were drawn, and in which tone.

A world is every combination of a few *aspects*. A draw of a world takes some combinations, each with distortions of
its own, so two draws share no image. Label sets are made from aspects (:func:`label_sets`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from PIL import Image

from bench.studies.emoji_task import STYLES, all_emoji, picture
from bench.studies.meta_task import distort, plain_glyph

PEOPLE = ("hand-fingers-open", "hand-single-finger", "person-role", "person-sport")
THINGS = ("animal-mammal", "animal-bird", "food-fruit", "food-prepared", "transport-ground", "place-building")
LETTERS = {"Latin": "RGQS", "Greek": "ΓΔΣΩ", "Cyrillic": "ЖЩЯЮ"}
WRONG = 0.25  # share of the labels that a noisy label set draws again


@dataclass(frozen=True)
class World:
    """Combinations of aspects.

    Args:
        name: what the images are.
        shown: for each thing that images show its names at every level, finest first: ("R", "Latin").
        levels: names of these levels, finest first: ("letter", "script").
        aspects: the values of every other aspect.
        render: from the number of the shown thing, and the values of the other aspects, to a plain image.
    """

    name: str
    shown: tuple[tuple[str, ...], ...]
    levels: tuple[str, ...]
    aspects: dict[str, tuple[str, ...]]
    render: Callable[..., Image.Image]

    def draw(self, count: int, part: int, seed: int = 0) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Images uint8 [N, SIZE, SIZE, 3] and for each level and aspect its codes [N]. Parts share no combination as
        far as there are enough of them, and never an image."""
        every = list(product(range(len(self.shown)), *(range(len(v)) for v in self.aspects.values())))
        order = np.random.default_rng([seed, *self.name.encode()]).permutation(len(every))
        chosen = [every[k] for k in np.resize(np.roll(order, -part * count), count)]
        rng = np.random.default_rng([seed, part, *self.name.encode()])
        images = []
        for thing, *values in chosen:
            names = [options[k] for options, k in zip(self.aspects.values(), values, strict=True)]
            images.append(distort(self.render(thing, *names).convert("RGB"), rng))
        table = np.array(chosen)
        labels = {aspect: table[:, 1 + k] for k, aspect in enumerate(self.aspects)}
        for k, level in enumerate(self.levels):
            codes = np.unique([names[k] for names in self.shown], return_inverse=True)[1]
            labels[level] = codes[table[:, 0]]
        return np.stack(images), labels


def people(of_each: int = 3) -> World:
    """Hands and people in four styles and five tones of skin."""
    chosen = _some(PEOPLE, of_each, toned=True)
    files = [e.tones for e in chosen]
    shown = tuple((e.file, e.subgroup, e.subgroup.split("-")[0]) for e in chosen)
    tones = tuple(f"tone {k}" for k in range(5))

    def render(thing: int, style: str, tone: str) -> Image.Image:
        return picture(files[thing][int(tone[-1])], style)

    return World("people", shown, ("emoji", "kind", "hand or person"), {"style": STYLES, "tone": tones}, render)


def things(of_each: int = 2) -> World:
    """Animals, food and places in four styles, in colour or grey."""
    chosen = _some(THINGS, of_each)

    def render(thing: int, style: str, colour: str) -> Image.Image:
        image = picture(chosen[thing].file, style)
        return image if colour == "colour" else image.convert("L")

    shown = tuple((e.file, e.subgroup, e.group) for e in chosen)
    aspects = {"style": STYLES, "colour": ("colour", "grey")}
    return World("things", shown, ("emoji", "subgroup", "group"), aspects, render)


def letters() -> World:
    """Letters of three scripts in eight fonts."""
    shown = tuple((letter, script) for script, some in LETTERS.items() for letter in some)
    fonts = {
        "regular upright": "Regular",
        "bold upright": "Bold",
        "regular italic": "Italic",
        "bold italic": "BoldItalic",
    }

    def render(thing: int, family: str, weight: str, slant: str) -> Image.Image:
        return plain_glyph(shown[thing][0], f"Noto{family}-{fonts[f'{weight} {slant}']}")

    aspects = {"family": ("Sans", "Serif"), "weight": ("regular", "bold"), "slant": ("upright", "italic")}
    return World("letters", shown, ("letter", "script"), aspects, render)


def _some(subgroups: Sequence[str], of_each: int, toned: bool = False) -> list:
    chosen = []
    for subgroup in subgroups:
        members = [e for e in all_emoji() if e.subgroup == subgroup and (e.tones or not toned)]
        rng = np.random.default_rng([0, *subgroup.encode()])
        chosen += [members[k] for k in sorted(rng.permutation(len(members))[:of_each])]
    return chosen


def label_sets(
    world: World, labels: dict[str, np.ndarray], seed: int = 0
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Ways to label a draw of a world.

    Returns:
        For each name of a label set its codes [N], and the one aspect that it is about. What is about no aspect
        (random labels) or about two is missing there. "Shown" is one aspect, whatever the level.
    """
    rng = np.random.default_rng([seed, 1])
    sets: dict[str, np.ndarray] = {}
    about: dict[str, str] = {}

    def add(name: str, codes: np.ndarray, aspect: str | None) -> None:
        sets[name] = codes
        if aspect is not None:
            about[name] = aspect

    def noisy(codes: np.ndarray) -> np.ndarray:
        wrong = rng.random(len(codes)) < WRONG
        return np.where(wrong, rng.integers(codes.max() + 1, size=len(codes)), codes)

    finest = world.levels[0]
    for level in world.levels:
        add(level, labels[level], "shown")
    # The same merging whatever the draw: it has a meaning.
    merge = np.random.default_rng([0, *world.name.encode()]).permutation(labels[finest].max() + 1) // 2
    add(f"{finest}, merged by pairs", merge[labels[finest]], "shown")
    add(f"{world.levels[-1]}, a quarter wrong", noisy(labels[world.levels[-1]]), "shown")
    for aspect, values in world.aspects.items():
        add(aspect, labels[aspect], aspect)
        if len(values) > 2:
            add(f"{aspect}, in two", labels[aspect] * 2 // len(values), aspect)
        add(f"{aspect}, a quarter wrong", noisy(labels[aspect]), aspect)
    first, *_ = world.aspects
    add(f"{world.levels[-1]} and {first}", labels[world.levels[-1]] * len(world.aspects[first]) + labels[first], None)
    for name in (finest, first):
        codes = labels[name]
        add(f"{name}, renamed", rng.permutation(codes.max() + 1)[codes], about[name])
    for classes in (2, 4, 12):
        add(f"random, {classes} classes", rng.permutation(len(labels[first])) % classes, None)
    return sets, about


def entropy(*codes: np.ndarray) -> float:
    """The joint entropy of label sets, in nats."""
    counts = np.unique(np.stack(codes), axis=1, return_counts=True)[1]
    p = counts / counts.sum()
    return float(-(p * np.log(p)).sum())


def variation_of_information(a: np.ndarray, b: np.ndarray) -> float:
    """H(a | b) + H(b | a) over H(a, b): 0 for the same partition, 1 for independent label sets (Meilă, 2007)."""
    joint = entropy(a, b)
    return (2 * joint - entropy(a) - entropy(b)) / joint if joint else 0.0
