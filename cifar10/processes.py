"""Several processes: joining, rank 0, one answer for all."""

import atexit
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from fastai.torch_core import num_distrib, rank_distrib

from cifar10.errors import UserError

T = TypeVar("T")


LOST = "a lost connection to another process"


def is_distributed() -> bool:
    """Whether torchrun started this process beside others."""
    return num_distrib() > 1


def is_rank0() -> bool:
    return rank_distrib() == 0


@contextmanager
def process_group(device: str, timeout: float) -> Iterator[None]:
    """Join the other processes, if torchrun started several, and take this process's own GPU.

    `timeout` is in seconds; after it, a process that is frozen or cut off counts as lost. One that ends is noticed at
    once. Raises `UserError` if one is lost.
    """
    if not is_distributed():
        yield
        return
    cuda = device in ("auto", "cuda") and torch.cuda.is_available()
    if cuda:
        processes, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if processes > gpus:
            raise UserError(f"there are {processes} processes and {gpus} GPU{'s' * (gpus > 1)}; start one for each GPU")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    elif device in ("auto", "mps") and torch.backends.mps.is_available():
        raise UserError("several processes can't share an Apple GPU; use one process, or --device cpu")
    limit, backend = timedelta(seconds=timeout), "cpu:gloo,cuda:nccl" if cuda else "gloo"
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=limit))
        # After a restart, gloo would find the addresses of the processes before.
        store = dist.PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
        dist.init_process_group(backend, timeout=limit, store=store, rank=rank, world_size=world_size)
        atexit.register(dist.destroy_process_group)  # or gloo's threads may abort the process at its end
        with nullcontext() if is_rank0() else open(os.devnull, "w") as nowhere, redirect_stdout(nowhere or sys.stdout):
            yield
    except RuntimeError as reason:
        if not is_lost(reason):
            raise
        raise UserError(f"stopped by {LOST}; start the training again") from None


def is_lost(reason: RuntimeError) -> bool:
    """Whether an exception means that another process ended, or does not answer."""
    return is_distributed() and bool(re.search("gloo|nccl|connection|timed out|socket", str(reason), re.IGNORECASE))


def from_rank0(function: Callable[..., T], *args) -> T:
    """What `function` returns in the first process, for all of them. A `UserError` there is raised in all, too."""
    if not is_distributed():
        return function(*args)
    answer: list[Any] = [None, None]
    if is_rank0():
        try:
            answer[0] = function(*args)
        except UserError as mistake:
            answer[1] = mistake.message
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise UserError(answer[1])
    return answer[0]


@contextmanager
def local_rank0_first() -> Iterator[None]:
    """In the block, the first process of each host comes before the others, which then find the files it made.

    All wait until they are made on every host, however long that takes. Raises `UserError` if one of them fails.
    """
    hosts, leads = int(os.environ.get("GROUP_WORLD_SIZE", 1)), os.environ.get("LOCAL_RANK", "0") == "0"
    ready = [f"ready-{host}" for host in range(hosts)]
    store = dist.distributed_c10d._get_default_store() if is_distributed() else None

    def wait():
        while store and not store.check(ready):
            if store.check(["unready"]):
                with suppress(RuntimeError):
                    store.wait(["failed"], timedelta(seconds=10))  # by the one that knows the reason, see `fails_first`
                raise UserError("another process failed, see its message")
            time.sleep(0.1)

    if not leads:
        wait()
    try:
        yield
    except BaseException:
        if store:
            store.set("unready", "")
        raise
    if store and leads:
        store.set(f"ready-{os.environ.get('GROUP_RANK', 0)}", "")
        wait()


def is_restart() -> bool:
    """Whether torchrun started the processes again, which it does `--max-restarts` times after one of them ended."""
    counts = [os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")] * num_distrib()
    if is_distributed():
        dist.all_gather_object(counts, counts[0])  # each host counts for itself
    return any(count != "0" for count in counts)


def launch_id() -> str | None:
    """A name of the torchrun that started this process, the same after a restart; `None` if none did."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return str(os.getppid()) if name == "none" else name


def check_same(value: str, what: str):
    """Raise `UserError` unless a value is the same in all processes."""
    if value != from_rank0(lambda: value):
        raise UserError(f"{what} of process {rank_distrib()} differs from that of the first; make them the same")
