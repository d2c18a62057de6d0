"""Files: atomic writes, locks, JSON and CSV, tensors with a checksum, figures."""

import errno
import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from filelock import FileLock
from matplotlib import pyplot as plt
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cifar10.errors import CorruptFileError, UserError, WriteError

LEFTOVERS = ".*.part"  # pattern of the temporary folders that `replacing` makes


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a new file or folder, which becomes `path` when the block succeeds and is removed when it fails.

    Whatever happens, `path` is the old one or the new one, and whole; a folder that is there already stays. The place
    is in a temporary folder beside `path`, with a random name: in two containers, process ids may be the same. Raises
    `WriteError`.
    """
    try:
        target = Path(os.path.realpath(path))  # a link stays
        with TemporaryDirectory(prefix=".", suffix=".part", dir=target.parent, ignore_cleanup_errors=True) as temporary:
            new = Path(temporary, target.name)
            yield new
            if new.is_file():
                with new.open("r+b") as file:
                    os.fsync(file.fileno())
            try:
                new.replace(target)
            except OSError:
                if not (new.is_dir() and target.is_dir()):  # otherwise another process has made it in the meantime
                    raise
    except OSError as reason:
        raise WriteError(path, reason) from None


def acquire(lock: FileLock, timeout: float = -1):
    """Acquire a lock, if the file system has any. Raises `Timeout` if that takes `timeout` seconds."""
    try:
        lock.acquire(timeout=timeout)
    except OSError as reason:
        if reason.errno not in (errno.ENOLCK, errno.ENOTSUP):
            raise


def remove_leftovers(parts: Iterable[Path], age: float = 0):
    """Remove `LEFTOVERS` of killed processes, if nothing was written to them for `age` seconds."""
    for part in parts:
        with suppress(OSError):  # another process may remove it, too
            if time.time() - max(path.stat().st_mtime for path in (part, *part.rglob("*"))) >= age:
                remove = shutil.rmtree if part.is_dir() else Path.unlink
                remove(part)


def write(path: Path, content: str | bytes):
    """Write `path` as a whole or not at all. Raises `WriteError`."""
    # A file name in the content may hold bytes that are not UTF-8.
    content = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    other = path.exists() and not path.is_file() and not path.is_dir()  # a pipe or a device
    if other or str(path).startswith(("/dev/std", "/dev/fd/")):
        try:
            with path.open("ab") as file:
                file.write(content)
        except OSError as reason:
            raise WriteError(path, reason) from None
    else:
        with replacing(path) as new:
            new.write_bytes(content)


def write_json(path: Path, value):
    write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_csv(path: Path, columns: list[str], rows):
    write(path, pd.DataFrame(list(rows), columns=columns).to_csv(index=False, lineterminator="\n", na_rep="nan"))


def read_csv(path: Path) -> dict[str, list[float]]:
    """Column name → numbers. Raises `UserError` for a file that is not a table of numbers."""
    try:
        table = pd.read_csv(path).astype(float)
        if table.empty:
            raise ValueError("it has no rows")
    except (OSError, ValueError) as reason:
        raise UserError(f"{path} can't be read as a table of numbers ({reason}); resume or repeat the run") from None
    return table.to_dict("list")


def checksum(tensors: dict[str, Tensor], state: str) -> str:
    digest = hashlib.sha256(state.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_tensors(path: Path, tensors: dict[str, Tensor], **state):
    """Write tensors and a JSON-serializable state as safetensors, with a SHA-256 of both. Raises like `write`."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(state)
    # One metadata entry, because safetensors writes several in random order, and equal content must give equal files.
    write(path, save(tensors, {"state": f"{checksum(tensors, text)} {text}"}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the state that `save_tensors` wrote. Nothing is unpickled.

    Raises `CorruptFileError` if a single bit differs, and `FileNotFoundError` if there is no such file.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError, ValueError) as reason:
        raise CorruptFileError(f"{path} is damaged or not a safetensors file ({str(reason).splitlines()[0]})") from None
    digest, _, text = metadata.get("state", "").partition(" ")
    if checksum(tensors, text) != digest:
        raise CorruptFileError(f"{path} is damaged: its checksum does not match")
    return tensors, json.loads(text)


def save_figure(path: Path):
    """Write matplotlib's current figure as PNG and close it."""
    png = io.BytesIO()
    plt.gcf().savefig(png, dpi=100, format="png")  # plt.savefig would draw the figure once more
    plt.close()
    write(path, png.getvalue())
