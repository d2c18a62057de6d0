"""Shared command-line behavior of all scripts: errors in one sentence, exit statuses, signals, progress bars.

Exit statuses: 0 for success, 2 for an error, 130 for Ctrl-C, 129 for SIGHUP, 143 for SIGTERM, 141 for a closed pipe.
"""

import os
import re
import signal
import sys
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from io import TextIOWrapper

import matplotlib
from fastcore.basics import IN_NOTEBOOK
from fastcore.script import anno_parser
from fastprogress import fastprogress


class UserError(ValueError):
    """A mistake that the user can fix. The message is one sentence: what is wrong, and what to do about it."""

    def __init__(self, message: str):
        super().__init__(message)
        self.message = message

    def __str__(self):  # fastai rewrites the arguments of an exception that passes through a callback
        return self.message


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C."""

    by, status = "SIGTERM", 143

    @classmethod
    def handle(cls, *_):
        raise cls


class HungUp(Terminated):
    """SIGHUP: the terminal was closed."""

    by, status = "SIGHUP", 129


class PipeClosed(Terminated):
    """The program that read the output has ended."""

    by, status = "a closed pipe", 141


class YesNo(BooleanOptionalAction):
    """`--flip` and `--no-flip`. fastcore also passes the type, which argparse no longer takes from Python 3.14 on."""

    def __init__(self, *args, type=None, **kwargs):
        super().__init__(*args, **kwargs)


class Parser(ArgumentParser):
    """argparse's parser, but an error is one line, and an unknown option is answered with the closest known one."""

    def error(self, message: str):
        if unknown := re.match(r"unrecognized arguments: (--[\w-]+)", message):
            known = [option for option in self._option_string_actions if option.startswith("--")]
            closest = get_close_matches(unknown[1], known, n=1)
            message = f"there is no option {unknown[1]}; {f'did you mean {closest[0]}?' if closest else 'see --help'}"
        elif message.startswith("unrecognized"):
            message += "; options begin with --, see --help"
        message = message.replace("_parse value", "value")  # fastcore's name for `int | None`
        fail(f"{self.prog}: error: {message}", 2)


def fail(message: str, status: int):
    """Print `message` to stderr and end the program with `status`."""
    with suppress(OSError):  # the terminal may have been closed
        print(message, file=sys.stderr)
    try:
        print(end="", flush=True)
    except OSError:  # Python would try again, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    raise SystemExit(status)


def parse(schema: Callable, words: list[str]) -> dict:
    """The options that were typed, by name, without those left at their default.

    `schema` is a function or a dataclass whose parameters are documented the way fastcore's `call_parse` reads them.
    Hyphens and underscores are interchangeable in the name of an option.
    """
    plain = anno_parser(schema)
    look = dict(prog=plain.prog, description=plain.description, formatter_class=plain.formatter_class)
    parser = Parser(**look, parents=[plain], add_help=False)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    words = [re.sub(r"^--[\w-]+", lambda option: option[0].replace("_", "-"), word) for word in words]
    untyped = object()
    names = [action.dest for action in parser._actions if action.default is not SUPPRESS]
    given = vars(parser.parse_args(words, Namespace(**dict.fromkeys(names, untyped))))
    return {name: value for name, value in given.items() if value is not untyped and name not in ("pdb", "xtra")}


@contextmanager
def script_settings() -> Iterator[None]:
    """Signals, output and plots as a script needs them; a notebook (`%run`) gets its own signal handlers back."""
    if isinstance(sys.stdout, TextIOWrapper):  # a notebook has another one
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    if not IN_NOTEBOOK:
        matplotlib.use("agg")  # plots are files
        if not getattr(sys.stdout, "isatty", bool)():  # no moving bars in a log file
            fastprogress.NO_BAR, fastprogress.ConsoleProgressBar.fill = True, ""
    kinds = {getattr(signal, kind.by, None): kind for kind in (Terminated, HungUp)}  # Windows has no SIGHUP
    numbers = [number for number in kinds if number and signal.getsignal(number) != signal.SIG_IGN]  # of nohup
    before = {number: signal.signal(number, kinds[number].handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(main: Callable, schema: Callable | None = None):
    """Run a script: call `main` with the typed options, which `schema` describes, and exit with its status."""
    with script_settings():
        debug = "--debug" in sys.argv
        try:
            given = parse(schema or main, sys.argv[1:])
            given.pop("debug", None)
            main(**given)
        except BrokenPipeError:
            fail(f"stopped by {PipeClosed.by}", PipeClosed.status)
        except KeyboardInterrupt as interrupt:
            fail(f"\nstopped by {getattr(interrupt, 'by', 'Ctrl-C')}{interrupt}", getattr(interrupt, "status", 130))
        except (UserError, OSError) as reason:
            if debug:
                raise
            hint = "" if isinstance(reason, UserError) else " (--debug shows where)"
            fail("error: " + str(reason).replace("\n", "\\n") + hint, 2)
