"""Training steps in one and in several processes: `python -m benchmarks.scale --data cifar10.tgz --out scale.json`

On a CPU, all numbers of processes share the same cores; on GPUs, each process has its own. They take turns, a few steps
each. Beside a step, two parts of it are timed alone: loading and augmenting a process's part of the batch, and the
all-reduce of gradients and of statistics of batch normalization.
"""

import os
from functools import partial
from itertools import chain, repeat
from statistics import median

import torch
import torch.distributed as dist
from fastai.torch_core import num_distrib, rank_distrib
from fastcore.basics import num_cpus
from torch import nn

from benchmarks.steps import learner_step, save, seconds_of, take_turns
from cifar10 import cli
from cifar10.cli import OutputFile
from cifar10.data.table import ImageTable
from cifar10.errors import UserError
from cifar10.hardware import get_device
from cifar10.processes import process_group
from cifar10.signals import is_distributed
from train import get_dls, get_learner

REPEATS = 10  # of what is timed alone
PARTS = ("step", "loading", "reducing")


def measure(data: str, bs: int, width: int, device: str, steps: int) -> dict[str, float]:
    """Seconds of a training step, of loading, and of all-reduce, in one of several processes."""
    with process_group(device, timeout=120):
        dls = get_dls(data, bs=bs, device=device)
        learn = get_learner(dls, width=width)
        step, model = learner_step(learn, steps), learn.model
        dls.train.share = slice(rank_distrib(), None, max(1, num_distrib()))
        batches = chain.from_iterable(repeat(dls.train))
        loading, reducing = seconds_of(lambda: next(batches), REPEATS, dls.device), 0.0
        if is_distributed():
            norms = [norm for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)]
            sums = [torch.zeros(sum(p.numel() for p in model.parameters() if p.requires_grad), device=dls.device)]
            sums += [torch.zeros(3, norm.num_features, dtype=torch.double, device=dls.device) for norm in norms] * 2
            reducing = seconds_of(lambda: [dist.all_reduce(tensor) for tensor in sums], REPEATS, dls.device)
        return dict(step=step, loading=loading, reducing=reducing)


def measure_in(processes: int, *arguments) -> dict[str, float]:
    """What `measure` returns in the first of so many processes."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # needs the C library
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    rendezvous = dict(run_id="scale", rdzv_backend="c10d", rdzv_endpoint="localhost:0")
    try:
        return elastic_launch(LaunchConfig(1, 1, processes, max_restarts=0, **rendezvous), measure)(*arguments)[0]
    except ChildFailedError:
        raise UserError(f"the measurement with {processes} processes failed, see above") from None


def main(
    data: str = "cifar10",  # as for train.py
    processes: str = "1,2",  # numbers of processes
    steps: int = 8,  # to time in each turn
    rounds: int = 3,  # turns of each number
    batch_size: int = 512,  # of all processes together
    width: int = 64,  # width of the ResNet
    device: str = "auto",  # as for train.py
    out: OutputFile = None,  # JSON file for the results
):
    "Compare training steps in one and in several processes."
    ImageTable.open(data)  # decoded here, before all processes need them
    numbers, on_cpu = [int(number) for number in processes.split(",")], get_device(device).type == "cpu"

    def way(number: int) -> dict[str, float]:
        if on_cpu:
            os.environ["OMP_NUM_THREADS"] = str(max(1, num_cpus() // number))
        found = measure_in(number, data, batch_size, width, device, steps)
        print(f"{number} processes: {found['step']:.3f} s", flush=True)
        return found

    turns = take_turns({number: partial(way, number) for number in numbers}, rounds)
    rows = []
    for number in numbers:
        seconds = [turn["step"] for turn in turns[number]]
        speedup = median(one["step"] / step for one, step in zip(turns[numbers[0]], seconds))
        parts = {part: median(turn[part] for turn in turns[number]) for part in PARTS}
        rows.append(dict(processes=number, **parts, speedup=speedup, steps=seconds))
    save(dict(batch_size=batch_size, width=width, seconds=rows), out)


if __name__ == "__main__":
    cli.run(main)
