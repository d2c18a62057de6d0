"""The cache of decoded images: a file of uint8 pixels, which may be larger than memory, and its state in JSON."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import torch
from fastai.vision.all import chunked
from torch import Tensor

from cifar10.data.decode import SIZE, Decoded, ValueRanges, decode_files, full_range
from cifar10.data.listing import Item, Listing
from cifar10.data.sources import fastai_home, short_hash, short_name
from cifar10.files import read_json, replacing, write_json

IN_MEMORY = 2**30  # bytes; larger sets of images stay on disk
AT_ONCE = 2**27  # bytes to read or decode in one go
LARGE_SIDE = 4 * SIZE  # side in pixels of an image of which much is lost at the default size
LONG_RATIO = 1.5  # times the shorter side: of such an image, a third and more is cut off
DECODER = 6  # raise it when decode.py makes other pixels of a file, or when the state changes


class PixelFile:
    """Images uint8 `(N, 3, size, size)` on disk, indexed like a tensor.

    The file stays open, so that the pixels remain the same when another process replaces it. Each access maps it anew,
    so that what was read before does not count as memory of this process.
    """

    def __init__(self, path: Path, size: int):
        self.path, self.file = path, path.open("rb")
        self.shape = (os.fstat(self.file.fileno()).st_size // (3 * size**2), 3, size, size)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows) -> Tensor:
        rows = rows.cpu().numpy() if isinstance(rows, Tensor) else rows
        mapped = np.memmap(self.file, np.uint8, "r", shape=self.shape) if len(self) else np.empty(self.shape, np.uint8)
        return torch.from_numpy(np.array(mapped[rows]))

    def load(self) -> "Tensor | PixelFile":
        """The images in memory, if they are few enough."""
        return self[:] if np.prod(self.shape) <= IN_MEMORY else self

    def __reduce__(self):  # an open file can't be pickled
        return PixelFile, (self.path, self.shape[-1])

    def chunks(self) -> Iterator[Tensor]:
        """All images in order, some at a time."""
        step = images_at_once(self.shape[-1])
        for begin in range(0, len(self), step):
            yield self[begin : begin + step]


def images_at_once(size: int) -> int:
    return max(1, AT_ONCE // (3 * size**2))


def digest(images: list[Item], pixels: PixelFile) -> str:
    """SHA-256 of each image's split and class, and of all pixels."""
    places = "\n".join(f"{image.split}/{image.label}" for image in images)
    hashed = hashlib.sha256(places.encode(errors="surrogateescape"))
    for chunk in pixels.chunks():
        hashed.update(chunk.numpy().data)
    return hashed.hexdigest()


def decode_once(
    listing: Listing, size: int, resize: str, fixed_ranges: ValueRanges | None
) -> tuple[PixelFile, dict[str, Any]]:
    """The pixels of a listing's images, and their state, from the cache if it is intact and fits the folder.

    The state has `broken`: why which images can't be used. The pixels are those of the others, `sha256` is theirs.
    `ranges` are the values that became 0 and 255, `sizes` the smallest and the largest one before images were resized,
    `large` and `long` the shares of images that are so, and `found` is what `find_mistakes` returns. Raises `UserError`
    if the cache can't be written.
    """
    key = fingerprint(listing, fixed_ranges)
    with fastai_home() as data:
        kind = str(size) if resize == "crop" else f"{size}-{resize}"
        path = data / "decoded" / f"{short_name(listing.folder.name)}-{short_hash(listing.folder)}-{kind}.pixels"
        return load(path, key, listing, size) or build(path, key, listing, size, resize, fixed_ranges)


def load(path: Path, key: str, listing: Listing, size: int) -> tuple[PixelFile, dict[str, Any]] | None:
    with suppress(OSError, LookupError, TypeError, ValueError):  # there is no cache, or a damaged one
        state = read_json(path.with_suffix(".json"))
        pixels = PixelFile(path, size)
        # The checksum also shows whether two processes wrote one of the files each.
        if state["fingerprint"] == key and state["sha256"] == digest(listing.without(state["broken"]), pixels):
            return pixels, state
    return None


def build(
    path: Path, key: str, listing: Listing, size: int, resize: str, fixed_ranges: ValueRanges | None
) -> tuple[PixelFile, dict[str, Any]]:
    """Decode the images of a listing, and write their pixels and the state of the cache."""
    print(f"Decoding {len(listing.images):,} images of {listing.name}, once …")
    ranges = dict(fixed_ranges or {})
    with replacing(path) as new:
        with new.open("wb") as file:
            decoded, broken = write_images(file, listing.images, ranges, size, resize)
            images = listing.without(broken)
            used = [(row, *item.used) for row, item in enumerate(decoded) if item.used]
            deep = pd.DataFrame(used, columns=["row", "kind", "low", "high"])  # more than 8 bits per value
            for kind, group in deep.groupby("kind"):
                ranges.setdefault(kind, full_range(kind, float(group.low.min()), float(group.high.max())))
            if not fixed_ranges:  # so far, each image was scaled by its own range
                rewrite_images(file, images, deep.row.tolist(), ranges, size, resize)
        pixels = PixelFile(new, size)
        found = find_mistakes(pixels, images, listing.flat)
        found["have damaged metadata, which is ignored"] = [[row] for row, item in enumerate(decoded) if item.damaged]
        found |= find_dark(deep, ranges)
        sizes = [item.size for item in decoded]
        state = dict(
            fingerprint=key, sha256=digest(images, pixels), broken=broken, ranges=ranges, found=found,
            sizes=[min(sizes), max(sizes)] if sizes else [],
            large=sum(min(size) >= LARGE_SIDE for size in sizes) / max(1, len(sizes)),
            long=sum(max(size) > LONG_RATIO * min(size) for size in sizes) / max(1, len(sizes)),
        )  # fmt: skip
    pixels.path = path
    write_json(path.with_suffix(".json"), state)
    return pixels, state


def write_images(
    file: BinaryIO, images: list[Item], ranges: ValueRanges, size: int, resize: str
) -> tuple[list[Decoded], list[tuple[int, str]]]:
    """Write the pixels of all images that can be decoded. Returns these, without pixels, and why others can't be."""
    files, step = [image.file for image in images], images_at_once(size)
    good: list[Decoded] = []
    broken: list[tuple[int, str]] = []
    for begin in range(0, len(files), step):
        for i, item in enumerate(decode_files(files[begin : begin + step], ranges, size, resize), begin):
            if isinstance(item, str):
                broken.append((i, item))
            else:
                file.write(item.pixels.tobytes())
                good.append(item._replace(pixels=None))
    return good, broken


def rewrite_images(file: BinaryIO, images: list[Item], rows: list[int], ranges: ValueRanges, size: int, resize: str):
    """Decode the images in some rows again, with these ranges, and replace their pixels."""
    for some in chunked(rows, images_at_once(size)):
        decoded = decode_files([images[row].file for row in some], ranges, size, resize)
        for row, item in zip(some, decoded, strict=True):
            file.seek(row * item.pixels.nbytes)
            file.write(item.pixels.tobytes())


def find_dark(deep: pd.DataFrame, ranges: ValueRanges) -> dict[str, list[list[int]]]:
    """Where most images of a kind use little of its range: what to say → the rows of these images."""
    found = {}
    for kind, group in deep.groupby("kind"):
        low, high = ranges[kind]
        dark = group.row[group.high - low < (high - low) / 10]
        if 2 * len(dark) > len(group):
            found[f"use less than a tenth of the range from {low:g} to {high:g}"] = [[row] for row in dark.tolist()]
    return found


def find_mistakes(pixels: PixelFile, images: list[Item], flat: bool) -> dict[str, list[list[int]]]:
    """What may be wrong with some images → their rows, those of identical images together."""
    one_color: list[int] = []
    identical: dict[bytes, list[int]] = {}
    for row, image in enumerate(image for chunk in pixels.chunks() for image in chunk.numpy()):
        if (image == image[:, :1, :1]).all():
            one_color.append(row)
        else:
            identical.setdefault(hashlib.sha256(image.data).digest(), []).append(row)
    contradictions, leaks = [], []
    for rows in identical.values():
        if len({images[row].label for row in rows}) > 1:
            contradictions.append(rows)
        elif len({images[row].split for row in rows}) > 1 or (flat and len(rows) > 1):
            leaks.append(rows)
    where = "others, and may be on both sides of the split" if flat else "images of another split"
    return {
        "show one color only": [[row] for row in one_color],
        "are identical to images of another class": contradictions,
        f"are identical to {where}": leaks,
    }


def fingerprint(listing: Listing, ranges: ValueRanges | None) -> str:
    """A hash of all that the decoded pixels depend on: the decoder, and each file's name, class, size and time."""
    lines = [f"decoder {DECODER} {ranges}"]
    for split, label, file in listing.images:
        try:
            stat = file.stat()
            times = f"{stat.st_mtime_ns} {stat.st_ctime_ns}"  # of the content, and of the content or name
            lines.append(f"{split}/{label} {listing.relative(file)} {stat.st_size} {times}")
        except OSError as reason:  # a link to nowhere, for example; decoding will tell
            lines.append(f"{split}/{label} {listing.relative(file)} {reason.errno}")
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()
