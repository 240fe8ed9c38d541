"""A wide meta-task: the tasks of bench/studies/meta_task.py and twice as many families.

More scripts, notations, tiles, icons, flags and pictures are drawn with fonts. Needs four Debian packages: ``apt-get
install fonts-noto-core fonts-noto-color-emoji fonts-font-awesome fonts-materialdesignicons-webfont``. The tasks of the
family "arrangements" ask how a picture is turned, placed or repeated, and not what it shows. Families were assigned
before any result, as a person would.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from bench.studies.meta_task import (
    EMOJI,
    SIZE,
    MetaTask,
    covered,
    distort,
    meta_tasks,
    plain_glyph,
    script_task,
)

AWESOME, MATERIAL = "fontawesome-webfont", "materialdesignicons-webfont"

# family: {task: (first and last code point, fonts, how many classes)}
SCRIPTS: dict[str, dict[str, tuple[int, int, str, int]]] = {
    "island scripts": {
        "Balinese": (0x1B05, 0x1B33, "NotoSansBalinese NotoSerifBalinese", 16),
        "Javanese": (0xA984, 0xA9B2, "NotoSansJavanese", 16),
        "Sundanese": (0x1B83, 0x1BA0, "NotoSansSundanese", 14),
        "Batak": (0x1BC0, 0x1BE5, "NotoSansBatak", 12),
        "Rejang": (0xA930, 0xA946, "NotoSansRejang", 14),
        "Tagalog": (0x1700, 0x1711, "NotoSansTagalog", 12),
    },
    "hill scripts": {
        "Tai Tham": (0x1A20, 0x1A4C, "NotoSansTaiTham", 18),
        "Tai Viet": (0xAA80, 0xAAAF, "NotoSansTaiViet", 16),
        "Cham": (0xAA00, 0xAA28, "NotoSansCham", 16),
        "Lepcha": (0x1C00, 0x1C23, "NotoSansLepcha", 14),
        "Limbu": (0x1900, 0x191E, "NotoSansLimbu", 12),
        "Meetei Mayek": (0xABC0, 0xABDA, "NotoSansMeeteiMayek", 16),
        "Ol Chiki": (0x1C5A, 0x1C77, "NotoSansOlChiki", 14),
    },
    "historic Indic scripts": {
        "Brahmi": (0x11005, 0x11037, "NotoSansBrahmi", 18),
        "Kharoshthi": (0x10A10, 0x10A35, "NotoSansKharoshthi", 14),
        "Grantha": (0x11305, 0x11339, "NotoSansGrantha NotoSerifGrantha", 16),
        "Siddham": (0x11580, 0x115AE, "NotoSansSiddham", 16),
        "Newa": (0x11400, 0x11434, "NotoSansNewa", 14),
        "Tirhuta": (0x11481, 0x114AF, "NotoSansTirhuta", 18),
    },
    "ancient Near Eastern scripts": {
        "cuneiform": (0x12000, 0x12399, "NotoSansCuneiform", 16),
        "Ugaritic": (0x10380, 0x1039D, "NotoSansUgaritic", 14),
        "Old Persian": (0x103A0, 0x103C3, "NotoSansOldPersian", 16),
        "Phoenician": (0x10900, 0x10915, "NotoSansPhoenician", 14),
        "Imperial Aramaic": (0x10840, 0x10855, "NotoSansImperialAramaic", 12),
        "Old South Arabian": (0x10A60, 0x10A7C, "NotoSansOldSouthArabian", 16),
    },
    "ancient Aegean scripts": {
        "Linear A": (0x10600, 0x1072F, "NotoSansLinearA", 18),
        "Linear B": (0x10000, 0x1004D, "NotoSansLinearB", 16),
        "Cypriot": (0x10800, 0x10835, "NotoSansCypriot", 14),
        "Anatolian hieroglyphs": (0x14400, 0x14646, "NotoSansAnatolianHieroglyphs", 16),
        "Carian": (0x102A0, 0x102D0, "NotoSansCarian", 14),
    },
    "East Asian scripts": {
        "Tibetan": (0xF40, 0xF67, "NotoSerifTibetan", 16),
        "Mongolian": (0x1820, 0x1842, "NotoSansMongolian", 14),
        "Phags-pa": (0xA840, 0xA866, "NotoSansPhagsPa", 14),
        "Yi": (0xA000, 0xA48C, "NotoSansYi", 20),
        "Nushu": (0x1B170, 0x1B2FB, "NotoSansNushu", 16),
        "Tangut": (0x17000, 0x17BFF, "NotoSerifTangut", 18),
    },
    "modern African scripts": {
        "Vai": (0xA500, 0xA60B, "NotoSansVai", 18),
        "Bamum": (0xA6A0, 0xA6E5, "NotoSansBamum", 16),
        "Adlam": (0x1E900, 0x1E921, "NotoSansAdlam", 14),
        "Mende Kikakui": (0x1E800, 0x1E8C4, "NotoSansMendeKikakui", 16),
        "Osmanya": (0x10480, 0x1049D, "NotoSansOsmanya", 14),
        "Bassa Vah": (0x16AD0, 0x16AED, "NotoSansBassaVah", 12),
    },
    "notations": {
        "music": (0x1D100, 0x1D126, "NotoMusic", 16),
        "notes and rests": (0x1D13A, 0x1D164, "NotoMusic", 12),
        "Byzantine music": (0x1D000, 0x1D0F5, "NotoMusic", 16),
        "shorthand": (0x1BC00, 0x1BC6A, "NotoSansDuployan", 14),
        "sign writing": (0x1D800, 0x1D9FF, "NotoSansSignWriting", 16),
        "alchemy": (0x1F700, 0x1F773, "NotoSansSymbols", 16),
    },
    "mathematical letters": {
        "script letters": (0x1D4D0, 0x1D503, "NotoSansMath", 18),
        "fraktur letters": (0x1D56C, 0x1D59F, "NotoSansMath", 18),
        "double-struck letters": (0x1D538, 0x1D56B, "NotoSansMath", 16),
        "bold italic letters": (0x1D63C, 0x1D66F, "NotoSansMath", 16),
        "bold Greek": (0x1D6A8, 0x1D6E1, "NotoSansMath", 14),
    },
    "tiles": {
        "braille": (0x2801, 0x28FF, "NotoSansSymbols2", 16),
        "mahjong": (0x1F000, 0x1F02B, "NotoSansSymbols2", 14),
        "dominoes": (0x1F031, 0x1F093, "NotoSansSymbols2", 14),
        "playing cards": (0x1F0A1, 0x1F0DF, "NotoSansSymbols2", 16),
        "hexagrams": (0x4DC0, 0x4DFF, "NotoSansSymbols2", 12),
    },
    "interface icons": {
        "web icons": (0xF000, 0xF0E0, AWESOME, 20),
        "more web icons": (0xF100, 0xF160, AWESOME, 14),
        "brand icons": (0xF166, 0xF1D7, AWESOME, 16),
        "outline icons": (0xF001, 0xF120, MATERIAL, 18),
        "device icons": (0xF200, 0xF300, MATERIAL, 14),
        "file icons": (0xF210, 0xF22F, MATERIAL, 12),
    },
    "scenes": {
        "buildings": (0x1F3D4, 0x1F3F0, EMOJI, 16),
        "sports": (0x1F3A3, 0x1F3C9, EMOJI, 14),
        "hands": (0x1F446, 0x1F450, EMOJI, 10),
        "clocks": (0x1F550, 0x1F567, EMOJI, 12),
        "clothes": (0x1F451, 0x1F463, EMOJI, 14),
        "office": (0x1F4B0, 0x1F4DC, EMOJI, 18),
    },
}
# Countries by family resemblance of their flags: two letters each.
FLAGS = {
    "tricolour flags": "FR IT IE BE RO DE NL RU HU BG EE LT LU AT",
    "cross and star flags": "SE NO DK FI IS GB CH GR CN VN TR PK IL CU",
    "American flags": "US CA MX BR AR CL CO VE PE UY PA JM BO PY",
    "African flags": "KE GH NG SN ML CM ET ZA TZ UG RW CI GN BJ",
}
POOL = tuple("ABDEFGJKLNPQRabdefghjkqr")
FONTS = ("NotoSans-Regular", "NotoSerif-Regular", "NotoSans-Bold")
ANIMALS = tuple(map(chr, range(0x1F400, 0x1F43C)))


@dataclass(frozen=True)
class ArrangedTask(MetaTask):
    """A task whose classes are ways to arrange one picture, such as four turns, whatever the picture shows."""

    rule: str = ""

    def _glyph(self, label: int, rng: np.random.Generator) -> np.ndarray:
        _, characters, files = self.glyphs[label]
        pairs = [(c, f) for c in characters for f in files if ord(c) in covered(f)]

        def picture() -> Image.Image:
            return plain_glyph(*pairs[int(rng.integers(len(pairs)))])

        return distort(RULES[self.rule](label, picture, rng), rng)


def _turned(label, picture, rng) -> Image.Image:
    return picture().rotate(90 * label)


def _mirrored(label, picture, rng) -> Image.Image:
    image = picture()
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if label else image


def _pasted(places: list[tuple[int, int]], side: int, picture) -> Image.Image:
    """Pictures of ``side`` pixels with their middles at these places of an empty square."""
    canvas = None
    for x, y in places:
        image = picture().resize((side, side), Image.Resampling.LANCZOS)
        canvas = Image.new(image.mode, (SIZE, SIZE), "white") if canvas is None else canvas
        canvas.paste(image, (x - side // 2, y - side // 2))
    assert canvas is not None
    return canvas


def _counted(label, picture, rng) -> Image.Image:
    cells = rng.permutation(9)[: label + 1]
    return _pasted([(int(11 + 21 * (c % 3)), int(11 + 21 * (c // 3))) for c in cells], 20, picture)


def _placed(label, picture, rng) -> Image.Image:
    return _pasted([(12 + 20 * (label % 3), 12 + 20 * (label // 3))], 26, picture)


def _scaled(label, picture, rng) -> Image.Image:
    return _pasted([(SIZE // 2, SIZE // 2)], (18, 28, 42, 62)[label], picture)


def _blurred(label, picture, rng) -> Image.Image:
    return picture().filter(ImageFilter.GaussianBlur(1.3 * label))


def _tinted(label, picture, rng) -> Image.Image:
    ink = np.array([(200, 30, 30), (200, 110, 20), (40, 140, 40), (20, 130, 150), (40, 60, 190), (130, 40, 160)][label])
    share = 1 - np.asarray(picture().convert("L"), dtype=np.float64)[..., None] / 255
    return Image.fromarray((255 - share * (255 - ink)).astype(np.uint8))


RULES = {
    "turned": _turned,
    "mirrored": _mirrored,
    "counted": _counted,
    "placed": _placed,
    "scaled": _scaled,
    "blurred": _blurred,
    "tinted": _tinted,
}


def _arranged(name: str, rule: str, classes: tuple[str, ...], animals: bool = False) -> MetaTask:
    characters, files = (ANIMALS, (EMOJI,)) if animals else (POOL, FONTS)
    glyphs = tuple((kind, characters, files) for kind in classes)
    return ArrangedTask(name, "arrangements", "arrangements", glyphs, rule=rule)


def _flags(name: str, countries: str) -> MetaTask:
    letters = [(country, "".join(chr(0x1F1E6 + ord(c) - ord("A")) for c in country)) for country in countries.split()]
    return MetaTask(name, "flags", "pictures", tuple((country, (flag,), (EMOJI,)) for country, flag in letters))


def wide_tasks() -> list[MetaTask]:
    """All tasks, in a fixed order. Raises FileNotFoundError, naming the packages, without the fonts."""
    turns = ("upright", "left", "upside down", "right")
    counts, places = (
        tuple("123456"),
        tuple(f"{v} {h}" for v in ["top", "middle", "bottom"] for h in ["left", "centre", "right"]),
    )
    return [
        *meta_tasks(),
        *(script_task(name, family, spec) for family, tasks in SCRIPTS.items() for name, spec in tasks.items()),
        *(_flags(name, countries) for name, countries in FLAGS.items()),
        _arranged("turned letters", "turned", turns),
        _arranged("turned animals", "turned", turns, animals=True),
        _arranged("mirrored letters", "mirrored", ("as written", "mirrored")),
        _arranged("how many letters", "counted", counts),
        _arranged("how many animals", "counted", counts, animals=True),
        _arranged("where", "placed", places),
        _arranged("how large", "scaled", ("tiny", "small", "medium", "large")),
        _arranged("how sharp", "blurred", ("sharp", "soft", "blurred", "very blurred")),
        _arranged("ink", "tinted", ("red", "orange", "green", "teal", "blue", "violet")),
    ]
