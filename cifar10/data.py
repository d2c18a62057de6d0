"""How the images reach the model: ImageTable → DataBlock → DataLoaders, where a batch is one indexing operation."""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from fastai.data.all import CategoryBlock, DataBlock, DataLoaders, IndexSplitter, Normalize, TfmdDL
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
        inputs, targets = dataset.tls[: dataset.n_inp], dataset.tls[dataset.n_inp :]
        try:
            rows = [table.row[item] for item in dataset.items] if table else []
        except (KeyError, TypeError):  # not in the table, or not a path
            rows = []
        if table and rows:
            self.pixels, self.rows = table.pixels, torch.tensor(rows)
            numbers = [labels.vocab.o2i for labels in targets]
            targets = [[number[table.labels[row]] for row in rows] for number in numbers]
        else:
            decoded = [decode_image(item, self.ranges) for item in inputs[0]]
            self.pixels = torch.from_numpy(np.array(decoded, np.uint8).reshape(-1, 3, SIZE, SIZE))
            self.rows = torch.arange(len(dataset))
            targets = [[int(label) for label in labels] for labels in targets]
        self.targets = [torch.tensor(target) for target in targets]

    def new(self, dataset=None, cls=None, **kwargs):
        if dataset is not None and not len(dataset):  # for `learn.export`: the exported file holds no images
            kwargs["table"] = None
        return super().new(dataset, cls, **{"table": self.table, "ranges": self.ranges, **kwargs})

    def shuffle_fn(self, idxs: list[int]) -> list[int]:
        order = torch.Generator().manual_seed(self.rng.getrandbits(63))  # much faster than Python's shuffle
        return torch.tensor(idxs)[torch.randperm(len(idxs), generator=order)].tolist()

    def create_batches(self, samps) -> Iterator[tuple]:
        """Batches of the images numbered `samps`. All go to the device at once, because a copy synchronizes."""
        idxs = list(islice(samps, self.n))
        end = len(idxs) // self.bs * self.bs if self.drop_last else len(idxs)
        for batch in torch.tensor(idxs[:end], device=self.device).split(self.bs) if end else ():
            yield self.batch(batch)

    def batch(self, indices: Tensor) -> tuple:
        """Images uint8 `(n, 3, 32, 32)`, and labels int64 `(n,)` if the data set has them, on the device."""
        self.pixels, self.rows, *self.targets = to_device([self.pixels, self.rows, *self.targets], self.device)  # once
        return TensorImage(self.pixels[self.rows[indices]]), *(TensorCategory(y[indices]) for y in self.targets)

    def to_detach(self, b, cpu: bool = True, gather: bool = True):
        """Like fastai's, but scalars, the sums of a metric, stay on the device, so that nothing waits for them."""
        return to_detach(b, cpu and not (isinstance(b, Tensor) and b.ndim == 0), gather)


class Labels:
    """`get_y` of the DataBlock: a file's class. An exported Learner keeps no file names."""

    def __init__(self, table: ImageTable):
        self.table = table

    def __call__(self, file) -> str:
        return self.table.labels[self.table.row[file]]

    def __getstate__(self):
        return {}


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
        get_y=Labels(images),
        batch_tfms=[*tfms, Normalize.from_stats(*(stats or images.stats(train)))],
        dl_type=TensorDL,
    )
    bs = bs or ASSIGNMENT.adapted(len(train)).batch_size
    return block.dataloaders(images, table=images, bs=bs, device=where)
