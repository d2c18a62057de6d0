"""Images in memory: every file of an image folder decoded once into one tensor, which is cached on disk."""

import hashlib
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from fastai.vision.all import PILImage, chunked, fastai_path, parallel
from PIL import Image, ImageOps
from sklearn.model_selection import train_test_split
from torch import Tensor

from cifar10.cli import UserError
from cifar10.files import CorruptFileError, load_tensors, save_tensors
from cifar10.sources import prepare_data, short_hash

SIZE = 32  # pixels along each side, as in CIFAR-10
MIN_SIDE = 4  # pixels; a smaller image is a mistake
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
HOLDOUT = 0.1  # of the training images, for hyperparameter selection without the test split
HOLDOUT_SEED = 42  # the same for every run, so that runs with different seeds can be compared


def decode_image(item) -> np.ndarray:
    """A path, PIL image, array or tensor → uint8 `(3, 32, 32)` in RGB; the longer side is cropped, then resized.

    Raises `UserError` for something that is not an image, is damaged, or has a side of less than `MIN_SIDE` pixels.
    """
    try:
        image = PILImage.create(item, mode=None)
        if image.mode.startswith("I"):  # 16 bits per pixel, which Pillow would clip at 255
            image = Image.fromarray(np.uint8(np.asarray(image).clip(0, 65535) // 256))
        image = image.convert("RGB")
    except Exception as reason:  # Pillow's plugins fail on damaged files in many ways
        raise UserError(f"{printable(item)} can't be read as an image ({reason}); repair or remove it") from None
    if min(image.size) < MIN_SIDE:
        raise UserError(f"{printable(item)} is too small to show anything, {image.width}×{image.height}; remove it")
    if image.size != (SIZE, SIZE):
        image = ImageOps.fit(image, (SIZE, SIZE), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)


def decode_images(items) -> np.ndarray:
    """Several items → uint8 `(N, 3, 32, 32)`."""
    return np.array([decode_image(item) for item in items], dtype=np.uint8).reshape(-1, 3, SIZE, SIZE)


def printable(item) -> str:
    """`item` on one line, without bytes that are not characters."""
    return str(item) if str(item).isprintable() else repr(str(item))[1:-1]


def visible(folder) -> list[os.DirEntry]:
    """The entries of `folder` by name, without hidden ones."""
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)


class ImageTable:
    """All images of a folder: `files[i]`, of the class `labels[i]`, decodes to `pixels[i]`, uint8 `(N, 3, 32, 32)`.

    They are decoded on all cores when first needed, and cached beside fastai's data. The cache is written atomically,
    and renewed when a name, size or time in the folder changes or its checksum does not match.
    `hash` is the SHA-256 of the pixels and of each image's split and class. `data` is what `prepare_data` takes to find
    the folder again, and `defaults` the hyperparameters that suit the images better than a recipe's.
    """

    def __init__(self, folder: Path, data: str = "", defaults: Mapping[str, Any] = MappingProxyType({})):
        self.folder, self.name = folder, printable(folder.name)
        self.data, self.defaults = data or str(folder), defaults
        self.splits = ["train", *[name for name in ("test", "valid", "val") if (folder / name).is_dir()][:1]]
        self.files, self.split, self.labels, listing = [], [], [], []
        try:
            for split in self.splits:
                for class_folder in visible(folder / split):
                    for entry in visible(class_folder) if class_folder.is_dir() else ():
                        if entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry.is_dir():
                            self.files.append(Path(entry.path))
                            self.split.append(split)
                            self.labels.append(class_folder.name)
                            name, stat = f"{split}/{class_folder.name}/{entry.name}", entry.stat()
                            listing.append(f"{name} {stat.st_size} {stat.st_mtime_ns}")
        except OSError as reason:
            raise UserError(f"{reason.filename} can't be read ({reason.strerror}); repair or remove it") from None
        self.check_classes()
        self.classes = sorted(set(self.labels))
        self.row = {file: row for row, file in enumerate(self.files)}
        self.fingerprint = hashlib.sha256("\n".join(listing).encode(errors="surrogateescape")).hexdigest()
        self.cache = fastai_path("data") / "decoded" / f"{folder.name}-{short_hash(folder)}.safetensors"

    @classmethod
    def open(cls, data: "str | Path | ImageTable") -> "ImageTable":
        """The images that `data` names; see `prepare_data`. Raises `UserError` if they can't be used."""
        return data if isinstance(data, ImageTable) else cls(*prepare_data(data))

    def check_classes(self):
        """Raise `UserError` for classes that can't be learned."""
        known = {label for label, split in zip(self.labels, self.split) if split == "train"}
        if not known:
            raise UserError(f"{self.folder} holds no images in train/<class>/; it should hold PNG or JPEG files there")
        if len(known) == 1:
            raise UserError(f"{self.folder}/train holds images of one class only, {printable(*known)}; add another")
        if unknown := sorted(set(self.labels) - known):
            names = printable(", ".join(unknown))
            raise UserError(f"{self.folder}/{self.splits[1]} has classes that train lacks, {names}; remove or add them")

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
        if len(self.splits) == 1:
            raise UserError(f"{self.folder} has no test/, valid/ or val/ beside train/; add one or use --valid holdout")
        if len(train) == len(self.files):
            raise UserError(f"{self.folder}/{self.splits[1]} holds no images; add some or use --valid holdout")
        return train, np.flatnonzero(np.array(self.split) != "train")

    @cached_property
    def decoded(self) -> tuple[Tensor, str]:
        return self.load() or self.build()

    pixels = property(lambda self: self.decoded[0])
    hash = property(lambda self: self.decoded[1])

    def stats(self, rows) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel over all pixels of the given images, in [0, 1].

        Exact: every one of the 256 values is counted, per channel.
        """
        levels, pixels = torch.arange(256, dtype=torch.float64) / 255, self.pixels[torch.as_tensor(rows, device="cpu")]
        counts = [torch.bincount(pixels[:, channel].flatten(), minlength=256).double() for channel in range(3)]
        mean = [(count * levels).sum() / count.sum() for count in counts]
        std = [((c * (levels - mu) ** 2).sum() / c.sum()).sqrt() for c, mu in zip(counts, mean)]
        return [mu.item() for mu in mean], [max(sigma.item(), 1 / 255) for sigma in std]  # a channel may be constant

    def load(self) -> tuple[Tensor, str] | None:
        """Pixels and hash from the cache, if it is intact and fits the folder."""
        try:
            tensors, state = load_tensors(self.cache)
        except (FileNotFoundError, CorruptFileError):
            return None
        pixels, expected = tensors.get("pixels"), (len(self.files), 3, SIZE, SIZE)
        if state.get("fingerprint") != self.fingerprint or pixels is None or tuple(pixels.shape) != expected:
            return None
        return pixels, state["sha256"]

    def build(self) -> tuple[Tensor, str]:
        """Decode all images and cache them."""
        chunks = list(chunked(self.files, 100))
        workers = os.cpu_count() if len(chunks) > 40 else 0  # starting processes takes longer than a few chunks
        print(f"Decoding {len(self.files):,} images of {self.name}, once …")
        decoded = parallel(decode_images, chunks, n_workers=workers, progress=True)
        pixels = torch.from_numpy(np.ascontiguousarray(np.concatenate(decoded)))
        names = "\n".join(map("/".join, zip(self.split, self.labels, strict=True)))
        digest = hashlib.sha256(names.encode(errors="surrogateescape"))
        digest.update(pixels.numpy().data)
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(self.cache, {"pixels": pixels}, fingerprint=self.fingerprint, sha256=digest.hexdigest())
        return pixels, digest.hexdigest()
