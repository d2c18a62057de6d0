"""Where the images come from: CIFAR-10, a folder, an archive, torchvision's batches, the digits → an image folder."""

import hashlib
import os
import shutil
import stat
import tarfile
import unicodedata
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import repeat
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import fastai.data
import numpy as np
from fastai.vision.all import URLs, fastai_cfg, fastai_path
from fastdownload import FastDownload
from filelock import FileLock
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from cifar10.data.folders import TABLES, find_splits, list_folders, pass_through, table_hint
from cifar10.errors import UserError, WriteError
from cifar10.files import LEFTOVERS, acquire, remove_leftovers, replacing

CIFAR10_IMAGES = 60_000
TIMEOUT = 20  # seconds to wait for an answer from the network
ABANDONED = 24 * 3600  # seconds without a write after which a temporary folder is that of a killed process
# The digits are for a first try: with a quarter of the operations in each step, and few steps. A digit's mirror image
# is not a digit.
DIGITS_DEFAULTS = {"epochs": 6, "width": 32, "flip": False}
BATCHES = "cifar-10-batches-py"  # torchvision's folder
# Encodings of names in zip archives, and how Unicode calls the letters that people write with them. Of the Chinese one,
# only what it has in common with its predecessor: rare characters would make everything possible.
ENCODINGS = {
    "cp437": ("LATIN",),
    "cp932": ("CJK", "HIRAGANA", "KATAKANA"),
    "euc_kr": ("HANGUL",),
    "gb2312": ("CJK",),
}
SPREADSHEETS = (".xlsx", ".xls", ".ods", ".numbers")
WAYS_TO_CIFAR10 = "connect to the network, or pass --data with a copy: a folder, cifar10.tgz or cifar-10-batches-py"


class Source(NamedTuple):
    """An image folder `train/<class>/*`, `test/<class>/*` or `<class>/*`; its name is the data set's name."""

    folder: Path  # or a table
    data: str  # what `prepare_data` takes to find it again
    defaults: dict[str, Any]  # hyperparameters that suit this data set better than a recipe's


def prepare_data(data: str | Path) -> Source:
    """Find, download, unpack or convert what `data` names.

    `"auto"` is CIFAR-10, or the digits if it can't be had; `"cifar10"`; `"digits"`; anything else is the path of an
    image folder, of an archive of one (.tgz, .tar.gz, .zip), of a table (.csv, .tsv), or of torchvision's
    `cifar-10-batches-py`.
    Raises `UserError` for a path that is none of these, and for `"cifar10"` if it is neither cached nor reachable.
    """
    if data in ("cifar10", "digits") and Path(data).exists() and not Path(data, "__init__.py").exists():
        print(f"{data} is the data set of this name; for the {data} in this folder, pass ./{data}")
    if data in ("auto", "cifar10"):
        try:
            return Source(cifar10_folder(), "cifar10", {})
        except OSError as reason:
            trouble = f"CIFAR-10 is neither in {fastai_path('data')} nor can it be downloaded ({reason})"
            if data == "cifar10":
                raise UserError(f"{trouble}; {WAYS_TO_CIFAR10}") from None
            print(f"{trouble}: training on scikit-learn's handwritten digits instead. For CIFAR-10, {WAYS_TO_CIFAR10}.")
            data = "digits"
    if data == "digits":
        return Source(make_once("digits", write_digits), "digits", DIGITS_DEFAULTS)
    try:
        path = Path(os.path.abspath(Path(data).expanduser()))  # a link stays: its own folder and name count
        path.stat()
        if path.is_file() and path.suffix.lower() in TABLES:
            return Source(path, str(path), {})
        if path.is_file() and path.suffix.lower() in SPREADSHEETS:
            raise UserError(f"{path} is a spreadsheet; save it as CSV UTF-8, and pass that file")
        unpacked = pass_through(unpack_once(path) if path.is_file() else path)
        inside = list_folders(unpacked)
        found = [p for p in (unpacked, *inside) if p.name == BATCHES or "train" in find_splits(p)]
        if len(found) > 1 and found[0] != unpacked:
            names = ", ".join(folder.name for folder in found)
            raise UserError(f"{path} holds several data sets, {names}; pass the path of one of them")
        if found:
            if found[0].name == BATCHES:
                name = f"cifar10-{cache_key(found[0])}"
                return Source(make_once(name, partial(convert_batches, found[0])) / "cifar10", str(path), {})
            return Source(found[0], str(path), {})
        for flat in (unpacked, *(inside if len(inside) == 1 else [])):
            if len(list_folders(flat)) > 1:  # a folder for each class
                return Source(flat, str(path), {})
    except FileNotFoundError:
        takes = "auto, cifar10, digits, or a folder, archive or CSV file"
        raise UserError(f"there is no {data}; --data takes {takes}") from None
    except (OSError, RuntimeError) as reason:  # RuntimeError: a home folder that can't be found, circular links
        raise UserError(f"{data} can't be read ({reason})") from None
    what = "one folder only" if len(inside) == 1 else "no folders"
    needed = "train/<class>/, or <class>/ for two classes or more, with images"
    raise UserError(f"{path} holds {what}; it needs {needed}{table_hint(unpacked) or '; or pass a CSV file'}")


@contextmanager
def fastai_home() -> Iterator[Path]:
    """fastai's folder of data sets. If the block can't write there, the `UserError` says how to choose another."""
    try:
        data = fastai_path("data")  # makes the folder, too
        (data / "decoded").mkdir(parents=True, exist_ok=True)
        remove_leftovers((*data.glob(LEFTOVERS), *data.glob(f"decoded/{LEFTOVERS}")), ABANDONED)
        yield data
    except WriteError as reason:
        raise UserError(f"{reason}, or set FASTAI_HOME to another folder") from None
    except OSError as reason:
        why = f"fastai's folder can't be used ({reason})"
        raise UserError(f"{why}; check the permissions, or set FASTAI_HOME to another folder") from None


def make_once(name: str, make: Callable[[Path], None]) -> Path:
    """A folder in fastai's, which `make` fills if it is not there."""
    with fastai_home() as data:
        folder = data / name
        if not folder.exists():
            with replacing(folder) as new:
                new.mkdir()
                make(new)
    return folder


def cifar10_folder() -> Path:
    """fastai's CIFAR-10: its cached folder, or its cached archive, or its download. Raises `OSError` if none works."""
    with fastai_home() as data:
        folder, archive = data / "cifar10", fastai_path("archive") / "cifar10.tgz"
    if sum(len(files) for _, _, files in os.walk(folder)) >= CIFAR10_IMAGES:  # a killed fastai may leave a part of it
        return folder
    archive.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{archive}.lock", mode=0o666)  # fastai's; without it, two downloads would write to the same file
    try:
        acquire(lock)
    except OSError:
        if not archive.is_file():  # otherwise it may be a shared one, which nobody has to write to
            raise
    try:
        if not archive.is_file():  # fastdownload would wait forever for a server that does not answer
            urllib.request.urlopen(urllib.request.Request(URLs.CIFAR, method="HEAD"), timeout=TIMEOUT).close()
            print("Downloading CIFAR-10 …")
        # Also checks the size and the beginning of an archive that is there already.
        FastDownload(fastai_cfg(), module=fastai.data, base="~/.fastai").download(URLs.CIFAR)
    except Exception as reason:  # fastdownload raises a bare Exception for a wrong checksum
        raise OSError(str(reason)) from reason
    finally:
        lock.release()
    return unpack_once(archive) / "cifar10"


def write_digits(folder: Path):
    """scikit-learn's 1,797 handwritten digits (UCI, 8×8) as 32×32 RGB images, a fifth of them to test on."""
    digits = load_digits()
    small = (Image.fromarray((image * 255 / 16).astype(np.uint8)) for image in digits.images)
    images = (image.resize((32, 32), Image.Resampling.BICUBIC).convert("RGB") for image in small)
    split = np.full(len(digits.target), "train", dtype=object)
    _, test = train_test_split(range(len(split)), test_size=0.2, stratify=digits.target, random_state=0)
    split[test] = "test"
    write_images(folder, zip(images, split, digits.target, strict=True))


def convert_batches(batches: Path, folder: Path):
    """torchvision's pickled CIFAR-10 as an image folder. torchvision checks the MD5 sums before it loads a file."""
    from torchvision.datasets import CIFAR10

    print(f"Converting {batches} …")
    try:
        splits = {name: CIFAR10(batches.parent, train=name == "train") for name in ("train", "test")}
    except RuntimeError as reason:
        raise UserError(f"{batches} is not the CIFAR-10 that torchvision downloads: {reason}") from None
    for name, images in splits.items():
        labels = [images.classes[label] for label in images.targets]
        write_images(folder / "cifar10", zip(map(Image.fromarray, images.data), repeat(name), labels))


def write_images(folder: Path, images: Iterable[tuple[Image.Image, str, str]]):
    """Write `(image, split, class)` triples as `folder/<split>/<class>/<number>.png`."""
    for number, (image, split, label) in enumerate(images):
        target = folder / str(split) / str(label)
        target.mkdir(parents=True, exist_ok=True)
        image.save(target / f"{number:05}.png")


def unpack_once(archive: Path) -> Path:
    """The folder into which `archive` is unpacked: a new one whenever the archive changes."""
    name = archive.name.removesuffix(".gz").rsplit(".", 1)[0]
    return make_once(f"{short_name(name)}-{cache_key(archive)}", partial(unpack, archive))


def unpack(archive: Path, folder: Path):
    """Unpack a tar or zip archive into `folder`.

    Raises `UserError` for a file that is neither, that is damaged, that would write outside of `folder`, that holds
    anything but files, folders and links between them, or that is larger than the free disk space.
    """
    print(f"Unpacking {archive} …")
    try:
        if tarfile.is_tarfile(archive):
            with tarfile.open(archive) as tar:
                check_members(((member.name, member.size) for member in tar), folder)
                tar.extractall(folder, filter="data")  # refuses links that lead out, and devices
        elif zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zipped:
                encoding = names_encoding(archive, zipped.infolist())
            with zipfile.ZipFile(archive, metadata_encoding=encoding) as zipped:
                members = zipped.infolist()
                for member in members:
                    member.filename = member.filename.replace("\\", "/")  # Windows separates folders so
                check_members(((member.filename, member.file_size) for member in members), folder)
                for member in members:
                    if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                        raise UserError(f"{member.filename!r} in it is neither a file nor a folder")
                zipped.extractall(folder, members)
        else:
            raise UserError("it is neither a tar nor a zip archive; --data takes .tgz, .tar.gz, .zip, .csv and .tsv")
    except Exception as reason:  # decompressors fail on damaged files in many ways
        known = isinstance(reason, UserError) or getattr(reason, "errno", None)  # a full disk, for example
        hint = "" if known else "; if it is damaged, remove it and get it again"
        raise UserError(f"{archive} can't be unpacked: {reason or type(reason).__name__}{hint}") from None


def names_encoding(archive: Path, members: Iterable[zipfile.ZipInfo]) -> str:
    """The encoding of the names in a zip archive that are not marked as UTF-8; it is reported if that is unclear.

    Many programs write UTF-8 nevertheless, and Windows the encoding of its country.
    """
    names = [member.filename.encode("cp437") for member in members if not member.flag_bits & 0x800]
    with suppress(UnicodeError):
        b"\n".join(names).decode()
        return "utf-8"
    likely = [
        encoding for encoding, scripts in ENCODINGS.items() if all(is_in(name, encoding, scripts) for name in names)
    ]
    if len(likely) == 1:
        return likely[0]
    what = " or ".join(likely) or "an unknown encoding"
    print(f"{archive} has file names in {what}; if classes are unreadable, unpack it with another program")
    return "cp437"


def is_in(name: bytes, encoding: str, scripts: tuple[str, ...]) -> bool:
    """Whether a path is one in an encoding: folders and files in ASCII, or with letters of these scripts only."""
    try:
        parts = [os.path.splitext(part)[0] for part in name.decode(encoding).split("/")]
    except UnicodeError:
        return False
    characters = [character for part in parts if not part.isascii() for character in part]
    letters = [unicodedata.name(character, "") for character in characters if character.isalpha()]
    symbols = [character for character in characters if unicodedata.category(character)[0] in "SC"]
    return all(letter.startswith(scripts) for letter in letters) and all(map(str.isascii, symbols))


def check_members(members: Iterable[tuple[str, int]], folder: Path):
    """Raise `UserError` for an unsafe path, or if the unpacked files would not fit on the disk."""
    free, needed = shutil.disk_usage(folder).free, 0
    for name, size in members:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(f"unsafe path in the archive, {name!r}")
        needed += size
        if needed > free:
            raise UserError(f"it holds more than {needed / 1e9:,.1f} GB, and only {free / 1e9:,.1f} GB are free")


def cache_key(path: Path) -> str:
    """Eight characters that change with the path, size and times of `path`."""
    found = path.stat()
    return short_hash(f"{path}\n{found.st_size}\n{found.st_mtime_ns}\n{found.st_ctime_ns}")


def short_name(name: str) -> str:
    """The beginning of a file name, so that there is room for more in the 255 bytes that a file system allows."""
    return os.fsencode(name)[:100].decode(errors="ignore")


def short_hash(text) -> str:
    return hashlib.sha256(str(text).encode(errors="surrogateescape")).hexdigest()[:8]
