"""A training step of our Learner against one of a plain PyTorch loop: `python -m benchmarks.steps`

Both train the same model with the same optimizer on batches of the same size, in the same precision and memory format,
in one process. The plain loop has a single batch, which is on the device already. The Learner has its usual data, and
then that batch alone, which shows what loading and augmentation add. All take turns of a few steps.

The other benchmarks time their steps with the functions of this module.
"""

import json
import time
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from fastai.vision.all import Callback, CancelFitException, DataLoader, DataLoaders, Learner, set_seed
from torch import nn

from cifar10 import cli
from cifar10.cli import OutputFile
from cifar10.errors import UserError
from cifar10.files import write_json
from cifar10.hardware import collect_env
from cifar10.recipes import ASSIGNMENT
from cifar10.training.callbacks import StopAtNaN
from cifar10.training.optim import Muon
from model import ResNet
from train import get_dls, get_learner

LR = 0.01
WARM_UP = 2  # steps before each measurement; the first ones include one-time set-up
Name, Value = TypeVar("Name"), TypeVar("Value")


def now(device: torch.device) -> float:
    """Seconds, when the device has done all it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(action: Callable[[], Any], count: int, device: torch.device) -> float:
    """The mean duration of `count` calls, after some to warm up."""
    for _ in range(WARM_UP):
        action()
    begin = now(device)
    for _ in range(count):
        action()
    return (now(device) - begin) / count


class TimeSteps(Callback):
    """Time `steps` training steps after some to warm up, and then stop; `seconds` is the mean."""

    order, run_valid = 1000, False  # the last one, so that the work of the other callbacks counts

    def __init__(self, steps: int):
        self.steps = steps

    def after_batch(self):
        if self.iter + 1 == WARM_UP:
            self.begin()
        elif self.iter + 1 == WARM_UP + self.steps:
            self.end()
            raise CancelFitException

    def begin(self):
        self.start = now(self.dls.device)

    def end(self):
        self.seconds = (now(self.dls.device) - self.start) / self.steps


def learner_step(learn: Learner, steps: int, timer: type[TimeSteps] = TimeSteps) -> float:
    """Seconds of a training step of a Learner, with its data and its records, as train.py trains.

    Raises `UserError` if an epoch has too few steps.
    """
    if WARM_UP + steps > len(learn.dls.train):
        raise UserError(f"an epoch has {len(learn.dls.train)} steps, too few to time {steps} after {WARM_UP} others")
    timing = timer(steps)
    with redirect_stdout(StringIO()):  # fastai's table
        learn.fit_one_cycle(1, LR, cbs=[StopAtNaN(), timing])
    return timing.seconds


def bare_loop(batch: tuple, classes: int, width: int, precision: str) -> Callable[[], None]:
    """A function that trains a ResNet of its own for one step on `batch`, on the device of the batch."""
    device = batch[0].device
    model = ResNet(classes, width=width).to(device, memory_format=torch.channels_last).train()
    model.prep[0].weight.requires_grad_(False)  # as ours, after whitening
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    lower = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    optimizer = Muon(
        model.parameters(), lr=LR, momentum=ASSIGNMENT.momentum, weight_decay=ASSIGNMENT.weight_decay,
        lr_scale=ASSIGNMENT.muon_lr_scale, ns_steps=ASSIGNMENT.ns_steps, dtype=dtype,
    )  # fmt: skip
    loss_func = nn.CrossEntropyLoss(label_smoothing=ASSIGNMENT.label_smoothing)
    x, y = (part.as_subclass(torch.Tensor) for part in batch)

    def step():
        with torch.autocast(device.type, lower) if lower else nullcontext():
            prediction = model(x)
        loss = loss_func(prediction.float(), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def one_batch(dls: DataLoaders) -> DataLoaders:
    """DataLoaders of nothing but one batch, loaded and augmented, in epochs as long as before."""
    loader = DataLoader([dls.train.one_batch()] * len(dls.train), bs=None)
    loader.to_detach = dls.train.to_detach  # or fastai would fetch each metric from a GPU
    same = DataLoaders(loader, loader, device=dls.device)
    same.vocab = dls.vocab
    return same


def take_turns(ways: dict[Name, Callable[[], Value]], rounds: int) -> dict[Name, list[Value]]:
    """What each of the `ways` returns in each round, so that whatever slows the machine down meets all of them."""
    turns = [{name: way() for name, way in ways.items()} for _ in range(rounds)]
    return {name: [turn[name] for turn in turns] for name in ways}


def compare_with_bare_loop(dls: DataLoaders, width: int, steps: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step, the median of the rounds; the ratio of ours to the bare loop; what the data add to it."""
    same = one_batch(dls)
    ours, fed = get_learner(dls, width=width), get_learner(same, width=width)
    bare = bare_loop(same.train.one_batch(), len(dls.vocab), width, ours.precision)
    ways = {
        "ours_ms": lambda: learner_step(ours, steps),
        "one_batch_ms": lambda: learner_step(fed, steps),
        "bare_ms": lambda: seconds_of(bare, steps, dls.device),
    }
    results = {name: 1000 * median(values) for name, values in take_turns(ways, rounds).items()}
    ratio, data_share = results["ours_ms"] / results["bare_ms"], 1 - results["one_batch_ms"] / results["ours_ms"]
    about = dict(precision=ours.precision, batch_size=dls.bs, width=width, steps=steps * rounds)
    return about | results | dict(ratio=ratio, data_share=data_share)


def save(results: dict[str, Any], out: str | None):
    """Print the results, and write them to `out`, if it is given, with what they depend on."""
    print(json.dumps(results, indent=2, ensure_ascii=False))
    if out:
        write_json(Path(out), results | collect_env())


def main(
    data: str = "digits",  # as for train.py
    bs: int = 128,  # batch size
    steps: int = 2,  # measured steps of each way in a round
    rounds: int = 10,  # in which all ways take turns
    width: int = 64,  # width of the ResNet
    device: str = "auto",  # as for train.py
    out: OutputFile = None,  # JSON file for the results
):
    "Compare a training step of our Learner with one of a plain PyTorch loop."
    set_seed(0)
    save(compare_with_bare_loop(get_dls(data, bs=bs, device=device), width, steps, rounds), out)


if __name__ == "__main__":
    cli.run(main)
