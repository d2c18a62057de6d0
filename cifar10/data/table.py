"""All images of a data set, as one tensor, with the split and class of each."""

import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from cifar10.data.cache import PixelFile, decode_once, images_at_once
from cifar10.data.decode import ValueRanges
from cifar10.data.labels import list_table
from cifar10.data.listing import Item, list_folder
from cifar10.data.reading import Reading
from cifar10.data.sources import prepare_data
from cifar10.errors import UserError
from cifar10.text import enumerate_names

HOLDOUT = 0.1  # part of the training images, to select hyperparameters without the test split
HOLDOUT_SEED = 42  # the same for every run, so that runs with different seeds can be compared


class ImageTable:
    """All images of a data set: `files[i]`, of class `labels[i]`, decodes to `pixels[i]`, uint8 `(N, 3, size, size)`.

    `data` is what `prepare_data` takes. `changes` are fields of the `reading`, like `size=64`. Images are decoded once,
    on all cores, into a cache below fastai's folder, which is renewed when a file's name, size or time changes, or when
    its checksum does not match. Up to 1 GiB of pixels are in memory, more stay on disk (`PixelFile`).

    `folder` is the image folder, or a CSV file (see `list_table`); `data` finds it again. `ranges` are the values that
    became 0 and 255 in images with more than 8 bits per value: those found, or the `fixed_ranges` of another data set.
    `hash` is the SHA-256 of the pixels and of each image's split and class. `defaults` are hyperparameters that suit
    the images better than a recipe's.

    Prints what a user should know about the images. Raises `UserError` if they can't be split as `valid` says (before
    decoding, see `split_rows`), if some can't be read and `skip_broken` is false, and if the rest can't be trained on.
    """

    def __init__(self, data: str | Path, reading: Reading | None = None, valid: str | None = None,
                 fixed_ranges: ValueRanges | None = None, **changes):  # fmt: skip
        self.reading = replace(reading or Reading(), **changes)
        self.size, self.resize = self.reading.size, self.reading.resize
        self.folder, self.data, self.defaults = prepare_data(data)
        is_table = self.folder.is_file()
        listing = list_table(self.folder, self.reading) if is_table else list_folder(self.folder, self.reading)
        self.name, self.flat = listing.name, listing.flat
        self.split_names = list(dict.fromkeys(image.split for image in listing.images))
        self.classes = sorted({image.label for image in listing.images})
        self.set_images(listing.images)
        if valid:
            self.split_rows(valid)
        pixels, state = decode_once(listing, self.size, self.resize, fixed_ranges)
        self.cache, self.pixels, self.hash = pixels.path, pixels.load(), state["sha256"]
        self.copies: dict[torch.device, Tensor] = {}
        self.ranges = {kind: tuple(limits) for kind, limits in state["ranges"].items()}
        self.sizes = [tuple(found) for found in state["sizes"]]
        self.large, self.long = state["large"], state["long"]
        notes, images = listing.notes, listing.without(state["broken"])
        if state["broken"]:
            names = [f"{listing.relative(listing.images[i].file)} ({why})" for i, why in state["broken"]]
            trouble = f"{len(names):,} of {len(listing.images):,} images can't be used: {enumerate_names(names)}"
            if not self.reading.skip_broken:
                raise UserError(f"{trouble}; repair or remove them, or leave them out with --skip_broken")
            notes.append(f"left out, because {trouble}")
            self.set_images(images)
        train = [row for row, split in enumerate(self.splits) if split == "train"]
        if lost := {*self.classes} - {self.labels[row] for row in train}:
            where = self.folder if self.flat else f"{self.folder}/train"
            raise UserError(f"no image of {enumerate_names(lost)} in {where} can be used; repair or remove it")
        for what, groups in state["found"].items():
            rows = [row for group in groups for row in group]
            names = [enumerate_names([listing.relative(self.files[row]) for row in same], " = ", 4) for same in groups]
            if rows:
                notes.append(f"{len(rows):,} of {len(images):,} images {what}: {enumerate_names(names)}")
            if {*rows} >= {*train} and (self.pixels[train[:1000]] == self.pixels[train[0]]).all():
                raise UserError(f"{notes[-1]}; all are the same, check how the files were made")
        for note in notes:
            print(f"{self.name}: {note}")

    def set_images(self, images: list[Item]):
        self.splits, self.labels, self.files = (list(column) for column in zip(*images)) if images else ([], [], [])
        self.row = {file: row for row, file in enumerate(self.files)}

    @classmethod
    def open(cls, data: "str | Path | ImageTable", reading: Reading | None = None, valid: str | None = None,
             fixed_ranges: ValueRanges | None = None, **changes) -> "ImageTable":  # fmt: skip
        """`ImageTable(data, …)`, or `data` itself if it is one; `UserError` if that was read in another way."""
        if not isinstance(data, ImageTable):
            return cls(data, reading, valid, fixed_ranges, **changes)
        wanted = vars(reading or data.reading) | changes
        for name, was in vars(data.reading).items():
            if (wanted[name] or None) != (was or None):  # no list is the same as an empty one
                raise UserError(f"{name} was {was!r} when the images were read; pass their path to read them anew")
        return data

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
            part = self.reading.valid_pct or (0.2 if self.flat else HOLDOUT)
            labels = [self.labels[row] for row in train]
            if single := [label for label, count in Counter(labels).items() if count == 1]:
                what = f"{self.folder} has a single training image of {enumerate_names(single)}"
                raise UserError(f"{what}; add another, or leave it out with --skip_classes {shlex.join(single)}")
            try:
                train, held_out = train_test_split(train, test_size=part, random_state=HOLDOUT_SEED, stratify=labels)
            except ValueError as reason:
                raise UserError(f"{self.folder} has too few images to hold {part:g} of them out ({reason})") from None
            return [np.sort(train), held_out]
        if not others:
            names = "test/, valid/ or val/ with class folders"
            raise UserError(f"{self.folder} has no {names} beside train/; add one or use --valid holdout")
        if self.reading.valid_pct is not None:
            raise UserError(f"{self.data} has splits of its own; add --valid holdout, or leave out --valid_pct")
        if lost := [name for name, rows in zip(self.split_names[1:], others) if not len(rows)]:
            raise UserError(f"no {enumerate_names(lost)} image in {self.folder} can be used; repair or remove them")
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
