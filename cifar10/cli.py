"""Shared command-line behavior of all scripts: errors in one sentence, exit statuses, signals, progress bars.

A script reads its options with `start` before it imports what takes seconds, so that errors appear at once, and passes
them on with `run`. Exit statuses: 0 for success, 1 if predict.py can't read some of the images, 2 for an error, and
those of `STATUS`.
"""

import errno
import os
import re
import signal
import sys
from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from importlib import import_module
from inspect import isclass, signature
from io import TextIOWrapper
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

try:
    from fastcore.basics import IN_NOTEBOOK
    from fastcore.script import anno_parser
except ModuleNotFoundError:
    how = "source .venv/bin/activate, or conda activate cifar10"
    sys.exit(f"error: fastcore is not installed; activate the environment first: {how}")

from cifar10 import signals
from cifar10.errors import UserError, WriteError
from cifar10.signals import SIGNALS, ignore_signals, is_first_to_fail

SYNONYMS = {"--bs": "--batch-size", "--learning-rate": "--lr-max"}  # what people type
OUT_OF_MEMORY = "OutOfMemoryError"  # torch's, which is not imported yet when a script reads its options
TOO_LARGE = "the GPU has too little memory; free some, use smaller batches or images, or set CUDA_VISIBLE_DEVICES="
STATUS = {"Ctrl-C": 130, "SIGHUP": 129, "SIGTERM": 143, "a closed pipe": 141}  # 128 + the signal's number; others: 1


def import_extra(package: str, group: str) -> ModuleType:
    """An optional package. Raises `UserError` with the command that installs it, if it is missing."""
    try:
        return import_module(package)
    except ImportError:
        ways = f"`make extras`, or `pip install '.[{group}]'`"
        raise UserError(f"{package}, which this needs, is not installed; install it with {ways}") from None


class YesNo(BooleanOptionalAction):
    """`--flip` and `--no-flip`. fastcore also passes the type, which argparse no longer takes from Python 3.14 on."""

    def __init__(self, *args, type=None, **kwargs):
        super().__init__(*args, **kwargs)


def check_parent(path: str):
    if not Path(path).parent.is_dir():
        raise ArgumentTypeError(WriteError(Path(path), OSError(errno.ENOENT, os.strerror(errno.ENOENT))))


def output_file(path: str) -> str:
    """The type of an option for a file to write, which is checked before the work starts."""
    check_parent(path)
    if Path(path).is_dir():
        raise ArgumentTypeError(WriteError(Path(path), OSError(errno.EISDIR, os.strerror(errno.EISDIR))))
    return path


def output_folder(path: str) -> str:
    """The type of an option for a new or empty folder to fill."""
    if Path(path).exists() and not (Path(path).is_dir() and not any(Path(path).iterdir())):
        raise ArgumentTypeError(f"{path} is not an empty folder; choose another one")
    check_parent(path)
    return path


OutputFile = Annotated[str | None, {"type": output_file}]
OutputFolder = Annotated[str | None, {"type": output_folder}]


class Parser(ArgumentParser):
    """argparse's parser, but an error is one line, and an unknown option is answered with the closest known one."""

    def error(self, message: str):
        if unknown := re.match(r"unrecognized arguments: (--[\w-]+)", message):
            known = re.findall(r"--[a-z][\w-]*", self.format_help())
            closest = get_close_matches(unknown[1], known, n=1)
            if SYNONYMS.get(unknown[1]) in known:
                closest = [SYNONYMS[unknown[1]]]
            hint = f"did you mean {closest[0]}?" if closest else "see --help"
            message = f"there is no option {unknown[1]}; {hint}"
        elif message.startswith("unrecognized"):
            message += "; options begin with --, see --help"
        message = message.replace("_parse value", "number")  # fastcore's name for `int | None`
        fail(f"{self.prog}: error: {message}", 2)


def fail(message: str, status: int):
    """Print `message` to stderr and end the program with `status`. Of several processes, the first to fail prints."""
    ignore_signals()
    with suppress(OSError):  # the terminal may have been closed
        if is_first_to_fail():
            print(message, file=sys.stderr)
    try:
        print(end="", flush=True)
    except OSError:  # Python would try again, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    raise SystemExit(status)


def split_at_dashes(words: list[str]) -> tuple[list[str], list[str]]:
    """The words before a bare `--`, and the rest: none of those after it is an option, whatever it begins with."""
    end = words.index("--") if "--" in words else len(words)
    return words[:end], words[end:]


def parse(schema: Callable, words: list[str]) -> dict:
    """The options that were typed, by name, without those left at their default.

    `schema` is a function or a dataclass whose parameters are documented the way fastcore's `call_parse` reads them.
    Hyphens and underscores are interchangeable in the name of an option.
    """
    plain = anno_parser(schema)
    look = dict(prog=plain.prog, description=plain.description, formatter_class=plain.formatter_class)
    parser = Parser(**look, parents=[plain], add_help=False, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options, others = split_at_dashes(words)
    for before, word in pairwise(["", *words]):  # a variable of the shell may not be set
        if not word or (word in options and re.fullmatch(r"--[\w-]+=", word)):
            name = word[:-1] or (before if before.startswith("--") and before in options else "an argument")
            parser.error(f"{name} is empty; give a value")
    # `--name` and `--name=value` only: argparse also takes `--my_photo 1.jpg`, a word with a space, as a value.
    options = [re.sub(r"^--[\w-]+(?==|\Z)", lambda name: name[0].replace("_", "-"), word) for word in options]
    untyped = object()
    unused = ("pdb", "xtra")  # fastcore's own options, which do nothing here
    names = [*signature(schema).parameters, *unused, "debug"]
    values = vars(parser.parse_args(options + others, Namespace(**dict.fromkeys(names, untyped))))
    typed = {name: value for name, value in values.items() if value is not untyped}
    for name in {*unused} & {*typed}:
        parser.error(f"unrecognized arguments: --{name}")
    return typed


@contextmanager
def handled() -> Iterator[None]:
    """Handle signals and errors as a script does; a notebook (`%run`) gets its own signal handlers back."""
    if isinstance(sys.stdout, TextIOWrapper):  # a notebook has another one
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # as with nohup
            signal.signal(number, signals.stop)
    try:
        yield
    except BrokenPipeError:
        fail("stopped by a closed pipe", STATUS["a closed pipe"])
    except (KeyboardInterrupt, Exception) as reason:
        default = "Ctrl-C" if isinstance(reason, KeyboardInterrupt) else signals.received
        if by := getattr(reason, "by", default):
            fail(f"\nstopped by {by}{getattr(reason, 'hint', '')}", STATUS.get(by, 1))
        expected = isinstance(reason, (UserError, OSError)) or type(reason).__name__ == OUT_OF_MEMORY
        if "--debug" in split_at_dashes(sys.argv[1:])[0] or not expected:
            raise
        what = TOO_LARGE if type(reason).__name__ == OUT_OF_MEMORY else str(reason).replace("\n", "\\n")
        hint = "" if isinstance(reason, UserError) else " (--debug shows where)"
        fail(f"error: {what}{hint}", 2)
    finally:
        signals.received = ""
        for number, handler in before.items():
            signal.signal(number, handler)


def start(schema: Callable, distributed: bool = False) -> dict[str, Any]:
    """The options that were typed, which `schema` describes (see `parse`), and checks if it is a class.

    Under torchrun, only a `distributed` script runs in each process; others run in the first one.
    """
    if not distributed and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if os.environ.get("RANK", "0") != "0":
            raise SystemExit
        print(f"{Path(sys.argv[0]).name} runs in one process: the others end", file=sys.stderr)
        os.environ["WORLD_SIZE"] = "1"
    with handled():
        typed = parse(schema, sys.argv[1:])
        typed.pop("debug", None)
        if isclass(schema):
            schema(**typed)
        return typed


def run(main: Callable, typed: dict[str, Any] | None = None):
    """Run a script: call `main` with the options that `start` returned, by default those that `main` describes."""
    if typed is None:
        typed = start(main)
    if not IN_NOTEBOOK:
        import matplotlib  # here, because both would delay `start`
        from fastprogress import fastprogress

        matplotlib.use("agg")  # plots are files
        if not getattr(sys.stdout, "isatty", bool)():  # no moving bars in a log file
            fastprogress.NO_BAR, fastprogress.ConsoleProgressBar.fill = True, ""
    with handled():
        main(**typed)
