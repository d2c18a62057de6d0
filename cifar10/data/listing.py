"""Which images a folder holds, and the split and class of each. Anything left out is reported, or raises."""

import os
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

from cifar10.data.decode import IMAGE_SUFFIXES
from cifar10.data.folders import find_splits, is_hidden, list_folders, pass_through, table_hint
from cifar10.data.reading import Reading
from cifar10.errors import UserError
from cifar10.text import enumerate_names, plural, printable

OR_CLASSES = "or if these are classes, put all folders into one named train, and add --valid holdout"
# Folders of a data set for detection or segmentation, as `simplified` gives them.
IMAGES = {"image", "images", "img", "imgs", "jpegimages"}
ANNOTATIONS = {"annotation", "annotations", "mask", "masks", "label", "labels", "groundtruth", "gt"}
# Names of folders that say nothing about the images in them.
VAGUE = {"", "data", "dataset", "datasets", "csv", "image", "images", "img", "labels", "downloads", "tmp", "train"}


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
        names = (self.root.name, *([folder.stem] if folder.is_file() else []))
        self.name = printable(next((name for name in names if name.casefold() not in VAGUE), self.root.name))
        groups = [(split, label, files) for split, labels in classes.items() for label, files in labels.items()]
        self.images = [Item(split, label, file) for split, label, files in groups for file in files]
        for _, alike in groupby(sorted(classes["train"], key=simplified), key=simplified):
            for one, other in pairwise(alike):
                self.notes.append(f"the classes {one!r} and {other!r} differ by {difference(one, other)} only")
        self.notes += find_twins(classes["train"])
        if ignored.total():
            self.notes.append(f"{plural(ignored.total(), 'file')} ignored: {kinds(ignored)}")

    def without(self, broken: Iterable[tuple[int, str]]) -> list[Item]:
        """The images but for those numbered in `broken`."""
        left_out = dict(broken)
        return [image for i, image in enumerate(self.images) if i not in left_out]

    def relative(self, file: Path) -> str:
        """A file's path below the data set's folder, if it is there."""
        return str(file.relative_to(self.root) if file.is_relative_to(self.root) else file)


def list_folder(folder: Path, reading: Reading | None = None) -> Listing:
    """The images of a folder of splits with class folders, or of class folders.

    Raises `UserError` if the classes can't be learned, or if a class has no image.
    """
    skip = {name.rstrip("/") for name in (reading or Reading()).skipped}  # a shell adds it to the name of a folder
    try:
        splits = find_splits(folder)
        listing = (list_splits if "train" in splits else list_flat)(folder, splits, skip)
    except OSError as reason:
        raise UserError(f"{reason.filename} can't be read ({reason.strerror}); repair or remove it") from None
    places = [path for paths in splits.values() for path in paths] if "train" in splits else [folder]
    listing.notes += find_unknown(skip, (path.name for place in places for path in list_folders(pass_through(place))))
    nested = [image for image in listing.images if normalize("NFC", image.file.parent.name) != image.label]
    if nested:
        note = f"{plural(len(nested), 'image')} in folders within a class, counted as part of it"
        inner = {image.file.relative_to(folder).parts[:2] for image in nested}
        if listing.flat and len({outer for outer, _ in inner}) == 1 < len(inner):
            outer = next(iter(inner))[0]
            note += f"; if these folders are the classes, pass --data {shlex.quote(str(folder / outer))}"
        listing.notes.append(note)
    return listing


def list_splits(folder: Path, splits: dict[str, list[Path]], skip: set[str]) -> Listing:
    """The images below `train/<class>/`, and below `<class>/` of the other splits that have train's classes.

    If there are both `valid/` and `test/`, the first one is for validation while training, and the other for the
    result. `splits` are the folders whose name means each of them, of which the first that fits is used.
    """
    paths = [(split, path) for split, paths in splits.items() for path in paths]
    ignored: dict[Path, Counter] = {path: Counter() for _, path in paths}
    classes = {path: list_classes(pass_through(path), ignored[path], skip) for _, path in paths}
    train = next((path for path in splits["train"] if classes[path]), splits["train"][0])
    if not classes[train] and any(list_images(train, Counter())):
        names = enumerate_names([path.name for _, path in paths])
        hint = table_hint(folder) or f"; they need train/<class>/, {OR_CLASSES}"
        raise UserError(f"{folder} holds {names}, but no class folders in {train.name}{hint}")
    fit = [(split, path) for split, path in paths if path == train or classes[path].keys() & classes[train].keys()]
    if len(fit) == 1:  # which classes are missing is an error of its own
        fit += [(split, path) for split, path in paths if split != "train" and classes[path]][:1]
    used: dict[str, Path] = {}
    for split, path in fit:
        used.setdefault(split, path)
    found = sum((ignored[path] for path in used.values()), Counter())
    check_classes(folder, {path.name: classes[path] for path in used.values()}, found)
    listing = Listing(folder, {split: classes[path] for split, path in used.items()}, found)
    if beside := [path.name for path in list_folders(folder) if path not in classes]:
        listing.notes.append(f"not used, beside {train.name}/: {enumerate_names(beside)}")
    for split, path in paths:
        if path not in used.values():
            why = f"{used[split].name}/ is" if (split, path) in fit else "it has none of train's classes"
            why = why if classes[path] else "its files have no class folders"
            listing.notes.append(f"{path.name}/ is not used: {why}")
    return listing


def list_flat(folder: Path, splits: dict[str, list[Path]], skip: set[str]) -> Listing:
    """The images below `<class>/`. Raises `UserError` if folders look like splits."""
    ignored = Counter[str]()
    classes = list_classes(folder, ignored, skip)
    if names := [path.name for paths in splits.values() for path in paths if path.name in classes]:
        what = f"{folder} holds {enumerate_names(names)}, but no train/"
        raise UserError(f"{what}; rename its folders to train, valid and test, {OR_CLASSES}")
    check_classes(folder, {"": classes}, ignored)
    return Listing(folder, {"train": classes}, ignored, flat=True)


def find_unknown(skip: set[str], names: Iterable[str]) -> Iterator[str]:
    """A note about classes to skip that are not among the `names`, perhaps because they are misspelled."""
    if unknown := skip - {normalize("NFC", name) for name in names}:
        yield f"there is no class {' or '.join(map(repr, sorted(unknown)))} to skip"


def find_twins(classes: dict[str, list[Path]]) -> Iterator[str]:
    """Notes about images that may be masks, or other versions of the same images."""
    versions, named_alike = defaultdict(list), defaultdict(list)
    for label, files in classes.items():
        for file in files:
            versions[file.with_suffix("")].append(printable(file.name))
        named_alike[frozenset(file.stem for file in files)].append(label)
    if twice := [names for names in versions.values() if len(names) > 1]:
        what = f"{sum(map(len, twice)):,} images differ by the suffix of their names only"
        yield f"{what}, like {' and '.join(twice[0])}; remove those that are masks or copies"
    for stems, labels in named_alike.items():
        if len(labels) > 1 and len({stem.rstrip("0123456789") for stem in stems}) > 1:  # not just numbered
            yield f"the files of {enumerate_names(labels)} have the same names; are they masks or copies?"


def kinds(ignored: Counter) -> str:
    """What files were ignored: `2 .heic, 1 hidden`."""
    return ", ".join(f"{count} {kind}" for kind, count in ignored.most_common() if count)


def list_classes(split: Path, ignored: Counter, skip: set[str]) -> dict[str, list[Path]]:
    """Class → its images, both by name. Names that differ by Unicode normalization only are the same class.

    Images of the classes to `skip` are counted.
    """
    classes: dict[str, list[Path]] = {}
    for entry in sorted(split.iterdir()):
        if is_hidden(entry.name):
            ignored["hidden"] += 1
        elif not entry.is_dir():
            ignored[f"directly in {split.name}/"] += 1
        elif (label := normalize("NFC", entry.name)) in skip:
            ignored["in skipped classes"] += sum(1 for _ in list_images(entry, Counter()))
        else:
            classes.setdefault(label, []).extend(list_images(entry, ignored))
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
    simple = {simplified(name): name for name in train}
    if (images := simple.keys() & IMAGES) and (marks := simple.keys() & ANNOTATIONS):
        names = " beside ".join(f"{simple[min(found)]}/" for found in (images, marks))
        needed = f"it needs a folder for each class{table_hint(folder) or ', or a CSV file of labels'}"
        raise UserError(f"{folder} holds {names}, which are no classes; {needed}")
    where = f"{folder}/{first}".rstrip("/")
    if not any(train.values()):
        raise UserError(f"{folder} holds no images in {first or '.'}/<class>/; it should hold PNG or JPEG files there")
    bare = [(split, name) for split in classes for name in classes[split] if not classes[split][name]]
    if empty := [f"{split}/{name}".lstrip("/") for split, name in bare]:
        what = f"{folder} has class folders without images: {enumerate_names(empty)}"
        other = f" (ignored files: {kinds(ignored)})" if ignored.total() else ""
        skip = shlex.join(dict.fromkeys(name for _, name in bare))
        raise UserError(f"{what}{other}; add some or remove them, or leave them out with --skip_classes {skip}")
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
