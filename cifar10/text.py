"""Names and numbers in messages."""

from collections.abc import Iterable


def printable(item) -> str:
    """`item` on one line, without bytes that are not characters."""
    return str(item) if str(item).isprintable() else repr(str(item))[1:-1]


def plural(count: int, noun: str) -> str:
    """`1 image`, `2,000 images`, `2 classes`."""
    ending = "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}{ending}"


def duration(seconds: float) -> str:
    """`40 seconds`, `12 minutes`, `2.5 hours`."""
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 100 * 60 else f"{seconds / 3600:.1f} hours"


def enumerate_names(names: Iterable[str], separator: str = ", ", most: int = 20) -> str:
    """The first names, and how many more there are."""
    names = list(map(printable, names))
    rest = f" and {len(names) - most:,} more" if len(names) > most else ""
    return separator.join(names[:most]) + rest
