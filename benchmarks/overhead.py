"""What our Learner adds to a plain PyTorch loop: `python benchmarks/overhead.py`.

Both train the same model with the same optimizer on batches of the same size in the same precision and memory format,
in one process, in turn: a step of the one, a step of the other. Printed is the ratio of the medians of their durations.
Both get random images, so the figure is the training step's; the augmentation is outside it on either side.
"""

import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from fastai.vision.all import Callback, CancelFitException, DataLoader, DataLoaders, set_seed
from fastcore.script import call_parse
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from learner import LABEL_SMOOTHING, MOMENTUM, decayed_and_not, get_learner
from model import ResNet
from muon import Muon
from runs import surroundings, write_json


class OneBatch(DataLoader):
    """The same batch, `steps` times."""

    def __init__(self, batch: tuple, steps: int):
        super().__init__([0], bs=1)
        self.batch, self.steps = batch, steps

    def __len__(self):
        return self.steps

    def __iter__(self):
        for _ in range(self.steps):
            yield self.batch


class Alternate(Callback):
    """Time each step of the Learner, and a step of `other` after it."""

    order = 1000  # the last, so that the other callbacks' work counts as the Learner's

    def __init__(self, other, times: list):
        self.other, self.times = other, times

    def before_train(self):
        self.start = time.perf_counter()

    def after_batch(self):
        if not self.training:
            return
        middle = time.perf_counter()
        self.other()
        end = time.perf_counter()
        self.times.append((middle - self.start, end - middle))
        self.start = time.perf_counter()

    def before_validate(self):
        raise CancelFitException


def plain_step(batch: tuple, classes: int, width: int, precision: str):
    """A function that trains a ResNet of its own for one step on `batch`, where that is."""
    device = batch[0].device
    model = ResNet(classes, width=width).to(device, memory_format=torch.channels_last).train()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    optimizer = Muon(decayed_and_not(model), lr=0.01, momentum=MOMENTUM, dtype=dtype)
    loss_func = nn.CrossEntropyLoss(label_smoothing=LABEL_SMOOTHING)

    def step():
        x, y = batch
        with torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext():
            prediction = model(x)
        loss = loss_func(prediction.float(), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(bs: int, steps: int, width: int, warmup: int = 2) -> dict:
    """Median seconds a step of ours and of the plain loop, and their ratio, over `steps` steps after `warmup` ones."""
    set_seed(0)
    batch = torch.randn(bs, 3, 32, 32), torch.randint(10, (bs,))
    dls = DataLoaders(OneBatch(batch, steps + warmup), OneBatch(batch, 1), device=torch.device("cpu"))
    dls.vocab = list(range(10))
    learn = get_learner(dls, width=width)

    other = plain_step(batch, 10, width, learn.precision)
    times = []
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 0.01, cbs=Alternate(other, times))
    ours, plain = (statistics.median(column) for column in zip(*times[warmup:], strict=True))
    return {
        "batch_size": bs, "width": width, "steps": steps, "precision": learn.precision,
        "ours_seconds": ours, "plain_seconds": plain, "ratio": ours / plain,
    }  # fmt: skip


@call_parse
def main(
    bs: int = 128,  # images a step
    steps: int = 20,  # measured steps of each
    width: int = 64,  # of the ResNet
    out: str = None,  # JSON file for the figures
):
    "Compare a training step of our Learner with one of a plain PyTorch loop."
    figures = measure(bs, steps, width)
    print(
        f"{figures['ours_seconds'] * 1000:.1f} ms a step against {figures['plain_seconds'] * 1000:.1f} ms in a plain"
        f" loop: ratio {figures['ratio']:.3f} ({figures['precision']}, batch {bs}, width {width}, {steps} steps each)"
    )
    if out:
        write_json(Path(out), figures | surroundings())
