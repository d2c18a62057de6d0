"""Folders: which of them people mean, which are splits, and which tables lie beside them."""

import os
import re
import shlex
from pathlib import Path

TABLES = (".csv", ".tsv")
SPLITS = ("train", "valid", "test")
# A word that means a split, as in `seg_train` or `train2017`, but not in `contest`: there is no letter on either side.
SPLIT = re.compile(
    r"(?<![^\W\d_])(?:(?P<train>train(ing)?)|(?P<valid>val(id(ation)?)?)|(?P<test>test(ing)?))"
    r"(set|data|images?)?(?![^\W\d_])"
)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is one that people don't mean: hidden, or made by a system."""
    return name.startswith(".") or name in ("__MACOSX", "@eaDir")  # made by macOS and by Synology's servers


def list_folders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:  # which knows what is a folder; asking for each file takes long
        return sorted(Path(entry.path) for entry in entries if entry.is_dir() and not is_hidden(entry.name))


def pass_through(folder: Path) -> Path:
    """The folder, or the one inside if that has the same name and is all there is, as in `seg_train/seg_train/`."""
    inside = [path for path in folder.iterdir() if not is_hidden(path.name)]
    alone = len(inside) == 1 and inside[0].is_dir() and inside[0].name.casefold() == folder.name.casefold()
    return pass_through(inside[0]) if alone else folder


def split_of(name: str) -> str | None:
    """The one of `SPLITS` that a name means, in any letter case and with affixes: `Val`, `seg_train`, `test_images`."""
    found = {split for match in SPLIT.finditer(name.casefold()) for split in SPLITS if match[split]}
    return found.pop() if len(found) == 1 else None


def find_splits(folder: Path) -> dict[str, list[Path]]:
    """Split → the folders whose name means it, the plainest first, in the order of `SPLITS`.

    Names with affixes count only beside those of another split, because `train_station` may be a class.
    """
    named = [(split_of(path.name), path) for path in list_folders(folder)]
    several = len({split for split, _ in named if split}) > 1

    def has_affix(path: Path) -> bool:
        return not SPLIT.fullmatch(path.name.casefold())

    def rank(path: Path) -> tuple[bool, bool, str]:  # False comes first
        return path.name not in SPLITS, has_affix(path), path.name

    found = {}
    for name in SPLITS:
        if paths := [path for split, path in named if split == name and (several or not has_affix(path))]:
            found[name] = sorted(paths, key=rank)
    return found


def table_hint(folder: Path) -> str:
    """What to pass instead of a folder with a table of labels in it; nothing if there is none."""
    tables = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in TABLES and not is_hidden(path.name)]
    tables.sort(key=lambda table: split_of(table.stem) != "train")
    return f"; if the labels are in {tables[0].name}, pass --data {shlex.quote(str(tables[0]))}" if tables else ""
