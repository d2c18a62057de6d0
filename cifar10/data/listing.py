"""Which images a folder holds, and the split and class of each. Anything left out is reported, or raises."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

import pandas as pd

from cifar10.data.decode import IMAGE_SUFFIXES
from cifar10.data.sources import is_hidden, list_folders
from cifar10.errors import UserError
from cifar10.text import enumerate_names, plural, printable

VALID = ("valid", "val", "validation")  # names of the split to validate on while training


class Item(NamedTuple):
    """An image file."""

    split: str
    label: str  # its class
    file: Path


class Listing:
    """The `images` of `folder`, which may also be a CSV file, from `classes`: split → class → files.

    `notes` say what is left out, and which classes are easily mistaken. If it is `flat`, there are no splits: all
    images are in "train", of which a part is to be validated on.
    """

    def __init__(self, folder: Path, classes: dict[str, dict[str, list[Path]]], ignored: Counter, flat: bool = False):
        self.folder, self.flat, self.notes = folder, flat, list[str]()
        self.root = folder.parent if folder.is_file() else folder
        self.name = printable(self.root.name)
        groups = [(split, label, files) for split, labels in classes.items() for label, files in labels.items()]
        self.images = [Item(split, label, file) for split, label, files in groups for file in files]
        for _, alike in groupby(sorted(classes["train"], key=simplified), key=simplified):
            for one, other in pairwise(alike):
                self.notes.append(f"the classes {one!r} and {other!r} differ by {difference(one, other)} only")
        if ignored.total():
            self.notes.append(f"{plural(ignored.total(), 'file')} ignored: {kinds(ignored)}")

    def without(self, broken: Iterable[tuple[int, str]]) -> list[Item]:
        """The images but for those numbered in `broken`."""
        left_out = dict(broken)
        return [image for i, image in enumerate(self.images) if i not in left_out]

    def relative(self, file: Path) -> str:
        """A file's path below the data set's folder, if it is there."""
        return str(file.relative_to(self.root) if file.is_relative_to(self.root) else file)


def list_folder(folder: Path) -> Listing:
    """The images below `train/<class>/`, and below `<class>/` of the other splits that have train's classes.

    They are `valid/` (or another of `VALID`) and `test/`: if there are both, the first one is for validation while
    training, and the other for the result. A folder without `train/` is flat: its folders are the classes.
    Raises `UserError` if the classes can't be learned, or if a class has no image.
    """
    ignored: dict[str, Counter] = {name: Counter() for name in ("train", *VALID, "test")}
    try:
        if not (folder / "train").is_dir():
            return list_flat(folder, ignored["train"])
        present = [name for name in ignored if (folder / name).is_dir()]
        classes = {split: list_classes(folder / split, ignored[split]) for split in present}
    except OSError as reason:
        raise UserError(f"{reason.filename} can't be read ({reason.strerror}); repair or remove it") from None
    others = [split for split in present if split != "train"]
    fit = [split for split in others if classes[split].keys() & classes["train"].keys()]
    fit = fit or [split for split in others if classes[split]][:1]
    used = ["train", *[split for split in fit if split != "test"][:1], *[split for split in fit if split == "test"]]
    chosen, found = {split: classes[split] for split in used}, sum((ignored[split] for split in used), Counter())
    check_classes(folder, chosen, found)
    listing = Listing(folder, chosen, found)
    if nested := sum(len(image.file.relative_to(folder).parts) > 3 for image in listing.images):
        listing.notes.append(f"{plural(nested, 'image')} in folders within a class, counted as part of it")
    if beside := [path.name for path in list_folders(folder) if path.name.casefold() not in present]:
        listing.notes.append(f"not used, beside train/: {enumerate_names(beside)}")
    for split in present:
        if split not in used:
            why = f"{used[1]}/ is" if split in fit else "it has none of train's classes"
            why = why if classes[split] else "its files have no class folders"
            listing.notes.append(f"{split}/ is not used: {why}")
    return listing


def list_flat(folder: Path, ignored: Counter) -> Listing:
    """The images below `<class>/`. Raises like `list_folder`, also if the folders look like splits."""
    classes = list_classes(folder, ignored)
    if splits := [name for name in classes if simplified(name) in ("train", "training", *VALID, "test", "testing")]:
        names = enumerate_names(splits)
        raise UserError(f"{folder} holds {names}, but no train/; rename its folders to train, valid and test")
    check_classes(folder, {"": classes}, ignored)
    return Listing(folder, {"train": classes}, ignored, flat=True)


def list_table(table: Path) -> Listing:
    """The images that a CSV file names: columns `image` (a path relative to the file), `label` and perhaps `split`.

    Splits are train, valid (or another of `VALID`) and test; without that column, the images are flat.
    Raises `UserError` for a file that is no such table.
    """
    try:
        rows = pd.read_csv(table, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as reason:
        raise UserError(f"{table} can't be read as a table ({str(reason).strip()})") from None
    if not isinstance(rows.index, pd.RangeIndex):
        raise UserError(f"{table} has rows longer than its first line; name all columns, or remove commas at the ends")
    if not {"image", "label"} <= {*rows}:
        raise UserError(f"{table} has the columns {enumerate_names(rows)}; it must have image and label")
    flat = "split" not in rows
    rows["split"] = "train" if flat else rows["split"].str.strip()
    rows["label"] = rows["label"].map(lambda label: normalize("NFC", label.strip()))
    for name, wrong in (
        ("label", rows["label"] == ""),
        ("split", ~rows["split"].isin(("train", *VALID, "test"))),
        ("image", rows["image"].map(Path).duplicated()),
    ):
        if wrong.any():
            line, value = wrong.idxmax() + 2, rows[name][wrong.idxmax()]
            why = {"label": "it is empty", "split": "it must be train, valid or test", "image": "it is there twice"}
            raise UserError(f"{table}, line {line}: {name} is {value!r}; {why[name]}")
    classes: dict[str, dict[str, list[Path]]] = {}
    for split in [name for name in ("train", *VALID, "test") if name in {*rows["split"]} or name == "train"]:
        groups = rows[rows["split"] == split].groupby("label")["image"]
        classes[split] = {str(label): [table.parent / image for image in images] for label, images in groups}
    check_classes(table, classes, Counter())
    return Listing(table, classes, Counter(), flat)


def kinds(ignored: Counter) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in ignored.most_common() if count)


def list_classes(split: Path, ignored: Counter) -> dict[str, list[Path]]:
    """Class → its images, both by name. Names that differ by Unicode normalization only are the same class."""
    classes: dict[str, list[Path]] = {}
    for entry in sorted(split.iterdir()):
        if is_hidden(entry.name):
            ignored["hidden"] += 1
        elif not entry.is_dir():
            ignored[f"directly in {split.name}/"] += 1
        else:
            classes.setdefault(normalize("NFC", entry.name), []).extend(list_images(entry, ignored))
    return dict(sorted(classes.items()))


def list_images(folder: Path, ignored: Counter) -> Iterator[Path]:
    """Files with one of `IMAGE_SUFFIXES` below `folder`, by path; other files are counted by suffix."""

    def fail(reason: OSError):
        raise reason

    visited = set()
    for path, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        if (real := os.path.realpath(path)) in visited:  # links may lead in circles
            folders.clear()
            continue
        visited.add(real)
        ignored["hidden"] += sum(map(is_hidden, folders))
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for name in sorted(files):
            suffix = os.path.splitext(name)[1].lower()
            if is_hidden(name):
                ignored["hidden"] += 1
            elif suffix in IMAGE_SUFFIXES:
                yield Path(path, name)
            else:
                ignored[printable(suffix) or "without a suffix"] += 1


def check_classes(folder: Path, classes: dict[str, dict[str, list[Path]]], ignored: Counter):
    """Raise `UserError` for classes that can't be learned.

    `classes` maps split → class → images. The first split is train, or "" for all images of a flat folder.
    """
    (first, train), *_ = classes.items()
    where = f"{folder}/{first}".rstrip("/")
    if not any(train.values()):
        raise UserError(f"{folder} holds no images in {first or '.'}/<class>/; it should hold PNG or JPEG files there")
    bare = [(split, name) for split in classes for name in classes[split] if not classes[split][name]]
    if empty := [f"{split}/{name}".lstrip("/") for split, name in bare]:
        what = f"{folder} has class folders without images: {enumerate_names(empty)}"
        other = f" (ignored files: {kinds(ignored)})" if ignored.total() else ""
        raise UserError(f"{what}; add some or remove them{other}")
    if len(train) == 1:
        raise UserError(f"{where} holds images of one class only, {printable(*train)}; add another")
    for split, others in classes.items():
        if unknown := sorted(others.keys() - train.keys()):
            near = [(one, other) for one in unknown for other in train if simplified(one) == simplified(other)]
            hint = "".join(f"; {one!r} differs from {other!r} by {difference(one, other)}" for one, other in near[:3])
            names = enumerate_names(map(repr, unknown))
            raise UserError(f"{folder}/{split} has classes that train lacks, {names}{hint}; rename, remove or add them")


def simplified(name: str) -> str:
    """Equal for names that a reader would take for the same."""
    return "".join(normalize("NFKC", name).casefold().replace("_", " ").replace("-", " ").split())


def difference(one: str, other: str) -> str:
    """What makes two names different that are the same when simplified."""
    if one.casefold() == other.casefold():
        return "letter case"
    if one.strip() == other.strip():
        return "spaces at the beginning or end"
    return "letter case, spaces, punctuation or similar characters"
