"""Class names in plots: short enough for their place, and in letters that a font has."""

import unicodedata
from functools import lru_cache, wraps

from matplotlib import font_manager, rcParams
from matplotlib import pyplot as plt

from cifar10.interpretation.predictions import Interpretation

LAST_RESORT = "Last Resort High-Efficiency"  # matplotlib's font of boxes


def width(text: str) -> float:
    """Columns that `text` takes, an average letter being one: Chinese, Japanese and Korean characters take two."""
    return sum(columns(character) for character in text)


def columns(character: str) -> float:
    if unicodedata.combining(character):
        return 0
    if unicodedata.east_asian_width(character) in "WF":
        return 2
    return 1.6 if character in "MWmw@%" else 1.3 if character.isupper() else 1


def shorten_middle(text: str, limit: int) -> str:
    """`text` in at most `limit` columns: the middle becomes an ellipsis, because ends tell names apart best."""
    if width(text) <= limit:
        return text
    head, tail = text, text
    while width(head) > limit // 2:
        head = head[:-1]
    while width(tail) > limit - 1 - limit // 2:
        tail = tail[1:]
    return f"{head}…{tail}"


@lru_cache
def has_glyph(file: str, character: str) -> bool:
    """Whether matplotlib can draw a character with the font in `file`; it can't with color fonts, for example."""
    try:
        font = font_manager.get_font(file)
        font.set_size(10, 100)
        return bool(font.get_char_index(ord(character)) and font.load_char(ord(character)))
    except Exception:  # FreeType's errors have many types
        return False


def fonts_for(text: str) -> tuple[list[str], set[str]]:
    """Font families that draw `text`: the default, and others of this system for the letters that it lacks.

    Also returns the letters that no font has.
    """
    families, default = list(rcParams["font.family"]), font_manager.findfont(font_manager.FontProperties())
    missing = {c for c in text if not c.isspace() and not has_glyph(default, c)}
    for font in font_manager.fontManager.ttflist if missing else ():
        found = {c for c in missing if has_glyph(font.fname, c)} if font.name != LAST_RESORT else set()
        if found:
            families.append(font.name)
            missing -= found
    return families, missing


def display_names(names: list[str], limit: int) -> list[str]:
    """The names as they appear in a plot: in `limit` columns, all different, "class 3" if no font has the letters."""
    _, missing = fonts_for("".join(names))
    shown = [f"class {i}" if missing & set(name) else shorten_middle(name, limit) for i, name in enumerate(names)]
    count = {name: shown.count(name) for name in shown} if len({*shown}) < len(shown) else {}
    return [
        f"{i}: {shorten_middle(names[i], max(limit - 3 - len(str(i)), 5))}" if count.get(name, 1) > 1 else name
        for i, name in enumerate(shown)
    ]


def wrap(text: str, limit: int) -> list[str]:
    """`text` in lines of at most `limit` columns."""
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
