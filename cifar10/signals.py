"""Stop signals, and which of several processes reports a failure. Without torch, so that a mistake is answered at once.

torchrun tells each process its rank, and the number of processes, in environment variables.
"""

import os
import signal
import time
from contextlib import suppress
from functools import cache
from threading import Thread
from typing import Any

from cifar10.errors import Stopped

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
store: Any = None  # torch's store of the current process group
received = ""  # the signal that has told this process to stop


def is_distributed() -> bool:
    """Whether torchrun started several processes."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def stop(number: int, frame):
    """Handle a signal.

    It is also noted, because the exception may be lost in the bare `except:` of a library, or cause another one there.
    """
    global received
    received = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    raise Stopped(received)


def ignore_signals():
    """Ignore stop signals from now on: torchrun sends one when any process exits, even to one about to print why."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def is_first_to_fail() -> bool:
    """Whether this process should report a failure: it is the first in its group to fail, as far as it can tell.

    Before there is a group, that is each host's first process, because hosts can't see each other.
    """
    if not is_distributed():
        return True
    if store is None:
        leads = os.environ.get("LOCAL_RANK", "0") == "0"
        if not leads:  # exiting now would make torchrun stop the first one before it prints
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # sent once the first process has exited
            time.sleep(60)
        return leads
    return claim_failure(store)


@cache  # because the store may end with its host
def claim_failure(store) -> bool:
    answers: list[bytes] = []
    rank = os.environ.get("RANK", "0")

    def ask():
        with suppress(RuntimeError):
            answers.append(store.compare_set("failed", "", rank))

    thread = Thread(target=ask, daemon=True)  # the host of the store may be unreachable
    thread.start()
    thread.join(timeout=5)
    return not answers or answers[0].decode() == rank
