"""Names and numbers in messages."""

from collections.abc import Iterable


def printable(item) -> str:
    """`item` on one line, without bytes that are not characters."""
    return str(item) if str(item).isprintable() else repr(str(item))[1:-1]


MAX_NAMES = 20  # in a message


def enumerate_names(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    names = list(map(printable, names))
    return ", ".join(names[:MAX_NAMES]) + f" and {len(names) - MAX_NAMES:,} more" * (len(names) > MAX_NAMES)
