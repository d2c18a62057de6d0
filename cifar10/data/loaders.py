"""How the images reach the model: ImageTable → DataBlock → DataLoaders, where a batch is one indexing operation."""

import math
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from unicodedata import normalize

import numpy as np
import torch
from fastai.data.all import CategoryBlock, DataBlock, DataLoaders, IntToFloatTensor, Normalize, TfmdDL, ToTensor
from fastai.torch_core import TensorCategory, TensorImage, to_detach, to_device
from fastai.vision.data import ImageBlock
from torch import Tensor

from cifar10.data.decode import SIZE, ValueRanges, decode_image
from cifar10.data.table import ImageTable
from cifar10.errors import UserError
from cifar10.hardware import get_device
from cifar10.text import enumerate_names, plural, printable

IMBALANCE = 10  # if a class has this many times the images of another, a note says so


class TensorDL(TfmdDL):
    """A fastai DataLoader whose images are one uint8 tensor, so that a batch is one indexing operation.

    Images of `table` are taken from there; others (`dls.test_dl(files)`, `learn.predict(image)`) are decoded here, with
    the same `ranges`, `size` and `resize`.

    With several processes, `share` is the slice of each batch that this one trains on (`None`: all of it), and `whole`
    the number of images in the whole batch. Only that slice is loaded and transformed if each transform has a `shard`
    or draws no random numbers (`takes_shards`). Otherwise the whole batch is transformed first, so that the random
    numbers are the same in all processes.
    """

    share: slice | None = None

    def __init__(self, dataset, table: ImageTable | None = None, ranges: ValueRanges | None = None, size: int = SIZE,
                 resize: str = "crop", weighted: bool = False, num_workers: int = 0, **kwargs):  # fmt: skip
        super().__init__(dataset, num_workers=0, **kwargs)  # nothing is left to do for workers
        self.fake_l.generator = torch.Generator()  # or PyTorch would draw a seed for workers from the global one
        self.table, self.weighted = table, weighted
        self.ranges, self.size, self.resize = ranges, size, resize  # what `decode_image` takes beside an image
        if table:
            self.ranges, self.size, self.resize = table.ranges, table.size, table.resize
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
            decoded = [decode_image(item, self.ranges, self.size, self.resize) for item in images]
            images = torch.from_numpy(np.array(decoded, np.uint8).reshape(-1, 3, self.size, self.size))
        self.pixels, self.rows = images, torch.arange(len(images)) if rows is None else torch.tensor(rows)
        self.targets = [torch.tensor([int(label) for label in labels]) for labels in targets]

    def new(self, dataset=None, cls=None, **kwargs):
        if dataset is not None and not len(dataset):  # for `learn.export`: the exported file holds no images
            kwargs["table"] = None
        names = ("table", "ranges", "size", "resize", "weighted")
        settings = {name: getattr(self, name) for name in names}
        return super().new(dataset, cls, **settings | kwargs)

    def shuffle_fn(self, idxs: list[int]) -> list[int]:
        """A random order, or for training if `weighted`, as many random draws with all classes equally likely."""
        generator = torch.Generator().manual_seed(self.rng.getrandbits(63))  # much faster than Python's shuffle
        if self.weighted and not getattr(self.dataset, "split_idx", 0):
            labels = self.targets[0].cpu()[idxs]
            draws = (1 / labels.bincount().double())[labels].multinomial(len(idxs), True, generator=generator)
        else:
            draws = torch.randperm(len(idxs), generator=generator)
        return torch.tensor(idxs)[draws].tolist()

    def __iter__(self) -> Iterator[tuple]:
        for batch in super().__iter__():
            if self.share is not None and not self.takes_shards:
                batch = tuple(tensor[self.share] for tensor in batch)
            if len(batch[0]):  # the last one may be too small for all processes
                yield batch

    def create_batches(self, samps) -> Iterator[tuple]:
        """Batches of the images numbered `samps`. Those of an epoch go to the device at once: a copy synchronizes.

        Raises `UserError` if there are transforms that would be left out.
        """
        transforms, takes_shards = self.after_batch.fs, self.takes_shards
        leave_labels(*transforms)
        for pipeline in (self.after_item, self.before_batch):
            for tfm in getattr(pipeline, "fs", [pipeline]):
                if not isinstance(tfm, ToTensor):
                    why = "is for single images, which don't occur here; use a batch transform instead"
                    raise UserError(f"{tfm} {why}")
        samps, epoch = iter(samps), math.ceil(self.n / self.bs) * self.bs
        while idxs := list(islice(samps, epoch)):  # there may be more, even without end
            for batch in torch.tensor(idxs, device=self.device).split(self.bs):
                if len(batch) == self.bs or not self.drop_last:
                    self.whole = len(batch)
                    for transform in transforms:
                        if hasattr(transform, "shard"):
                            transform.shard = (len(batch), self.share) if takes_shards else None
                    yield self.batch(batch[self.share] if takes_shards else batch)

    @property
    def takes_shards(self) -> bool:
        """Whether to load and transform only this process's slice of each batch."""
        tfms = self.after_batch.fs
        shardable = all(hasattr(tfm, "shard") or isinstance(tfm, (IntToFloatTensor, Normalize)) for tfm in tfms)
        return self.share is not None and shardable

    def batch(self, indices: Tensor) -> tuple:
        """Images uint8 `(n, 3, size, size)`, and labels int64 `(n,)` if the data set has them, on the device."""
        if self.table and self.pixels is self.table.pixels:
            self.pixels = self.table.pixels_on(torch.device(self.device))
        elif isinstance(self.pixels, Tensor):
            self.pixels = self.pixels.to(self.device)
        self.rows, *self.targets = to_device([self.rows, *self.targets], self.device)  # once
        images = TensorImage(to_device(self.pixels[self.rows[indices]], self.device))
        return images, *(TensorCategory(y[indices]) for y in self.targets)

    def to_detach(self, b, cpu: bool = True, gather: bool = True):
        """Like fastai's, but scalars, the sums of a metric, stay on the device, so that nothing waits for them.

        Nothing is gathered from other processes; `Distributed` adds up the metrics.
        """
        return to_detach(b, cpu and not (isinstance(b, Tensor) and b.ndim == 0), gather=False)


def leave_labels(*transforms):
    """Give transforms that have no method for labels one that returns them as they are.

    Otherwise plum raises an exception for each batch, whose traceback keeps the batch in memory until Python's garbage
    collector comes by. That may be a dozen batches later.
    """

    def encodes(self, x: TensorCategory):
        return x

    for transform in transforms:
        try:
            type(transform).encodes.resolve_method((transform, TensorCategory(0)))
        except AttributeError:  # a function, which also gets the labels
            continue
        except LookupError:
            type(transform)(encodes)  # this is how fastai adds a method to a transform


class ClassOf:
    """`get_y` of the DataBlock: the class of a file in the table, or of another file the name of its folder."""

    def __init__(self, labels: dict[Path, str]):
        self.labels = labels
        self.__name__ = "class_of"  # fastai can't pickle a function without a name

    def __call__(self, file) -> str:
        return self.labels.get(file) or normalize("NFC", Path(file).parent.name)

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):  # an exported Learner does not hold the names of the files
        return ClassOf, ({},)


def build_dls(data, tfms=(), *, bs: int, valid="test", device="auto", stats=None,
            weighted=False, only: str | None = None, classes: list[str] | None = None) -> DataLoaders:  # fmt: skip
    """fastai DataLoaders: images `(N, 3, size, size)`, normalized, and labels int64 `(N,)`.

    `data` is an `ImageTable` or what `prepare_data` takes; `tfms` are batch transforms beside `Normalize`, whose mean
    and standard deviation per channel are `stats`, by default those of the training images. `bs` is the batch size.
    `valid` is "test", or "holdout" for a part of the training images; `device` is "auto", "cpu", "cuda" or "mps". If
    there is a third split, `dls[2]` holds the test images. `weighted` draws the training images of all classes equally
    often. `only` validates on the images of one split, whose classes may be some of `classes`. Raises `UserError` for
    data that can't be used.
    """
    where, images = get_device(device), ImageTable.open(data)
    splits = [images.rows_of(only)] * 2 if only else images.split_rows(valid)
    classes = classes or images.classes
    if unknown := {*images.classes} - {*classes}:
        names, known = enumerate_names(sorted(unknown)), enumerate_names(classes)
        raise UserError(f"{images.name} has classes that the model does not know: {names}; it knows {known}")
    for note in class_notes(images, splits, valid, weighted) if not only else ():
        print(f"{images.name}: {note}")
    rows = np.sort(np.concatenate(splits))
    block = DataBlock(
        blocks=(ImageBlock, CategoryBlock(vocab=classes)),
        get_items=lambda images: [images.files[row] for row in rows],
        splitter=lambda files: [np.searchsorted(rows, split).tolist() for split in splits],
        get_y=ClassOf(dict(zip(images.files, images.labels))),
        batch_tfms=[*tfms, Normalize.from_stats(*(stats or images.stats(splits[0])))],
        dl_type=TensorDL,
    )
    return block.dataloaders(images, table=images, bs=bs, device=where, weighted=weighted)


def with_stats(dls: DataLoaders, mean: Tensor, std: Tensor) -> DataLoaders:
    """The same DataLoaders, but normalized with another mean and standard deviation per channel."""
    normalize = Normalize.from_stats(mean.flatten().tolist(), std.flatten().tolist())

    def changed(loader: TensorDL) -> TensorDL:
        others = [tfm for tfm in loader.after_batch.fs if not isinstance(tfm, Normalize)]
        return loader.new(after_batch=[*others, normalize])

    return DataLoaders(*map(changed, dls.loaders), path=dls.path, device=dls.device)


def class_notes(images: ImageTable, splits: list[np.ndarray], valid: str, weighted: bool) -> Iterator[str]:
    """What a user should know about the numbers of images per class."""
    train, *others = ([images.labels[row] for row in rows] for rows in splits)
    names = ("validation", "test") if len(others) > 1 else (eval_split_name(images, valid),)
    for name, labels in zip(names, others):
        if missing := sorted({*images.classes} - {*labels}):
            yield f"there are no {name} images of {enumerate_names(missing)}, so they can't be evaluated"
    (most, many), *_, (least, few) = Counter(train).most_common()
    if many > IMBALANCE * few:
        counts = f"{printable(most)} has {plural(many, 'training image')} and {printable(least)} {few:,}"
        yield f"{counts}: look at the accuracy per class" + (", and consider --weighted" if not weighted else "")


def eval_split_name(images: ImageTable, valid: str) -> str:
    """The evaluated split: test or validation."""
    own = valid == "test" and not images.flat and images.split_names[-1] == "test"
    return "test" if own else "validation"


def describe(dls: DataLoaders) -> str:
    """What the images are, like: `photos: 2 classes (cat, dog); 80 training and 20 test images, 99×66 pixels`."""
    images = dls.train.table
    second = "test" if images.splits[int(dls.valid.rows[0])] == "test" else "validation"
    names = ("training", second, "test")
    counts = [f"{len(dl.dataset):,} {name}" for dl, name in zip(dls.loaders, names, strict=False)]
    sizes = " to ".join(dict.fromkeys(f"{width}×{height}" for width, height in images.sizes))
    target = f"{images.size}×{images.size}"
    resized = f", resized to {target}" if sizes != target else ""
    listed = f"{', '.join(counts[:-1])} and {counts[-1]}"
    left, bs = dls.train.n % dls.train.bs, dls.train.bs
    skipped = f"; each epoch skips {left:,} that don't fill a batch of {bs}" if 5 * left > dls.train.n else ""
    classes = f"{plural(len(dls.vocab), 'class')} ({enumerate_names(dls.vocab, most=10)})"
    return f"{images.name}: {classes}; {listed} images, {sizes} pixels{resized}{skipped}"
