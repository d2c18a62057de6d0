"""Class names in plots: short enough for the space there is, and in fonts that have their letters."""

import unicodedata
from collections import Counter
from functools import lru_cache, wraps

from matplotlib import font_manager, rcParams
from matplotlib import pyplot as plt

from cifar10.interpretation.predictions import Interpretation

LAST_RESORT = "Last Resort High-Efficiency"  # matplotlib's font of boxes


def width(text: str) -> float:
    """Columns that `text` takes: one for an average letter, two for a Chinese, Japanese or Korean character."""
    return sum(columns(character) for character in text)


def columns(character: str) -> float:
    if unicodedata.combining(character):
        return 0
    if unicodedata.east_asian_width(character) in "WF":
        return 2
    return 1.6 if character in "MWmw@%" else 1.3 if character.isupper() else 1


def shorten_middle(text: str, limit: int) -> str:
    """Shorten `text` to `limit` columns: an ellipsis replaces the middle, because the ends tell names apart best."""
    if width(text) <= limit:
        return text
    head, tail = text, text
    while width(head) > limit // 2:
        head = head[:-1]
    while width(tail) > limit - 1 - limit // 2:
        tail = tail[1:]
    return f"{head}…{tail}"


@lru_cache
def letters_in(file: str) -> frozenset[str]:
    """The letters that a font file has; none if it can't be read, for example because it was removed."""
    try:
        return frozenset(map(chr, font_manager.get_font(file).get_charmap()))
    except (OSError, RuntimeError):
        return frozenset()


def fonts_for(text: str) -> tuple[list[str], set[str]]:
    """Font families that draw `text`: the default, and others of this system for the letters that it lacks.

    Also returns the letters that no font has. matplotlib takes each letter from the first family that has it.
    """
    families = list(rcParams["font.family"])
    missing = {*"".join(text.split())} - letters_in(font_manager.findfont(font_manager.FontProperties()))
    for font in font_manager.fontManager.ttflist:
        if missing and font.name != LAST_RESORT and missing & letters_in(font.fname):
            families.append(font.name)
            missing -= letters_in(font.fname)
    return families, missing


def display_names(names: list[str], limit: int) -> list[str]:
    """The names as a plot shows them: in `limit` columns, all different, and "class 3" if no font has the letters."""
    _, missing = fonts_for("".join(names))
    shown = [f"class {i}" if missing & set(name) else shorten_middle(name, limit) for i, name in enumerate(names)]
    count = Counter(shown)
    return [
        f"{i}: {shorten_middle(names[i], max(limit - 3 - len(str(i)), 5))}" if count[name] > 1 else name
        for i, name in enumerate(shown)
    ]


def wrap(text: str, limit: int) -> list[str]:
    """Split `text` into lines of at most `limit` columns."""
    lines = [""]
    for c in text:
        lines = [*lines, c] if width(lines[-1] + c) > limit else [*lines[:-1], lines[-1] + c]
    return lines


def with_fonts(plot):
    """Draw with fonts that have the letters of all class names."""

    @wraps(plot)
    def draw(interp: Interpretation):
        fonts = fonts_for("".join(interp.names))[0]
        with plt.rc_context({"font.family": fonts, "text.parse_math": False}):  # a name may hold dollar signs
            plot(interp)

    return draw
