"""Where the images come from, and how they reach the net: source → folder of images → DataBlock → DataLoaders.

Every source becomes a folder `train/<class>/*`, `test/<class>/*`. Its images are decoded once into one uint8 tensor,
which is cached on disk; from then on a batch is one indexing operation on that tensor.
"""

import hashlib
import os
import shutil
import socket
import stat
import tarfile
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path, PurePosixPath

import fastai.data
import numpy as np
import torch
from fastai.vision.all import (
    CategoryBlock,
    DataBlock,
    DataLoaders,
    ImageBlock,
    IndexSplitter,
    Normalize,
    PILImage,
    TensorCategory,
    TensorImage,
    TfmdDL,
    URLs,
    chunked,
    default_device,
    fastai_cfg,
    fastai_path,
    parallel,
    parent_label,
    to_detach,
    to_device,
)
from fastdownload import FastDownload
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from augment import Cutout, FlipLR, RandomCrop
from errors import UserError
from files import Damaged, load_tensors, save_tensors, whole_folder

SIZE = 32  # pixels along each side, as in CIFAR-10
DEVICES = ("auto", "cpu", "cuda")
VALIDS = ("test", "holdout")  # what to validate on
VALID_NAMES = ("test", "valid", "val")  # the usual names of the second split's folder, in order of preference
MIN_SIDE = 4  # pixels; a smaller image is a mistake
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
HOLDOUT = 0.1  # of the training images, for choosing things without looking at the test split
HOLDOUT_SEED = 42  # the same for every run, so that runs with different seeds can be compared
CIFAR10_IMAGES = 60_000
PATIENCE = 10  # seconds to wait for an answer from the network
SMALL = 10_000  # training images; below, a batch of 512 would leave only a handful of steps an epoch
WAYS_TO_CIFAR10 = "connect to the network, or pass --data with a copy: a folder, cifar10.tgz or cifar-10-batches-py"


# ---- Sources -------------------------------------------------------------------------------------------------------


def find_source(data: str | Path) -> Path:
    """The image folder that `data` names, made ready if need be; its name is the data set's name.

    `"auto"` is CIFAR-10, or the digits where it cannot be had; `"cifar10"`, `"digits"`; anything else is the path of an
    image folder, of an archive of one (.tgz, .tar.gz, .zip), or of torchvision's `cifar-10-batches-py`.
    Raises `UserError` for a path that is none of these, and for `"cifar10"` where it is neither cached nor reachable.
    """
    if data == "digits":
        return digits_folder()
    if data in ("auto", "cifar10"):
        try:
            return cifar10_folder()
        except OSError as reason:
            trouble = f"CIFAR-10 is neither in {fastai_path('data')} nor can it be downloaded ({reason})"
            if data == "cifar10":
                raise UserError(f"{trouble}; {WAYS_TO_CIFAR10}") from None
            print(f"{trouble}: training on scikit-learn's handwritten digits instead. For CIFAR-10, {WAYS_TO_CIFAR10}.")
            return digits_folder()
    try:
        path = Path(data).expanduser().resolve(strict=True)
        if path.is_file():
            path = unpacked(path)
        for folder in (path, *sorted(p for p in path.iterdir() if p.is_dir())):
            if folder.name == "cifar-10-batches-py":
                return from_batches(folder)
            if (folder / "train").is_dir():
                return folder
    except FileNotFoundError:
        raise UserError(f"there is no {data}; --data takes auto, cifar10, digits, or a folder or archive") from None
    except (OSError, RuntimeError) as reason:  # RuntimeError: a home folder that can't be found, links in a circle
        raise UserError(f"{data} can't be read ({reason})") from None
    raise UserError(f"{path} holds no folder train/<class>/ with images; see --data in the README for the layout")


def cifar10_folder() -> Path:
    """fastai's CIFAR-10: its cached folder, or its cached archive, or its download. Raises `OSError` for none."""
    folder, archive = fastai_path("data") / "cifar10", fastai_path("archive") / "cifar10.tgz"
    if sum(len(files) for _, _, files in os.walk(folder)) >= CIFAR10_IMAGES:  # a killed fastai may leave a part of it
        return folder
    if not archive.is_file():
        check_reachable(URLs.CIFAR)
        print("Downloading CIFAR-10 …")
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(3 * PATIENCE)  # a download that stalls ends with an error
    try:
        # Checks the size and the beginning of an archive that is there already, too.
        archive = FastDownload(fastai_cfg(), module=fastai.data, base="~/.fastai").download(URLs.CIFAR)
    except Exception as reason:  # fastdownload raises a bare Exception for a wrong checksum
        raise OSError(str(reason)) from reason
    finally:
        socket.setdefaulttimeout(timeout)
    return unpacked(Path(archive)) / "cifar10"


def check_reachable(url: str):
    """Raise `OSError` with the reason unless a server answers for `url` within `PATIENCE` seconds."""
    outcome: list[str] = []

    def ask():
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PATIENCE):
                outcome.append("")
        except urllib.error.URLError as error:
            outcome.append(str(error.reason))
        except OSError as error:
            outcome.append(str(error))

    # In a thread, because looking up the name can take much longer than the timeout.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE)
    if reason := outcome[0] if outcome else f"no answer within {PATIENCE} seconds":
        raise OSError(reason)


def digits_folder() -> Path:
    """scikit-learn's 1,797 handwritten digits (UCI, 8×8) as 32×32 RGB images, a fifth of them to test on."""
    folder = fastai_path("data") / "digits"
    if not folder.exists():
        digits = load_digits()
        images = [
            Image.fromarray(np.uint8(image * 255 / 16)).resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB")
            for image in digits.images
        ]
        _, test = train_test_split(range(len(images)), test_size=0.2, stratify=digits.target, random_state=0)
        split = np.full(len(images), "train", dtype=object)
        split[test] = "test"
        write_images(folder, zip(images, split, digits.target, strict=True))
    return folder


def from_batches(folder: Path) -> Path:
    """torchvision's pickled CIFAR-10 as an image folder. torchvision checks the MD5 sums before it loads a file."""
    from torchvision.datasets import CIFAR10

    target = fastai_path("data") / f"cifar10-{key(folder)}" / "cifar10"
    if not target.exists():
        print(f"Converting {folder} …")
        try:
            splits = {name: CIFAR10(folder.parent, train=name == "train") for name in ("train", "test")}
        except RuntimeError as reason:
            raise UserError(f"{folder} is not the CIFAR-10 that torchvision downloads: {reason}") from None
        write_images(
            target,
            (
                (Image.fromarray(pixels), split, images.classes[label])
                for split, images in splits.items()
                for pixels, label in zip(images.data, images.targets, strict=True)
            ),
        )
    return target


def unpacked(archive: Path) -> Path:
    """The folder into which `archive` is unpacked, once: a new one when the archive changes."""
    name = archive.name.removesuffix(".gz").rsplit(".", 1)[0]
    folder = fastai_path("data") / f"{name}-{key(archive)}"
    if not folder.exists():
        print(f"Unpacking {archive} …")
        with whole_folder(folder) as temporary:
            unpack(archive, temporary)
    return folder


def unpack(archive: Path, folder: Path):
    """Unpack a tar or zip archive into `folder`.

    Raises `UserError` for a file that is neither, that is damaged, that would write outside of `folder`, that holds
    anything but files, folders and links between them, or that needs more room than there is.
    """
    try:
        if tarfile.is_tarfile(archive):
            with tarfile.open(archive) as tar:
                check_members(((member.name, member.size) for member in tar), folder)
                tar.extractall(folder, filter="data")  # refuses links that lead out, and devices
        elif zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zipped:
                check_members(((member.filename, member.file_size) for member in zipped.infolist()), folder)
                for member in zipped.infolist():
                    if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                        raise UserError(f"{member.filename!r} in it is neither a file nor a folder")
                zipped.extractall(folder)
        else:
            raise UserError("it is neither a tar nor a zip archive; --data takes .tgz, .tar.gz and .zip")
    except Exception as reason:  # whatever a decompressor stumbles over, the archive is no good
        raise UserError(f"{archive} can't be unpacked: {reason or type(reason).__name__}") from None


def check_members(members: Iterable[tuple[str, int]], folder: Path):
    """Raise `UserError` for a name that leads out of `folder`, or where the bytes of all files have no room there."""
    free, needed = shutil.disk_usage(folder).free, 0
    for name, size in members:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(f"{name!r} in it leads out of the folder that it is unpacked into")
        needed += size
        if needed > free:
            raise UserError(f"it holds more than {needed / 1e9:,.1f} GB, and only {free / 1e9:,.1f} GB are free")


def key(path: Path) -> str:
    """Eight letters that change with the path, size and modification time of `path`."""
    stat = path.stat()
    return short_hash(f"{path}\n{stat.st_size}\n{stat.st_mtime_ns}")


def short_hash(text) -> str:
    return hashlib.sha256(str(text).encode(errors="surrogateescape")).hexdigest()[:8]


def write_images(folder: Path, images):
    """Write `(image, split, class)` triples as `folder/<split>/<class>/<number>.png`, all of them or none."""
    with whole_folder(folder) as temporary:
        for number, (image, split, label) in enumerate(images):
            target = temporary / str(split) / str(label)
            target.mkdir(parents=True, exist_ok=True)
            image.save(target / f"{number:05}.png")


# ---- Images in memory ----------------------------------------------------------------------------------------------


def pixels_of(item) -> np.ndarray:
    """A path, PIL image, array or tensor → uint8 `(3, 32, 32)` in RGB, resized with its longer side cropped.

    Raises `UserError` for what is no image, is damaged, or has a side of less than `MIN_SIDE` pixels.
    """
    try:
        image = PILImage.create(item, mode=None)
        if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would cut off at 255
            image = Image.fromarray(np.uint8(np.asarray(image).clip(0, 65535) // 256))
        image = image.convert("RGB")
    except Exception as reason:  # Pillow's plugins stumble over damage in many ways
        raise UserError(f"{printable(item)} can't be read as an image ({reason}); repair or remove it") from None
    if min(image.size) < MIN_SIDE:
        raise UserError(f"{printable(item)} is too small to show anything, {image.width}×{image.height}; remove it")
    if image.size != (SIZE, SIZE):
        image = ImageOps.fit(image, (SIZE, SIZE), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)


def printable(item) -> str:
    """`item` on one line, and without bytes that are no letters in any alphabet."""
    return str(item) if str(item).isprintable() else repr(str(item))[1:-1]


def visible(folder) -> list[os.DirEntry]:
    """The entries of `folder` by name, without hidden ones."""
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)


def decode(items) -> np.ndarray:
    """Several items → uint8 `(N, 3, 32, 32)`."""
    return np.array([pixels_of(item) for item in items], dtype=np.uint8).reshape(-1, 3, SIZE, SIZE)


class ImageTable:
    """All images of a folder: `files[i]` decodes to `pixels[i]`, uint8 `(N, 3, 32, 32)`.

    They are decoded on all cores, when they are first asked for, and once: they are cached beside fastai's data in a
    file that is written whole or not at all, and made anew when a name, size or time in the folder changes or the
    cache's own checksum doesn't fit.
    `hash` is the SHA-256 of the pixels and of each image's split and class.
    """

    def __init__(self, folder: Path, source: str = ""):
        self.folder, self.name, self.source = folder, printable(folder.name), source or str(folder)
        self.is_digits = folder == fastai_path("data") / "digits"
        self.splits = ["train", *[name for name in VALID_NAMES if (folder / name).is_dir()][:1]]
        self.files, self.split, self.labels, listing = [], [], [], []
        try:
            for split in self.splits:
                for class_folder in visible(folder / split):
                    for entry in visible(class_folder) if class_folder.is_dir() else ():
                        if entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry.is_dir():
                            self.files.append(Path(entry.path))
                            self.split.append(split)
                            self.labels.append(class_folder.name)
                            stat = entry.stat()
                            listing.append(
                                f"{split}/{class_folder.name}/{entry.name} {stat.st_size} {stat.st_mtime_ns}"
                            )
        except OSError as reason:
            raise UserError(f"{reason.filename} can't be read ({reason.strerror}); repair or remove it") from None
        self.check_classes()
        self.row = {file: row for row, file in enumerate(self.files)}
        self.fingerprint = hashlib.sha256("\n".join(listing).encode(errors="surrogateescape")).hexdigest()
        self.cache = fastai_path("data") / "decoded" / f"{folder.name}-{short_hash(folder)}.safetensors"

    def check_classes(self):
        """Raise `UserError` for classes that can't be learned."""
        known, others = (
            {label for label, split in zip(self.labels, self.split) if (split == "train") == is_train}
            for is_train in (True, False)
        )
        if not known:
            raise UserError(f"{self.folder} holds no images in train/<class>/; it should hold PNG or JPEG files there")
        if len(known) == 1:
            raise UserError(f"{self.folder}/train holds images of one class only, {printable(*known)}; add another")
        if unknown := sorted(others - known):
            raise UserError(
                f"{self.folder}/{self.splits[1]} has images of {printable(', '.join(unknown))}, and train has none;"
                " add some there, or remove these"
            )

    @cached_property
    def decoded(self) -> tuple[Tensor, str]:
        return self.load() or self.build()

    @property
    def pixels(self) -> Tensor:
        return self.decoded[0]

    @property
    def hash(self) -> str:
        return self.decoded[1]

    def stats(self, rows) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel over all pixels of the given images, in [0, 1].

        Exact: every one of the 256 values is counted, per channel.
        """
        rows = torch.as_tensor(rows, device="cpu")
        levels = torch.arange(256, dtype=torch.float64) / 255
        mean, std = [], []
        for channel in range(3):
            count = torch.bincount(self.pixels[rows, channel].flatten(), minlength=256).double()
            mu = (count * levels).sum() / count.sum()
            mean.append(mu.item())
            variance = (count * (levels - mu) ** 2).sum() / count.sum()
            std.append(max(variance.sqrt().item(), 1 / 255))  # a channel may be the same everywhere
        return mean, std

    def checksum(self, pixels: Tensor) -> str:
        names = "\n".join(map("/".join, zip(self.split, self.labels, strict=True)))
        digest = hashlib.sha256(names.encode(errors="surrogateescape"))
        digest.update(pixels.numpy())
        if self.is_digits:  # which have other transforms than the same images elsewhere
            digest.update(b"digits")
        return digest.hexdigest()

    def load(self) -> tuple[Tensor, str] | None:
        try:
            tensors, state = load_tensors(self.cache)
        except (FileNotFoundError, Damaged):
            return None
        pixels, expected = tensors.get("pixels"), (len(self.files), 3, SIZE, SIZE)
        if state.get("fingerprint") != self.fingerprint or pixels is None or tuple(pixels.shape) != expected:
            return None
        return pixels, state["sha256"]

    def build(self) -> tuple[Tensor, str]:
        chunks = list(chunked(self.files, 100))
        workers = os.cpu_count() if len(chunks) > 40 else 0  # starting processes takes longer than a few chunks
        print(f"Decoding {len(self.files):,} images of {self.name}, once …")
        decoded = parallel(decode, chunks, n_workers=workers, progress=True)
        pixels = torch.from_numpy(np.ascontiguousarray(np.concatenate(decoded)))
        digest = self.checksum(pixels)
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(self.cache, {"pixels": pixels}, fingerprint=self.fingerprint, sha256=digest)
        return pixels, digest


class TensorDL(TfmdDL):
    """A fastai DataLoader whose images are one uint8 tensor, so that a batch is one indexing operation.

    Images of `table` are taken from there; others (`dls.test_dl(files)`, `learn.predict(image)`) are decoded here.
    """

    def __init__(self, dataset, table: ImageTable | None = None, num_workers: int = 0, **kwargs):
        super().__init__(dataset, num_workers=0, **kwargs)  # nothing is left to do for workers
        self.table = table
        inputs, targets = dataset.tls[: dataset.n_inp], dataset.tls[dataset.n_inp :]
        try:
            rows = [table.row[item] for item in dataset.items]
        except (AttributeError, KeyError, TypeError):  # no table, or not in it, or no path
            rows = None
        if rows:
            self.pixels, self.rows = table.pixels, torch.tensor(rows)
            numbers = [labels.vocab.o2i for labels in targets]
            targets = [[number[table.labels[row]] for row in rows] for number in numbers]
        else:
            self.pixels, self.rows = torch.from_numpy(decode(inputs[0])), torch.arange(len(dataset))
            targets = [[int(label) for label in labels] for labels in targets]
        self.targets = [torch.tensor(target) for target in targets]

    def new(self, dataset=None, cls=None, **kwargs):
        if dataset is not None and not len(dataset):  # for `learn.export`: no image belongs into its file
            kwargs["table"] = None
        return super().new(dataset, cls, **{"table": self.table, **kwargs})

    def shuffle_fn(self, idxs: list[int]) -> list[int]:
        order = torch.Generator().manual_seed(self.rng.getrandbits(63))
        return torch.tensor(idxs)[torch.randperm(len(idxs), generator=order)].tolist()  # in no time, unlike Python's

    def __iter__(self):
        self.randomize()
        self.before_iter()
        for indices in self.chunks(self.get_idxs()):
            yield self.after_batch(self.batch(indices))
        self.after_iter()

    def chunks(self, idxs) -> Iterable[Tensor]:
        """The indices of each batch, on the device."""
        if isinstance(idxs, list):  # copied there once an epoch, because a copy makes the host wait
            end = len(idxs) // self.bs * self.bs if self.drop_last else len(idxs)
            return torch.tensor(idxs[:end], device=self.device).split(self.bs) if end else ()
        return (torch.tensor(chunk, device=self.device) for chunk in chunked(idxs, self.bs, self.drop_last))

    def batch(self, indices: Tensor) -> tuple:
        """Images uint8 `(n, 3, 32, 32)`, and labels int64 `(n,)` where the data set has them, on the device."""
        self.pixels, self.rows, *self.targets = to_device([self.pixels, self.rows, *self.targets], self.device)  # once
        return TensorImage(self.pixels[self.rows[indices]]), *(TensorCategory(y[indices]) for y in self.targets)

    def to_detach(self, b, cpu: bool = True, gather: bool = True):
        """fastai's, but single numbers, the sums of a metric, stay on the device and keep nobody waiting."""
        return to_detach(b, cpu and not (isinstance(b, Tensor) and b.ndim == 0), gather)


# ---- DataLoaders ---------------------------------------------------------------------------------------------------


def get_device(device: str) -> torch.device:
    """`"auto"` is the fastest device here. Raises `UserError` for `"cuda"` where there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA GPU that PyTorch can use here; leave out --device, or set it to cpu")
    return default_device() if device == "auto" else torch.device(device)


def get_dls(data: str | Path = "auto", bs: int | None = None, valid: str = "test", device: str = "auto") -> DataLoaders:
    """fastai DataLoaders of 32×32 images for `data` (see `find_source`).

    `bs` is the number of images a step, by default 512, or 64 for fewer than 10,000 training images. `valid="test"`
    validates on the test split; `valid="holdout"` on a tenth of the training images, class by class, and leaves the
    test split alone. `device` is "auto", "cpu" or "cuda". Raises `UserError` for data that cannot be used.
    """
    if valid not in VALIDS:
        raise UserError(f"valid is {valid!r}; it must be one of {', '.join(VALIDS)}")
    device = get_device(device)
    folder = find_source(data)
    if data == "auto":
        data = folder.name
    table = ImageTable(folder, source=str(data if data in ("cifar10", "digits") else Path(data).expanduser().resolve()))
    files, labels = table.files, table.labels
    if valid == "holdout":
        files, labels = zip(
            *((f, y) for f, y, split in zip(files, labels, table.split) if split == "train"), strict=True
        )
        try:
            _, valid_rows = train_test_split(
                range(len(files)), test_size=HOLDOUT, random_state=HOLDOUT_SEED, stratify=labels
            )
        except ValueError as reason:
            raise UserError(f"{table.folder} has too few images to hold a tenth of them out ({reason})") from None
    elif len(table.splits) == 2:
        valid_rows = [row for row, split in enumerate(table.split) if split != "train"]
        if not valid_rows:
            raise UserError(f"{table.folder}/{table.splits[1]} holds no images; add some or use --valid holdout")
    else:
        raise UserError(
            f"{table.folder} has no {'/ or '.join(VALID_NAMES)}/ beside train/; add one or use --valid holdout"
        )
    train_rows = np.setdiff1d(range(len(files)), valid_rows)

    block = DataBlock(
        blocks=(ImageBlock, CategoryBlock(vocab=sorted(set(table.labels)))),
        get_items=lambda table: files,
        splitter=IndexSplitter(valid_rows),
        get_y=parent_label,
        batch_tfms=[
            RandomCrop(SIZE, padding=4),
            *([] if table.is_digits else [FlipLR()]),  # a digit's mirror image is no digit
            Cutout(8, 8),
            Normalize.from_stats(*table.stats(train_rows)),
        ],
        dl_type=TensorDL,
    )
    if bs is None:
        bs = 512 if len(train_rows) >= SMALL else min(64, len(train_rows))
    return block.dataloaders(table, table=table, bs=bs, device=device)
