"""Tables that name images and their classes, as people save them: which separator, which columns, which files."""

import codecs
import csv
import io
import os
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NoReturn
from unicodedata import normalize

import pandas as pd

from cifar10.data.decode import IMAGE_SUFFIXES
from cifar10.data.folders import SPLITS, list_folders, split_of
from cifar10.data.listing import Listing, check_classes, find_unknown
from cifar10.data.reading import Reading
from cifar10.errors import UserError
from cifar10.text import enumerate_names, printable

BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
LABELS = ("label", "class", "category")  # names of the column of classes, the usual one first
SAMPLE = 2**16  # characters that show which separator a table has

Find = Callable[[Path], list[Path]]  # see `finder`


def list_table(table: Path, reading: Reading) -> Listing:
    """The images that a table names, in a column of paths or ids, with their class and perhaps their split.

    Without options, the columns are `image`, `label` and `split`, or those that alone can be. Paths are relative to
    `reading.images`, by default the table's folder, or the only folder in it that holds all images. Without a column of
    splits, the images are flat. Raises `UserError` for a file that is no such table, and if it is unclear what is what.
    """
    find = finder()
    rows = read_rows(table)
    folders = [Path(reading.images).expanduser()] if reading.images else [table.parent, *list_folders(table.parent)]
    if not has_header([*rows.iloc[0]], reading, lambda cell: any(is_image(find, folder / cell) for folder in folders)):
        rows.columns = pd.Index([str(number + 1) for number in range(rows.shape[1])])
    else:
        rows.columns = pd.Index([name or str(number) for number, name in enumerate(rows.iloc[0], start=1)])
        rows = rows.iloc[1:]
    if not rows.columns.is_unique:
        raise UserError(f"{table} has the columns {enumerate_names(rows)}; give each another name")
    folder, image, label, split = choose_columns(table, rows, reading, folders, find)
    labels, skipped = {*rows[label]}, rows[label].isin(reading.skipped)
    parts = {*rows[split].map(split_of)} if split else set()
    rows = rows[~skipped]
    found = rows[image].map(lambda cell: find(folder / cell))
    files = pd.Series([paths[0] if paths else folder / cell for paths, cell in zip(found, rows[image])], rows.index)
    splits = rows[split].map(split_of) if split else pd.Series("train", rows.index)
    for column, wrong, why in (
        (label, rows[label] == "", "it is empty"),
        (image, rows[image] == "", "it is empty"),
        (split, splits.isna(), "it must be train, valid or test"),
        (image, found.map(len) > 1, "there are images of this name with several suffixes"),
        (image, files.duplicated(), "it is there twice"),
    ):
        if wrong.any():
            line, *others = rows.index[wrong]
            where = f"{table}, line {line}" + (f" and {len(others):,} more" if others else "")
            raise UserError(f"{where}: {column} is {rows[column][line]!r}; {why}")
    notes = [*find_unknown(reading.skipped, labels)]
    if len(parts) == 1 and parts != {"train"}:  # a table of test images, for example
        notes.append(f"all images are in the split {parts.pop()}, so they count as not split")
        split, splits = None, pd.Series("train", rows.index)
    classes: dict[str, dict[str, list[Path]]] = {name: {} for name in SPLITS if name == "train" or name in {*splits}}
    for (split_name, class_name), group in files.groupby([splits, rows[label]]):
        classes[split_name][class_name] = list(group)
    ignored = Counter({"in skipped classes": int(skipped.sum())})
    check_classes(table, classes, ignored)
    if not found.map(len).any():
        what = f"none of the images that {table} names in the column {image} is in {folder}"
        raise UserError(f"{what}; pass the folder that holds them with --images")
    listing = Listing(table, classes, ignored, flat=not split)
    listing.notes += notes
    if (folder, image, label) != (table.parent, "image", "label"):
        where = f" in {printable(folder.name)}/" if folder != table.parent else ""
        splits_too = f", splits: column {printable(split)}" if split else ""
        listing.notes.append(
            f"images: column {printable(image)}{where}, classes: column {printable(label)}{splits_too}"
        )
    return listing


def has_header(first: list[str], reading: Reading, is_image: Callable[[str], bool]) -> bool:
    """Whether the first line of a table names columns instead of an image.

    A usual name of a column, or one that was typed, is not that of an image without its suffix, even if there is one.
    """
    images = [cell for cell in first if is_image(cell)]
    typed = (reading.image_column, reading.label_column, reading.split_column)
    names = {"image", *LABELS, "split", *(name.casefold() for name in typed if name and not name.isdigit())}
    with_suffix = [cell for cell in images if os.path.splitext(cell)[1].lower() in IMAGE_SUFFIXES]
    return not images or (not with_suffix and not names.isdisjoint(cell.casefold() for cell in first))


def read_rows(table: Path) -> pd.DataFrame:
    """The cells of all rows that are not blank, without spaces around them; the index is the number of their line."""
    try:
        data = table.read_bytes()
        encoding = next((encoding for bom, encoding in BOMS.items() if data.startswith(bom)), "utf-8")
        text = normalize("NFC", data.decode(encoding))
        sample = text[:SAMPLE]
        separator = max(",;\t|", key=lambda separator: count_rows(split_cells(sample, separator)))
        lines = split_cells(text, separator if count_rows(split_cells(sample, separator)) else " ")
    except UnicodeError:
        raise UserError(f"{table} is not in UTF-8; save it as UTF-8 (in Excel: CSV UTF-8)") from None
    except (OSError, csv.Error) as reason:
        raise UserError(f"{table} can't be read as a table ({reason})") from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UserError(f"{table}, line {line} holds a NUL byte; remove it, and save the file as UTF-8")
    if not lines:
        raise UserError(f"{table} can't be read as a table (it is empty)")
    width = len(next(iter(lines.values())))
    if longer := [line for line, cells in lines.items() if len(cells) > width]:
        what = f"{table} has rows longer than its first line"
        raise UserError(f"{what}; name all columns, or remove commas at the ends (line {longer[0]})")
    return pd.DataFrame(list(lines.values()), index=list(lines)).fillna("")


def split_cells(text: str, separator: str) -> dict[int, list[str]]:
    """Number of the line → cells; spaces may be several, to align columns."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    rows = ((reader.line_num, [cell.strip() for cell in row if cell or separator != " "]) for row in reader)
    return {line: cells for line, cells in rows if any(cells)}


def count_rows(lines: dict[int, list[str]]) -> int:
    """How many rows have as many cells as the first one, if that has several."""
    widths = [len(row) for row in lines.values()]
    return widths.count(widths[0]) if widths and widths[0] > 1 else 0


def finder() -> Find:
    """A function path → the files that it means: with this name, in any Unicode form, or images without the suffix.

    Each folder is listed once, because asking for each file takes much longer.
    """

    @cache
    def folders(path: Path) -> list[Path]:
        if path.is_dir():
            return [path]
        inside = (same for parent in folders(path.parent) for same in parent.iterdir())
        return [same for same in inside if normalize("NFC", same.name) == path.name and same.is_dir()]

    @cache
    def files(folder: Path) -> dict[str, list[Path]]:
        names, stems = defaultdict(list), defaultdict(list)
        with suppress(OSError):
            for entry in (
                entry for path in folders(folder) for entry in sorted(os.scandir(path), key=lambda e: e.name)
            ):
                if entry.is_file():
                    name = normalize("NFC", entry.name)
                    stem, suffix = os.path.splitext(name)
                    names[name].append(Path(entry.path))
                    if suffix.lower() in IMAGE_SUFFIXES:
                        stems[stem].append(Path(entry.path))
        return stems | names

    return lambda path: files(path.parent).get(path.name, [])


def is_image(find: Find, path: Path) -> bool:
    return any(same.suffix.lower() in IMAGE_SUFFIXES for same in find(path))


def choose_columns(
    table: Path, rows: pd.DataFrame, reading: Reading, folders: Sequence[Path], find: Find
) -> tuple[Path, str, str, str | None]:
    """The folder of the images, and the columns of images, classes and splits, if there are any."""
    usual = {name.casefold(): name for name in rows}
    image = reading.image_column or usual.get("image")
    label = reading.label_column or next((usual[name] for name in LABELS if name in usual), None)
    named_split = reading.split_column or usual.get("split")

    def fail(why: str) -> NoReturn:
        first = image or next((name for name in rows if name != label), "COLUMN")
        others = [name for name in rows if name != first]
        repeated = [name for name in others if 1 < rows[name].nunique() < len(rows)]  # as classes are
        guess = label or ["COLUMN", *others, *repeated][-1]
        options = ["--data", str(table), "--image_column", first, "--label_column", guess]
        raise UserError(f"{table} has the columns {enumerate_names(rows)}; {why}, like {shlex.join(options)}")

    for name in (reading.image_column, reading.label_column, reading.split_column):
        if name and name not in rows:
            raise UserError(f"{table} has no column {name!r}; its columns are {enumerate_names(rows)}")
    candidates = [image] if image else [name for name in rows if name not in (label, named_split)]
    used = rows[~rows[label].isin(reading.skipped)] if label else rows
    places = [
        (folder, name)
        for folder in folders
        for name in candidates
        if len(used) and used[name].is_unique and all(is_image(find, folder / cell) for cell in used[name])
    ]
    places = [place for place in places if place[0] == folders[0]] or places
    if len(places) > 1 and image:
        fail(f"several folders hold the images; add --images {shlex.quote(str(places[0][0]))} or another")
    if len(places) != 1 and not image:
        fail("say which one names existing images, and with --images in which folder")
    folder, image = places[0] if places else (folders[0], str(image))
    others = [name for name in rows if name != image]
    splits = [name for name in others if rows[name].nunique() > 1 and rows[name].map(split_of).notna().all()]
    split = named_split or (splits[0] if len(splits) == 1 else None)
    if not label:
        others = [name for name in others if name not in (split, *splits)]
        repeated = [name for name in others if 1 < rows[name].nunique() <= len(rows) / 2]
        likely = others if len(others) == 1 else repeated
        if len(likely) != 1:
            fail("say which one names the classes")
        label = likely[0]
    return folder, image, label, split
