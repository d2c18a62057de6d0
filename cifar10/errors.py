"""What went wrong, in one sentence."""

import errno
from pathlib import Path


class UserError(ValueError):
    """A mistake that the user can fix. The message is one sentence: what is wrong, and what to do about it."""

    def __init__(self, message: str):
        super().__init__(message)
        self.message = message

    def __str__(self):  # fastai rewrites the arguments of an exception that passes through a callback
        return self.message


class Stopped(KeyboardInterrupt):
    """A signal or a closed pipe, handled like Ctrl-C. `hint` is what to do next."""

    def __init__(self, by: str, hint: str = ""):
        super().__init__()
        self.by, self.hint = by, hint


class WriteError(UserError):
    """A file could not be written: the disk is full, or a permission is missing."""

    def __init__(self, path: Path, reason: OSError):
        remedies = {
            **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some disk space"),
            **dict.fromkeys((errno.ENOENT, errno.ENOTDIR), "make its folder first, or choose another"),
            errno.EISDIR: "give the name of a file, not of a folder",
        }
        remedy = remedies.get(reason.errno or 0, "check the permissions")
        super().__init__(f"{path} can't be written ({reason.strerror or reason}); {remedy}")


class CorruptFileError(UserError):
    """A file does not hold what was written: it is truncated, altered, or something else altogether."""
