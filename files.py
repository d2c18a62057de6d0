"""Files and folders that appear whole or not at all, tensors with a checksum, and a folder that one process holds."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from errors import UserError


class NotWritten(UserError):
    """A file for which there is no room, or no permission."""

    def __init__(self, path: Path, reason: OSError):
        full = reason.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "make room for it" if full else "see to it that it can be"
        super().__init__(f"{path} can't be written ({reason.strerror or reason}); {remedy}")


class Damaged(UserError):
    """A file that isn't what was written: cut off, altered, or something else altogether."""


def write(path: Path, content: str | bytes):
    """Write `path` whole or not at all: a reader never sees a part of it, not even after a power failure.

    Raises `NotWritten` where the disk is full, and then leaves the old `path` as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            # A file's name in it may hold bytes that are no UTF-8.
            file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as reason:
        raise NotWritten(path, reason) from None
    finally:
        with suppress(OSError):  # on a disk that can't be written to any more
            temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends well, and vanishes when it doesn't."""
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        yield temporary
        temporary.chmod(0o755)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process made it in the meantime
                raise
    except OSError as reason:
        raise NotWritten(folder, reason) from None
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)


def checksum(tensors: dict[str, Tensor], state: str) -> str:
    digest = hashlib.sha256(state.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_tensors(path: Path, tensors: dict[str, Tensor], **state):
    """Write tensors, and whatever JSON can hold, as safetensors with a SHA-256 of all of it. Raises like `write`."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(state)
    # One entry, because safetensors writes several in a new order each time, and equal content must be equal files.
    write(path, save(tensors, {"state": f"{checksum(tensors, text)} {text}"}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the state that `save_tensors` wrote. Nothing is unpickled.

    Raises `Damaged` for any file in which a bit differs, and `FileNotFoundError` for none.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError, ValueError) as reason:
        raise Damaged(f"{path} is damaged, or no safetensors file ({str(reason).splitlines()[0]})") from None
    digest, _, text = metadata.get("state", "").partition(" ")
    if checksum(tensors, text) != digest:
        raise Damaged(f"{path} is damaged: its checksum doesn't fit")
    return tensors, json.loads(text)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; a process that is killed lets go. Raises `UserError` if another one holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is being trained by another process; wait for its end, or stop it") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)
