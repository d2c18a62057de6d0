"""Running as several processes: joining them, and rank 0 acting or deciding for all. No effect in a single process.

Rank 0 is the process that prints and writes. The first process of each host has the local rank 0.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from functools import wraps
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from fastai.torch_core import num_distrib, rank_distrib

from cifar10 import signals
from cifar10.errors import UserError
from cifar10.signals import ignore_signals, is_distributed, is_first_to_fail
from cifar10.text import plural

T = TypeVar("T")
NEEDED = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets, too
LOST = "a lost connection to another process"
PATIENCE = timedelta(days=1)  # how long to wait while one process works for all, like decoding the images
NUMBERS = count()  # one for each group that this process joins
patient: dist.ProcessGroup | None = None  # the same processes, with a longer timeout


def on_rank0(function: Callable[..., T]) -> Callable[..., T | None]:
    """A decorator: rank 0 calls the function; the others do nothing and get `None`."""

    @wraps(function)
    def called(*args, **kwargs):
        return function(*args, **kwargs) if rank_distrib() == 0 else None

    return called


def from_rank0(function: Callable[..., T]) -> Callable[..., T]:
    """A decorator: rank 0 calls the function; all processes get what it returns.

    If it raises an exception, rank 0 leaves the group, and the others end because they have lost it.
    """

    @wraps(function)
    def called(*args, **kwargs):
        answer: list[Any] = [on_rank0(function)(*args, **kwargs)]
        if is_distributed():
            dist.broadcast_object_list(answer)
        return answer[0]

    return called


@contextmanager
def process_group(device: str, timeout: float) -> Iterator[None]:
    """Join the other processes for the block, if torchrun started several, and give each process its own GPU.

    `timeout` is in seconds; after it, a process that is frozen or cut off counts as lost. One that ends is noticed at
    once. Raises `UserError` if one is lost. Only rank 0 prints in the block.
    """
    global patient
    if not is_distributed():
        yield
        return
    if missing := [name for name in NEEDED if name not in os.environ]:
        raise UserError(
            f"WORLD_SIZE is set, but not {', '.join(missing)}; start the processes with torchrun, or unset it"
        )
    cuda = device in ("auto", "cuda") and torch.cuda.is_available()
    if cuda:
        processes, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if processes > gpus:
            raise UserError(f"there are {processes} processes and {plural(gpus, 'GPU')}; start one for each GPU")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    elif device in ("auto", "mps") and torch.backends.mps.is_available():
        raise UserError("several processes can't share an Apple GPU; use one process, or --device cpu")
    limit, backend, rank = timedelta(seconds=timeout), "cpu:gloo,cuda:nccl" if cuda else "gloo", rank_distrib()
    try:
        # Otherwise, after a restart or in a second group, gloo would find the addresses of the previous processes.
        name = f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT')}-{next(NUMBERS)}"
        signals.store = dist.PrefixStore(name, next(dist.rendezvous("env://", timeout=limit))[0])
        dist.init_process_group(backend, timeout=limit, store=signals.store, rank=rank, world_size=num_distrib())
        patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        try:
            with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if rank == 0 else nowhere):
                yield
        except BaseException:
            ignore_signals()
            is_first_to_fail()  # claim the failure before the others can notice that this process leaves
            raise
        finally:
            dist.destroy_process_group()  # otherwise gloo's threads may abort the process at exit
            patient = None
        signals.store = None
    except RuntimeError as reason:
        if not is_lost(reason):
            raise
        raise UserError(f"stopped by {LOST}; start the run again") from None


def is_lost(reason: RuntimeError) -> bool:
    """Whether an exception means that another process has exited or stopped responding."""
    # gloo has no exceptions of its own; its messages start with a path in its source.
    return is_distributed() and (isinstance(reason, dist.DistError) or "gloo/" in str(reason))


def stopped_by(reason: BaseException) -> str | None:
    """What stopped this process, if an exception comes from that: a signal, a closed pipe or a lost process."""
    if isinstance(reason, BrokenPipeError):
        return "a closed pipe"
    if isinstance(reason, RuntimeError) and is_lost(reason):
        return LOST
    if isinstance(reason, KeyboardInterrupt):
        return getattr(reason, "by", "Ctrl-C")
    return signals.received or None


@contextmanager
def local_rank0_first() -> Iterator[None]:
    """Each host's first process runs the block before the others, so that they find the files it made.

    All wait until they are made on every host. If one of them fails, the others notice that it has left.
    """
    leads = os.environ.get("LOCAL_RANK", "0") == "0"
    if patient and not leads:
        dist.barrier(patient)
    yield
    if patient and leads:
        dist.barrier(patient)


def host_count() -> int:
    return int(os.environ.get("GROUP_WORLD_SIZE", 1)) if is_distributed() else 1


def is_restart() -> bool:
    """Whether torchrun restarted these processes, which it does up to `--max-restarts` times."""
    counts = [os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")] * num_distrib()
    if is_distributed():
        dist.all_gather_object(counts, counts[0])  # each host keeps its own count
    return any(count != "0" for count in counts)


def launch_command(script: str) -> list[str]:
    """The command that starts a script the way this process was started."""
    if is_distributed():
        processes = os.environ.get("LOCAL_WORLD_SIZE", str(num_distrib()))
        return ["torchrun", "--standalone", "--nproc_per_node", processes, script]
    return ["python" if shutil.which("python") == sys.executable else sys.executable, script]


def launch_id() -> str | None:
    """An ID of this torchrun launch, unchanged by restarts; `None` without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return str(os.getppid()) if name == "none" else name


def check_same(value: str, what: str):
    """Raise `UserError` unless a value is the same in all processes."""
    if value != from_rank0(lambda: value)():
        raise UserError(f"{what} of process {rank_distrib()} differs from that of rank 0; make them the same")
