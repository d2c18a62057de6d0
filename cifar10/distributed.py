"""Training in several processes, each on its part of every batch: `torchrun --nproc_per_node 2 train.py`

All processes draw the same random numbers. Each loads, augments and trains on its own part of every batch, PyTorch's
DistributedDataParallel averages the gradients, and batch normalization is computed over all parts: the result is that
of a single process, up to rounding. Only the first process prints and writes.
"""

import atexit
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.data.core import DataLoaders
from fastai.torch_core import get_model, num_distrib, rank_distrib
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cifar10.cli import UserError
from cifar10.sync_batch_norm import SyncBatchNorm2d

T = TypeVar("T")
LOST = "a lost connection to another process"
DEVICE_RNG = {"cuda": torch.cuda, "mps": torch.mps}  # devices with a random state of their own


def is_distributed() -> bool:
    """Whether torchrun started this process beside others."""
    return num_distrib() > 1


def is_first() -> bool:
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
        with nullcontext() if is_first() else open(os.devnull, "w") as nowhere, redirect_stdout(nowhere or sys.stdout):
            yield
    except RuntimeError as reason:
        if not is_lost(reason):
            raise
        raise UserError(f"stopped by {LOST}; start the training again") from None


def is_lost(reason: RuntimeError) -> bool:
    """Whether an exception means that another process ended, or does not answer."""
    return is_distributed() and bool(re.search("gloo|nccl|connection|timed out|socket", str(reason), re.IGNORECASE))


def from_first(function: Callable[..., T], *args) -> T:
    """What `function` returns in the first process, for all of them. A `UserError` there is raised in all, too."""
    if not is_distributed():
        return function(*args)
    answer: list[Any] = [None, None]
    if is_first():
        try:
            answer[0] = function(*args)
        except UserError as mistake:
            answer[1] = mistake.message
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise UserError(answer[1])
    return answer[0]


@contextmanager
def local_first() -> Iterator[None]:
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
    if value != from_first(lambda: value):
        raise UserError(f"{what} of process {rank_distrib()} differs from that of the first; make them the same")


class Distributed(Callback):
    """Train in all processes together. Batches, losses, metrics and the model are those of a single process."""

    order = MixedPrecision.order + 1  # after layers are frozen, before anything is recorded

    def before_train(self):  # other events also come from predictions, which the first process makes alone
        if not isinstance(self.model, DistributedDataParallel):
            self.join()
        self.flop = self.recorder.flop
        for value in get_model(self.model).state_dict().values():  # hosts with different processors may have drifted
            dist.broadcast(value, 0)

    def join(self):
        """Take a part of each batch from now on."""
        if (bs := self.dls.train.bs) < num_distrib():
            raise UserError(f"batch_size is {bs}, below the {num_distrib()} processes; use fewer of them")
        self.loaders = self.dls.loaders
        set_random_states(self.dls, from_first(random_states, self.dls))
        for loader in self.loaders:
            loader.share = slice(rank_distrib(), None, num_distrib())
        self.norms = [module for module in self.model.modules() if type(module) is nn.BatchNorm2d]
        for norm in self.norms:
            on_cpu, norm.process_group = norm.weight.device.type == "cpu", None
            norm.__class__ = SyncBatchNorm2d if on_cpu else nn.SyncBatchNorm
        self.wrap()

    def wrap(self):
        model = get_model(self.model)
        self.trained = [p.requires_grad for p in model.parameters()]
        self.learn.model = DistributedDataParallel(model, broadcast_buffers=False)

    def before_batch(self):
        if self.training and self.trained != [p.requires_grad for p in get_model(self.model).parameters()]:
            self.wrap()  # because it takes note of them only in the beginning

    def after_loss(self):
        if self.training:
            part = len(self.xb[0]) / self.dl.whole  # of the batch
            if part != 1 / num_distrib():
                self.learn.loss_grad = self.loss_grad * (part * num_distrib())
            self.learn.loss = self.loss.detach() * part
            dist.all_reduce(self.learn.loss)

    def after_train(self):
        recorder = self.recorder
        self.sum_up(recorder._train_mets)
        sums = self.tensor(recorder.correct, recorder.seen, recorder.flop - self.flop)
        dist.all_reduce(sums)
        recorder.correct, recorder.seen, recorder.flop = sums[0], int(sums[1]), self.flop + sums[2].item()

    def after_validate(self):
        if isinstance(self.model, DistributedDataParallel):
            self.sum_up(self.recorder._valid_mets)

    def sum_up(self, metrics):
        """Add up what the processes found."""
        for metric in metrics:
            metric.total = self.tensor(metric.total, metric.count)
            dist.all_reduce(metric.total)
            metric.total, metric.count = metric.total[0], int(metric.total[1])

    def tensor(self, *values) -> Tensor:
        return torch.tensor([float(value) for value in values], dtype=torch.float64, device=self.dls.device)

    def after_fit(self):
        if isinstance(self.model, DistributedDataParallel):
            self.learn.model = get_model(self.model)
            for norm in self.norms:
                norm.__class__ = nn.BatchNorm2d
            for loader in self.loaders:
                loader.share = None
                for transform in getattr(loader.after_batch, "fs", []):
                    if hasattr(transform, "part"):
                        transform.part = None


def random_states(dls: DataLoaders) -> dict[str, Any]:
    """Of all generators that a training draws from: two tensors, of PyTorch and of the device, and values for JSON."""
    numpy: Any = np.random.get_state()
    states: dict[str, Any] = dict(python=random.getstate(), numpy=[numpy[0], numpy[1].tolist(), *numpy[2:]])
    states |= dict(loaders=[dl.rng.getstate() for dl in (dls.train, dls.valid)], torch=torch.get_rng_state())
    device = DEVICE_RNG.get(dls.device.type)
    return states | (dict(device=device.get_rng_state()) if device else {})


def set_random_states(dls: DataLoaders, states: dict[str, Any]):
    """Restore what `random_states` returned."""
    np.random.set_state(tuple(states["numpy"]))
    generators = (random, dls.train.rng, dls.valid.rng)
    for generator, (kind, numbers, gauss) in zip(generators, [states["python"], *states["loaders"]], strict=True):
        generator.setstate((kind, tuple(numbers), gauss))  # JSON has no tuples
    torch.set_rng_state(states["torch"])
    if "device" in states and (device := DEVICE_RNG.get(dls.device.type)):
        device.set_rng_state(states["device"])
