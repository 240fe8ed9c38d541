"""A bank of 70 real tasks of another kind than the glyphs: artwork of emoji in four styles, in 14 families.

The pictures are those of four npm packages, about 350 MB, installed by

    npm install --prefix build/emoji emoji-datasource-{apple,facebook,google,twitter}@16.0.0

A family is a part of Unicode's taxonomy of emoji. Each of its five tasks has emoji of its own: one task tells apart
single emoji in each of the four styles, and one tells apart kinds of emoji in all styles. So neither the artist nor a
shared picture says which tasks are of one family. Families were assigned before any result, as a person would.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.studies.meta_task import SIZE, distort
from t2v_fast.demo import DemoTask

FOLDER = Path(__file__).resolve().parents[2] / "build" / "emoji" / "node_modules"
INSTALL = "npm install --prefix build/emoji emoji-datasource-{apple,facebook,google,twitter}@16.0.0"
STYLES = ("apple", "facebook", "google", "twitter")
SINGLE = 8  # emoji of a task that tells single emoji apart
KINDS, FEWEST = 5, 3  # of a task that tells kinds apart: the most classes, and the fewest emoji of a class
# family: the subgroups of Unicode's taxonomy
FAMILIES: dict[str, tuple[str, ...]] = {
    "faces": ("face-smiling", "face-affection", "face-concerned", "face-negative", "face-neutral-skeptical"),
    "animals": ("animal-mammal", "animal-bird", "animal-bug", "animal-marine", "animal-reptile"),
    "food": ("food-fruit", "food-vegetable", "food-prepared", "food-asian", "food-sweet"),
    "people": ("person-role", "person-activity", "person-sport", "person-fantasy", "person-gesture"),
    "hands and bodies": ("hand-fingers-open", "hand-fingers-partial", "hand-single-finger", "hands", "body-parts"),
    "vehicles": ("transport-ground", "transport-air", "transport-water"),
    "places": ("place-building", "place-geographic", "place-other", "place-religious"),
    "sky and time": ("sky & weather", "time"),
    "clothing": ("clothing",),
    "office and tools": ("office", "tool", "book-paper", "mail", "writing"),
    "sound and devices": ("music", "musical-instrument", "sound", "light & video", "computer"),
    "sport and games": ("sport", "game", "event", "award-medal"),
    "signs": ("alphanum", "av-symbol", "zodiac", "religion", "transport-sign"),
    "arrows and shapes": ("arrow", "geometric"),
}


@dataclass(frozen=True)
class Emoji:
    """One emoji: its file name, where Unicode puts it, and the file names of its skin tones, lightest first."""

    file: str
    group: str
    subgroup: str
    tones: tuple[str, ...] = ()


@dataclass(frozen=True)
class EmojiTask:
    """A task before its images are drawn: for each class its files, and the styles of all."""

    name: str
    family: str
    classes: tuple[tuple[str, tuple[str, ...]], ...]
    styles: tuple[str, ...]

    def draw(self, count: int, split: int, seed: int = 0) -> DemoTask:
        """``count`` images, uint8 [N, SIZE, SIZE, 3], in classes of equal size."""
        rng = np.random.default_rng([seed, split, *self.name.encode()])
        labels = np.arange(count) % len(self.classes)
        images = []
        for label in labels:
            files = self.classes[label][1]
            file, style = files[rng.integers(len(files))], self.styles[rng.integers(len(self.styles))]
            images.append(distort(picture(file, style), rng))
        order = rng.permutation(count)
        names = tuple(name for name, _ in self.classes)
        return DemoTask(self.name, self.family, np.stack(images)[order], labels[order], names)


@cache
def picture(file: str, style: str) -> Image.Image:
    """An emoji on white, with the margin that the glyphs have."""
    drawn = Image.open(FOLDER / f"emoji-datasource-{style}" / "img" / style / "64" / file).convert("RGBA")
    image = Image.new("RGBA", (SIZE, SIZE), "white")
    inner = drawn.resize((SIZE * 3 // 4, SIZE * 3 // 4), Image.Resampling.LANCZOS)
    image.alpha_composite(inner, (SIZE // 8, SIZE // 8))
    return image.convert("RGB")


@cache
def all_emoji() -> tuple[Emoji, ...]:
    """The emoji that all four styles have, in Unicode's order."""
    path = FOLDER / f"emoji-datasource-{STYLES[0]}" / "emoji.json"
    missing = [s for s in STYLES if not (FOLDER / f"emoji-datasource-{s}" / "img" / s / "64").is_dir()]
    if missing:
        raise FileNotFoundError(f"no pictures of {', '.join(missing)} in {FOLDER}: {INSTALL}")
    records = sorted(json.loads(path.read_text()), key=lambda r: r["sort_order"])
    return tuple(Emoji(r["image"], r["category"], r["subcategory"], _tones(r)) for r in records if _in_every_style(r))


def _in_every_style(record: dict[str, Any]) -> bool:
    return all(record[f"has_img_{style}"] for style in STYLES)


def _tones(record: dict[str, Any]) -> tuple[str, ...]:
    """The files of the five skin tones, or nothing. Emoji of two people have a tone for each, and are left out."""
    tones = [v for key, v in sorted(record.get("skin_variations", {}).items()) if "-" not in key]
    return tuple(v["image"] for v in tones) if len(tones) == 5 and all(map(_in_every_style, tones)) else ()


def emoji_tasks(families: dict[str, tuple[str, ...]] = FAMILIES) -> list[EmojiTask]:
    """All tasks, in a fixed order. Raises FileNotFoundError, with the command, without the packages."""
    tasks = []
    for family, subgroups in families.items():
        rng = np.random.default_rng([0, *family.encode()])
        members = [e for e in all_emoji() if e.subgroup in subgroups]
        members = [members[k] for k in rng.permutation(len(members))]
        for k, style in enumerate(STYLES):
            own = members[k * SINGLE : (k + 1) * SINGLE]
            classes = tuple((e.file, (e.file,)) for e in own)
            tasks.append(EmojiTask(f"{family}, {style}", family, classes, (style,)))
        tasks.append(EmojiTask(f"{family}, kinds", family, _kinds(members[len(STYLES) * SINGLE :], subgroups), STYLES))
    return tasks


def _kinds(emoji: Sequence[Emoji], subgroups: Sequence[str]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Subgroups as classes; single emoji where only one subgroup has enough of them."""
    by_kind = {s: tuple(e.file for e in emoji if e.subgroup == s) for s in subgroups}
    kinds = tuple((s, files) for s, files in by_kind.items() if len(files) >= FEWEST)
    return kinds[:KINDS] if len(kinds) > 1 else tuple((e.file, (e.file,)) for e in emoji[:SINGLE])
