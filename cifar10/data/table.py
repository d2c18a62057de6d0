"""Images in memory: every file of an image folder decoded once into one tensor, which is cached on disk."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastai.vision.all import chunked, fastai_path
from sklearn.model_selection import train_test_split
from torch import Tensor

from cifar10.data.cache import PixelFile, digest, images_at_once, overwrite, publish, write_pixels
from cifar10.data.decode import SIZE, ValueRanges, decode_files, full_range
from cifar10.data.listing import Listing, list_folder, list_table
from cifar10.data.sources import prepare_data, short_hash, short_name
from cifar10.errors import UserError
from cifar10.text import enumerate_names, printable

HOLDOUT = 0.1  # of the training images, for hyperparameter selection without the test split
IMBALANCE = 10  # times as many images of a class as of another are worth a word
HOLDOUT_SEED = 42  # the same for every run, so that runs with different seeds can be compared
DECODER = 3  # raise it when decode.py makes other pixels of a file


class ImageTable:
    """All images of a data set: `files[i]`, of class `labels[i]`, decodes to `pixels[i]`, uint8 `(N, 3, size, size)`.

    They are decoded on all cores, once: the result is cached beside fastai's data. The cache is written atomically, and
    renewed when a name, size or time in the folder changes or its checksum does not match. Up to 1 GiB of pixels are
    in memory, more stay on the disk (`PixelFile`). `folder` may also be a CSV file, see `list_table`.
    `ranges` are the values that became 0 and 255, if images have more than 8 bits per value, see `decode_image`; they
    are found, unless those of another data set are given. `hash` is the SHA-256 of the pixels and of each image's split
    and class. `data` is what `prepare_data` takes to find the folder again, and `defaults` the hyperparameters that
    suit the images better than a recipe's. `valid_pct` is the part of the images to validate on where there is no split
    for it. What a user should know about the folder is printed. Raises `UserError` if there are files that can't be
    read, unless `skip_broken` leaves them out, and if the rest can't be trained on.
    """

    def __init__(self, data: str | Path, skip_broken: bool = False, size: int = SIZE,
                 valid_pct: float | None = None, ranges: ValueRanges | None = None):  # fmt: skip
        folder, self.data, self.defaults = prepare_data(data)
        self.folder, self.name = folder, printable(folder.parent.name if folder.is_file() else folder.name)
        self.size, self.valid_pct = size, valid_pct
        listing = list_table(folder) if folder.is_file() else list_folder(folder)
        self.copies: dict[torch.device, Tensor] = {}
        self.fingerprint, self.given = fingerprint(listing, folder, ranges), ranges
        self.cache = fastai_path("data") / "decoded" / f"{short_name(folder.name)}-{short_hash(folder)}-{size}.pixels"
        self.pixels, state = self.load(listing) or self.build(listing)
        self.hash, self.ranges = state["sha256"], {kind: tuple(limits) for kind, limits in state["ranges"].items()}
        self.flat, self.sizes = listing.flat, [tuple(found) for found in state["sizes"]]
        notes, broken = listing.notes, dict(state["broken"])
        if broken:
            names = [f"{relative(listing.files[i], folder)} ({why})" for i, why in broken.items()]
            trouble = f"{len(broken):,} of {len(listing.files):,} images can't be used: {enumerate_names(names)}"
            if not skip_broken:
                raise UserError(f"{trouble}; repair or remove them, or leave them out with --skip_broken")
            notes.append(f"left out, because {trouble}")
        keep = [i for i in range(len(listing.files)) if i not in broken]
        self.files = [listing.files[i] for i in keep]
        self.splits, self.labels = [listing.splits[i] for i in keep], [listing.labels[i] for i in keep]
        self.split_names, self.classes = list(dict.fromkeys(listing.splits)), sorted({*listing.labels})
        self.row = {file: row for row, file in enumerate(self.files)}
        train = [row for row, split in enumerate(self.splits) if split == "train"]
        counts = Counter(self.labels[row] for row in train)
        if lost := {*self.classes} - {*counts}:
            where = folder if listing.flat else f"{folder}/train"
            raise UserError(f"no image of {enumerate_names(lost)} in {where} can be used; repair or remove it")
        for what, rows in state["found"].items():
            names = [relative(self.files[row], folder) for row in rows]
            notes.append(f"{len(rows):,} of {len(self.files):,} images {what}: {enumerate_names(names)}")
            if {*rows} >= {*train} and (self.pixels[train[:1000]] == self.pixels[train[0]]).all():
                raise UserError(f"{notes[-1]}; all are the same, check how the files were made")
        (most, many), (least, few) = counts.most_common()[0], counts.most_common()[-1]
        if many > IMBALANCE * few:
            few_and_many = f"{printable(most)} has {many:,} training images and {printable(least)} {few:,}"
            notes.append(f"{few_and_many}: look at the accuracy per class, and consider --weighted")
        for note in notes:
            print(f"{self.name}: {note}")

    @classmethod
    def open(cls, data: "str | Path | ImageTable", *args, **kwargs) -> "ImageTable":
        """The images that `data` names, unless it is an `ImageTable` already."""
        return data if isinstance(data, ImageTable) else cls(data, *args, **kwargs)

    def split_rows(self, valid: str) -> list[np.ndarray]:
        """Rows of the training images, of the validation images, and of the test images if they are a third split.

        `valid` is "test" for the folder's own splits, or "holdout" for a part of the training images. This part is
        `valid_pct`, by default a tenth, or a fifth of a folder without splits; it is the same for every run.
        """
        if valid not in ("test", "holdout"):
            raise UserError(f"valid is {valid!r}; it must be one of test, holdout")
        splits = np.array(self.splits)
        train, *others = (np.flatnonzero(splits == name) for name in self.split_names)
        if valid == "holdout" or self.flat:
            part = self.valid_pct or (0.2 if self.flat else HOLDOUT)
            labels = [self.labels[row] for row in train]
            if single := [label for label, count in Counter(labels).items() if count == 1]:
                names = enumerate_names(single)
                raise UserError(f"{self.folder} has a single training image of {names}; add another, or remove it")
            try:
                train, held_out = train_test_split(train, test_size=part, random_state=HOLDOUT_SEED, stratify=labels)
            except ValueError as reason:
                raise UserError(f"{self.folder} has too few images to hold {part:g} of them out ({reason})") from None
            return [np.sort(train), held_out]
        if not others:
            names = "test/, valid/ or val/ with class folders"
            raise UserError(f"{self.folder} has no {names} beside train/; add one or use --valid holdout")
        if self.valid_pct is not None:
            raise UserError(f"{self.data} has splits of its own; add --valid holdout, or leave out --valid_pct")
        if lost := [f"{self.folder}/{name}" for name, rows in zip(self.split_names[1:], others) if not len(rows)]:
            raise UserError(f"no image in {enumerate_names(lost)} can be used; repair or remove it")
        return [train, *others]

    def rows_of(self, split: str) -> np.ndarray:
        """Rows of the images of one split; "all" are those of all splits. Raises `UserError` if there are none."""
        if split != "all" and split not in self.split_names:
            raise UserError(f"{self.folder} has no {split} split; it has {', '.join(self.split_names)}; or use all")
        return np.flatnonzero([split in ("all", name) for name in self.splits])

    def pixels_on(self, device: torch.device) -> Tensor | PixelFile:
        """The pixels on a device, where they are copied once for all DataLoaders, unless they are on the disk."""
        if isinstance(self.pixels, PixelFile):
            return self.pixels
        if device not in self.copies:
            self.copies[device] = self.pixels.to(device)  # on a CPU these are the same ones
        return self.copies[device]

    def stats(self, rows) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel over all pixels of the given images, in [0, 1].

        Exact: every one of the 256 values is counted, per channel.
        """
        levels, counts = torch.arange(256, dtype=torch.float64) / 255, torch.zeros(3, 256, dtype=torch.float64)
        for some in torch.as_tensor(rows, device="cpu").split(images_at_once(self.size)):
            pixels = self.pixels[some]
            counts += torch.stack([torch.bincount(pixels[:, channel].flatten(), minlength=256) for channel in range(3)])
        mean = [(count * levels).sum() / count.sum() for count in counts]
        std = [((c * (levels - mu) ** 2).sum() / c.sum()).sqrt() for c, mu in zip(counts, mean)]
        return [mu.item() for mu in mean], [max(sigma.item(), 1 / 255) for sigma in std]  # a channel may be constant

    def load(self, listing: Listing) -> tuple[Tensor | PixelFile, dict[str, Any]] | None:
        """Pixels and state from the cache, if it is intact and fits the folder."""
        with suppress(OSError, LookupError, TypeError, ValueError):  # there is no cache, or a damaged one
            state = json.loads(self.cache.with_suffix(".json").read_text(encoding="utf-8"))
            broken = dict(state["broken"])
            places = [f"{listing.splits[i]}/{listing.labels[i]}" for i in range(len(listing.files)) if i not in broken]
            pixels = PixelFile(self.cache, len(places), self.size)
            fits = state["fingerprint"] == self.fingerprint and self.cache.stat().st_size == np.prod(pixels.shape)
            if fits and state["sha256"] == digest(places, pixels):
                return pixels.load(), state
        return None

    def build(self, listing: Listing) -> tuple[Tensor | PixelFile, dict[str, Any]]:
        """Decode all images and cache them."""
        print(f"Decoding {len(listing.files):,} images of {self.name}, once …")
        broken: dict[int, str] = {}
        used: dict[int, tuple] = {}  # of images with more than 8 bits per value
        sizes: list[tuple[int, int]] = []

        def decoded() -> Iterator[list[np.ndarray]]:
            step = images_at_once(self.size)
            for begin in range(0, len(listing.files), step):
                files = listing.files[begin : begin + step]
                group = list(enumerate(decode_files(files, self.given or {}, self.size), begin))
                broken.update((i, item) for i, item in group if isinstance(item, str))
                good = [(i, item) for i, item in group if i not in broken]
                used.update((i, item.used) for i, item in good if item.used)
                sizes.extend(item.size for _, item in good)
                yield [item.pixels for _, item in good]

        temporary = self.cache.with_name(f".{self.cache.name}.{os.getpid()}.part")
        try:
            written = write_pixels(temporary, decoded(), self.size)
            keep = [i for i in range(len(listing.files)) if i not in broken]
            ranges = dict(self.given or {})
            for kind in sorted({kind for kind, *_ in used.values()} - {*ranges}):
                lows, highs = zip(*(limits for other, *limits in used.values() if other == kind))
                ranges[kind] = full_range(kind, min(lows), max(highs))
            if used and not self.given:  # again, with the range of all
                row, again = {i: row for row, i in enumerate(keep)}, [listing.files[i] for i in used]
                groups = chunked(again, images_at_once(self.size))
                images = (item.pixels for some in groups for item in decode_files(some, ranges, self.size))
                overwrite(written, zip((row[i] for i in used), images, strict=True))
            places = [(listing.splits[i], listing.labels[i]) for i in keep]
            found = suspicious(written, places, listing.flat)
            for kind, (low, high) in ranges.items():
                dark = {i for i, (other, _, top) in used.items() if other == kind and top - low < (high - low) / 10}
                if 2 * len(dark) > sum(other == kind for other, *_ in used.values()):
                    what = f"use less than a tenth of the range from {low:g} to {high:g}"
                    found[what] = [row for row, i in enumerate(keep) if i in dark]
            state = dict(
                fingerprint=self.fingerprint, sha256=digest(map("/".join, places), written), ranges=ranges,
                broken=list(broken.items()), found=found, sizes=[min(sizes), max(sizes)] if sizes else [],
            )  # fmt: skip
            return publish(written, self.cache, state).load(), state
        finally:
            temporary.unlink(missing_ok=True)


def suspicious(pixels: PixelFile, places: list[tuple[str, str]], flat: bool) -> dict[str, list[int]]:
    """What may be wrong with images → their rows; `places` are the split and class of each."""
    one_color, content = [], []
    for chunk in pixels.chunks():
        darkest, brightest = chunk.flatten(2).aminmax(dim=2)
        one_color += (darkest == brightest).all(dim=1).tolist()
        content += [hashlib.sha256(row.data).digest() for row in chunk.numpy()]
    classes: dict[bytes, list[str]] = {}  # of each training image
    for row, (split, label) in enumerate(places):
        if split == "train" and not one_color[row]:
            classes.setdefault(content[row], []).append(label)
    known = [(row, split, classes.get(content[row], [])) for row, (split, _) in enumerate(places)]
    found = {
        "show one color only": [row for row, single in enumerate(one_color) if single],
        "are validation or test images, but identical to training images": [
            row for row, split, same in known if split != "train" and same
        ],
        "are in two classes of train": [row for row, split, same in known if split == "train" and len({*same}) > 1],
        "are identical to others, and may be on both sides of the split": [
            row for row, split, same in known if flat and len(same) > 1
        ],
    }
    return {what: rows for what, rows in found.items() if rows}


def relative(file: Path, folder: Path) -> str:
    """A file's path below the data set's folder, if it is there."""
    root = folder.parent if folder.is_file() else folder
    return str(file.relative_to(root) if file.is_relative_to(root) else file)


def fingerprint(listing: Listing, folder: Path, ranges: ValueRanges | None) -> str:
    """A hash of all that the decoded pixels depend on: the decoder, and each file's name, class, size and time."""
    lines = [f"decoder {DECODER} {ranges}"]
    for file, split, label in zip(listing.files, listing.splits, listing.labels, strict=True):
        try:
            stat = file.stat()
            times = f"{stat.st_mtime_ns} {stat.st_ctime_ns}"  # of the content, and of the content or name
            lines.append(f"{split}/{label} {relative(file, folder)} {stat.st_size} {times}")
        except OSError as reason:  # a link to nowhere, for example; decoding will tell
            lines.append(f"{split}/{label} {relative(file, folder)} {reason.errno}")
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()
