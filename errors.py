"""How the scripts speak to their user: mistakes are told in one sentence, and bars move on terminals only."""

import re
import signal
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from difflib import get_close_matches
from functools import wraps

from fastprogress import fastprogress


class UserError(ValueError):
    """Something the user can put right. The message is one sentence: what is wrong, and what would be right."""

    def __init__(self, message: str):
        super().__init__(message)
        self.message = message

    def __str__(self):  # fastai rewrites the arguments of an exception that passes through a callback
        return self.message


class Terminated(KeyboardInterrupt):
    """SIGTERM, with which an operating system ends a process; as good a reason to stop as Ctrl-C."""


def terminate(*_):
    raise Terminated


def stop(message: str, status: int):
    """Print `message` on stderr and end the program with `status`."""
    print(message, file=sys.stderr)
    raise SystemExit(status)


def parser_error(self: ArgumentParser, message: str):
    """Without argparse's lines of usage; an unknown option is answered with the one that was probably meant."""
    if unknown := re.match(r"unrecognized arguments: (--[\w-]+)", message):
        known = [option for option in self._option_string_actions if option.startswith("--")]
        meant = get_close_matches(unknown[1], known, n=1)
        message = f"there is no option {unknown[1]}; " + (f"did you mean {meant[0]}?" if meant else "see --help")
    elif message.startswith("unrecognized"):
        message += "; options begin with --, see --help"
    stop(f"{self.prog}: error: {message}", 2)


def command_line(main: Callable) -> Callable:
    """Decorate a script's `main`: a `UserError` ends it with one sentence and status 2, Ctrl-C and SIGTERM with
    one line and 130 or 143. The exception's own text, if it has one, is printed, too.

    fastcore's `call_parse` spells an option of two words with a hyphen; here an underscore, as in Python, does as well.
    """
    if main.__module__ == "__main__":  # an import of the script changes nothing
        ArgumentParser.error = parser_error
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
        signal.signal(signal.SIGTERM, terminate)
        if not sys.stdout.isatty():  # a log file is no place for moving bars
            fastprogress.NO_BAR, fastprogress.ConsoleProgressBar.fill = True, ""
        sys.argv[1:] = [re.sub(r"^--[\w-]+", lambda option: option[0].replace("_", "-"), a) for a in sys.argv[1:]]

    @wraps(main)
    def run(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as mistake:
            stop("error: " + str(mistake).replace("\n", "\\n"), 2)
        except OSError as reason:  # a disk or a terminal that went away, a folder that can't be entered
            stop(f"error: {reason}", 2)
        except KeyboardInterrupt as interrupt:
            by, status = ("SIGTERM", 143) if isinstance(interrupt, Terminated) else ("Ctrl-C", 130)
            stop(f"\nstopped by {by}{interrupt}", status)

    return run
