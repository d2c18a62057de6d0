"""Images in memory: every file of an image folder decoded once into one tensor, which is cached on disk."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from fastai.vision.all import chunked, fastai_path, parallel
from sklearn.model_selection import train_test_split
from torch import Tensor

from cifar10.cli import UserError
from cifar10.decode import SIZE, ValueRanges, decode, full_range, printable
from cifar10.files import CorruptFileError, load_tensors, save_tensors
from cifar10.listing import Listing, enumerate_names, list_folder
from cifar10.sources import prepare_data, short_hash, short_name

HOLDOUT = 0.1  # of the training images, for hyperparameter selection without the test split
HOLDOUT_SEED = 42  # the same for every run, so that runs with different seeds can be compared
DECODER = 2  # raise it when decode.py makes other pixels of a file


class ImageTable:
    """All images of a folder: `files[i]`, of the class `labels[i]`, decodes to `pixels[i]`, uint8 `(N, 3, 32, 32)`.

    They are decoded on all cores, once: the result is cached beside fastai's data. The cache is written atomically, and
    renewed when a name, size or time in the folder changes or its checksum does not match. `ranges` are the values that
    became 0 and 255, if images have more than 8 bits per value; see `decode_image`.
    `hash` is the SHA-256 of the pixels and of each image's split and class. `data` is what `prepare_data` takes to find
    the folder again, and `defaults` the hyperparameters that suit the images better than a recipe's.
    What a user should know about the folder is printed. Raises `UserError` if there are files that can't be read,
    unless `skip_broken` leaves them out, and if the rest can't be trained on.
    """

    def __init__(self, folder: Path, data: str = "", defaults: Mapping[str, Any] = MappingProxyType({}),
                 skip_broken: bool = False):  # fmt: skip
        self.folder, self.name = folder, printable(folder.name)
        self.data, self.defaults = data or str(folder), dict(defaults)
        listing = list_folder(folder)
        self.fingerprint = fingerprint(listing, folder)
        self.copies: dict[torch.device, Tensor] = {}
        self.cache = fastai_path("data") / "decoded" / f"{short_name(folder.name)}-{short_hash(folder)}.safetensors"
        self.pixels, state = self.load(len(listing.files)) or self.build(listing)
        self.hash, self.ranges = state["sha256"], {kind: tuple(limits) for kind, limits in state["ranges"].items()}
        notes, broken = listing.notes, dict(state["broken"])
        if broken:
            names = [f"{listing.files[i].relative_to(folder)} ({why})" for i, why in broken.items()]
            trouble = f"{len(broken):,} of {len(listing.files):,} images can't be used: {enumerate_names(names)}"
            if not skip_broken:
                raise UserError(f"{trouble}; repair or remove them, or leave them out with --skip_broken")
            notes.append(f"left out, because {trouble}")
        keep = [i for i in range(len(listing.files)) if i not in broken]
        self.files = [listing.files[i] for i in keep]
        self.split, self.labels = [listing.splits[i] for i in keep], [listing.labels[i] for i in keep]
        self.splits, self.classes = sorted({*listing.splits}, key="train".__ne__), sorted({*listing.labels})
        self.row = {file: row for row, file in enumerate(self.files)}
        train = [row for row, split in enumerate(self.split) if split == "train"]
        if lost := {*self.classes} - {self.labels[row] for row in train}:
            raise UserError(f"no image of {enumerate_names(lost)} in {folder}/train can be used; repair or remove it")
        for what, rows in state["found"].items():
            names = [str(self.files[row].relative_to(folder)) for row in rows]
            notes.append(f"{len(rows):,} of {len(self.files):,} images {what}: {enumerate_names(names)}")
            if {*rows} >= {*train} and (self.pixels[train] == self.pixels[train[0]]).all():
                raise UserError(f"{notes[-1]}; all are the same, check how the files were made")
        for note in notes:
            print(f"{self.name}: {note}")

    @classmethod
    def open(cls, data: "str | Path | ImageTable", skip_broken: bool = False) -> "ImageTable":
        """The images that `data` names; see `prepare_data`. Raises `UserError` if they can't be used."""
        return data if isinstance(data, ImageTable) else cls(*prepare_data(data), skip_broken=skip_broken)

    def split_rows(self, valid: str) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the training and of the validation images: `valid` is "test", or "holdout" for a tenth of train."""
        if valid not in ("test", "holdout"):
            raise UserError(f"valid is {valid!r}; it must be one of test, holdout")
        train = np.flatnonzero(np.array(self.split) == "train")
        if valid == "holdout":
            labels = [self.labels[row] for row in train]
            try:
                train, held_out = train_test_split(train, test_size=HOLDOUT, random_state=HOLDOUT_SEED, stratify=labels)
            except ValueError as reason:
                raise UserError(f"{self.folder} has too few images to hold a tenth of them out ({reason})") from None
            return np.sort(train), held_out
        if len(train) == len(self.files):
            names = "test/, valid/ or val/ with class folders"
            raise UserError(f"{self.folder} has no {names} beside train/; add one or use --valid holdout")
        return train, np.flatnonzero(np.array(self.split) != "train")

    def pixels_on(self, device: torch.device) -> Tensor:
        """The pixels on a device, where they are copied once for all DataLoaders."""
        if device not in self.copies:
            self.copies[device] = self.pixels.to(device)  # on a CPU these are the same ones
        return self.copies[device]

    def stats(self, rows) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel over all pixels of the given images, in [0, 1].

        Exact: every one of the 256 values is counted, per channel.
        """
        levels, pixels = torch.arange(256, dtype=torch.float64) / 255, self.pixels[torch.as_tensor(rows, device="cpu")]
        counts = [torch.bincount(pixels[:, channel].flatten(), minlength=256).double() for channel in range(3)]
        mean = [(count * levels).sum() / count.sum() for count in counts]
        std = [((c * (levels - mu) ** 2).sum() / c.sum()).sqrt() for c, mu in zip(counts, mean)]
        return [mu.item() for mu in mean], [max(sigma.item(), 1 / 255) for sigma in std]  # a channel may be constant

    def load(self, files: int) -> tuple[Tensor, dict[str, Any]] | None:
        """Pixels and state from the cache, if it is intact and fits the folder."""
        try:
            tensors, state = load_tensors(self.cache)
        except (FileNotFoundError, CorruptFileError):
            return None
        pixels = tensors.get("pixels")
        if state.get("fingerprint") != self.fingerprint or pixels is None:
            return None
        return (pixels, state) if tuple(pixels.shape) == (files - len(state["broken"]), 3, SIZE, SIZE) else None

    def build(self, listing: Listing) -> tuple[Tensor, dict[str, Any]]:
        """Decode all images and cache them."""
        print(f"Decoding {len(listing.files):,} images of {self.name}, once …")
        decoded = decode_files(listing.files)
        broken = {i: item for i, item in enumerate(decoded) if isinstance(item, str)}
        used = {i: item[1] for i, item in enumerate(decoded) if i not in broken and item[1]}
        ranges = {}
        for kind in sorted({kind for kind, *_ in used.values()}):
            lows, highs = zip(*(limits for other, *limits in used.values() if other == kind))
            ranges[kind] = full_range(kind, min(lows), max(highs))
        if used:  # again, with the range of all
            for i, item in zip(used, decode_files([listing.files[i] for i in used], ranges), strict=True):
                decoded[i] = item
        keep = [i for i in range(len(decoded)) if i not in broken]
        pixels = torch.from_numpy(np.array([decoded[i][0] for i in keep], np.uint8).reshape(-1, 3, SIZE, SIZE))
        places = [(listing.splits[i], listing.labels[i]) for i in keep]
        digest = hashlib.sha256("\n".join(map("/".join, places)).encode(errors="surrogateescape"))
        digest.update(pixels.numpy().data)
        found = suspicious(pixels, places)
        for kind, (low, high) in ranges.items():
            dark = {i for i, (other, _, top) in used.items() if other == kind and top - low < (high - low) / 10}
            if 2 * len(dark) > sum(other == kind for other, *_ in used.values()):
                what = f"use less than a tenth of the range from {low:g} to {high:g}"
                found[what] = [row for row, i in enumerate(keep) if i in dark]
        state = dict(
            fingerprint=self.fingerprint, sha256=digest.hexdigest(), ranges=ranges, broken=list(broken.items()),
            found=found,
        )  # fmt: skip
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(self.cache, {"pixels": pixels}, **state)
        return pixels, state


def suspicious(pixels: Tensor, places: list[tuple[str, str]]) -> dict[str, list[int]]:
    """What may be wrong with images, and with which rows; `places` are the split and class of each."""
    darkest, brightest = pixels.flatten(2).aminmax(dim=2)
    one_color = (darkest == brightest).all(dim=1)
    classes: dict[bytes, set[str]] = {}  # of each training image
    content = [hashlib.sha256(row.data).digest() for row in pixels.numpy()]
    for row, (split, label) in enumerate(places):
        if split == "train" and not one_color[row]:
            classes.setdefault(content[row], set()).add(label)
    known = [(row, split, classes.get(content[row], ())) for row, (split, _) in enumerate(places)]
    found = {
        "show one color only": one_color.nonzero().flatten().tolist(),
        "are validation images, but identical to training images": [
            row for row, split, same in known if split != "train" and same
        ],
        "are in two classes of train": [row for row, split, same in known if split == "train" and len(same) > 1],
    }
    return {what: rows for what, rows in found.items() if rows}


def decode_files(files: list[Path], ranges: ValueRanges = MappingProxyType({})) -> list:
    """What `decode` returns for each file, or why it can't be used, on all cores."""
    chunks = list(chunked(files, 100))
    workers = os.cpu_count() if len(chunks) > 40 else 0  # starting processes takes longer than a few chunks
    parts = parallel(decode_chunk, chunks, ranges=dict(ranges), n_workers=workers, progress=True)
    return [item for part in parts for item in part]


def decode_chunk(files: list[Path], ranges: ValueRanges) -> list:
    def decoded(file):
        try:
            return decode(file, ranges)
        except ValueError as why:
            return str(why)

    return [decoded(file) for file in files]


def fingerprint(listing: Listing, folder: Path) -> str:
    """A hash of all that the decoded pixels depend on: the decoder, and each file's name, class, size and time."""
    lines = [f"decoder {DECODER}"]
    for file, split, label in zip(listing.files, listing.splits, listing.labels, strict=True):
        try:
            stat = file.stat()
            times = f"{stat.st_mtime_ns} {stat.st_ctime_ns}"  # of the content, and of the content or name
            lines.append(f"{split}/{label} {file.relative_to(folder)} {stat.st_size} {times}")
        except OSError as reason:  # a link to nowhere, for example; decoding will tell
            lines.append(f"{split}/{label} {file.relative_to(folder)} {reason.errno}")
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()
