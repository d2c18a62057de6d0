"""Shared command-line behavior of all scripts: errors in one sentence, exit statuses, signals, progress bars.

Exit statuses: 0 for success, 2 for an error, 130 for Ctrl-C, 143 for SIGTERM.
"""

import re
import signal
import sys
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Callable
from difflib import get_close_matches
from io import TextIOWrapper

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

    @classmethod
    def handle(cls, *_):
        raise cls


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
    print(message, file=sys.stderr)
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


def run(main: Callable, schema: Callable | None = None):
    """Run a script: call `main` with the typed options, which `schema` describes, and exit with its status."""
    if isinstance(sys.stdout, TextIOWrapper):  # a notebook has another one
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    signal.signal(signal.SIGTERM, Terminated.handle)
    if not (sys.stdout and sys.stdout.isatty()):  # no moving bars in a log file
        fastprogress.NO_BAR, fastprogress.ConsoleProgressBar.fill = True, ""
    given = parse(schema or main, sys.argv[1:])
    debug = given.pop("debug", False)
    try:
        main(**given)
    except KeyboardInterrupt as interrupt:
        by, status = ("SIGTERM", 143) if isinstance(interrupt, Terminated) else ("Ctrl-C", 130)
        fail(f"\nstopped by {by}{interrupt}", status)
    except (UserError, OSError) as reason:
        if debug:
            raise
        hint = "" if isinstance(reason, UserError) else " (--debug shows where)"
        fail("error: " + str(reason).replace("\n", "\\n") + hint, 2)
