"""How the images reach the model: ImageTable → DataBlock → DataLoaders, where a batch is one indexing operation."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from unicodedata import normalize

import numpy as np
import torch
from fastai.data.all import CategoryBlock, DataBlock, DataLoaders, IndexSplitter, Normalize, TfmdDL, ToTensor
from fastai.torch_core import TensorCategory, TensorImage, default_device, to_detach, to_device
from fastai.vision.data import ImageBlock
from torch import Tensor

from cifar10.cli import UserError
from cifar10.decode import SIZE, ValueRanges, decode_image
from cifar10.images import ImageTable
from cifar10.recipes import ASSIGNMENT


class TensorDL(TfmdDL):
    """A fastai DataLoader whose images are one uint8 tensor, so that a batch is one indexing operation.

    Images of `table` are taken from there; others (`dls.test_dl(files)`, `learn.predict(image)`) are decoded here, with
    the same `ranges`.
    """

    def __init__(self, dataset, table: ImageTable | None = None, ranges: ValueRanges | None = None,
                 num_workers: int = 0, **kwargs):  # fmt: skip
        super().__init__(dataset, num_workers=0, **kwargs)  # nothing is left to do for workers
        self.fake_l.generator = torch.Generator()  # or PyTorch would draw a seed for workers from the global one
        self.table, self.ranges = table, table.ranges if table else ranges
        if not hasattr(dataset, "tls"):  # any other data set of (image, class) pairs
            inputs, *classes = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
            self.set_images(inputs, classes)
            return
        targets: list = dataset.tls[dataset.n_inp :]
        try:
            rows = [table.row[item] for item in dataset.items] if table else []
        except (KeyError, TypeError):  # not in the table, or not a path
            rows = []
        if table and rows:
            numbers = [tl.vocab.o2i for tl in targets]
            self.set_images(table.pixels, [[number[table.labels[row]] for row in rows] for number in numbers], rows)
        else:  # the items themselves, because fastai's PILImage would lose what `decode_image` looks after
            self.set_images(dataset.tls[0].items if len(dataset) else [], targets)

    def set_images(self, images, targets, rows=None):
        """Decoded pixels, of which there are `rows`, or images that are still to be decoded; and their classes."""
        if rows is None:
            decoded = [decode_image(item, self.ranges) for item in images]
            images = torch.from_numpy(np.array(decoded, np.uint8).reshape(-1, 3, SIZE, SIZE))
        self.pixels, self.rows = images, torch.arange(len(images)) if rows is None else torch.tensor(rows)
        self.targets = [torch.tensor([int(label) for label in labels]) for labels in targets]

    def new(self, dataset=None, cls=None, **kwargs):
        if dataset is not None and not len(dataset):  # for `learn.export`: the exported file holds no images
            kwargs["table"] = None
        return super().new(dataset, cls, **{"table": self.table, "ranges": self.ranges, **kwargs})

    def shuffle_fn(self, idxs: list[int]) -> list[int]:
        order = torch.Generator().manual_seed(self.rng.getrandbits(63))  # much faster than Python's shuffle
        return torch.tensor(idxs)[torch.randperm(len(idxs), generator=order)].tolist()

    def create_batches(self, samps) -> Iterator[tuple]:
        """Batches of the images numbered `samps`. Those of an epoch go to the device at once: a copy synchronizes.

        Raises `UserError` if there are transforms that would be left out.
        """
        steps = [step for when in (self.after_item, self.before_batch) for step in getattr(when, "fs", [when])]
        if other := [step for step in steps if not isinstance(step, ToTensor)]:
            raise UserError(f"{other[0]} is for single images, which don't occur here; use a batch transform instead")
        samps, epoch = iter(samps), -(-self.n // self.bs) * self.bs
        while idxs := list(islice(samps, epoch)):  # there may be more, even without end
            for batch in torch.tensor(idxs, device=self.device).split(self.bs):
                if len(batch) == self.bs or not self.drop_last:
                    yield self.batch(batch)

    def batch(self, indices: Tensor) -> tuple:
        """Images uint8 `(n, 3, 32, 32)`, and labels int64 `(n,)` if the data set has them, on the device."""
        if self.table and self.pixels is self.table.pixels:
            self.pixels = self.table.pixels_on(torch.device(self.device))
        self.pixels, self.rows, *self.targets = to_device([self.pixels, self.rows, *self.targets], self.device)  # once
        return TensorImage(self.pixels[self.rows[indices]]), *(TensorCategory(y[indices]) for y in self.targets)

    def to_detach(self, b, cpu: bool = True, gather: bool = True):
        """Like fastai's, but scalars, the sums of a metric, stay on the device, so that nothing waits for them."""
        return to_detach(b, cpu and not (isinstance(b, Tensor) and b.ndim == 0), gather)


class ClassOf:
    """`get_y` of the DataBlock: the class of a file below `folder/<split>/<class>/`, or else its folder's name."""

    def __init__(self, folder: Path):
        self.folder, self.__name__ = folder, "class_of"  # fastai can't pickle a function without a name

    def __call__(self, file) -> str:
        path = Path(file).absolute()
        inside = path.parts[len(self.folder.parts) :] if path.is_relative_to(self.folder) else ()
        return normalize("NFC", inside[1] if len(inside) > 2 else path.parent.name)


def get_device(device: str) -> torch.device:
    """`"auto"` is the fastest device here. Raises `UserError` for one that this machine does not have."""
    if device in ("cuda", "mps") and not getattr(torch, device).is_available():
        raise UserError(f"device is {device!r}, and PyTorch finds none here; use another device or machine")
    return default_device() if device == "auto" else torch.device(device)


def get_dls(data, tfms=(), bs: int | None = None, valid="test", device="auto", stats=None) -> DataLoaders:
    """fastai DataLoaders of 32×32 images: `(N, 3, 32, 32)`, normalized, and labels int64 `(N,)`.

    `data` is an `ImageTable` or what `prepare_data` takes; `tfms` are batch transforms beside `Normalize`, whose mean
    and standard deviation per channel are `stats`, by default those of the training images. `bs` is the batch size, by
    default 512, or 64 for fewer than 10,000 training images. `valid` is "test", or "holdout" for a stratified tenth of
    the training images; `device` is "auto", "cpu", "cuda" or "mps". Raises `UserError` for data that can't be used.
    """
    where, images = get_device(device), ImageTable.open(data)
    train, held_out = images.split_rows(valid)
    rows = np.sort(np.concatenate([train, held_out]))
    block = DataBlock(
        blocks=(ImageBlock, CategoryBlock(vocab=images.classes)),
        get_items=lambda images: [images.files[row] for row in rows],
        splitter=IndexSplitter(np.searchsorted(rows, held_out).tolist()),
        get_y=ClassOf(images.folder),
        batch_tfms=[*tfms, Normalize.from_stats(*(stats or images.stats(train)))],
        dl_type=TensorDL,
    )
    bs = bs or ASSIGNMENT.adapted(len(train)).batch_size
    return block.dataloaders(images, table=images, bs=bs, device=where)
