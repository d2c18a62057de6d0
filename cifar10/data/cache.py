"""The cache of decoded images: a file of uint8 pixels, which may be larger than the memory, and its state in JSON."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cifar10.errors import WriteError
from cifar10.files import write_json

IN_MEMORY = 2**30  # bytes; larger sets of images stay on the disk
AT_ONCE = 2**27  # bytes to read or decode in one go


class PixelFile:
    """Images uint8 `(N, 3, size, size)` on the disk, indexed like a tensor.

    Each access maps the file anew, so that what was read before does not count as memory of this process. Once `load`
    has opened it, another process may replace the file at its path by that of other images.
    """

    def __init__(self, path: Path, count: int, size: int):
        self.path, self.shape = path, (count, 3, size, size)
        self.file: Any = path

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows) -> Tensor:
        rows = rows.cpu().numpy() if isinstance(rows, Tensor) else rows
        mapped = np.memmap(self.file, np.uint8, "r", shape=self.shape) if len(self) else np.empty(self.shape, np.uint8)
        return torch.from_numpy(np.array(mapped[rows]))

    def chunks(self) -> Iterator[Tensor]:
        """All images in order, some at a time."""
        step = images_at_once(self.shape[-1])
        for begin in range(0, len(self), step):
            yield self[begin : begin + step]

    def load(self) -> "Tensor | PixelFile":
        """The images in memory, if they are few enough."""
        if np.prod(self.shape) <= IN_MEMORY:
            return self[:]
        self.file = self.path if os.name == "nt" else self.path.open("rb")  # Windows would not replace an open file
        return self

    def __getstate__(self) -> dict[str, Any]:  # of a copy
        return vars(self) | {"file": self.path}


def images_at_once(size: int) -> int:
    return max(1, AT_ONCE // (3 * size**2))


def digest(places: Iterable[str], pixels: PixelFile) -> str:
    """SHA-256 of each image's split and class, and of all pixels."""
    hashed = hashlib.sha256("\n".join(places).encode(errors="surrogateescape"))
    for chunk in pixels.chunks():
        hashed.update(chunk.numpy().data)
    return hashed.hexdigest()


def write_pixels(path: Path, groups: Iterable[list[np.ndarray]], size: int) -> PixelFile:
    """Write groups of images `(3, size, size)`, one after the other. Raises `WriteError`."""
    count = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for group in groups:
                for image in group:
                    file.write(image.tobytes())
                count += len(group)
            file.flush()
            os.fsync(file.fileno())
    except OSError as reason:
        raise WriteError(path, reason) from None
    return PixelFile(path, count, size)


def overwrite(pixels: PixelFile, images: Iterable[tuple[int, np.ndarray]]):
    """Replace single rows. Raises `WriteError`."""
    try:
        with pixels.path.open("r+b") as file:
            for row, image in images:
                file.seek(row * image.nbytes)
                file.write(image.tobytes())
    except OSError as reason:
        raise WriteError(pixels.path, reason) from None


def publish(pixels: PixelFile, path: Path, state: dict[str, Any]) -> PixelFile:
    """Give a written file its name, and write its state beside it: only a file that fits its state is used again."""
    try:
        pixels.path.replace(path)
    except OSError as reason:
        raise WriteError(path, reason) from None
    write_json(path.with_suffix(".json"), state)
    return PixelFile(path, len(pixels), pixels.shape[-1])
